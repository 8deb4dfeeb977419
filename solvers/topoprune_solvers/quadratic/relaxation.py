"""Greedy with exchanges, and a certified lower bound from convex and semidefinite relaxations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import QuadraticSubset
from topoprune_solvers.quadratic.budgets import OpenPart
from topoprune_solvers.quadratic.common import PROVEN, Search, affordable, resolution, subset_solution
from topoprune_solvers.quadratic.convex import (
    ConvexForm,
    diagonal_forms,
    largest_eigenvalue,
    row_bound,
    tangent_bounds,
)
from topoprune_solvers.quadratic.greedy import improve, starts
from topoprune_solvers.quadratic.local_search import SHARE, iterate, patience_of
from topoprune_solvers.quadratic.semidefinite import SEMIDEFINITE_UNITS, SOURCE, semidefinite_form
from topoprune_solvers.result import NEVER, Deadline
from topoprune_solvers.solution import Bound, Solution

__all__ = ["CertifiedRelaxation", "relax"]

STEPS = 300  # gradient steps of a convex relaxation
CONVERGING_UNITS = 400  # up to here the semidefinite relaxation has iterations enough


@dataclass(frozen=True)
class CertifiedRelaxation:
    """Search with exchanges, then bound from below: row sums, convex quadratics, and a semidefinite relaxation.

    The bounds are dual values, valid whatever the accuracy of the solve, with float slack taken off.
    """

    name: str = "relaxation"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=QuadraticSubset,
        exact=False,
        guarantee="a certified lower bound >= 0 and hence the gap of the set found",
        complexity="O(n^3) an iteration up to 1000 units; O(n^3) some 20 times up to 4096; beyond O(n^2) a step",
        reference="Povh, Rendl, Wiegele (2006); Billionnet, Elloumi (2007) for the diagonal; Gilmore (1962)",
        when="above 24 units, to know how far from the best the set can be",
    )

    def solve(
        self, problem: QuadraticSubset, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best set of the searches with the best bound that fits into the time limit."""
        deadline = Deadline.after(time_limit)
        # A third of the time for the search, at most; the rest for the bound.
        first = Deadline.after(None if time_limit is None else time_limit / 3)
        searches = [improve(search, first) for search in starts(problem, warm_start, first)]
        best = min(searches, key=lambda search: search.value)
        if problem.n <= SEMIDEFINITE_UNITS:
            best, _ = iterate(best, first, patience_of(problem.n), SHARE, np.random.default_rng(seed))
        best, bounds, _, _ = relax(best, deadline)
        return subset_solution(
            problem,
            ~best.pruned,
            self.name,
            bounds=bounds,
            timed_out=deadline.passed(),
            rounding=resolution(problem, best.pruned),
            stats={bound.source: bound.value for bound in bounds},
        )


def relax(best: Search, deadline: Deadline = NEVER) -> tuple[Search, list[Bound], OpenPart, ConvexForm]:
    """Return a set at least as good as `best`, lower bounds, and the convex form with the best bound.

    The fractional solutions of the semidefinite relaxation are rounded and improved on the way.
    """
    problem = best.problem
    part = OpenPart.of(problem)
    f = part.f
    empty = ConvexForm(part.quadratic, part.linear, part.constant, None, 0.0, "convex relaxation")
    if f == 0 or part.count in (0, f):
        only = "the budget leaves no choice"
        return best, [Bound(best.value - resolution(problem, best.pruned), only)], part, empty
    bounds = [Bound(0.0, "damage is never negative"), Bound(row_bound(part, deadline), "row sums")]
    zero, one = np.zeros((1, f)), np.ones((1, f))
    at_best = best.pruned[part.units].astype(np.float64)[None]
    found = [best]

    def close(bound: float) -> bool:
        return bound >= found[0].value * (1 - PROVEN / 2) - resolution(problem, found[0].pruned) / 2

    def polish(form: ConvexForm) -> float:
        value, _, _ = tangent_bounds(
            form,
            part,
            zero,
            one,
            at_best,
            steps=STEPS,
            lipschitz=2 * largest_eigenvalue(form.quadratic, deadline),
            cutoff=found[0].value,
            deadline=deadline,
        )
        return float(value[0])

    def visit(bound: float, x: np.ndarray) -> bool:
        rounded = _rounded(part, x)
        if rounded is not None and not np.array_equal(rounded, found[0].pruned):
            search = improve(Search.at(problem, rounded), deadline)
            if search.value < found[0].value - resolution(problem, search.pruned):
                found[0] = search
        return close(bound)

    chosen, chosen_value = empty, -np.inf
    for form in diagonal_forms(part, deadline):
        value = polish(form)
        bounds.append(Bound(value, form.source))
        if value > chosen_value:
            chosen, chosen_value = form, value
        # The semidefinite relaxation contains the other diagonals, where it has time to converge.
        if close(value) or f <= CONVERGING_UNITS:
            break
    if f <= SEMIDEFINITE_UNITS and not close(chosen_value) and affordable(deadline, 30.0 * f**3):
        value, semidefinite = semidefinite_form(part, deadline, visit=visit)
        if semidefinite is not None:
            bounds.append(Bound(value, SOURCE))
            if not close(value):
                value = polish(semidefinite)
                bounds.append(Bound(value, f"{SOURCE}, polished"))
            if value > chosen_value:
                chosen = semidefinite
    return found[0], bounds, part, chosen


def _rounded(part: OpenPart, x: np.ndarray) -> np.ndarray | None:
    """Return the pruned set of the largest entries of a fractional x that meets the budget."""
    order = np.argsort(-x, kind="stable")
    count = part.count
    if count is None:
        assert part.cost is not None
        count = int(np.searchsorted(np.cumsum(part.cost[order]), part.need)) + 1 if part.need > 0 else 0
    choice = np.zeros(part.f)
    choice[order[:count]] = 1.0
    pruned = part.pruned(choice)
    return pruned if part.problem.violation(~pruned) is None else None


register(CertifiedRelaxation())

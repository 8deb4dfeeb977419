"""Budgeted domination (k-centre): search over thresholds with a dominating-set oracle.

At threshold t only edges of weight <= t count. A selection of k units has objective <= t exactly
if it dominates the graph at t, so the optimum is the smallest edge weight whose graph has a
dominating set of at most k units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.budgeted.group_cover import NativeFailure, greedy_in_groups
from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.domination.covering import Cover, closed_rows
from topoprune_solvers.domination.greedy import best_greedy_cover, greedy_cover
from topoprune_solvers.domination.lagrangian import cover_bound
from topoprune_solvers.problems import BudgetedDomination
from topoprune_solvers.result import Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution, Status

__all__ = ["GreedyKCentre", "Oracle", "ThresholdSearch"]

Oracle = Callable[[Cover, Groups, Deadline, int], "tuple[np.ndarray | None, bool]"]
"""``(cover, groups, deadline, seed) -> (keep, decided)`` for a coverable instance: an extendable cover, or None; with
``decided`` True a None is a proof that there is none."""


@dataclass(frozen=True)
class GreedyKCentre:
    """Binary search over the edge weights with the greedy dominating set as oracle.

    The bound is the smallest weight whose graph the dual bounds cannot rule out. If even
    all edges do not let k units cover everything, the objective is inf and the units that cover
    most are kept.
    """

    name: str = "greedy"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=BudgetedDomination,
        exact=False,
        guarantee="the radius greedy needs at k units, with a lower bound by duality (without the groups)",
        complexity="O((n + m) log n log m)",
        reference="Hochbaum and Shmoys (1985), A best possible heuristic for the k-center problem",
        when="neurons, or a first answer in milliseconds",
    )

    def solve(
        self, problem: BudgetedDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return k units: the greedy cover at the smallest threshold found, filled up by importance."""
        deadline = Deadline.after(time_limit)
        search = ThresholdSearch.start(problem, check_start(problem, warm_start), deadline)
        search.raise_bound()
        return search.solution(self.name)


class ThresholdSearch:
    """The state of a search: the best selection, and the thresholds proven too small.

    Thresholds are numbered by their place among the distinct edge weights. Those up to `refuted`
    admit no dominating set of k units.
    """

    def __init__(self, problem: BudgetedDomination, deadline: Deadline) -> None:
        assert problem.weight is not None and problem.forced is not None and problem.forbidden is not None
        self.problem, self.deadline = problem, deadline
        self.groups = Groups.of(problem)
        self.thresholds = np.unique(problem.weight)
        self.refuted = -1
        self.tried = 0
        self.timed_out = False
        self.failure = ""
        self.keep = self.groups.fill(problem, problem.forced)
        self.objective = problem.objective(self.keep)
        indptr, indices, positions = closed_rows(problem.indptr, problem.indices)
        weight = np.full(indices.size, -1.0)  # a unit always covers itself
        weight[positions] = problem.weight
        self._closed = indptr, indices, weight

    @classmethod
    def start(cls, problem: BudgetedDomination, start: np.ndarray | None, deadline: Deadline) -> ThresholdSearch:
        """Return a search after the greedy phase."""
        search = cls(problem, deadline)
        if problem.k == problem.n:
            return search
        if start is not None:
            assert problem.importance is not None
            search.offer(search.groups.cut(problem, start, problem.importance))
        search.greedy_phase()
        return search

    def cover_at(self, number: int) -> Cover:
        """Return the unit-cost covering instance of a threshold. O(n + m)."""
        assert self.problem.forced is not None and self.problem.forbidden is not None
        indptr, indices, weight = self._closed
        inside = weight <= self.thresholds[number] if number >= 0 else weight < 0
        starts = np.concatenate([[0], np.cumsum(inside)])[indptr]
        cost = np.ones(self.problem.n)
        return Cover(starts, indices[inside], cost, self.problem.forced, self.problem.forbidden)

    def offer(self, keep: np.ndarray) -> None:
        """Fill a selection up to k units and keep it if its radius is smaller."""
        full = self.groups.fill(self.problem, keep)
        objective = self.problem.objective(full)
        if objective < self.objective:
            self.keep, self.objective = full, objective

    def reached(self) -> int:
        """Return the number of the smallest threshold known to work; one past the last if none is."""
        return int(np.searchsorted(self.thresholds, self.objective))

    def refute(self, number: int) -> None:
        """Record a proof that a threshold, hence every smaller one, needs more than k units."""
        self.refuted = max(self.refuted, number)

    def greedy_phase(self) -> None:
        """Bisect with the greedy oracle, then cover as much as possible if no threshold works."""
        low, high = -1, self.reached()
        while high - low > 1 and not self.out_of_time():
            # With nothing found yet, ask first whether all edges together suffice.
            middle = high - 1 if high == len(self.thresholds) else (low + high) // 2
            cover = self.cover_at(middle)
            self.tried += 1
            if cover.coverable() and (keep := self.greedy_at(cover)) is not None:
                self.offer(keep)
                high = min(middle, self.reached())
            elif high == len(self.thresholds):
                break
            else:
                low = middle
        if math.isinf(self.objective) and len(self.thresholds):
            widest = self.cover_at(len(self.thresholds) - 1)
            if self.groups.single:
                most = greedy_cover(widest, limit=self.problem.k)
            else:
                most = greedy_in_groups(widest, self.groups, self.deadline)
            self.keep = self.groups.fill(self.problem, most)
            self.objective = self.problem.objective(self.keep)

    def greedy_at(self, cover: Cover) -> np.ndarray | None:
        """Return a cover that greedy finds within k and the groups' bounds, or None."""
        keep = best_greedy_cover(cover)
        if self.groups.extendable(keep):
            return keep
        if self.groups.single:
            return None
        keep = greedy_in_groups(cover, self.groups, self.deadline)
        return keep if np.all(cover.counts(keep) > 0) else None

    def raise_bound(self) -> None:
        """Bisect for the largest threshold that the dual bounds refute."""
        low, high = self.refuted, self.reached()
        while high - low > 1 and not self.out_of_time():
            middle = (low + high) // 2
            if self.too_small(self.cover_at(middle)):
                self.refute(middle)
                low = middle
            else:
                high = middle

    def too_small(self, cover: Cover) -> bool:
        """Return True if the instance is cheaply seen to need more than k units."""
        k = self.problem.k
        # k + 1 as the value to reach: more than a proof of "more than k" is not asked for.
        return not cover.coverable() or cover_bound(cover, upper=k + 1.0, target=k).value > k

    def exact_phase(self, oracle: Oracle, seed: int) -> None:
        """Bisect between the refuted and the reached thresholds until they meet or time is up."""
        while (high := self.reached()) - self.refuted > 1 and not self.out_of_time():
            middle = high - 1 if high == len(self.thresholds) else (self.refuted + high) // 2
            cover = self.cover_at(middle)
            self.tried += 1
            if self.too_small(cover):
                self.refute(middle)
                continue
            try:
                keep, decided = oracle(cover, self.groups, self.deadline, seed)
            except NativeFailure as error:
                self.failure = str(error)
                return
            if keep is not None:
                self.offer(keep)
                assert self.reached() <= middle, "a superset of a cover has no larger radius"
            elif decided:
                self.refute(middle)
            else:
                self.out_of_time()
                return

    def out_of_time(self) -> bool:
        """Return True, and remember it, once the deadline has passed."""
        self.timed_out = self.timed_out or self.deadline.passed()
        return self.timed_out

    def solution(self, solver: str, source: str = "dual bound at the next smaller threshold") -> Solution:
        """Return the finished solution: every radius below the first threshold not refuted is impossible."""
        problem = self.problem
        if problem.k == problem.n:
            bound = Bound(0.0, "nothing is pruned")
        elif self.refuted + 1 < len(self.thresholds):
            smallest = float(self.thresholds[self.refuted + 1])
            bound = Bound(smallest, source if self.refuted >= 0 else "smallest distance")
        else:
            bound = Bound(math.inf, source if self.refuted >= 0 else "the graph has no edges")
        stats: dict[str, Any] = {"thresholds_tried": self.tried}
        if self.failure:
            stats["failure"] = self.failure
        solution = unit_solution(problem, self.keep, solver, bound=bound, timed_out=self.timed_out, stats=stats)
        if self.failure and solution.status is not Status.OPTIMAL:
            return replace(solution, status=Status.FAILED)
        return solution


register(GreedyKCentre())

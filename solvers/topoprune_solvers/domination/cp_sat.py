"""Minimum dominating set with OR-Tools CP-SAT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import Cover, cover_of
from topoprune_solvers.domination.greedy import best_greedy_cover, prune_redundant
from topoprune_solvers.domination.lagrangian import EFFORT, cover_bound
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import NEVER, Deadline, check_start, unit_solution
from topoprune_solvers.scaling import integer_costs
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["CoverRows", "CpSatDominatingSet", "CpSatOutcome", "cover_rows", "cp_sat_cover"]


@dataclass(frozen=True)
class CpSatDominatingSet:
    """Model the cover as clauses, hint the greedy solution, and let CP-SAT close the gap.

    Args:
        num_workers: CP-SAT threads. One by default: with a fixed seed a single worker repeats its
            search exactly, several race each other and return a different optimum from run to run.
            (A time limit that strikes still makes the incumbent depend on the machine's speed.)
    """

    num_workers: int = 1
    name: str = "cp-sat"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=True,
        guarantee="optimal given time (float costs: to 1e-9), else the incumbent with CP-SAT's dual bound",
        complexity="exponential in the worst case",
        requires=("ortools",),
        reference="Perron, Didier, Gay (2023), The CP-SAT-LP solver, CP 2023",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return CP-SAT's best cover, never worse than greedy or the repaired warm start."""
        deadline = Deadline.after(time_limit)
        cover = cover_of(problem)
        keep = best_greedy_cover(cover, check_start(problem, warm_start))
        bound = cover_bound(cover, problem.objective(keep), effort=10 * EFFORT)
        if bound.value >= problem.objective(keep):
            return unit_solution(problem, keep, self.name, bound=bound)
        part = cover_rows(cover, ceiling=problem.objective(keep))
        outcome = cp_sat_cover(
            part.rows,
            cover.cost[part.units],
            hint=keep[part.units],
            deadline=deadline,
            seed=seed,
            workers=self.num_workers,
        )
        if outcome.chosen is not None:
            found = cover.forced.copy()
            found[part.units[outcome.chosen]] = True
            # CP-SAT may keep free units that cover nothing new.
            found = prune_redundant(cover, found)
            keep = found if problem.objective(found) <= problem.objective(keep) else keep
        proven = Bound(outcome.bound + part.fixed, "CP-SAT")
        return unit_solution(
            problem,
            keep,
            self.name,
            bound=best_bound("min", [bound, proven]),
            timed_out=not outcome.proven,
            stats={"branches": outcome.branches, "conflicts": outcome.conflicts},
        )


@dataclass(frozen=True, eq=False)
class CoverRows:
    """What is left to decide once forced units stand: candidates and, per element, who covers it.

    Args:
        units: (c,) original numbers of the candidates.
        rows: one list per uncovered element of local candidate numbers.
        fixed: cost of the forced units.
    """

    units: np.ndarray
    rows: list[list[int]]
    fixed: float


def cover_rows(cover: Cover, ceiling: float = math.inf) -> CoverRows:
    """Return the open part of an instance without the candidates that alone exceed `ceiling`.

    Args:
        ceiling: objective of a known cover. No cover that is as cheap uses a dearer unit, and
            dropping those keeps huge costs out of solvers with limited precision.
    """
    fixed = float(cover.cost[cover.forced].sum())
    open_unit = ~cover.forced & ~cover.forbidden & (cover.cost <= ceiling)
    units = np.flatnonzero(open_unit)
    local = np.full(cover.n, -1, dtype=np.int64)
    local[units] = np.arange(units.size)
    rows = []
    for element in np.flatnonzero(cover.counts(cover.forced) == 0).tolist():
        numbers = local[cover.row(element)]
        rows.append(numbers[numbers >= 0].tolist())
    return CoverRows(units, rows, fixed)


@dataclass(frozen=True, eq=False)
class CpSatOutcome:
    """Result of one CP-SAT call: `chosen` (c,) bool or None, a lower bound, and whether the search finished."""

    chosen: np.ndarray | None
    bound: float
    proven: bool
    branches: int = 0
    conflicts: int = 0


def cp_sat_cover(
    rows: Sequence[Sequence[int]],
    cost: np.ndarray,
    *,
    hint: np.ndarray | None = None,
    at_most: int | None = None,
    deadline: Deadline = NEVER,
    seed: int = 0,
    workers: int = 1,
) -> CpSatOutcome:
    """Solve a set-cover instance, or decide whether `at_most` candidates can cover it.

    Args:
        rows: candidates per element. cost: (c,) float64 >= 0. hint: (c,) bool.
        at_most: if given, costs are ignored and the question is a yes/no one: `chosen` is an
            answer, or None with `proven` True for a proven no.

    Returns:
        The outcome; `bound` is a valid lower bound in float costs (0 if nothing is known).
    """
    if deadline.passed():
        return CpSatOutcome(None, 0.0, False)
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in range(cost.size)]
    for row in rows:
        model.add_bool_or([variables[unit] for unit in row])
    scaled = integer_costs(cost)
    if at_most is not None:
        model.add(sum(variables) <= at_most)
    else:
        model.minimize(cp_model.LinearExpr.weighted_sum(variables, scaled.values.tolist()))
    if hint is not None:
        for variable, value in zip(variables, hint.tolist(), strict=True):
            model.add_hint(variable, value)
    solver = cp_model.CpSolver()
    # Level 2 puts the clauses into the LP; without it the lower bound is several times too low.
    solver.parameters.linearization_level = 2
    solver.parameters.num_workers = workers
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    if math.isfinite(deadline.at):
        solver.parameters.max_time_in_seconds = deadline.remaining()
    status = solver.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    chosen = np.array([solver.boolean_value(variable) for variable in variables], dtype=bool) if found else None
    counters = {"branches": int(solver.num_branches), "conflicts": int(solver.num_conflicts)}
    if at_most is not None:
        return CpSatOutcome(chosen, 0.0, status != cp_model.UNKNOWN, **counters)
    bound = max(0.0, solver.best_objective_bound * scaled.unit) if found or status == cp_model.UNKNOWN else 0.0
    return CpSatOutcome(chosen, bound, status == cp_model.OPTIMAL, **counters)


register(CpSatDominatingSet())

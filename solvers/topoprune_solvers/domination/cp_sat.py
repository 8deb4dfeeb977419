"""Minimum dominating set with OR-Tools CP-SAT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import Cover, SetCover
from topoprune_solvers.domination.tally import solve_natively
from topoprune_solvers.native import Channel, NativeTask
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import NEVER, Deadline
from topoprune_solvers.scaling import integer_costs
from topoprune_solvers.solution import Solution

__all__ = [
    "CoverRows",
    "CpSatDominatingSet",
    "CpSatOutcome",
    "cover_rows",
    "cp_sat_cover",
    "cp_sat_task",
    "run_cp_sat",
]


@dataclass(frozen=True)
class CpSatDominatingSet:
    """Model the cover as clauses, hint the greedy solution, and let CP-SAT close the gap.

    No reductions come first: this is the plain model, to compare with. Instances above 10,000 nonzeros are
    solved in a process of their own, which is killed if it overshoots the time limit (model building counts).

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
        when="a second opinion on `exact`: CP-SAT on the plain model",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return CP-SAT's best cover, never worse than greedy or the repaired warm start."""

        def task(instance: SetCover, hint: np.ndarray) -> NativeTask:
            return cp_sat_task(instance, hint, seed=seed, workers=self.num_workers)

        return solve_natively(problem, self.name, task, warm_start=warm_start, time_limit=time_limit)


def cp_sat_task(
    instance: SetCover,
    hint: np.ndarray | None = None,
    *,
    seed: int = 0,
    workers: int = 1,
    settings: Mapping[str, Any] | None = None,
    name: str = "CP-SAT",
) -> NativeTask:
    """Return the cover task (see `tally`) that runs CP-SAT on an instance.

    Args:
        instance: the instance. hint: (c,) bool. seed: for CP-SAT. workers: its threads.
        settings: further CP-SAT parameters. name: source of the bounds.
    """
    arguments = (instance, hint, seed, workers, dict(settings or {}))
    return NativeTask(f"{__name__}:run_cp_sat", arguments, name)


def run_cp_sat(
    channel: Channel,
    instance: SetCover,
    hint: np.ndarray | None,
    seed: int,
    workers: int,
    settings: Mapping[str, Any],
) -> dict[str, int]:
    """Solve an instance and stream covers and bounds; the function behind `cp_sat_task`."""
    cuts = instance.row_start.tolist()
    flat = instance.row.tolist()
    rows = [flat[start:end] for start, end in pairwise(cuts)]
    outcome = cp_sat_cover(
        rows,
        instance.cost,
        demand=instance.demand,
        hint=hint,
        deadline=Deadline.after(channel.remaining() if math.isfinite(channel.remaining()) else None),
        seed=seed,
        workers=workers,
        settings=settings,
        channel=channel,
    )
    if outcome.chosen is not None:
        channel.send(("cover", outcome.chosen))
    channel.send(("bound", outcome.bound))
    return {"branches": outcome.branches, "conflicts": outcome.conflicts}


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
    """Return the open part of an instance of demand 1 without the candidates that alone exceed `ceiling`.

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
    demand: np.ndarray | None = None,
    hint: np.ndarray | None = None,
    at_most: int | None = None,
    deadline: Deadline = NEVER,
    seed: int = 0,
    workers: int = 1,
    settings: Mapping[str, Any] | None = None,
    channel: Channel | None = None,
) -> CpSatOutcome:
    """Solve a set-cover instance, or decide whether `at_most` candidates can cover it.

    Args:
        rows: candidates per element. cost: (c,) float64 >= 0. demand: (e,) int >= 1, by default 1 each.
        hint: (c,) bool.
        at_most: if given, costs are ignored and the question is a yes/no one: `chosen` is an
            answer, or None with `proven` True for a proven no.
        settings: further CP-SAT parameters.
        channel: told of better covers and bounds while the search runs.

    Returns:
        The outcome; `bound` is a valid lower bound in float costs (0 if nothing is known).
    """
    nothing = CpSatOutcome(None, 0.0, False)
    if deadline.passed():
        return nothing
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in range(cost.size)]
    wanted = [1] * len(rows) if demand is None else demand.tolist()
    for number, (row, times) in enumerate(zip(rows, wanted, strict=True)):
        if number % 4096 == 0 and deadline.passed():
            return nothing
        chosen_by = [variables[unit] for unit in row]
        if times == 1:
            model.add_bool_or(chosen_by)
        else:
            model.add(cp_model.LinearExpr.sum(chosen_by) >= times)
    scaled = integer_costs(cost)
    if at_most is not None:
        model.add(cp_model.LinearExpr.sum(variables) <= at_most)
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
    for name, value in (settings or {}).items():
        setattr(solver.parameters, name, value)
    if math.isfinite(deadline.at):
        solver.parameters.max_time_in_seconds = deadline.remaining()
    callback = None
    if channel is not None:
        callback = _reporter(cp_model, variables, channel)
        solver.best_bound_callback = lambda bound: channel.send(("bound", max(0.0, bound * scaled.unit)))
    status = solver.solve(model, callback)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    chosen = np.array([solver.boolean_value(variable) for variable in variables], dtype=bool) if found else None
    counters = {"branches": int(solver.num_branches), "conflicts": int(solver.num_conflicts)}
    if at_most is not None:
        return CpSatOutcome(chosen, 0.0, status != cp_model.UNKNOWN, **counters)
    bound = max(0.0, solver.best_objective_bound * scaled.unit) if found or status == cp_model.UNKNOWN else 0.0
    return CpSatOutcome(chosen, bound, status == cp_model.OPTIMAL, **counters)


def _reporter(cp_model: Any, variables: Sequence[Any], channel: Channel) -> Any:
    class Reporter(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]
        def on_solution_callback(self) -> None:
            channel.send(("cover", np.array([self.boolean_value(variable) for variable in variables], dtype=bool)))

    return Reporter()


register(CpSatDominatingSet())

"""Exact soft domination: relaxation, fixing by reduced gains, then enumeration or the facility-location program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.budgeted.facility_fixing import fix_units
from topoprune_solvers.budgeted.facility_lagrangian import relax
from topoprune_solvers.budgeted.facility_location import Prepared, greedy_with_bound
from topoprune_solvers.budgeted.facility_program import solve_program
from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.budgeted.service import Service
from topoprune_solvers.problems import SoftDomination
from topoprune_solvers.result import Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution, Status, best_bound

__all__ = ["ExactFacilityLocation", "MilpFacilityLocation"]

MILP_UNITS = 200
MILP_PAIRS = 60_000  # assignment variables HiGHS gets at most; beyond, a single LP takes minutes
ENUMERATE = 20_000  # selections; all of 12 or 14 heads, any budget
ENUMERATE_WORK = 2_000_000  # selections * n * k; less takes no longer than the relaxation
_CHUNK = 2_000
_SCALE = 1024.0  # the incumbent's value in the scaled model: makes HiGHS' absolute gap of 1e-6 a relative 1e-9
_HIGHS_TOLERANCE = 5e-7  # relative to the incumbent: HiGHS' feasibility and gap tolerances, added to its bound
_REFERENCE = "Cornuejols, Fisher, Nemhauser (1977), Location of bank accounts to optimize float"


@dataclass(frozen=True)
class MilpFacilityLocation:
    """Solve ``max sum importance_i s_ij y_ij`` with y_ij <= x_j, sum_j y_ij <= 1, sum x = k by HiGHS.

    Its LP relaxation is usually close to integral. Results are optimal to a relative 1e-6 (float solver).
    """

    name: str = "milp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=SoftDomination,
        exact=True,
        guarantee="optimal to 1e-6 given time, else the incumbent with HiGHS' dual bound",
        complexity="exponential in the worst case; n + m variables in the LP",
        max_units=MILP_UNITS,
        reference=_REFERENCE,
        when="a second opinion on `exact`, up to 200 units",
    )

    def solve(
        self, problem: SoftDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return HiGHS' best selection, never worse than greedy with swaps."""
        deadline = Deadline.after(time_limit)
        keep, bound = greedy_with_bound(problem, check_start(problem, warm_start), deadline)
        stats: dict[str, Any] = {}
        if bound.value > problem.objective(keep) > 0 and not deadline.passed():
            keep, proven = _milp(problem, keep, deadline, stats)
            bound = best_bound("max", [bound, proven]) or bound
        return _finish(self.name, problem, keep, bound, deadline, stats, 1e-6)


@dataclass(frozen=True)
class ExactFacilityLocation:
    """Close the gap: try all selections where they are few, else relax, fix what the gap decides, and finish.

    The Lagrangian bound decides most units: one whose exchange would cost more than the gap is fixed. What
    is left is enumerated up to 20,000 selections (12 heads at any budget have fewer from the start), or given to
    HiGHS up to 60,000 pairs of units. Beyond that the relaxation's bound and gap stand.
    """

    name: str = "exact"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=SoftDomination,
        exact=True,
        guarantee=(
            "optimal given time up to 200 units (where HiGHS finishes: to 1e-6); above, optimal or the gap to the "
            "Lagrangian bound"
        ),
        complexity="O(C(n, k) n k) up to 20,000 selections, else exponential in the worst case",
        reference=_REFERENCE,
        when="heads: the default; give a time limit for neurons",
    )

    def solve(
        self, problem: SoftDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal selection, or the best one in time with what is proven."""
        deadline = Deadline.after(time_limit)
        case = Prepared.of(problem)
        keep, bound = greedy_with_bound(case, check_start(problem, warm_start), deadline)
        stats: dict[str, Any] = {}

        def finish(tolerance: float = 1e-9) -> Solution:
            return _finish(self.name, problem, keep, bound, deadline, stats, tolerance)

        def open_gap() -> bool:
            return bound.value > problem.objective(keep) * (1 + 1e-9) and not deadline.passed()

        at_once = min(ENUMERATE, ENUMERATE_WORK // max(1, problem.n * problem.k))
        if open_gap() and (few := _selections(case, at_once)) is not None:
            keep, bound = _enumerate(case, few, keep, bound, deadline)
            return finish()
        if not open_gap():
            return finish()
        relaxed = relax(case, keep, deadline)
        keep, bound = relaxed.keep, best_bound("max", [bound, relaxed.bound]) or bound
        stats["iterations"] = relaxed.iterations
        if not open_gap():
            return finish()
        smaller = Prepared(*_fixed(case, relaxed.price, keep, stats))
        if (few := _selections(smaller, ENUMERATE)) is not None:
            keep, bound = _enumerate(smaller, few, keep, bound, deadline)
            return finish()
        keep, proven = _milp(smaller.problem, keep, deadline, stats)
        if proven is not None:
            # Fixing only lost selections that are no better than the incumbent.
            proven = replace(proven, value=max(proven.value, problem.objective(keep)))
        bound = best_bound("max", [bound, proven]) or bound
        return finish(tolerance=1e-6)


def _finish(
    name: str,
    problem: SoftDomination,
    keep: np.ndarray,
    bound: Bound,
    deadline: Deadline,
    stats: dict[str, Any],
    tolerance: float,
) -> Solution:
    late = deadline.passed()
    solution = unit_solution(problem, keep, name, bound=bound, timed_out=late, tolerance=tolerance, stats=stats)
    if "failure" in stats and solution.status is not Status.OPTIMAL:
        return replace(solution, status=Status.FAILED)
    return solution


def _fixed(case: Prepared, price: np.ndarray, keep: np.ndarray, stats: dict[str, Any]) -> tuple[Any, Any, Any]:
    forced, forbidden = fix_units(case, price, case.problem.objective(keep))
    # The incumbent itself may be cut off with what is no better; the smaller problem must keep a selection.
    forced, forbidden = forced & keep, forbidden & ~keep
    stats["fixed"] = int((forced | forbidden).sum())
    problem = replace(case.problem, forced=forced, forbidden=forbidden)
    made = Prepared.of(problem)
    return made.problem, case.service, made.groups


def _selections(case: Prepared, limit: int) -> Iterator[tuple[int, ...]] | None:
    assert case.problem.forced is not None and case.problem.forbidden is not None
    free = np.flatnonzero(~case.problem.forced & ~case.problem.forbidden)
    return case.groups.selections(case.problem.forced, free, limit)


def _enumerate(
    case: Prepared, selections: Iterator[tuple[int, ...]], keep: np.ndarray, bound: Bound, deadline: Deadline
) -> tuple[np.ndarray, Bound]:
    """Return the best selection, evaluated in chunks, and the bound that follows. O(selections n k)."""
    problem = case.problem
    assert problem.forced is not None
    base = case.service.reached(problem.forced)
    matrix = case.service.dense()
    best: tuple[int, ...] | None = None
    best_value = problem.objective(keep)
    while chunk := list(islice(selections, _CHUNK)):
        if deadline.passed():
            break
        columns = np.array(chunk, dtype=np.int64).reshape(len(chunk), -1)
        reach = np.maximum(matrix[:, columns].max(axis=2, initial=0.0), base[:, None])
        values = reach.sum(axis=0)
        first = int(values.argmax())
        if values[first] > best_value * (1 + 1e-12):
            best, best_value = chunk[first], float(values[first])
    if best is not None:
        keep = problem.forced.copy()
        keep[list(best)] = True
    if not chunk:
        bound = Bound(problem.objective(keep), "enumeration of all selections")
    return keep, bound


def _milp(
    problem: SoftDomination, keep: np.ndarray, deadline: Deadline, stats: dict[str, Any]
) -> tuple[np.ndarray, Bound | None]:
    """Let HiGHS improve a selection; return the better one and HiGHS' bound, or None where it has none."""
    assert problem.forced is not None and problem.forbidden is not None
    service = Service.of(problem)
    objective = problem.objective(keep)
    # What the forced units explain is given; only what others add to it is to be decided.
    base = service.reached(problem.forced)
    extra = service.gets - base[service.rows]
    useful = (extra > 0) & ~problem.forbidden[service.indices]
    row, col, profit = service.rows[useful], service.indices[useful], extra[useful]
    if not row.size or row.size > MILP_PAIRS or deadline.passed():
        return keep, None
    scale = objective / _SCALE
    columns = row, col, profit / scale, problem.forced, problem.forbidden, Groups.of(problem)
    answer = solve_program(*columns, deadline)
    if isinstance(answer, str):
        stats["failure"] = answer
        return keep, None
    found, dual, stats["nodes"] = answer
    if found is not None and problem.violation(found) is None and problem.objective(found) > objective:
        keep = found
    if dual is None:
        return keep, None
    return keep, Bound(float(base.sum()) + dual * scale + _HIGHS_TOLERANCE * objective, "HiGHS dual bound")


register(MilpFacilityLocation())
register(ExactFacilityLocation())

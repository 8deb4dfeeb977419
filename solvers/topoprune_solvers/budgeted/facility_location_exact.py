"""Exact soft domination: enumeration where few selections exist, the facility-location program elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.budgeted.facility_location import Similarity, greedy_with_bound
from topoprune_solvers.domination.milp import HIGHS_TOLERANCE
from topoprune_solvers.problems import SoftDomination
from topoprune_solvers.result import Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["ExactFacilityLocation", "MilpFacilityLocation"]

MILP_UNITS = 200
ENUMERATE = 20_000  # selections; all of 12 or 14 heads, any budget
_CHUNK = 2_000
_SCALE = 1024.0  # the incumbent's value in the scaled model: makes HiGHS' absolute gap of 1e-6 a relative 1e-9


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
        reference="Cornuejols, Fisher, Nemhauser (1977), Location of bank accounts to optimize float",
    )

    def solve(
        self, problem: SoftDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return HiGHS' best selection, never worse than greedy with swaps."""
        return _solve_milp(self.name, problem, warm_start, Deadline.after(time_limit))


@dataclass(frozen=True)
class ExactFacilityLocation:
    """Try all selections where there are at most 20,000 (12 heads at any budget), else use the `milp` solver."""

    name: str = "exact"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=SoftDomination,
        exact=True,
        guarantee="optimal (above 20,000 selections: to 1e-6, given time)",
        complexity="O(C(n, k) n k) up to 20,000 selections, else exponential in the worst case",
        max_units=MILP_UNITS,
        reference="Cornuejols, Fisher, Nemhauser (1977), Location of bank accounts to optimize float",
    )

    def solve(
        self, problem: SoftDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal selection, or the best one in time with what is proven."""
        assert problem.forced is not None and problem.forbidden is not None
        deadline = Deadline.after(time_limit)
        free = np.flatnonzero(~problem.forced & ~problem.forbidden)
        count = math.comb(free.size, problem.k - int(problem.forced.sum()))
        if count > ENUMERATE:
            return _solve_milp(self.name, problem, warm_start, deadline)
        keep, bound = greedy_with_bound(problem, check_start(problem, warm_start), deadline)
        if bound.value > problem.objective(keep) and not deadline.passed():
            keep = _enumerate(problem, free)
            bound = Bound(problem.objective(keep), "enumeration of all selections")
        return unit_solution(
            problem, keep, self.name, bound=bound, timed_out=deadline.passed(), stats={"selections": count}
        )


def _enumerate(problem: SoftDomination, free: np.ndarray) -> np.ndarray:
    """Return the first best selection in lexicographic order, evaluated in chunks. O(C(n, k) n k)."""
    assert problem.importance is not None and problem.forced is not None
    matrix = Similarity.of(problem).dense()
    base = matrix[:, problem.forced].max(axis=1, initial=0.0)
    best: tuple[int, ...] = ()
    best_value = -np.inf
    selections = combinations(free.tolist(), problem.k - int(problem.forced.sum()))
    while chunk := list(islice(selections, _CHUNK)):
        columns = np.array(chunk, dtype=np.int64).reshape(len(chunk), -1)
        reach = np.maximum(matrix[:, columns].max(axis=2, initial=0.0), base[:, None])
        values = problem.importance @ reach
        first = int(values.argmax())
        if values[first] > best_value:
            best, best_value = chunk[first], float(values[first])
    keep = problem.forced.copy()
    keep[list(best)] = True
    return keep


def _solve_milp(name: str, problem: SoftDomination, warm_start: Any, deadline: Deadline) -> Solution:
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    assert problem.importance is not None and problem.forced is not None and problem.forbidden is not None
    keep, bound = greedy_with_bound(problem, check_start(problem, warm_start), deadline)
    objective = problem.objective(keep)
    if bound.value <= objective or objective <= 0 or deadline.passed():
        return unit_solution(problem, keep, name, bound=bound, timed_out=deadline.passed())
    similarity = Similarity.of(problem)
    n = problem.n
    row = np.repeat(np.arange(n), np.diff(similarity.indptr))
    profit = problem.importance[row] * similarity.value
    useful = (profit > 0) & ~problem.forbidden[similarity.indices]
    row, col, profit = row[useful], similarity.indices[useful], profit[useful]
    scale = objective / _SCALE
    pairs = row.size
    number = np.arange(pairs)
    assign = sparse.csr_array((np.ones(pairs), (row, n + number)), shape=(n, n + pairs))
    opened = sparse.csr_array(
        (np.concatenate([np.ones(pairs), -np.ones(pairs)]), (np.tile(number, 2), np.concatenate([n + number, col]))),
        shape=(pairs, n + pairs),
    )
    count = sparse.csr_array((np.ones(n), (np.zeros(n, dtype=np.int64), np.arange(n))), shape=(1, n + pairs))
    result = milp(
        -np.concatenate([np.zeros(n), profit / scale]),
        # Only the units are integral: with them fixed the best assignment is integral by itself.
        integrality=np.concatenate([np.ones(n), np.zeros(pairs)]),
        bounds=Bounds(
            np.concatenate([problem.forced, np.zeros(pairs)]), np.concatenate([~problem.forbidden, np.ones(pairs)])
        ),
        constraints=[
            LinearConstraint(assign, ub=1.0),
            LinearConstraint(opened, ub=0.0),
            LinearConstraint(count, lb=problem.k, ub=problem.k),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": deadline.remaining()},
    )
    if result.x is not None:
        found = result.x[:n] > 0.5
        if int(found.sum()) == problem.k and problem.objective(found) > objective:
            keep = found
    proven = None
    if result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
        proven = Bound(-float(result.mip_dual_bound) * scale + HIGHS_TOLERANCE * objective, "HiGHS dual bound")
    return unit_solution(
        problem,
        keep,
        name,
        bound=best_bound("max", [bound, proven]),
        timed_out=result.status == 1,
        tolerance=1e-6,
        stats={"nodes": int(result.mip_node_count or 0)},
    )


register(MilpFacilityLocation())
register(ExactFacilityLocation())

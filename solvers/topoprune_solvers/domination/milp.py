"""Minimum dominating set as a mixed-integer program, solved by HiGHS through scipy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import cover_of
from topoprune_solvers.domination.cp_sat import cover_rows
from topoprune_solvers.domination.greedy import best_greedy_cover, prune_redundant
from topoprune_solvers.domination.lagrangian import EFFORT, cover_bound
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import Deadline, check_start, unit_solution
from topoprune_solvers.scaling import is_integral
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["HIGHS_TOLERANCE", "MilpDominatingSet"]

HIGHS_TOLERANCE = 5e-7  # relative to the incumbent: HiGHS' feasibility and gap tolerances, taken off its bound
_SCALE = 1024.0  # the incumbent's value in the scaled model: makes HiGHS' absolute gap of 1e-6 a relative 1e-9


@dataclass(frozen=True)
class MilpDominatingSet:
    """Hand the covering program to HiGHS; its LP gives the best cheap bound on sparse graphs.

    HiGHS computes in floats. With integral costs its bound is rounded up and the result is exact;
    with others "optimal" means to a relative 1e-6. scipy passes no warm start on, so the greedy
    cover (or the repaired warm start) only bounds the costs and stands in if HiGHS finds nothing better.
    """

    name: str = "milp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=True,
        guarantee="optimal given time (float costs: to 1e-6), else the incumbent with HiGHS' dual bound",
        complexity="exponential in the worst case",
        reference="Huangfu and Hall (2018), Parallelizing the dual revised simplex method, Math. Prog. Comp. 10",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return HiGHS' best cover, never worse than greedy or the repaired warm start."""
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp

        deadline = Deadline.after(time_limit)
        cover = cover_of(problem)
        keep = best_greedy_cover(cover, check_start(problem, warm_start))
        objective = problem.objective(keep)
        bound = cover_bound(cover, objective, effort=10 * EFFORT)
        if bound.value >= objective or deadline.passed():
            return unit_solution(problem, keep, self.name, bound=bound, timed_out=deadline.passed())
        part = cover_rows(cover, ceiling=objective)
        indptr = np.cumsum([0, *map(len, part.rows)])
        indices = np.concatenate([np.asarray(row, dtype=np.int64) for row in part.rows])
        matrix = sparse.csr_array((np.ones(indices.size), indices, indptr), shape=(len(part.rows), part.units.size))
        scale = objective / _SCALE
        result = milp(
            cover.cost[part.units] / scale,
            integrality=np.ones(part.units.size, dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, lb=1.0),
            options={"mip_rel_gap": 0.0, "time_limit": deadline.remaining()},
        )
        if result.x is not None:
            found = cover.forced.copy()
            found[part.units[result.x > 0.5]] = True
            if problem.covered(found).all():
                found = prune_redundant(cover, found)
                keep = found if problem.objective(found) <= objective else keep
        proven = None
        if result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
            value = part.fixed + float(result.mip_dual_bound) * scale - HIGHS_TOLERANCE * objective
            if is_integral(cover.cost):
                # An integral optimum cannot lie strictly between the (lowered) bound and the next integer.
                value = float(math.ceil(value))
            proven = Bound(value, "HiGHS dual bound")
        return unit_solution(
            problem,
            keep,
            self.name,
            bound=best_bound("min", [bound, proven]),
            timed_out=result.status == 1,
            tolerance=1e-6,
            stats={"nodes": int(result.mip_node_count or 0)},
        )


register(MilpDominatingSet())

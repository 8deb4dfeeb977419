"""Minimum dominating set as a mixed-integer program, solved by HiGHS (scipy)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import SetCover
from topoprune_solvers.domination.tally import solve_natively
from topoprune_solvers.native import Channel, NativeTask
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.scaling import is_integral
from topoprune_solvers.solution import Solution

__all__ = ["HIGHS_TOLERANCE", "MilpDominatingSet", "milp_task", "run_milp"]

HIGHS_TOLERANCE = 5e-7  # relative to the incumbent: HiGHS' feasibility and gap tolerances, taken off its bound
SOURCE = "HiGHS dual bound"
_SCALE = 1024.0  # the incumbent's value in the scaled model: makes HiGHS' absolute gap of 1e-6 a relative 1e-9
_MARGIN = 0.05  # of the time limit: left for HiGHS to notice it, before its process is killed with all it knows


@dataclass(frozen=True)
class MilpDominatingSet:
    """Hand the covering program to HiGHS; its LP gives the best cheap bound on sparse graphs.

    HiGHS computes in floats. With integral costs its bound is rounded up and the result is exact;
    with others "optimal" means to a relative 1e-6. scipy passes no warm start on, so the greedy
    cover (or the repaired warm start) only bounds the costs and stands in if HiGHS finds nothing better.
    Its presolve can overshoot a time limit: instances above 10,000 nonzeros run in a process that is killed then.
    """

    name: str = "milp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=True,
        guarantee="optimal given time (float costs: to 1e-6), else the incumbent with HiGHS' dual bound",
        complexity="exponential in the worst case",
        reference="Huangfu and Hall (2018), Parallelizing the dual revised simplex method, Math. Prog. Comp. 10",
        when="a second opinion on `exact`, without OR-Tools",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return HiGHS' best cover, never worse than greedy or the repaired warm start; `seed` has no use."""

        def task(instance: SetCover, start: np.ndarray) -> NativeTask:
            return milp_task(instance, instance.value(start))

        return solve_natively(problem, self.name, task, warm_start=warm_start, time_limit=time_limit, tolerance=1e-6)


def milp_task(instance: SetCover, objective: float, *, name: str = SOURCE) -> NativeTask:
    """Return the cover task (see `tally`) that runs HiGHS' branch and cut.

    Args:
        instance: the instance. objective: > 0, cost of a known cover; scales the model.
        name: source of the bound.
    """
    return NativeTask(f"{__name__}:run_milp", (instance, objective), name)


def run_milp(channel: Channel, instance: SetCover, objective: float) -> dict[str, int]:
    """Solve an instance and send its cover and bound at the end; the function behind `milp_task`."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    rows = sparse.csr_array(
        (np.ones(instance.row.size), instance.row, instance.row_start),
        shape=(instance.n_elements, instance.n_candidates),
    )
    scale = objective / _SCALE
    options: Any = {"mip_rel_gap": 0.0}
    if math.isfinite(seconds := channel.remaining()):
        options["time_limit"] = seconds * (1 - _MARGIN)
    result = milp(
        instance.cost / scale,
        integrality=np.ones(instance.n_candidates, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(rows, lb=instance.demand.astype(np.float64)),
        options=options,
    )
    if result.x is not None:
        channel.send(("cover", result.x > 0.5))
    if result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
        value = float(result.mip_dual_bound) * scale - HIGHS_TOLERANCE * objective
        # An integral optimum cannot lie strictly between the (lowered) bound and the next integer.
        channel.send(("bound", float(math.ceil(value)) if is_integral(instance.cost) else value))
    return {"nodes": int(result.mip_node_count or 0)}


register(MilpDominatingSet())

"""Edge selection with degree bounds on both sides as a minimum-cost flow (OR-Tools)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.common import edge_solution, only_selection
from topoprune_solvers.edges.dual_flow import DualFlowEdges
from topoprune_solvers.edges.optimal_flow import optimal_flow, run_optimal_flow
from topoprune_solvers.native import run_killable
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.result import Deadline
from topoprune_solvers.solution import Bound, Solution, Status

__all__ = ["MinCostFlowEdges"]

IN_PROCESS = 50_000  # edges, some tenths of a second; larger problems get a process that can be killed
SOURCE = "minimum-cost flow (OR-Tools)"


@dataclass(frozen=True)
class MinCostFlowEdges:
    """Send k units from rows to columns over unit arcs; attachment 0, any degree bounds.

    Scores become integers, rounded up, so that the integer optimum bounds the true one. They
    carry up to 40 bits: bound and objective may differ by about 1e-12 of the largest score per
    edge kept, and an optimum smaller than that is not told from its neighbours. Ties break as the
    flow algorithm meets them (the same way on every run).

    Several seconds at 768 x 3072, which `dual-flow` brings down to two or three; `greedy` is exact and far faster
    where one side has no bounds.
    """

    name: str = "min-cost-flow"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=EdgeSelection,
        exact=True,
        guarantee="optimal to the rounding of scores; attachment 0 only",
        complexity="O(V^2 E log(V C)), V = n_rows + n_cols, E = n",
        requires=("ortools",),
        reference="Goldberg (1997), An efficient implementation of a scaling minimum-cost flow algorithm, J. Algor. 22",
        when="row and column bounds where the optimum itself is wanted, attachment 0",
        lacks=("attachment",),
    )

    def solve(
        self, problem: EdgeSelection, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal selection, or what `dual-flow` finds at once if time runs out or the flow solver fails.

        Raises:
            ValueError: attachment > 0.
            Infeasible: no k edges meet all bounds.
        """
        if problem.attachment:
            raise ValueError(
                f"solver {self.name!r} needs attachment 0, found {problem.attachment:g}: a concave degree cost is no "
                "flow cost; use 'lagrangian' (no column bounds), 'greedy' (bounds on one side) or 'cp-sat' (small)"
            )
        only = only_selection(problem)
        if only is not None:
            return edge_solution(problem, only, self.name, bound=Bound(problem.objective(only), "only selection"))
        deadline = Deadline.after(time_limit)
        if problem.n <= IN_PROCESS:
            keep, value = optimal_flow(problem)
            return edge_solution(problem, keep, self.name, bound=Bound(value, SOURCE))
        # OR-Tools' flow solver knows no time limit, so it runs where it can be killed.
        first = DualFlowEdges().solve(problem, warm_start=warm_start, time_limit=0.0, seed=seed)
        outcome = run_killable(f"{run_optimal_flow.__module__}:run_optimal_flow", (problem,), deadline=deadline)
        if outcome.state == "finished":
            keep, value = outcome.value
            return edge_solution(problem, keep, self.name, bound=Bound(value, SOURCE))
        failed = outcome.state == "crashed" and first.status is not Status.OPTIMAL
        stopped = edge_solution(problem, first.keep, self.name, bound=first.bound, timed_out=True)
        return replace(stopped, status=Status.FAILED, stats={"failed": outcome.message}) if failed else stopped


register(MinCostFlowEdges())

"""Two-sided degree bounds at scale: dual prices decide most edges, a flow decides the rest, the dual certifies."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.common import bounded_sides, edge_solution, edge_start, only_selection
from topoprune_solvers.edges.core_flow import CoreNetwork, conflict
from topoprune_solvers.edges.line_prices import PriceSearch
from topoprune_solvers.edges.optimal_flow import optimal_flow
from topoprune_solvers.edges.sorting import select_edges
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.result import Deadline
from topoprune_solvers.solution import Bound, Infeasible, Solution, relative_gap

__all__ = ["DualFlowEdges"]

SMALL = 20_000  # edges up to which the core is everything: an exact flow takes tens of milliseconds
ATTEMPTS = 5
ARCS_PER_SECOND = 60_000  # of a minimum-cost flow, cautiously; only used to decide whether one still fits


@dataclass(frozen=True)
class DualFlowEdges:
    """Dual prices for rows and columns, then a flow on the edges whose reduced score is near zero.

    1. `PriceSearch` lowers the dual; it bounds the optimum, and its reduced scores say what clearly stays or goes.
    2. The edges nearest to zero reduced score are the core. A maximum flow repairs the selection within it; if it
       cannot, the core widens, in the end to all edges, where failing proves infeasibility.
    3. A minimum-cost flow (OR-Tools, where installed) makes the selection optimal within the core.
    4. While the gap is above `tolerance` and time is left: more rounds, a wider core (five times at most).

    Without OR-Tools the answer of step 2, with a core as narrow as possible, stays: valid, with a certified gap that
    is somewhat larger.

    Args:
        rounds: of the first price search; each is two sortings of the matrix.
        core_share: of all edges that the first core holds.
        tolerance: relative gap that ends the search.
    """

    name: str = "dual-flow"
    rounds: int = 5
    core_share: float = 0.02
    tolerance: float = 1e-5
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=EdgeSelection,
        exact=False,
        guarantee="certified gap from dual prices; optimal within a core of near-tied edges (OR-Tools); attachment 0",
        complexity="O(n log n) a round, some 5 rounds, and a flow on a few per cent of the edges",
        requires=("scipy",),
        reference="reduced-cost fixing with a core: Balas and Zemel (1980), Oper. Res. 28",
        when="row and column bounds on large matrices, attachment 0",
        lacks=("attachment",),
    )

    def solve(
        self, problem: EdgeSelection, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best selection found; the limit is looked at between steps of at most some 0.3 s each.

        Raises:
            ValueError: attachment > 0.
            Infeasible: no k edges meet all bounds; says which bounds contradict each other.
        """
        if problem.attachment:
            raise ValueError(
                f"solver {self.name!r} takes attachment 0, found {problem.attachment:g}: a concave degree cost is no "
                "flow cost; use 'lagrangian' (no column bounds), 'greedy' (bounds on one side) or 'cp-sat' (small)"
            )
        deadline = Deadline.after(time_limit)
        only = only_selection(problem)
        if only is not None:
            return edge_solution(problem, only, self.name, bound=Bound(problem.objective(only), "only selection"))
        if len(bounded_sides(problem)) < 2:
            keep = select_edges(problem, problem.score)
            return edge_solution(problem, keep, self.name, bound=Bound(problem.objective(keep), "sorting"))
        return self._search(problem, edge_start(problem, warm_start), deadline)

    def _search(self, problem: EdgeSelection, keep: np.ndarray | None, deadline: Deadline) -> Solution:
        search = PriceSearch(problem)
        native = find_spec("ortools") is not None
        edges = problem.n if problem.allowed is None else int(problem.allowed.sum())
        narrow = max(1, round(self.core_share / 10 * edges))
        wide = edges if edges <= SMALL else max(SMALL, 10 * narrow)
        size = wide if native else narrow
        rounds, bound, timed_out = self.rounds, Bound(np.inf, "none"), False
        for attempt in range(ATTEMPTS):
            prices = search.improve(rounds, tolerance=self.tolerance / 100, deadline=deadline)
            bound = min(bound, Bound(prices.bound, "dual prices of rows and columns"), key=_value)
            if keep is not None and deadline.passed():
                timed_out = True
                break
            network, repaired = _feasible_core(problem, prices.reduced, size)
            keep = _better(problem, keep, repaired)
            size = network.core.size
            if native and network.core.size < edges and _fits(network.core.size, deadline):
                keep = _better(problem, keep, network.cheapest())
            elif native and _fits(edges, deadline):
                flow, optimum = optimal_flow(problem)
                keep = _better(problem, keep, flow)
                bound = min(bound, Bound(optimum, "minimum-cost flow (OR-Tools)"), key=_value)
            done = relative_gap(problem.objective(keep), bound.value) <= self.tolerance or (native and size >= edges)
            if done or attempt == ATTEMPTS - 1:
                break
            if not _fits(size, deadline):
                timed_out = True
                break
            # A maximum flow takes any way through its core: the narrower, the better.
            rounds, size = 2 * rounds, min(edges, 3 * size) if native else narrow
        assert keep is not None, "the first attempt found a selection"
        stats = {"rounds": search.rounds, "core": size}
        return edge_solution(problem, keep, self.name, bound=bound, timed_out=timed_out, stats=stats)


def _feasible_core(problem: EdgeSelection, reduced: np.ndarray, size: int) -> tuple[CoreNetwork, np.ndarray]:
    # The edges nearest to zero reduced score, as many as a repair needs, and the repaired mask.
    mask, distance = reduced > 0, np.abs(reduced).reshape(-1)
    edges = int(np.count_nonzero(np.isfinite(distance)))  # what is not allowed is infinitely far
    while True:
        size = min(size, edges)
        widest = np.partition(distance, size - 1)[size - 1]
        network = CoreNetwork(problem, mask, np.flatnonzero(distance <= widest))
        repaired = network.repaired()
        if repaired is not None:
            return network, repaired
        if network.core.size >= edges:
            raise Infeasible(f"no selection of k={problem.k} edges meets all degree bounds: {conflict(problem)}")
        size = 4 * network.core.size


def _fits(arcs: int, deadline: Deadline) -> bool:
    return arcs / ARCS_PER_SECOND < deadline.remaining()


def _value(bound: Bound) -> float:
    return bound.value


def _better(problem: EdgeSelection, keep: np.ndarray | None, found: np.ndarray | None) -> np.ndarray:
    # The better of two masks; the first one in a tie.
    known = [mask for mask in (keep, found) if mask is not None]
    return max(known, key=problem.objective)


register(DualFlowEdges())

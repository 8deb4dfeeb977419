"""Exact attachment-weighted edge selection without column bounds, by dynamic programming over rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.common import bounded_sides, edge_solution, only_selection
from topoprune_solvers.edges.row_values import row_values
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.solution import Bound, Solution

__all__ = ["DynamicProgramEdges"]


@dataclass(frozen=True)
class DynamicProgramEdges:
    """Choose the degree of row after row; a row of degree t keeps its t best edges.

    ``best_i(b) = max_t best_{i-1}(b - t) + V_i(t)`` over the budget b used so far, with V_i as in
    `edges.row_values`. Takes row bounds and any attachment. Ties go to the smaller degree of the
    later row.
    """

    name: str = "dp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=EdgeSelection,
        exact=True,
        guarantee="optimal; no column bounds",
        complexity="O(n k) time, O(n_rows k) memory",
        max_units=16384,
        when="attachment on small matrices, to the optimum; row bounds allowed",
        lacks=("column bounds",),
    )

    def solve(
        self, problem: EdgeSelection, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal selection; the work is bounded (seconds at 16384 edges).

        Raises:
            ValueError: column bounds.
        """
        if "column" in bounded_sides(problem):
            raise ValueError(
                f"solver {self.name!r} takes no column bounds; use 'cp-sat' (small instances), 'dual-flow' or "
                "'min-cost-flow' (attachment 0), or 'greedy' (bounds on one side)"
            )
        only = only_selection(problem)
        if only is not None:
            return edge_solution(problem, only, self.name, bound=Bound(problem.objective(only), "only selection"))
        table = row_values(problem)
        keep = table.mask(_degrees(table.value, problem.k))
        return edge_solution(problem, keep, self.name, bound=Bound(problem.objective(keep), "dynamic programming"))


def _degrees(value: np.ndarray, k: int) -> np.ndarray:
    rows = value.shape[0]
    best = np.full(k + 1, -np.inf)
    best[0] = 0.0
    choice = np.zeros((rows, k + 1), dtype=np.int32)
    for row in range(rows):
        following = np.full(k + 1, -np.inf)
        for degree in np.flatnonzero(np.isfinite(value[row])).tolist():
            if degree > k:
                break
            reached = best[: k + 1 - degree] + value[row, degree]
            better = reached > following[degree:]
            following[degree:][better] = reached[better]
            choice[row, degree:][better] = degree
        best = following
    assert np.isfinite(best[k]), "the row bounds were checked to allow k edges"
    degrees = np.zeros(rows, dtype=np.int64)
    left = k
    for row in reversed(range(rows)):
        degrees[row] = choice[row, left]
        left -= int(degrees[row])
    return degrees


register(DynamicProgramEdges())

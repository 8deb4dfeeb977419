"""Baselines of edge selection: random edges, and the largest scores whatever the attachment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.common import bounded_sides, candidate_value, edge_solution
from topoprune_solvers.edges.sorting import top_edges
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.solution import Bound, Solution

__all__ = ["EdgeBaseline"]


@dataclass(frozen=True)
class EdgeBaseline:
    """Keep k edges at random or by score.

    Args:
        name: ``"random"`` (seeded) or ``"magnitude"`` (ties to the lower index).
    """

    name: str
    capabilities: Capabilities

    def solve(
        self, problem: EdgeSelection, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return k edges; only `seed` matters, and only to ``"random"``.

        Raises:
            ValueError: a problem with degree bounds.
        """
        sides = bounded_sides(problem)
        if sides:
            raise ValueError(
                f"solver {self.name!r} knows no degree bounds, this problem bounds {' and '.join(sides)} degrees; "
                "use 'greedy' (one side), or 'dual-flow' or 'min-cost-flow' (attachment 0)"
            )
        if self.name == "random":
            keep = np.zeros(problem.n, dtype=bool)
            candidates = np.flatnonzero(candidate_value(problem, problem.score) > -np.inf)
            keep[np.random.default_rng(seed).permutation(candidates)[: problem.k]] = True
            return edge_solution(problem, keep, self.name)
        keep = top_edges(candidate_value(problem, problem.score), problem.k)
        bound = None if problem.attachment else Bound(problem.objective(keep), "sorting")
        return edge_solution(problem, keep, self.name, bound=bound)


for _name, _guarantee, _when in (
    ("random", "none: a baseline", "the baseline to beat"),
    ("magnitude", "optimal at attachment 0; else none", "the usual baseline: the largest scores"),
):
    register(
        EdgeBaseline(
            _name,
            Capabilities(
                problem=EdgeSelection,
                exact=False,
                guarantee=_guarantee,
                complexity="O(n)",
                when=_when,
                lacks=("row bounds", "column bounds"),
            ),
        )
    )

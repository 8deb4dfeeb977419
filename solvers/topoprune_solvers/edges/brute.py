"""Exhaustive edge selection: the slow and obvious twin."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.common import degrees_allowed, edge_solution
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.solution import Bound, Infeasible, Solution

__all__ = ["BruteEdges"]


@dataclass(frozen=True)
class BruteEdges:
    """Try all ways to keep k of at most 16 edges; takes every bound and attachment."""

    name: str = "brute"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=EdgeSelection,
        exact=True,
        guarantee="optimal, by trying every selection of k edges",
        complexity="O(C(n, k) n)",
        max_units=16,
        when="tests",
    )

    def solve(
        self, problem: EdgeSelection, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the first best selection in lexicographic order; ignores the time limit.

        Raises:
            Infeasible: no selection of k edges meets the degree bounds.
        """
        best, best_value, tried = None, -np.inf, 0
        for chosen in combinations(range(problem.n), problem.k):
            keep = np.zeros(problem.n, dtype=bool)
            keep[list(chosen)] = True
            tried += 1
            if not degrees_allowed(problem, keep.reshape(problem.shape)):
                continue
            value = problem.objective(keep)
            if best is None or value > best_value:
                best, best_value = keep, value
        if best is None:
            raise Infeasible(f"no selection of k={problem.k} edges meets the row and column degree bounds")
        bound = Bound(best_value, "enumeration of all selections")
        return edge_solution(problem, best, self.name, bound=bound, stats={"selections": tried})


register(BruteEdges())

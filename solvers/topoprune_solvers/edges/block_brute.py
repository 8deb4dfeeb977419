"""Exhaustive N:M masks: the slow and obvious twin."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.block_common import block_solution
from topoprune_solvers.problems.blocks import BlockMask
from topoprune_solvers.solution import Bound, Solution

__all__ = ["BruteBlocks"]


@dataclass(frozen=True)
class BruteBlocks:
    """Try all selections of the right size of at most 18 edges."""

    name: str = "brute"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=BlockMask,
        exact=True,
        guarantee="optimal, by trying every selection",
        complexity="O(C(n, n kept / group) n)",
        max_units=18,
        when="tests",
    )

    def solve(
        self, problem: BlockMask, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the first best mask in lexicographic order; ignores the time limit."""
        best: np.ndarray | None = None
        for chosen in combinations(range(problem.n), problem.n // problem.group * problem.kept):
            keep = np.zeros(problem.n, dtype=bool)
            keep[list(chosen)] = True
            if problem.violation(keep) is None and (best is None or problem.objective(keep) > problem.objective(best)):
                best = keep
        assert best is not None, "every block has a mask"
        return block_solution(problem, best, self.name, bound=Bound(problem.objective(best), "enumeration"))


register(BruteBlocks())

"""Exhaustive N:M masks: the slow and obvious twin."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems.blocks import BlockMask
from topoprune_solvers.result import mask_solution
from topoprune_solvers.solution import Bound, Solution

__all__ = ["BruteBlocks"]


@dataclass(frozen=True)
class BruteBlocks:
    """Try all ways to keep the right number in every group of a row, of at most 18 edges."""

    name: str = "brute"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=BlockMask,
        exact=True,
        guarantee="optimal, by trying every selection",
        complexity="O(C(group, kept)^(n / group) n)",
        max_units=18,
        when="tests",
    )

    def solve(
        self, problem: BlockMask, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the first best mask in lexicographic order; ignores the time limit."""
        best: np.ndarray | None = None
        size = problem.group
        choices = [[j in chosen for j in range(size)] for chosen in combinations(range(size), problem.kept)]
        for groups in product(choices, repeat=problem.n // size):
            keep = np.array(groups, dtype=bool).reshape(-1)
            if problem.violation(keep) is None and (best is None or problem.objective(keep) > problem.objective(best)):
                best = keep
        assert best is not None, "every block has a mask"
        return mask_solution(problem, best, self.name, bound=Bound(problem.objective(best), "enumeration"))


register(BruteBlocks())

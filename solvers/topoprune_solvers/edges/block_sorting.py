"""N:M masks in one direction: the best N of every group, exactly; and random masks as a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.sorting import keep_best, sorted_lines
from topoprune_solvers.problems.blocks import BlockMask
from topoprune_solvers.result import mask_solution
from topoprune_solvers.solution import Bound, Solution

__all__ = ["RandomBlocks", "SortingBlocks", "best_of_groups"]


def best_of_groups(problem: BlockMask) -> np.ndarray:
    """Return the flat mask that keeps the best edges of every group of a row; ties to the lower column. O(n log m)."""
    groups = problem.score.reshape(-1, problem.group)
    degree = np.full(groups.shape[0], problem.kept, dtype=np.int64)
    return keep_best(groups, sorted_lines(groups, 1), degree, 1).reshape(-1)


@dataclass(frozen=True)
class SortingBlocks:
    """Keep the N largest scores of every group of M; ties go to the lower column."""

    name: str = "sorting"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=BlockMask,
        exact=True,
        guarantee="optimal",
        complexity="O(n log m)",
        reference="Mishra et al. (2021), arXiv:2104.08378",
        when="N:M masks that need not be transposable",
        lacks=("transposable",),
    )

    def solve(
        self, problem: BlockMask, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the optimal mask; all options are ignored.

        Raises:
            ValueError: a transposable problem.
        """
        if problem.transposable:
            raise ValueError(f"solver {self.name!r} takes no transposable masks; use 'exact' or 'greedy'")
        keep = best_of_groups(problem)
        return mask_solution(problem, keep, self.name, bound=Bound(problem.objective(keep), "sorting"))


@dataclass(frozen=True)
class RandomBlocks:
    """Keep N random edges of every group; transposable: shuffle the rows and columns of a band in every block."""

    name: str = "random"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=BlockMask,
        exact=False,
        guarantee="none: a baseline",
        complexity="O(n log m)",
        when="the baseline to beat",
    )

    def solve(
        self, problem: BlockMask, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return a mask that depends on the seed and the shape only."""
        rng = np.random.default_rng(seed)
        size = problem.group
        if problem.transposable:
            places = np.tile(np.arange(size), (problem.n // size**2, 1))
            row, column = rng.permuted(places, axis=1), rng.permuted(places, axis=1)
            keep = problem.from_blocks((row[:, :, None] + column[:, None, :]) % size < problem.kept)
        else:
            places = np.tile(np.arange(size), (problem.n // size, 1))
            keep = rng.permuted(places, axis=1) < problem.kept
        return mask_solution(problem, keep, self.name)


register(SortingBlocks())
register(RandomBlocks())

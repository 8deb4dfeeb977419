"""Transposable N:M masks to the optimum: enumerated patterns for small groups, batched assignment for larger ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from math import comb
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.block_assignment import assign_blocks
from topoprune_solvers.edges.block_common import block_bound
from topoprune_solvers.edges.block_sorting import best_of_groups
from topoprune_solvers.problems.blocks import BlockMask
from topoprune_solvers.result import Deadline, mask_solution, mask_start
from topoprune_solvers.solution import Bound, Solution

__all__ = ["ExactBlocks", "patterns"]

LARGEST_TABLE = 128  # patterns up to which all are tried; 2:4 has 90
CHUNK = 1 << 20  # numbers handled at once: some 10 ms, and little memory


@dataclass(frozen=True)
class ExactBlocks:
    """Solve every block to its optimum.

    Groups of at most 4: the score of every pattern of every block is one matrix product. Larger groups: each block is
    a transportation problem, solved by shortest augmenting paths for many blocks side by side; its prices prove
    the optimum. Blocks that a time limit leaves over keep the warm start or the best of `group` shifted bands.
    """

    name: str = "exact"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=BlockMask,
        exact=True,
        guarantee="optimal given time, else a valid mask with a bound",
        complexity="O(n) for groups up to 4 (90 patterns a block), else O(m^3) a block as a rule",
        reference="shortest augmenting paths: Tomizawa (1971); Edmonds and Karp (1972)",
        when="the default for N:M masks, transposable or not",
    )

    def solve(
        self, problem: BlockMask, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal mask, or at the time limit the best one known; a feasible warm start (n,) competes."""
        deadline = Deadline.after(time_limit)
        given = mask_start(problem, warm_start)
        if not problem.transposable:
            keep = best_of_groups(problem)
            return mask_solution(problem, keep, self.name, bound=Bound(problem.objective(keep), "sorting"))
        score = problem.blocks(problem.score)
        table = patterns(problem.kept, problem.group)
        source = "dual prices of each block" if table is None else "all patterns of each block"
        mask, bound, left = np.zeros(score.shape, dtype=bool), 0.0, 0
        chunk = max(1, CHUNK // (4 * problem.group**2 if table is None else len(table)))
        for first in range(0, len(score), chunk):
            part = slice(first, first + chunk)
            if deadline.passed():
                part, left = slice(first, None), len(score) - first
                start = None if given is None else problem.blocks(given)[part]
                mask[part], limit = _leftover(score[part], problem.kept, start)
                bound += limit
                break
            if table is None:
                mask[part], row, column = assign_blocks(score[part], problem.kept)
                bound += float(block_bound(score[part], problem.kept, row, column).sum())
            else:
                worth = score[part].reshape(-1, problem.group**2) @ table.T
                choice = worth.argmax(axis=1)
                mask[part] = table[choice].reshape(-1, problem.group, problem.group) > 0
                bound += float(worth[np.arange(choice.size), choice].sum()) * (1 + 1e-14)
        keep = problem.from_blocks(mask).reshape(-1)
        stats = {"blocks": len(score), "blocks_left_to_greedy": left}
        return mask_solution(problem, keep, self.name, bound=Bound(bound, source), timed_out=left > 0, stats=stats)


def _leftover(score: np.ndarray, kept: int, start: np.ndarray | None) -> tuple[np.ndarray, float]:
    # A valid mask of every block at little cost, and an upper bound: rows alone, each with its best edges.
    blocks, size, _ = score.shape
    place = np.arange(size)
    bands = (place[:, None, None] + place[None, :, None] + place[None, None, :]) % size < kept
    mask = bands[(score.reshape(blocks, -1) @ bands.reshape(size, -1).T.astype(np.float64)).argmax(axis=1)]
    if start is not None:
        better = np.einsum("bij,bij->b", score, start) > np.einsum("bij,bij->b", score, mask)
        mask[better] = start[better]
    best = np.sort(score, axis=2)[:, :, size - kept :]
    return mask, float(best.sum()) * (1 + 1e-13)


@cache
def patterns(kept: int, group: int) -> np.ndarray | None:
    """Return all (p, group^2) float64 0/1 patterns with row and column sums `kept`, or None if there are too many.

    >>> patterns(2, 4).shape, patterns(1, 3).shape
    ((90, 16), (6, 9))
    """
    if group > 6 or comb(group, kept) ** (group - 1) > 200_000:
        return None
    rows = np.array([[int(j in chosen) for j in range(group)] for chosen in combinations(range(group), kept)])
    partial = np.zeros((1, 0, group), dtype=np.int64)
    for _ in range(group):
        grown = [np.concatenate([partial, np.broadcast_to(row, (len(partial), 1, group))], axis=1) for row in rows]
        partial = np.concatenate(grown)
        partial = partial[(partial.sum(axis=1) <= kept).all(axis=1)]
    if len(partial) > LARGEST_TABLE:
        return None
    table = partial.reshape(len(partial), group * group).astype(np.float64)
    table.setflags(write=False)
    return table


register(ExactBlocks())

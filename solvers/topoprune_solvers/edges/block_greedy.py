"""Transposable N:M masks by greedy matching and swaps, all blocks side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.block_common import block_bound, scaled_prices
from topoprune_solvers.edges.block_sorting import best_of_groups
from topoprune_solvers.problems.blocks import BlockMask
from topoprune_solvers.result import NEVER, Deadline, mask_solution, mask_start
from topoprune_solvers.solution import Bound, Solution

__all__ = ["GreedyBlocks", "greedy_blocks"]

PRICE_ROUNDS = 8
SWEEPS = 10


@dataclass(frozen=True)
class GreedyBlocks:
    """Take edges by falling score while their row and column have room; complete; swap while it gains.

    The greedy matching alone keeps at least half of the optimum, and usually stops with a few rows and columns of
    a block short of N. They are completed by exchanges (two edges in for one out), then pairs of rows
    swap one column each while the score grows. Dual prices per block certify the result.
    """

    name: str = "greedy"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=BlockMask,
        exact=False,
        guarantee="certified gap; the matching before completion is at least half of the optimum",
        complexity="O(n log m) and O(n m) a sweep of swaps",
        reference="Hubara et al. (2021), Accelerated sparse neural training, NeurIPS",
        when="to compare with the published method; 'exact' is about as fast",
    )

    def solve(
        self, problem: BlockMask, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the swapped mask or a feasible warm start (n,), whichever is better; the limit ends the swaps."""
        deadline = Deadline.after(time_limit)
        given = mask_start(problem, warm_start)
        if not problem.transposable:
            keep = best_of_groups(problem)
            return mask_solution(problem, keep, self.name, bound=Bound(problem.objective(keep), "sorting"))
        score = problem.blocks(problem.score)
        keep = problem.from_blocks(greedy_blocks(score, problem.kept, deadline)).reshape(-1)
        if given is not None and problem.objective(given) > problem.objective(keep):
            keep = given
        row, column = scaled_prices(score, problem.kept, PRICE_ROUNDS)
        bound = Bound(float(block_bound(score, problem.kept, row, column).sum()), "dual prices of each block")
        return mask_solution(problem, keep, self.name, bound=bound, timed_out=deadline.passed())


def greedy_blocks(score: np.ndarray, kept: int, deadline: Deadline = NEVER) -> np.ndarray:
    """Return (b, m, m) bool masks with all row and column sums `kept`; ties go to the lower flat index.

    Args:
        score: (b, m, m) float64 >= 0.
    """
    mask = _matching(score, kept)
    _complete(score, mask, kept)
    for _ in range(SWEEPS):
        if deadline.passed() or not _swap(score, mask, deadline):
            break
    return mask


def _matching(score: np.ndarray, kept: int) -> np.ndarray:
    blocks, size, _ = score.shape
    order = np.argsort(-score.reshape(blocks, size * size), axis=1, kind="stable")
    mask = np.zeros((blocks, size, size), dtype=bool)
    in_row, in_column = np.zeros((blocks, size), dtype=np.int64), np.zeros((blocks, size), dtype=np.int64)
    every = np.arange(blocks)
    for place in range(size * size):
        row, column = np.divmod(order[:, place], size)
        free = (in_row[every, row] < kept) & (in_column[every, column] < kept)
        mask[every, row, column] = free
        in_row[every, row] += free
        in_column[every, column] += free
    return mask


def _complete(score: np.ndarray, mask: np.ndarray, kept: int) -> None:
    # Adds one edge to every block that lacks some, until none does. A free edge between a short row and a short
    # column is added at once. Else a short row r and a short column c take (r, j) and (i, c) for (i, j):
    # if no such exchange existed, the rows without c and the columns without r would all be short, and meet freely.
    while True:
        short_row, short_column = mask.sum(axis=2) < kept, mask.sum(axis=1) < kept
        lacking = np.flatnonzero(short_row.any(axis=1))
        if not lacking.size:
            return
        value, taken = score[lacking], mask[lacking]
        short_row, short_column = short_row[lacking], short_column[lacking]
        every = np.arange(lacking.size)
        direct = np.where(short_row[:, :, None] & short_column[:, None, :] & ~taken, value, -np.inf)
        best = direct.reshape(lacking.size, -1).argmax(axis=1)
        found = np.isfinite(direct.reshape(lacking.size, -1)[every, best])
        i, j = np.divmod(best, mask.shape[2])
        mask[lacking[found], i[found], j[found]] = True

        rest = np.flatnonzero(~found)
        value, taken = value[rest], taken[rest]
        r, c = short_row[rest].argmax(axis=1), short_column[rest].argmax(axis=1)
        every = np.arange(rest.size)
        from_row, from_column = value[every, r], value[every, :, c]  # (b, m) scores along row r and along column c
        possible = taken & ~taken[every, r][:, None, :] & ~taken[every, :, c][:, :, None]
        gain = np.where(possible, from_row[:, None, :] + from_column[:, :, None] - value, -np.inf)
        i, j = np.divmod(gain.reshape(rest.size, -1).argmax(axis=1), mask.shape[2])
        block = lacking[rest]
        mask[block, i, j] = False
        mask[block, r, j] = True
        mask[block, i, c] = True


def _swap(score: np.ndarray, mask: np.ndarray, deadline: Deadline) -> bool:
    # One sweep over all pairs of rows: each gives the other its best column to move. True if anything gained.
    blocks, size, _ = score.shape
    every, gained = np.arange(blocks), False
    for first in range(size):
        if deadline.passed():
            return False
        for second in range(first + 1, size):
            a, b = mask[:, first], mask[:, second]
            change = score[:, second] - score[:, first]
            down = np.where(a & ~b, change, -np.inf)  # the first row's edge moves to the second row
            up = np.where(b & ~a, -change, -np.inf)
            j, k = down.argmax(axis=1), up.argmax(axis=1)
            gain = down[every, j] + up[every, k]
            better = np.flatnonzero(gain > 1e-12 * np.abs(down[every, j]))
            if better.size:
                gained = True
                j, k = j[better], k[better]
                mask[better, first, j], mask[better, second, j] = False, True
                mask[better, first, k], mask[better, second, k] = True, False
    return gained


register(GreedyBlocks())

"""The transportation problem of a transposable block, for many blocks side by side.

Every row of a block takes its best edges at given column prices, so that only columns are over- or underfull. The
excess of a column then moves along a cheapest path (column - kept edge - row - free edge - column - ...) to an
underfull one, found by Dijkstra on reduced scores; prices follow, so that kept edges always have reduced score >= 0
and others <= 0. With no excess left that proves the optimum. All blocks take each step together, as numpy operations.

Shape legend: b blocks, m rows and columns of a block; nodes 0..m-1 are rows, m..2m-1 columns.
"""

from __future__ import annotations

import numpy as np

from topoprune_solvers.edges.block_common import scaled_prices
from topoprune_solvers.edges.sorting import keep_best, sorted_lines

__all__ = ["assign_blocks"]


PRICE_ROUNDS = 4


def assign_blocks(score: np.ndarray, kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (b, m, m) bool masks of highest score with all row and column sums `kept`, and the prices that prove it.

    Args:
        score: (b, m, m) float64. kept: 0..m.

    Returns:
        Masks, (b, m) row prices, (b, m) column prices.

    Complexity: O(m^2) a path and block, at most O(kept m) paths; about m / 12 are usual.
    """
    blocks, size, _ = score.shape
    row, column = np.zeros((blocks, size)), np.zeros((blocks, size))
    if not 0 < kept < size:
        return np.full(score.shape, kept > 0), row, column
    _, column = scaled_prices(score, kept, PRICE_ROUNDS)  # a good start: few columns are over- or underfull
    lines = (score - column[:, None, :]).reshape(blocks * size, size)
    ordered = sorted_lines(lines, 1)
    degree = np.full(blocks * size, kept, dtype=np.int64)
    mask = keep_best(lines, ordered, degree, 1).reshape(score.shape)
    row = ordered[:, size - kept].reshape(blocks, size).copy()
    open_blocks = np.arange(blocks)
    while True:
        overfull = mask[open_blocks].sum(axis=1) > kept
        some = overfull.any(axis=1)
        open_blocks, overfull = open_blocks[some], overfull[some]
        if not open_blocks.size:
            return mask, row, column
        state = mask[open_blocks], row[open_blocks], column[open_blocks]
        _augment(score[open_blocks], kept, overfull.argmax(axis=1), *state)
        mask[open_blocks], row[open_blocks], column[open_blocks] = state


def _augment(
    score: np.ndarray, kept: int, source: np.ndarray, mask: np.ndarray, row: np.ndarray, column: np.ndarray
) -> None:
    # Move one unit from the overfull `source` column of each block to an underfull one; in place.
    blocks, size, _ = score.shape
    reduced = score - row[:, :, None] - column[:, None, :]
    cost = np.full((blocks, 2 * size, 2 * size), np.inf)  # cost[:, from, to]
    # Rounding may leave a reduced score on the wrong side of zero.
    cost[:, :size, size:] = np.where(mask, np.inf, np.maximum(-reduced, 0.0))
    cost[:, size:, :size] = np.where(mask, np.maximum(reduced, 0.0), np.inf).swapaxes(1, 2)
    underfull = np.zeros((blocks, 2 * size), dtype=bool)
    underfull[:, size:] = mask.sum(axis=1) < kept

    distance = np.full((blocks, 2 * size), np.inf)
    distance[np.arange(blocks), size + source] = 0.0
    tentative = distance.copy()  # inf once a node is settled
    before = np.zeros((blocks, 2 * size), dtype=np.int64)
    end = np.zeros(blocks, dtype=np.int64)
    running = np.arange(blocks)
    while running.size:
        node = tentative[running].argmin(axis=1)
        arrived = underfull[running, node]
        end[running[arrived]] = node[arrived]
        running, node = running[~arrived], node[~arrived]
        so_far = tentative[running, node]
        tentative[running, node] = np.inf
        reach = so_far[:, None] + cost[running, node]
        shorter = reach < distance[running]  # never for a settled node: its distance is smaller or equal
        distance[running] = np.where(shorter, reach, distance[running])
        tentative[running] = np.where(shorter, reach, tentative[running])
        before[running] = np.where(shorter, node[:, None], before[running])

    every = np.arange(blocks)
    gain = np.maximum(distance[every, end][:, None] - distance, 0.0)
    row -= gain[:, :size]
    column += gain[:, size:]
    walking, node = every, end
    while walking.size:
        previous = before[walking, node]
        from_row = previous < size
        i, j = np.where(from_row, previous, node), np.where(from_row, node, previous) - size
        mask[walking, i, j] ^= True
        going = previous != size + source[walking]
        walking, node = walking[going], previous[going]

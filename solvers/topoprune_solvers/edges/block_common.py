"""A dual bound for transposable N:M blocks."""

from __future__ import annotations

import numpy as np

__all__ = ["block_bound", "scaled_prices"]


def block_bound(score: np.ndarray, kept: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return (b,) upper bounds on the score that each transposable block can keep, for any prices.

    ``sum_ij max(0, s_ij - row_i - column_j) + kept (sum row + sum column)``, rounded up.

    Args:
        score: (b, m, m). row, column: (b, m) prices.
    """
    surplus = np.maximum(score - row[:, :, None] - column[:, None, :], 0.0).sum(axis=(1, 2))
    paid = kept * (row.sum(axis=1) + column.sum(axis=1))
    # Up, by more than the sums above can have lost: keeps the bound above the true optimum.
    return surplus + paid + 1e-13 * (surplus + kept * (np.abs(row).sum(axis=1) + np.abs(column).sum(axis=1)))


def scaled_prices(score: np.ndarray, kept: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (b, m) row and column prices near the best ones, by minimising over rows and columns in turn.

    Complexity: O(b m^2 log m) a round.
    """
    blocks, size, _ = score.shape
    row, column = np.zeros((blocks, size)), np.zeros((blocks, size))
    if not 0 < kept < size:
        return row, column
    for _ in range(rounds):
        row = _between(score - column[:, None, :], kept, 2)
        column = _between(score - row[:, :, None], kept, 1)
    return row, column


def _between(value: np.ndarray, kept: int, axis: int) -> np.ndarray:
    # Halfway between the last edge a line keeps and the first one it does not.
    place = value.shape[axis] - kept
    part = np.partition(value, (place - 1, place), axis=axis)
    return (np.take(part, place - 1, axis=axis) + np.take(part, place, axis=axis)) / 2

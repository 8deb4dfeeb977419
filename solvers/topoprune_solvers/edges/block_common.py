"""What the N:M solvers share: a dual bound per block, a checked warm start, a finished Solution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from topoprune_solvers.problems.blocks import BlockMask
from topoprune_solvers.result import stopped_status
from topoprune_solvers.solution import Bound, Solution, Status

__all__ = ["block_bound", "block_solution", "block_start", "scaled_prices"]

PROVEN = 1e-9  # relative distance of objective and bound that counts as equal: summation order


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


def block_start(problem: BlockMask, warm_start: Any) -> np.ndarray | None:
    """Return a warm start as a flat mask; None if there is none or it breaks the rule.

    Raises:
        ValueError: a mask of another size, e.g. from another layer.
    """
    if warm_start is None:
        return None
    start = np.asarray(warm_start, dtype=bool).reshape(-1)
    if start.size != problem.n:
        raise ValueError(f"warm_start has {start.size} entries, expected {problem.n}: an edge mask of this problem")
    return start if problem.violation(start) is None else None


def block_solution(
    problem: BlockMask,
    keep: np.ndarray,
    solver: str,
    *,
    bound: Bound | None = None,
    timed_out: bool = False,
    stats: Mapping[str, Any] | None = None,
) -> Solution:
    """Build the Solution of a mask (flat or not): objective and the status the bound allows."""
    objective = problem.objective(keep)
    status = stopped_status() if timed_out else Status.FEASIBLE
    if bound is not None:
        # A bound below a known objective is rounding: the optimum cannot be beyond it.
        bound = Bound(max(float(bound.value), objective), bound.source)
        if bound.value - objective <= PROVEN * abs(objective):
            status, bound = Status.OPTIMAL, Bound(objective, bound.source)
    return Solution(
        keep=keep.reshape(-1),
        objective=objective,
        sense=problem.sense,
        status=status,
        solver=solver,
        bound=bound,
        stats={} if stats is None else dict(stats),
    )

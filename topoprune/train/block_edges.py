"""n:m sparsity on a ramp: of every m consecutive inputs of an output at least n stay, in the end exactly n."""

from __future__ import annotations

from typing import Literal

import numpy as np

from topoprune_solvers import Bound, EdgeSelection, Solution, Status

__all__ = ["choose_in_blocks"]

ROUNDS = 4  # linearised re-solves; each keeps at least the objective of the one before


def choose_in_blocks(
    score: np.ndarray,
    k: int,
    pattern: tuple[int, int],
    *,
    attachment: float = 0.0,
    reading: Literal["a", "b"] = "b",
    allowed: np.ndarray | None = None,
) -> Solution:
    """Keep k weights of a matrix, at least n of every m consecutive ones of a row, with the highest score.

    Maximises ``sum_ij score_ij m_ij - attachment * sum_j f(d_j / rows)`` with d_j the number of weights that stay in
    column j and f the concave degree cost of Eq. 1 (`EdgeSelection`). In the end all rows have the same degree, so
    it is among the inputs that hubs grow. On the ramp to n:m, k falls: every block then loses up to m - n
    weights, those that cost least first, over the whole matrix.

    Args:
        score: (rows, columns) >= 0, rows are outputs; m divides columns.
        k: between n / m of the weights and all that are allowed.
        pattern: (n, m). attachment: strength >= 0, in units of score. reading: of Eq. 1.
        allowed: (rows, columns) bool, what has not gone before, at least n in every block; None: everything.

    Returns:
        The mask, flattened, with an upper bound. Without attachment it is optimal: the m - n least of a block
        are taken in rising order, so the least ones of all blocks together form a selection. With attachment the
        concave cost is replaced by its tangent in turn, which never lowers the objective.

    Raises:
        ValueError: k that the blocks cannot meet.

    Complexity: O(size log size) a round.

    Example:
        >>> choose_in_blocks(np.array([[3.0, 1.0, 2.0, 4.0]]), 2, (1, 2)).keep.tolist()
        [True, False, False, True]
    """
    n, m = pattern
    rows, columns = score.shape
    gone = np.zeros(score.shape, dtype=bool) if allowed is None else ~allowed
    if not score.size // m * n <= k <= score.size - int(gone.sum()):
        raise ValueError(f"cannot keep {k} of {score.size} weights with {n} in every {m} and {int(gone.sum())} gone")
    # Columns as rows: the degree that can differ is that of an input.
    judge = EdgeSelection(score.T, k=k, attachment=attachment, reading=reading)
    keep = _cheapest_go(score, gone, k, n, m)
    bound = float(score[keep].sum())
    value = judge.objective(keep.T)
    for _ in range(ROUNDS if attachment and 0 < k < score.size else 0):
        slope = judge.degree_cost_slope(np.count_nonzero(keep, axis=0))
        again = _cheapest_go(score - attachment / rows * slope, gone, k, n, m)
        better = judge.objective(again.T)
        if not better > value:
            break
        keep, value = again, better
    if attachment:
        # A concave sum is least at the extremes: as many full columns as k allows, one in between, the rest empty.
        full, rest = divmod(k, rows)
        degree = np.zeros(columns, dtype=np.int64)
        degree[:full] = rows
        degree[full : full + 1] = rest
        bound -= attachment * float(judge.degree_cost(degree).sum())
    status = Status.FEASIBLE if attachment else Status.OPTIMAL
    source = "sorting in blocks" + (", degrees at their extremes" if attachment else "")
    limit = Bound(bound if attachment else value, source)
    return Solution(keep.reshape(-1), value, "max", status, "sorting", limit)


def _cheapest_go(score: np.ndarray, gone: np.ndarray, k: int, n: int, m: int) -> np.ndarray:
    """Return the mask after the least weights of all blocks went, at most m - n a block; ties to the lower index."""
    blocks = np.where(gone, -np.inf, score).reshape(-1, m)
    order = np.argsort(blocks, axis=1, kind="stable")[:, : m - n]
    flat = (np.arange(blocks.shape[0])[:, None] * m + order).reshape(-1)
    keep = np.ones(score.size, dtype=bool)
    if score.size - k < flat.size:
        # Stable, and rising within a block: equal scores go block by block, and selections nest.
        rank = np.argsort(np.take_along_axis(blocks, order, axis=1).reshape(-1), kind="stable")
        flat = flat[rank[: score.size - k]]
    keep[flat] = False
    return keep.reshape(score.shape)

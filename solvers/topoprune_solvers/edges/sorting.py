"""Edge selection by sorting: the best edges of each line, of the whole matrix, and with bounds on one side.

A line is a row (axis 1) or a column (axis 0). Lines are sorted by value only, in ascending order: which edges
a line keeps follows from its threshold, and ties at a threshold go to the lower flat index. That is several
times faster than sorting indices.
"""

from __future__ import annotations

import numpy as np

from topoprune_solvers.edges.common import bounded_sides, candidate_value, column_limits, row_limits
from topoprune_solvers.problems import EdgeSelection

__all__ = ["keep_best", "line_degrees", "ranks_between", "select_edges", "sorted_lines", "top_edges"]


def top_edges(value: np.ndarray, k: int) -> np.ndarray:
    """Return the mask of the k largest entries of an array of any shape; ties to the lower flat index.

    Complexity: O(n), by partition.

    >>> top_edges(np.array([[1.0, 2.0], [2.0, 2.0]]), 2).tolist()
    [[False, True], [True, False]]
    """
    flat = value.reshape(-1)
    if k == 0:
        return np.zeros(value.shape, dtype=bool)
    place = flat.size - k
    threshold = np.partition(flat, place)[place]
    mask = flat >= threshold
    surplus = int(np.count_nonzero(mask)) - k
    if surplus:
        mask[np.flatnonzero(flat == threshold)[-surplus:]] = False
    return mask.reshape(value.shape)


def sorted_lines(value: np.ndarray, axis: int) -> np.ndarray:
    """Return (lines, width) `value` with each row (axis 1) or column (axis 0) in ascending order."""
    # A copy in C order: sorting strided lines in place is far slower.
    lines = np.array(value if axis == 1 else value.T, order="C")
    lines.sort(axis=1)
    return lines


def keep_best(value: np.ndarray, ordered: np.ndarray, degree: np.ndarray, axis: int) -> np.ndarray:
    """Return the (n_rows, n_cols) mask that keeps the `degree` largest entries of each line; ties to the lower index.

    Args:
        value: (n_rows, n_cols) float64. ordered: its `sorted_lines` along `axis`.
        degree: (lines,) int, 0 <= degree <= width.

    Complexity: O(n).

    >>> value = np.array([[3.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    >>> keep_best(value, sorted_lines(value, 1), np.array([1, 2]), 1).tolist()
    [[True, False, False], [True, True, False]]
    """
    lines, width = ordered.shape
    if not lines or not width:
        return np.zeros(value.shape, dtype=bool)
    place, every = width - degree, np.arange(lines)
    threshold = np.where(degree > 0, ordered[every, np.minimum(place, width - 1)], np.inf)
    mask: np.ndarray = value >= np.expand_dims(threshold, axis)
    # Where the best edge left out is worth as much as the last one kept, equals were kept in excess.
    cut = (degree > 0) & (degree < width) & (ordered[every, np.maximum(place - 1, 0)] == threshold)
    if np.any(cut):
        tied = np.flatnonzero(cut)
        lines_of = value[tied] if axis == 1 else value[:, tied].T
        limit = threshold[tied, None]
        above, equal = lines_of > limit, lines_of == limit
        kept = above | (equal & (np.cumsum(equal, axis=1) <= (degree[tied] - above.sum(axis=1))[:, None]))
        if axis == 1:
            mask[tied] = kept
        else:
            mask[:, tied] = kept.T
    return mask


def line_degrees(
    value: np.ndarray, ordered: np.ndarray, k: int, low: np.ndarray, high: np.ndarray, axis: int
) -> tuple[np.ndarray, float]:
    """Return how many edges each line keeps in the best selection of k edges, and its threshold.

    Every line keeps its `low` best edges; the others compete for the rest, up to `high` a line:
    those above one threshold stay, and of those equal to it the first ones by flat index.

    Args:
        value: (n_rows, n_cols). ordered: its `sorted_lines`. low, high: (lines,) int degree bounds with
            ``low.sum() <= k <= high.sum()``.

    Returns:
        (lines,) int64 degrees with sum k, and the value of the last edge that competed successfully
        (inf where none did).
    """
    left = k - int(low.sum())
    if left == 0:
        return low.astype(np.int64), np.inf
    width = ordered.shape[1]
    pool = ranks_between(ordered, low, high)
    threshold = float(np.partition(pool, pool.size - left)[pool.size - left])
    above = (ordered > threshold).sum(axis=1)
    degree = np.clip(above, low, high).astype(np.int64)
    left = k - int(degree.sum())
    position = np.flatnonzero(value.reshape(-1) == threshold)  # ascending: row-major order
    line = position // value.shape[1] if axis == 1 else position % value.shape[1]
    # The place of each tied edge among those of its own line says whether the line's bounds decide on it.
    by_line = np.argsort(line, kind="stable")
    place = np.empty(line.size, dtype=np.int64)
    first = np.searchsorted(line[by_line], line[by_line])
    place[by_line] = np.arange(line.size) - first + above[line[by_line]]
    competes = (place >= low[line]) & (place < high[line])
    degree += np.bincount(line[competes][:left], minlength=degree.size)
    assert int(degree.sum()) == k and width >= int(degree.max(initial=0)), "bounds allow k edges"
    return degree, threshold


def ranks_between(ordered: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return a flat array of the entries with low <= rank < high, rank 0 being the largest of a line."""
    width = ordered.shape[1]
    if np.all(low == low[0]) and np.all(high == high[0]):
        return ordered[:, width - int(high[0]) : width - int(low[0])].reshape(-1)
    rank = np.arange(width - 1, -1, -1, dtype=np.int32)
    return ordered[(rank >= low[:, None].astype(np.int32)) & (rank < high[:, None].astype(np.int32))]


def select_edges(problem: EdgeSelection, value: np.ndarray) -> np.ndarray:
    """Return the mask that maximises the sum of `value` under the budget and the bounds of one side.

    Exact: the bounds of one side and the budget form a laminar family, for which taking every
    line's best `min` edges and then the best of the rest (up to each line's `max`) is optimal.

    Args:
        problem: k and bounds; at most one side bounded.
        value: (n_rows, n_cols) float64 of any sign, e.g. re-weighted scores; what is not
            allowed is left out here.

    Complexity: O(n) without bounds, O(n log width) with.
    """
    sides = bounded_sides(problem)
    assert len(sides) < 2, "one bounded side at most"
    value = candidate_value(problem, value)
    if not sides:
        return top_edges(value, problem.k)
    axis = 1 if sides[0] == "row" else 0
    low, high = row_limits(problem) if axis == 1 else column_limits(problem)
    ordered = sorted_lines(value, axis)
    degree, _ = line_degrees(value, ordered, problem.k, low, high, axis)
    return keep_best(value, ordered, degree, axis)

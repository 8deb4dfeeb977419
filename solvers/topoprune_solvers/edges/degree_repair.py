"""Row degrees that sum to exactly k, from the two degree vectors on either side of the best price.

At the best price the rows that differ jump between a small and a large degree and are worth the same at both;
usually it is one row. What it leaves over is shared out over the other rows, whose worth is locally concave, so
that a few edges more or less in each of them cost little.
"""

from __future__ import annotations

import heapq

import numpy as np

from topoprune_solvers.edges.row_values import BudgetPrice, RowValues
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["repair_degrees", "total_worth"]

JUMPS = 8  # rows tried as the one at an intermediate degree
EXCHANGES = 4000


def total_worth(value: np.ndarray, degree: np.ndarray) -> float:
    """Return the worth of all rows at their degrees."""
    return float(value[np.arange(degree.size), degree].sum())


def repair_degrees(table: RowValues, k: int, price: BudgetPrice, deadline: Deadline = NEVER) -> np.ndarray:
    """Return (r,) degrees that sum to exactly k, near those of `budget_price`.

    Rows move from `fewer` to `more` while they fit, largest jump first. Then one row at a time is tried
    at every intermediate degree, the others making up for it edge by edge; the best choice stays. Single-edge
    exchanges follow while they gain.

    Complexity: O(r c + jump log r) a row tried, and O(r) an exchange.
    """
    value = table.value
    degree = price.fewer.copy()
    missing = k - int(degree.sum())
    jump = price.more - price.fewer
    for row in np.argsort(-jump, kind="stable").tolist():
        if 0 < jump[row] <= missing:
            degree[row] += jump[row]
            missing -= int(jump[row])
    if missing:
        tries: list[tuple[int, int] | None] = [None]
        left = np.flatnonzero(degree != price.more)
        tries += [(row, int(price.more[row])) for row in left[np.argsort(jump[left], kind="stable")][:JUMPS].tolist()]
        options = []
        for jumping in tries:
            option = _shared(value, degree, missing, jumping)
            if option is not None:
                options.append(option)
            if deadline.passed():
                break
        if not options:
            options.append(_anyhow(value, degree, missing))
        degree = max(options, key=lambda option: total_worth(value, option))
    return _exchange(value, degree, deadline)


def _shared(value: np.ndarray, degree: np.ndarray, missing: int, jumping: tuple[int, int] | None) -> np.ndarray | None:
    # Give `missing` edges to rows one at a time; with a jumping row (row, degree it jumps to), the best split
    # between that row at any degree in between and the others, which may have to give edges up.
    others = np.ones(degree.size, dtype=bool)
    if jumping is None:
        steps, _ = _single_steps(value, degree, others, missing, 1)
        return degree + np.bincount(steps, minlength=degree.size) if len(steps) == missing else None
    row, target = jumping
    others[row] = False
    reach = target - int(degree[row])
    up, gain_up = _single_steps(value, degree, others, missing, 1)
    down, gain_down = _single_steps(value, degree, others, reach - missing, -1)
    # The row takes `taken` edges, the others missing - taken: from all they can take to all they can give.
    taken = np.arange(missing - len(up), missing + len(down) + 1)
    worth = value[row, degree[row] + taken] + np.concatenate([gain_up[::-1], gain_down[1:]])
    if not np.any(np.isfinite(worth)):
        return None
    best = int(taken[worth.argmax()])
    result = degree.copy()
    result[row] += best
    rest = missing - best
    result += np.bincount(up[:rest], minlength=degree.size) if rest >= 0 else 0
    result -= np.bincount(down[:-rest], minlength=degree.size) if rest < 0 else 0
    return result


def _single_steps(
    value: np.ndarray, degree: np.ndarray, rows: np.ndarray, count: int, change: int
) -> tuple[np.ndarray, np.ndarray]:
    # Best next edge (change 1) or cheapest edge to lose (-1), again and again: the rows in order, and the
    # cumulative worth after 0, 1, ... steps. Stops where no row can move.
    degree = degree.copy()
    width = value.shape[1]

    def gain(row: int) -> float:
        to = int(degree[row]) + change
        return float(value[row, to] - value[row, degree[row]]) if 0 <= to < width else -np.inf

    heap = [(-gain(row), row) for row in np.flatnonzero(rows).tolist()]
    heapq.heapify(heap)
    order: list[int] = []
    worth = [0.0]
    while len(order) < count and heap and heap[0][0] < np.inf:
        loss, row = heap[0]
        degree[row] += change
        order.append(row)
        worth.append(worth[-1] - loss)
        heapq.heapreplace(heap, (-gain(row), row))
    return np.array(order, dtype=np.int64), np.array(worth)


def _anyhow(value: np.ndarray, degree: np.ndarray, missing: int) -> np.ndarray:
    # Bounds leave room for k edges, so filling row after row up to its largest degree always ends.
    degree = degree.copy()
    largest = value.shape[1] - 1 - np.isfinite(value)[:, ::-1].argmax(axis=1)
    room = np.minimum(np.cumsum(largest - degree), missing)
    return degree + np.diff(room, prepend=0)


def _exchange(value: np.ndarray, degree: np.ndarray, deadline: Deadline) -> np.ndarray:
    # Move one edge from one row to another while the total grows.
    degree = degree.copy()
    if len(degree) < 2:
        return degree
    every = np.arange(degree.size)
    add, drop = _gain(value, degree, every, 1), _gain(value, degree, every, -1)
    for count in range(EXCHANGES):
        to_row, from_row = int(add.argmax()), int(drop.argmax())
        if to_row == from_row:
            second_add, second_drop = add.copy(), drop.copy()
            second_add[to_row] = second_drop[to_row] = -np.inf
            if second_add.max() + drop[from_row] >= add[to_row] + second_drop.max():
                to_row = int(second_add.argmax())
            else:
                from_row = int(second_drop.argmax())
        worth = add[to_row] + drop[from_row]
        if not worth > 1e-12 * (abs(add[to_row]) + abs(drop[from_row])) or (count % 64 == 63 and deadline.passed()):
            break
        degree[to_row] += 1
        degree[from_row] -= 1
        moved = np.array([to_row, from_row])
        add[moved], drop[moved] = _gain(value, degree, moved, 1), _gain(value, degree, moved, -1)
    return degree


def _gain(value: np.ndarray, degree: np.ndarray, rows: np.ndarray, change: int) -> np.ndarray:
    # Worth of changing the degree of each of `rows` by one; -inf where that leaves the table or a bound.
    target = degree[rows] + change
    inside = (target >= 0) & (target < value.shape[1])
    return np.where(inside, value[rows, np.where(inside, target, 0)] - value[rows, degree[rows]], -np.inf)

"""Lagrangian view of edge selection: an upper bound on the optimum, and row degrees close to it.

Without column bounds a row of degree t keeps its t best edges, so it is worth
``V_i(t) = (sum of its t largest scores) - attachment * f(t / n_cols)`` and only the degrees are
to be chosen: ``max sum_i V_i(t_i), sum_i t_i = k``. Pricing the budget at mu separates the rows;
every mu gives the upper bound ``sum_i max_t (V_i(t) - mu t) + mu k``.

Shape legend: r rows, c columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.edges.common import candidate_value, row_limits
from topoprune_solvers.problems import EdgeSelection

__all__ = ["RowValues", "budget_price", "repair_degrees", "row_values"]

BISECTIONS = 60
EXCHANGES = 2000


@dataclass(frozen=True)
class RowValues:
    """What each row is worth at each degree.

    Args:
        order: (r, c) int64, columns of each row by descending score, ties to the lower column.
        value: (r, c + 1) float64, V_i(t); -inf at degrees that bounds or `allowed` rule out.
    """

    order: np.ndarray
    value: np.ndarray

    def mask(self, degree: np.ndarray) -> np.ndarray:
        """Return the (r, c) mask that keeps the best `degree` edges of each row."""
        keep = np.zeros(self.order.shape, dtype=bool)
        np.put_along_axis(keep, self.order, np.arange(self.order.shape[1]) < degree[:, None], axis=1)
        return keep


def row_values(problem: EdgeSelection) -> RowValues:
    """Tabulate V_i(t) of all rows and degrees; column bounds are ignored (a relaxation). O(r c log c)."""
    rows, cols = problem.shape
    score = candidate_value(problem, problem.score)
    order = np.argsort(-score, axis=1, kind="stable")
    value = np.zeros((rows, cols + 1))
    np.cumsum(np.take_along_axis(score, order, axis=1), axis=1, out=value[:, 1:])
    degree = np.arange(cols + 1)
    if problem.attachment:
        value -= problem.attachment * problem.degree_cost(degree)
    low, high = row_limits(problem)
    if np.any(low > 0) or np.any(high < cols):
        value[(degree < low[:, None]) | (degree > high[:, None])] = -np.inf
    return RowValues(order, value)


def budget_price(table: RowValues, k: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Minimise the Lagrangian bound over the price of an edge, by bisection.

    Rows whose degree agrees at both ends of the price interval are settled (degrees fall as the
    price rises) and leave the computation.

    Returns:
        The upper bound on the optimum, and the (r,) degrees at a price slightly above and
        slightly below the best one; their sums enclose k.
    """
    value = table.value
    rows, width = value.shape
    if width == 1 or rows == 0:
        nothing = np.zeros(rows, dtype=np.int64)
        return float(value[:, 0].sum()) if rows else 0.0, nothing, nothing
    with np.errstate(invalid="ignore"):
        steps = np.diff(value, axis=1)
    steps = steps[np.isfinite(steps)]
    reach = 1.0 + np.abs(steps).max(initial=0.0)
    cheap, dear = -reach, reach
    degree = np.arange(width)
    at_dear, at_cheap = (value - dear * degree).argmax(axis=1), (value - cheap * degree).argmax(axis=1)
    best = min(_bound(value, at_dear, dear, k), _bound(value, at_cheap, cheap, k))
    for _ in range(BISECTIONS):
        price = (cheap + dear) / 2
        open_rows = np.flatnonzero(at_dear != at_cheap)
        if open_rows.size == 0 or not cheap < price < dear:
            break
        at_price = at_dear.copy()
        at_price[open_rows] = (value[open_rows] - price * degree).argmax(axis=1)
        best = min(best, _bound(value, at_price, price, k))
        total = int(at_price.sum())
        if total == k:
            return _rounded_up(best, value, at_price), at_price, at_price
        if total > k:
            cheap, at_cheap = price, at_price
        else:
            dear, at_dear = price, at_price
    return _rounded_up(best, value, at_dear), at_dear, at_cheap


def repair_degrees(table: RowValues, k: int, fewer: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Return (r,) degrees that sum to exactly k, near the two degree vectors of `budget_price`.

    At the best price the rows that differ are worth the same at both degrees: they move from
    `fewer` to `more` while they fit, largest first. The rest goes to one row or to the best
    single edges, whichever is worth more; single-edge exchanges follow while they gain.
    """
    degree = fewer.copy()
    missing = k - int(degree.sum())
    jump = more - fewer
    for row in np.argsort(-jump, kind="stable").tolist():
        if 0 < jump[row] <= missing:
            degree[row] += jump[row]
            missing -= int(jump[row])
    if missing > 0:
        options = [_one_by_one(table.value, degree, missing), *_in_one_row(table.value, degree, missing)]
        degree = max(options, key=lambda option: float(_pick(table.value, option).sum()))
    return _exchange(table.value, degree)


def _pick(value: np.ndarray, degree: np.ndarray) -> np.ndarray:
    return np.take_along_axis(value, degree[:, None], axis=1)[:, 0]


def _bound(value: np.ndarray, degree: np.ndarray, price: float, k: int) -> float:
    return float((_pick(value, degree) - price * degree).sum() + price * k)


def _rounded_up(bound: float, value: np.ndarray, degree: np.ndarray) -> float:
    # Up, by more than the sums above can have lost: keeps the bound above the true optimum.
    return bound + 1e-13 * float(np.abs(_pick(value, degree)).sum())


def _gain(value: np.ndarray, degree: np.ndarray, change: int) -> np.ndarray:
    # (r,) worth of changing each degree by `change`; -inf where that leaves the table or a bound.
    target = degree + change
    inside = (target >= 0) & (target < value.shape[1])
    return np.where(inside, _pick(value, np.where(inside, target, degree)) - _pick(value, degree), -np.inf)


def _one_by_one(value: np.ndarray, degree: np.ndarray, missing: int) -> np.ndarray:
    degree = degree.copy()
    gain = _gain(value, degree, 1)
    for _ in range(missing):
        row = int(gain.argmax())
        degree[row] += 1
        step = _gain(value[row : row + 1], degree[row : row + 1], 1)
        gain[row] = step[0]
    return degree


def _in_one_row(value: np.ndarray, degree: np.ndarray, missing: int) -> list[np.ndarray]:
    gain = _gain(value, degree, missing)
    row = int(gain.argmax())
    if not np.isfinite(gain[row]):
        return []
    whole = degree.copy()
    whole[row] += missing
    return [whole]


def _exchange(value: np.ndarray, degree: np.ndarray) -> np.ndarray:
    # Move one edge from one row to another while the total grows.
    degree = degree.copy()
    if len(degree) < 2:
        return degree
    for _ in range(EXCHANGES):
        add, drop = _gain(value, degree, 1), _gain(value, degree, -1)
        to_row, from_row = int(add.argmax()), int(drop.argmax())
        if to_row == from_row:
            second_add, second_drop = add.copy(), drop.copy()
            second_add[to_row] = second_drop[to_row] = -np.inf
            if second_add.max() + drop[from_row] >= add[to_row] + second_drop.max():
                to_row = int(second_add.argmax())
            else:
                from_row = int(second_drop.argmax())
        worth = add[to_row] + drop[from_row]
        if not worth > 1e-12 * (abs(add[to_row]) + abs(drop[from_row])):
            break
        degree[to_row] += 1
        degree[from_row] -= 1
    return degree

"""Lagrangian view of edge selection: what each row is worth at each degree, and the best price of an edge.

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
from topoprune_solvers.edges.sorting import keep_best, sorted_lines
from topoprune_solvers.problems import EdgeSelection

__all__ = ["BudgetPrice", "RowValues", "budget_price", "row_values"]

STEPS = 120  # price steps at most; 10 to 30 are usual


@dataclass(frozen=True, eq=False)
class RowValues:
    """What each row is worth at each degree.

    Args:
        score: (r, c) float64, -inf where an edge is not allowed. ordered: (r, c), its rows in ascending order.
        value: (r, c + 1) float64, V_i(t); -inf at degrees that bounds or `allowed` rule out.
    """

    score: np.ndarray
    ordered: np.ndarray
    value: np.ndarray

    def mask(self, degree: np.ndarray) -> np.ndarray:
        """Return the (r, c) mask that keeps the best `degree` edges of each row; ties to the lower column."""
        return keep_best(self.score, self.ordered, degree, 1)


@dataclass(frozen=True, eq=False)
class BudgetPrice:
    """The price of an edge at which the Lagrangian bound is lowest.

    Args:
        bound: upper bound on the optimum. price: of one edge, in units of score.
        fewer, more: (r,) int64, best degrees slightly above and slightly below the price; their sums enclose k.
    """

    bound: float
    price: float
    fewer: np.ndarray
    more: np.ndarray


def row_values(problem: EdgeSelection) -> RowValues:
    """Tabulate V_i(t) of all rows and degrees; column bounds are ignored (a relaxation). O(r c log c)."""
    rows, cols = problem.shape
    score = candidate_value(problem, problem.score)
    ordered = sorted_lines(score, 1)
    value = np.zeros((rows, cols + 1))
    np.cumsum(ordered[:, ::-1], axis=1, out=value[:, 1:])
    degree = np.arange(cols + 1)
    if problem.attachment:
        value -= problem.attachment * problem.degree_cost(degree)
    low, high = row_limits(problem)
    if np.any(low > 0) or np.any(high < cols):
        value[(degree < low[:, None]) | (degree > high[:, None])] = -np.inf
    return RowValues(score, ordered, value)


def budget_price(table: RowValues, k: int) -> BudgetPrice:
    """Minimise the Lagrangian bound over the price of an edge.

    The bound is convex and piecewise linear in the price. The next price is where the lines at
    both ends of the interval cross; if the bound there lies on the crossing, it is the minimum, exactly.
    Every third step halves the interval instead. Degrees fall as the price rises: a row whose degree agrees at both
    ends leaves the computation, and the others are only looked at between their two degrees.
    """
    value = table.value
    rows, width = value.shape
    if width == 1 or rows == 0:
        nothing = np.zeros(rows, dtype=np.int64)
        return BudgetPrice(float(value[:, 0].sum()) if rows else 0.0, 0.0, nothing, nothing)
    finite = np.isfinite(value)
    at_dear, at_cheap = finite.argmax(axis=1), width - 1 - finite[:, ::-1].argmax(axis=1)  # at a price of +-infinity
    dear, cheap = _Line.of(value, at_dear, np.inf), _Line.of(value, at_cheap, -np.inf)
    for end in (dear, cheap):
        if end.edges == k:
            return BudgetPrice(_rounded_up(end.worth, value, end.degree), 0.0, end.degree, end.degree)
    best, best_price = np.inf, 0.0
    for step in range(STEPS):
        open_rows = np.flatnonzero(dear.degree != cheap.degree)
        price = (cheap.worth - dear.worth) / (cheap.edges - dear.edges)
        halving = step % 3 == 2 and np.isfinite(dear.price - cheap.price)
        if halving:
            price = (cheap.price + dear.price) / 2
        first, last = int(dear.degree[open_rows].min()), int(cheap.degree[open_rows].max()) + 1
        at_price = dear.degree.copy()
        window = value[open_rows, first:last] - price * np.arange(first, last)
        at_price[open_rows] = first + window.argmax(axis=1)
        line = _Line.of(value, at_price, price)
        bound = line.worth + price * (k - line.edges)
        if bound < best:
            best, best_price = bound, price
        if line.edges == k:
            return BudgetPrice(_rounded_up(best, value, line.degree), price, line.degree, line.degree)
        settled = not halving and line.edges in (dear.edges, cheap.edges)  # both lines meet the bound here
        if line.edges > k:
            cheap = line
        else:
            dear = line
        if settled or not cheap.price < dear.price:
            break
    return BudgetPrice(_rounded_up(best, value, dear.degree), best_price, dear.degree, cheap.degree)


@dataclass(frozen=True, eq=False)
class _Line:
    # The part of the bound that is linear in the price around one price: worth + price * (k - edges).
    degree: np.ndarray
    price: float
    worth: float
    edges: int

    @classmethod
    def of(cls, value: np.ndarray, degree: np.ndarray, price: float) -> _Line:
        worth = float(value[np.arange(degree.size), degree].sum())
        return cls(degree, price, worth, int(degree.sum()))


def _rounded_up(bound: float, value: np.ndarray, degree: np.ndarray) -> float:
    # Up, by more than the sums above can have lost: keeps the bound above the true optimum.
    return bound + 1e-12 * float(np.abs(value[np.arange(degree.size), degree]).sum())

"""Prices for two-sided degree bounds: alternating exact minimisation of the dual over rows and over columns.

With a price p_i for every row, v_j for every column and mu for every edge, the selection splits into single edges:
``sum_ij max(0, s_ij - p_i - v_j - mu) + mu k + sum_i max(p_i row_min_i, p_i row_max_i) + (the same for columns)``
is an upper bound on the optimum for any prices. At fixed column prices the best row prices and mu follow from one
sorting of the rows, and the other way round; edges far from zero reduced score are as good as decided.

Shape legend: r rows, c columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.edges.common import candidate_value, column_limits, row_limits
from topoprune_solvers.edges.sorting import ranks_between
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["LinePrices", "PriceSearch"]


@dataclass(frozen=True, eq=False)
class LinePrices:
    """Dual prices and what they prove.

    Args:
        row: (r,) float64. column: (c,) float64. edge: mu. All in units of score.
        bound: upper bound on the optimum.
        reduced: (r, c) float64, score less the three prices; -inf where an edge is not allowed.
    """

    row: np.ndarray
    column: np.ndarray
    edge: float
    bound: float
    reduced: np.ndarray


class PriceSearch:
    """Block coordinate descent on the dual of a two-sided edge selection; it can be continued.

    Each half round is exact given the other side's prices, so the dual never rises; a matrix with many
    distinct scores behaves almost smoothly and converges linearly. With many ties it may stop early,
    at a bound that is valid but not the best.

    Args:
        problem: attachment is ignored.

    Complexity: O(n log max(r, c)) a round; three copies of the score matrix.
    """

    def __init__(self, problem: EdgeSelection) -> None:
        self._problem = problem
        self._limits = row_limits(problem), column_limits(problem)
        score = candidate_value(problem, problem.score)
        self._lines = score, np.ascontiguousarray(score.T)
        self._work = np.empty(score.shape), np.empty(score.shape[::-1])
        self._prices = [np.zeros(problem.shape[0]), np.zeros(problem.shape[1])]
        self._edge = 0.0
        self.rounds = 0

    def improve(self, rounds: int, tolerance: float = 0.0, deadline: Deadline = NEVER) -> LinePrices:
        """Run at most `rounds` rounds, one at least; stop once a round gains less than `tolerance` of the bound."""
        best: LinePrices | None = None
        for _ in range(rounds):
            self._half(0)
            self._half(1)
            self.rounds += 1
            last, best = best, self._state()
            if deadline.passed():
                break
            if last is not None and last.bound - best.bound <= tolerance * abs(best.bound):
                break
        assert best is not None, "one round at least"
        return best

    def _half(self, side: int) -> None:
        lines, work = self._lines[side], self._work[side]
        np.subtract(lines, self._prices[1 - side], out=work)
        work.sort(axis=1)
        low, high = self._limits[side]
        price, self._edge = _best_prices(work, self._problem.k, low, high)
        self._prices[side] = price - self._edge

    def _state(self) -> LinePrices:
        row, column = self._prices
        reduced = self._lines[0] - (row + self._edge)[:, None]
        reduced -= column
        positive = float(np.maximum(reduced, 0.0, out=self._work[0]).sum())
        parts = [positive, self._edge * self._problem.k]
        for price, (low, high) in zip((row, column), self._limits, strict=True):
            parts.append(float(np.where(price > 0, price * high, price * low).sum()))
        # Up, by more than the sums above can have lost: keeps the bound above the true optimum.
        slack = 1e-12 * (sum(abs(part) for part in parts) + float(np.abs(row).sum() + np.abs(column).sum()))
        return LinePrices(row, column, self._edge, sum(parts) + slack, reduced)


def _best_prices(ordered: np.ndarray, k: int, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, float]:
    # Price of an edge in each line (mu included), and mu: a line whose degree at mu is within its bounds pays mu,
    # the others pay what brings them to their bound, in the middle between the last edge kept and the next.
    lines, width = ordered.shape
    every = np.arange(lines)

    def ranked(rank: np.ndarray, beyond: float) -> np.ndarray:
        # Value of the edge of 1-based rank in each line.
        inside = (rank >= 1) & (rank <= width)
        return np.where(inside, ordered[every, np.where(inside, width - rank, 0)], beyond)

    ceiling = ranked(low, np.inf), ranked(low + 1, -np.inf)  # an edge may cost as much as the first of these
    floor = ranked(high, np.inf), ranked(high + 1, -np.inf)  # and no less than the second of these
    left = k - int(low.sum())
    if left:
        pool = ranks_between(ordered, low, high)
        mu = float(np.partition(pool, pool.size - left)[pool.size - left])
    else:
        kept = ceiling[0][np.isfinite(ceiling[0])]
        mu = float(np.median(kept)) if kept.size else 0.0
    price = np.full(lines, mu)
    dear, cheap = mu > ceiling[0], mu < floor[1]
    price[dear] = _middle(ceiling[0][dear], ceiling[1][dear])
    price[cheap] = _middle(floor[0][cheap], floor[1][cheap])
    return price, mu


def _middle(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    # Halfway, or the finite one where a line has no edge on the other side.
    with np.errstate(invalid="ignore"):
        middle = above / 2 + below / 2
    return np.where(np.isfinite(middle), middle, np.where(np.isfinite(above), above, below))

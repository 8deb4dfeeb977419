"""The open part of a quadratic subset problem, and its budget as a polytope: linear minima and projections.

Rows of a batch are independent (nodes of a search). Shape legend: b rows of a batch, f open units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.problems import QuadraticSubset

__all__ = ["OpenPart"]

ROUNDS = 20


@dataclass(frozen=True, eq=False)
class OpenPart:
    """Choose x in {0, 1}^f (1 = pruned) with least ``x^T Q x + q^T x + constant`` within the budget.

    Args:
        units: (f,) int64, the open units. quadratic: (f, f) float64. linear: (f,) float64. constant: float.
        count: number of open units to prune, or None.
        cost: (f,) float64 and need: ``cost @ x >= need``; None and 0 where `count` is given.
    """

    problem: QuadraticSubset
    units: np.ndarray
    quadratic: np.ndarray
    linear: np.ndarray
    constant: float
    count: int | None
    cost: np.ndarray | None
    need: float

    @classmethod
    def of(cls, problem: QuadraticSubset) -> OpenPart:
        """Take forced and forbidden units out; the Gram is copied only where there are some. O(n^2)."""
        assert problem.forced is not None and problem.forbidden is not None
        units = np.flatnonzero(~problem.forced & ~problem.forbidden)
        gone = np.flatnonzero(problem.forbidden)
        whole = units.size == problem.n
        quadratic = problem.gram if whole else problem.gram[np.ix_(units, units)]
        linear = 2 * problem.gram[np.ix_(units, gone)].sum(axis=1)
        constant = float(problem.gram[np.ix_(gone, gone)].sum())
        if problem.k is not None:
            count = problem.n - problem.k - gone.size
            return cls(problem, units, quadratic, linear, constant, count, None, 0.0)
        assert problem.cost is not None and problem.budget is not None
        need = float(problem.cost[~problem.forbidden].sum()) - problem.budget - problem.cost_slack
        return cls(problem, units, quadratic, linear, constant, None, problem.cost[units], max(need, 0.0))

    @property
    def f(self) -> int:
        """Number of open units."""
        return int(self.units.size)

    def pruned(self, x: np.ndarray) -> np.ndarray:
        """Return the (n,) pruned mask of an (f,) 0/1 vector."""
        assert self.problem.forbidden is not None
        mask = self.problem.forbidden.copy()
        mask[self.units] = x > 0.5
        return mask

    def least(self, slope: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return (b,) minima of ``slope . x`` over the budget polytope, ``low <= x <= high``; inf where it is empty.

        Args:
            slope: (b, f). low, high: (b, f) of 0 and 1. O(b f log f).
        """
        fixed = (slope * low).sum(axis=1)
        free = (high > low).astype(bool)
        rows = np.arange(slope.shape[0])
        if self.count is not None:
            missing = self.count - low.sum(axis=1).astype(np.int64)
            ordered = np.sort(np.where(free, slope, np.inf), axis=1)
            sums = np.concatenate([np.zeros((rows.size, 1)), np.cumsum(ordered, axis=1)], axis=1)
            inside = (missing >= 0) & (missing <= free.sum(axis=1))
            return np.where(inside, fixed + sums[rows, np.clip(missing, 0, self.f)], np.inf)
        assert self.cost is not None
        take = free & (slope <= 0)  # worth pruning whatever the budget says
        fixed = fixed + np.where(take, slope, 0.0).sum(axis=1)
        missing = self.need - ((low + take) * self.cost).sum(axis=1)
        useful = free & ~take & (self.cost > 0)
        ratio = np.full(slope.shape, np.inf)
        np.divide(slope, self.cost, out=ratio, where=useful)
        order = np.argsort(ratio, axis=1, kind="stable")
        freed = np.cumsum(np.take_along_axis(np.where(useful, self.cost, 0.0), order, axis=1), axis=1)
        paid = np.cumsum(np.take_along_axis(np.where(useful, slope, 0.0), order, axis=1), axis=1)
        total = np.zeros(rows.size)
        for row in np.flatnonzero(missing > 0).tolist():
            # Linear between two units: the last one counts in part.
            if self.f == 0 or freed[row, -1] < missing[row]:
                total[row] = np.inf
            else:
                total[row] = np.interp(missing[row], np.append(0.0, freed[row]), np.append(0.0, paid[row]))
        return fixed + total

    def project(self, x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Return the (b, f) points of the budget polytope nearest to the rows of x, by a guarded Newton search. O(b f).

        Only nearly exact: the bounds derived from the points hold at any point.
        """
        if self.f == 0:
            return x
        direction = np.ones(self.f) if self.cost is None else self.cost
        target = float(self.need if self.count is None else self.count)
        reach = (np.abs(x).max(axis=1) + 1.0) / max(float(direction.max()), 1e-300)
        if self.count is not None:
            below, above = -reach, reach
        else:
            # Units of small cost need a large price before they move.
            least = direction[direction > 0].min(initial=1.0)
            below, above = np.zeros(x.shape[0]), reach * float(direction.max()) / least
        price = np.zeros(x.shape[0])
        for _ in range(ROUNDS):
            moved = x + price[:, None] * direction
            inside = (moved > low) & (moved < high)
            short = target - np.clip(moved, low, high) @ direction
            above = np.where(short <= 0, price, above)
            below = np.where(short > 0, price, below)
            if np.all(np.abs(short) <= 1e-12 * max(target, 1.0)):
                break
            # Newton on a piecewise linear function; bisection where it leaves the bracket.
            rate = inside @ (direction * direction)
            price = price + np.divide(short, rate, out=np.full(x.shape[0], np.inf), where=rate > 0)
            price = np.where((price > below) & (price < above), price, (below + above) / 2)
        if self.count is None:
            price = np.where(np.clip(x, low, high) @ direction >= target, 0.0, price)
        return np.clip(x + price[:, None] * direction, low, high)

"""Groups of units with bounds: what may still be added to a selection, and the best way to fill it up.

A selection is *extendable* if units can be added until exactly k stay and every group is within its bounds:
no group is above its upper bound, and what the groups still need fits into k. Extendable selections are the
independent sets of a matroid (a truncated partition matroid with lower bounds), so adding units in
descending order of a value, skipping those that no longer fit, gives the selection of largest value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from topoprune_solvers.csr import read_only

__all__ = ["Groups"]


@dataclass(frozen=True, eq=False)
class Groups:
    """The bounds of a budgeted problem, in a form that algorithms need not tell from a plain budget.

    Args:
        label: (n,) int64. low: (g,) int64. high: (g,) int64. k: units to keep.
    """

    label: np.ndarray
    low: np.ndarray
    high: np.ndarray
    k: int

    @classmethod
    def of(cls, problem: Any) -> Groups:
        """Read the bounds of a `BudgetProblem`; without groups there is one, of exactly k units."""
        label, low, high = problem.limits()
        return cls(read_only(label), low, high, problem.k)

    @property
    def single(self) -> bool:
        """Whether all units form one group: a plain budget."""
        return self.low.size == 1 and int(self.low[0]) == int(self.high[0]) == self.k

    def count(self, keep: np.ndarray) -> np.ndarray:
        """Return (g,) int64: kept units of each group."""
        return np.bincount(self.label[keep], minlength=self.low.size)

    def slack(self, count: np.ndarray) -> int:
        """Return how many units of k are not yet spoken for by kept units or by groups below their lower bound."""
        return self.k - int(np.maximum(self.low, count).sum())

    def extendable(self, keep: np.ndarray) -> bool:
        """Return True if units can be added to the selection until it is feasible."""
        count = self.count(keep)
        return bool(np.all(count <= self.high)) and self.slack(count) >= 0

    def extend(self, keep: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Return `keep` with units added in the given order, those skipped that no longer fit.

        Args:
            keep: (n,) bool, extendable.
            order: units to add, without repetition and without forbidden units. With all allowed units the
                result is feasible, and of largest value if the order is by descending value.

        Complexity: O(n log n); O(n) without groups.
        """
        full = keep.copy()
        order = order[~keep[order]]
        if self.single:
            full[order[: self.k - int(keep.sum())]] = True
            return full
        count, label = self.count(keep), self.label[order]
        rank = _rank(label)
        needed = rank < np.maximum(self.low - count, 0)[label]
        spare = np.flatnonzero(~needed & (rank < (self.high - count)[label]))
        full[order[needed]] = True
        full[order[spare[: self.slack(count)]]] = True
        return full

    def fill(self, problem: Any, keep: np.ndarray) -> np.ndarray:
        """Return `keep` filled up to k with the most important allowed units, ties to the lower index."""
        order = np.argsort(-problem.importance, kind="stable")
        return self.extend(keep, order[~problem.forbidden[order]])

    def cut(self, problem: Any, start: np.ndarray, value: np.ndarray) -> np.ndarray:
        """Return an extendable part of a start: the forced units, then by descending value what fits."""
        units = np.flatnonzero(start & ~problem.forbidden)
        return self.extend(problem.forced, units[np.argsort(-value[units], kind="stable")])

    def fits(self, keep: np.ndarray) -> np.ndarray:
        """Return (n,) bool: units outside an extendable selection that may be added to it."""
        count = self.count(keep)
        open_group = (count < self.high) & ((count < self.low) | (self.slack(count) > 0))
        return ~keep & open_group[self.label]

    def separate(self, indptr: np.ndarray, indices: np.ndarray) -> bool:
        """Return True if no edge joins two groups. O(n + nnz)."""
        return bool(np.all(np.repeat(self.label, np.diff(indptr)) == self.label[indices]))

    def selections(self, forced: np.ndarray, free: np.ndarray, limit: int) -> Iterator[tuple[int, ...]] | None:
        """Return all ways to complete the forced units, as tuples of free units; None if there are more than `limit`.

        Args:
            forced: (n,) bool, extendable. free: units that may be added. limit: selections.
        """
        count = self.count(forced)
        members = [free[self.label[free] == group].tolist() for group in range(self.low.size)]
        low = np.maximum(self.low - count, 0).tolist()
        high = [min(int(h), len(m)) for h, m in zip(self.high - count, members, strict=True)]
        need = self.k - int(forced.sum())
        if _number(members, low, high, need, limit) > limit:
            return None
        return _each(members, low, high, need)


def _rank(label: np.ndarray) -> np.ndarray:
    """Return for each entry how many earlier ones have the same label.

    >>> _rank(np.array([1, 0, 1, 1])).tolist()
    [0, 0, 1, 2]
    """
    order = np.argsort(label, kind="stable")
    first = np.searchsorted(label[order], label[order])
    rank = np.empty(label.size, dtype=np.int64)
    rank[order] = np.arange(label.size) - first
    return rank


def _number(members: list[list[int]], low: list[int], high: list[int], need: int, limit: int) -> float:
    """Count the selections by convolving the groups' binomial counts; anything above `limit` counts as limit + 1.

    >>> _number([[0, 1], [2, 3]], [0, 0], [2, 2], 2, 100)
    6.0
    """
    ways = np.zeros(need + 1)
    ways[0] = 1.0
    for units, least, most in zip(members, low, high, strict=True):
        most = min(most, need)
        own = [float(min(comb(len(units), size), limit + 1)) if size >= least else 0.0 for size in range(most + 1)]
        ways = np.minimum(np.convolve(ways, own)[: need + 1], limit + 1)
    return float(ways[need])


def _each(members: list[list[int]], low: list[int], high: list[int], need: int) -> Iterator[tuple[int, ...]]:
    if not members:
        if need == 0:
            yield ()
        return
    later_low, later_high = sum(low[1:]), sum(high[1:])
    for size in range(max(low[0], need - later_high), min(high[0], need - later_low) + 1):
        for own in combinations(members[0], size):
            for others in _each(members[1:], low[1:], high[1:], need - size):
                yield own + others

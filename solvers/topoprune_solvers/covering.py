"""Dominating set seen as set cover: unit j covers the units of its closed neighbourhood N[j].

`Cover` is the array form all cover algorithms work on. It is cheap to build, so the k-centre
search can make one per threshold without checking the graph again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.problems import DominatingSet

__all__ = ["Cover", "closed_rows", "cover_of", "is_integral"]


@dataclass(frozen=True, eq=False)
class Cover:
    """A covering instance on n units.

    Args:
        indptr: (n + 1,) int. indices: closed neighbourhoods, the unit itself first in its row.
        cost: (n,) float64 >= 0. forced: (n,) bool. forbidden: (n,) bool.
    """

    indptr: np.ndarray
    indices: np.ndarray
    cost: np.ndarray
    forced: np.ndarray
    forbidden: np.ndarray

    @property
    def n(self) -> int:
        """Number of units."""
        return int(self.indptr.size - 1)

    def row(self, unit: int) -> np.ndarray:
        """Return the closed neighbourhood of a unit."""
        return self.indices[self.indptr[unit] : self.indptr[unit + 1]]

    def counts(self, keep: np.ndarray) -> np.ndarray:
        """Return (n,) int: how many kept units cover each unit. O(n + nnz)."""
        if not self.n:
            return np.zeros(0, dtype=np.int64)
        # Rows are never empty (they hold the unit itself), which reduceat needs.
        return np.add.reduceat(keep[self.indices].astype(np.int64), self.indptr[:-1])

    def coverable(self) -> bool:
        """Return True if the allowed units together cover everything."""
        return bool(np.all(self.counts(~self.forbidden) > 0))


def closed_rows(indptr: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return closed (indptr, indices) with the unit first in each row, and the positions of the old entries.

    >>> closed_rows(np.array([0, 1, 2]), np.array([1, 0]))[1].tolist()
    [0, 1, 1, 0]
    """
    n = indptr.size - 1
    own = indptr[:-1].astype(np.int64) + np.arange(n)
    others = np.ones(indices.size + n, dtype=bool)
    others[own] = False
    closed = np.empty(indices.size + n, dtype=np.int64)
    closed[own] = np.arange(n)
    closed[others] = indices
    return indptr.astype(np.int64) + np.arange(n + 1), closed, np.flatnonzero(others)


def cover_of(problem: DominatingSet) -> Cover:
    """Return the covering instance of a dominating-set problem."""
    assert problem.cost is not None and problem.forced is not None and problem.forbidden is not None
    indptr, indices, _ = closed_rows(problem.indptr, problem.indices)
    return Cover(indptr, indices, problem.cost, problem.forced, problem.forbidden)


def is_integral(cost: np.ndarray) -> bool:
    """Return True if all costs are integers whose sum a float64 holds exactly, so bounds may be rounded up."""
    return bool(cost.size == 0 or (np.all(cost == np.floor(cost)) and cost.sum() < 2.0**53))

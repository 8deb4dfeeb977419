"""What all problems on the units of one layer share: a graph, forced and forbidden units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.csr import check_adjacency, read_only
from topoprune_solvers.solution import Infeasible

__all__ = ["UnitProblem", "vector"]


def vector(name: str, value: np.ndarray | None, n: int, default: float, dtype: type) -> np.ndarray:
    """Return a read-only (n,) array: `value`, or `default` everywhere; ValueError for another shape or no number."""
    array: np.ndarray = np.full(n, default, dtype=dtype) if value is None else np.asarray(value, dtype=dtype)
    if array.shape != (n,):
        raise ValueError(f"{name} has shape {array.shape}, expected ({n},)")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite; entry {int(np.flatnonzero(~np.isfinite(array))[0])} is not")
    return read_only(array)


@dataclass(frozen=True, eq=False)
class UnitProblem:
    """Shared fields: a symmetric, loop-free CSR graph on n units, forced and forbidden units.

    Args:
        indptr: (n + 1,) int32. indices: (nnz,) int32. weight: (nnz,) float64 distances >= 0
            (small = alike); all 0 if omitted.
        forced: (n,) bool, units that must stay. forbidden: (n,) bool, units that must go.
    """

    indptr: np.ndarray
    indices: np.ndarray
    weight: np.ndarray | None = None
    forced: np.ndarray | None = None
    forbidden: np.ndarray | None = None

    def __post_init__(self) -> None:
        indptr = np.asarray(self.indptr, dtype=np.int32)
        indices = np.asarray(self.indices, dtype=np.int32)
        weight = np.zeros(indices.shape) if self.weight is None else np.asarray(self.weight, dtype=np.float64)
        check_adjacency(indptr, indices, weight)
        if weight.size and weight.min() < 0:
            raise ValueError(f"edge weights are distances and must be >= 0, found {weight.min():g}")
        n = indptr.size - 1
        for name, array in (("indptr", indptr), ("indices", indices), ("weight", weight)):
            object.__setattr__(self, name, read_only(array))
        for name in ("forced", "forbidden"):
            object.__setattr__(self, name, vector(name, getattr(self, name), n, 0, bool))
        both = np.flatnonzero(self.forced & self.forbidden)  # type: ignore[operator]
        if both.size:
            raise Infeasible(f"units {both.tolist()[:10]} are both forced and forbidden")

    @property
    def n(self) -> int:
        """Number of units."""
        return int(self.indptr.size - 1)

    def neighbours(self, unit: int) -> np.ndarray:
        """Return the (degree,) int32 neighbours of a unit, without the unit itself."""
        return self.indices[self.indptr[unit] : self.indptr[unit + 1]]

    def distances(self, unit: int) -> np.ndarray:
        """Return the (degree,) float64 edge weights in the order of `neighbours`."""
        assert self.weight is not None
        return self.weight[self.indptr[unit] : self.indptr[unit + 1]]

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with an (n,) keep mask, or None. O(n + nnz)."""
        if np.any(self.forced & ~keep):  # type: ignore[operator]
            return "a forced unit was pruned"
        if np.any(self.forbidden & keep):  # type: ignore[operator]
            return "a forbidden unit was kept"
        return None

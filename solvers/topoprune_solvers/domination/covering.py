"""Dominating set seen as set cover: unit j covers the units of its closed neighbourhood N[j].

`Cover` is a graph with masks: cheap to build, so the k-centre search can make one per threshold without
checking the graph again. `SetCover` is what is left to decide: candidates and elements have numbers of
their own, nothing is forced or forbidden any more. `open_part` leads from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from topoprune_solvers.problems import DominatingSet

__all__ = ["Cover", "OpenPart", "SetCover", "closed_rows", "cover_of", "open_part"]


@dataclass(frozen=True, eq=False)
class Cover:
    """A covering instance on n units.

    Args:
        indptr: (n + 1,) int. indices: closed neighbourhoods, the unit itself first in its row.
        cost: (n,) float64 >= 0. forced: (n,) bool. forbidden: (n,) bool.
        demand: (n,) int64 >= 0, how many kept units each closed neighbourhood needs; None for 1 each.
    """

    indptr: np.ndarray
    indices: np.ndarray
    cost: np.ndarray
    forced: np.ndarray
    forbidden: np.ndarray
    demand: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.demand is None:
            object.__setattr__(self, "demand", np.ones(self.n, dtype=np.int64))

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
        return bool(np.all(self.counts(~self.forbidden) >= self.demand))


@dataclass(frozen=True, eq=False)
class SetCover:
    """Choose candidates of least cost so that every element is covered as often as it demands.

    Both directions are stored, numbers ascending within each row and column.

    Args:
        row_start: (e + 1,) int64. row: (nnz,) int32, candidates of each element.
        col_start: (c + 1,) int64. col: (nnz,) int32, elements of each candidate.
        cost: (c,) float64 >= 0. demand: (e,) int64 >= 1.
    """

    row_start: np.ndarray
    row: np.ndarray
    col_start: np.ndarray
    col: np.ndarray
    cost: np.ndarray
    demand: np.ndarray

    @classmethod
    def from_rows(
        cls, row_start: np.ndarray, row: np.ndarray, cost: np.ndarray, demand: np.ndarray | None = None
    ) -> SetCover:
        """Build from the candidates of each element (ascending within an element). O(nnz)."""
        elements, candidates = row_start.size - 1, cost.size
        matrix = sparse.csr_array(
            (np.ones(row.size, dtype=np.int8), row.astype(np.int32), row_start.astype(np.int64)),
            shape=(elements, candidates),
        ).tocsc()
        return cls(
            row_start.astype(np.int64),
            row.astype(np.int32),
            matrix.indptr.astype(np.int64),
            matrix.indices.astype(np.int32),
            np.asarray(cost, dtype=np.float64),
            np.ones(elements, dtype=np.int64) if demand is None else np.asarray(demand, dtype=np.int64),
        )

    @property
    def n_elements(self) -> int:
        """Number of elements to cover."""
        return int(self.row_start.size - 1)

    @property
    def n_candidates(self) -> int:
        """Number of candidates to choose from."""
        return int(self.col_start.size - 1)

    def candidates(self, element: int) -> np.ndarray:
        """Return the candidates that cover an element."""
        return self.row[self.row_start[element] : self.row_start[element + 1]]

    def elements(self, candidate: int) -> np.ndarray:
        """Return the elements a candidate covers."""
        return self.col[self.col_start[candidate] : self.col_start[candidate + 1]]

    def counts(self, chosen: np.ndarray) -> np.ndarray:
        """Return (e,) int64: how many chosen candidates cover each element. O(nnz)."""
        hits = np.concatenate([[0], np.cumsum(chosen[self.row], dtype=np.int64)])
        return hits[self.row_start[1:]] - hits[self.row_start[:-1]]

    def is_cover(self, chosen: np.ndarray) -> bool:
        """Return True if a (c,) bool choice meets every demand. O(nnz)."""
        return bool(np.all(self.counts(chosen) >= self.demand))

    def value(self, chosen: np.ndarray) -> float:
        """Return the cost of a (c,) bool choice."""
        return float(self.cost[chosen].sum())


@dataclass(frozen=True, eq=False)
class OpenPart:
    """What is left of a `Cover` once its forced units stand and its forbidden ones are gone.

    Args:
        instance: the open decision; a candidate may cover nothing.
        units: (c,) original number of each candidate. elements: (e,) original number of each element.
        fixed: cost of the forced units.
    """

    instance: SetCover
    units: np.ndarray
    elements: np.ndarray
    fixed: float

    def keep(self, cover: Cover, chosen: np.ndarray) -> np.ndarray:
        """Return the (n,) bool keep mask of a (c,) bool choice: the forced units and the chosen ones."""
        keep = cover.forced.copy()
        keep[self.units[chosen]] = True
        return keep


def open_part(cover: Cover, ceiling: float = np.inf) -> OpenPart:
    """Return the open decision of a cover.

    Args:
        cover: the instance.
        ceiling: candidates dearer than this are left out (objective of a known cover: no better one has
            them, and huge costs stay out of solvers with limited precision).

    Complexity: O(n + nnz).

    Example:
        >>> from topoprune_solvers import DominatingSet
        >>> star = DominatingSet.from_edges(4, [(0, 1), (0, 2), (0, 3)], forced=np.array([False, True, False, False]))
        >>> part = open_part(cover_of(star))
        >>> part.elements.tolist(), part.units.tolist(), part.instance.candidates(0).tolist()
        ([2, 3], [0, 2, 3], [0, 1])
    """
    residual = cover.demand - cover.counts(cover.forced)
    units = np.flatnonzero(~cover.forced & ~cover.forbidden & (cover.cost <= ceiling))
    elements = np.flatnonzero(residual > 0)
    local = np.full(cover.n, -1, dtype=np.int32)
    local[units] = np.arange(units.size, dtype=np.int32)
    wanted = np.repeat(residual > 0, np.diff(cover.indptr))
    number = local[cover.indices]
    inside = wanted & (number >= 0)
    row = number[inside]
    owner = np.repeat(np.arange(cover.n), np.diff(cover.indptr))[inside]
    # closed rows hold the unit itself first: sort numbers within each row (one key is quicker than a lexsort)
    row = np.sort(owner * units.size + row) % max(1, units.size)
    start = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=cover.n)[elements])])
    instance = SetCover.from_rows(start, row, cover.cost[units], residual[elements])
    return OpenPart(instance, units, elements, float(cover.cost[cover.forced].sum()))


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
    assert problem.demand is not None and not isinstance(problem.demand, int)
    return Cover(indptr, indices, problem.cost, problem.forced, problem.forbidden, problem.demand)

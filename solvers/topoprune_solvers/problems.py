"""The decisions a pruning engine asks for, as plain arrays: no model, no torch.

======================  =========================================================
`DominatingSet`         A: the cheapest set of units that covers every unit
`BudgetedDomination`    B: exactly k units, smallest distance to the nearest kept one
`SoftDomination`        B: exactly k units, most importance explained by the kept ones
`EdgeSelection`         D: exactly k weight edges, attachment-weighted
======================  =========================================================

Problems are frozen and checked on construction; arrays are read-only. A problem without
any solution raises `Infeasible` on construction where that can be seen in linear time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from topoprune_solvers.csr import check_adjacency, read_only
from topoprune_solvers.solution import Infeasible, Sense

__all__ = ["BudgetedDomination", "DominatingSet", "EdgeSelection", "Problem", "SoftDomination"]


def _vector(name: str, value: np.ndarray | None, n: int, default: float, dtype: type) -> np.ndarray:
    array: np.ndarray = np.full(n, default, dtype=dtype) if value is None else np.asarray(value, dtype=dtype)
    if array.shape != (n,):
        raise ValueError(f"{name} has shape {array.shape}, expected ({n},)")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite; entry {int(np.flatnonzero(~np.isfinite(array))[0])} is not")
    return read_only(array)


@dataclass(frozen=True, eq=False)
class _UnitProblem:
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
            object.__setattr__(self, name, _vector(name, getattr(self, name), n, 0, bool))
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


@dataclass(frozen=True, eq=False)
class DominatingSet(_UnitProblem):
    """Problem A: minimise the cost of kept units so that every unit is kept or has a kept neighbour.

    Args:
        cost: (n,) float64 >= 0, default 1 each (minimum cardinality).
        Others as in every unit problem; `weight` only decides which kept neighbour is named
        as dominator (the nearest, ties to the lower index).

    Raises:
        Infeasible: a unit whose closed neighbourhood is forbidden throughout.

    Example:
        >>> path = DominatingSet.from_edges(3, [(0, 1), (1, 2)])
        >>> path.objective(np.array([False, True, False]))
        1.0
    """

    cost: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        cost = _vector("cost", self.cost, self.n, 1.0, np.float64)
        if cost.size and cost.min() < 0:
            raise ValueError(f"costs must be >= 0, found {cost.min():g} at unit {int(cost.argmin())}")
        object.__setattr__(self, "cost", cost)
        bare = np.flatnonzero(~self.covered(~self.forbidden))  # type: ignore[operator]
        if bare.size:
            raise Infeasible(f"units {bare.tolist()[:10]} and all their neighbours are forbidden")

    @classmethod
    def from_edges(cls, n: int, edges: object, **fields: object) -> DominatingSet:
        """Build from an (m, 2) edge list."""
        from topoprune_solvers.csr import adjacency_from_edges

        indptr, indices, _ = adjacency_from_edges(n, np.asarray(edges, dtype=np.int64).reshape(-1, 2))
        return cls(indptr, indices, **fields)  # type: ignore[arg-type]

    @property
    def sense(self) -> Sense:
        """This problem minimises."""
        return "min"

    def covered(self, keep: np.ndarray) -> np.ndarray:
        """Return (n,) bool: units that are kept or adjacent to a kept unit. O(n + nnz)."""
        hits = np.concatenate([[0], np.cumsum(keep[self.indices])])
        return keep | (hits[self.indptr[1:]] > hits[self.indptr[:-1]])

    def objective(self, keep: np.ndarray) -> float:
        """Return the total cost of the kept units."""
        assert self.cost is not None
        return float(self.cost[keep].sum())


@dataclass(frozen=True, eq=False)
class BudgetedDomination(_UnitProblem):
    """Problem B (hard): exactly k units, minimise the largest distance to a kept neighbour (k-centre).

    The objective is the largest edge weight between a pruned unit and its nearest kept
    neighbour; inf where a pruned unit has none, 0 where nothing is pruned.

    Args:
        k: number of units to keep, 0 <= k <= n (k = 0 only for n = 0).
        importance: (n,) float64, which units fill up a cover smaller than k; default all 0.

    Raises:
        Infeasible: k below the number of forced units or above the number of allowed ones.
    """

    k: int = 0
    importance: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "importance", _vector("importance", self.importance, self.n, 0.0, np.float64))
        _check_count(self.k, self.n, self.forced, self.forbidden)

    @property
    def sense(self) -> Sense:
        """This problem minimises."""
        return "min"

    def objective(self, keep: np.ndarray) -> float:
        """Return the covering radius of the kept units. O(n + nnz)."""
        assert self.weight is not None
        reach = np.where(keep, 0.0, np.inf)
        rows = np.repeat(np.arange(self.n), np.diff(self.indptr))
        kept = keep[self.indices]
        np.minimum.at(reach, rows[kept], self.weight[kept])
        return float(reach.max(initial=0.0))


@dataclass(frozen=True, eq=False)
class SoftDomination(_UnitProblem):
    """Problem B (soft): exactly k units, maximise the importance the kept ones explain.

    Facility location: ``max_S sum_i importance_i * max_{j in S} similarity_ij`` with
    similarity_ii = 1, similarity_ij = 1 - weight_ij on edges and 0 elsewhere.

    Args:
        k: number of units to keep.
        importance: (n,) float64 >= 0, e.g. output energy; default all 1.
        weight: as in every unit problem, here in [0, 1].

    Raises:
        ValueError: weights above 1 (the measure has no similarity in [0, 1]) or negative importance.
        Infeasible: as in `BudgetedDomination`.
    """

    k: int = 0
    importance: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        importance = _vector("importance", self.importance, self.n, 1.0, np.float64)
        object.__setattr__(self, "importance", importance)
        if importance.size and importance.min() < 0:
            raise ValueError(f"importance must be >= 0, found {importance.min():g} at unit {int(importance.argmin())}")
        assert self.weight is not None
        if self.weight.size and self.weight.max() > 1 + 1e-9:
            raise ValueError(
                f"soft domination needs distances in [0, 1], found {self.weight.max():g}; "
                "use a normalised measure such as 'output-gram' or the k-centre objective"
            )
        _check_count(self.k, self.n, self.forced, self.forbidden)

    @property
    def sense(self) -> Sense:
        """This problem maximises."""
        return "max"

    def objective(self, keep: np.ndarray) -> float:
        """Return the explained importance of the kept units. O(n + nnz)."""
        assert self.weight is not None and self.importance is not None
        best = keep.astype(np.float64)
        rows = np.repeat(np.arange(self.n), np.diff(self.indptr))
        kept = keep[self.indices]
        np.maximum.at(best, rows[kept], np.clip(1.0 - self.weight[kept], 0.0, 1.0))
        return float(self.importance @ best)


def _check_count(k: int, n: int, forced: np.ndarray | None, forbidden: np.ndarray | None) -> None:
    assert forced is not None and forbidden is not None
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool):
        raise ValueError(f"k must be an integer number of units, found {k!r}")
    if not 0 <= k <= n or (k == 0 and n > 0):
        raise Infeasible(f"cannot keep exactly {k} of {n} units; expected 1 <= k <= {n}")
    if k < forced.sum():
        raise Infeasible(f"{int(forced.sum())} units are forced, but only k={k} may stay")
    if k > n - forbidden.sum():
        raise Infeasible(f"only {int(n - forbidden.sum())} units are allowed, but k={k} must stay")


@dataclass(frozen=True, eq=False)
class EdgeSelection:
    """Problem D: keep exactly k edges of a bipartite layer graph, attachment-weighted.

    Maximise ``sum_ij score_ij m_ij - attachment * sum_i f(d_i / n_cols)`` with d_i the number of
    kept edges of row i. f is increasing and **concave**: the first edges of a row are the dear
    ones, so rows with many edges grow (rich get richer) and the degree spread rises with
    `attachment`. Readings of NeuroPrune's Eq. 1: ``"a"`` f(x) = x - x^2/2,
    ``"b"`` f(x) = log(x + delta0).

    Args:
        score: (n_rows, n_cols) float64 >= 0, e.g. |w| or |w| * activation norm.
        k: number of edges to keep, 0 <= k <= n_rows * n_cols.
        attachment: strength lambda >= 0, in units of score.
        reading: ``"a"`` or ``"b"``. delta0: offset of reading b, > 0.
        row_min, row_max: (n_rows,) int degree bounds or None. col_min, col_max: (n_cols,).
        allowed: (n_rows, n_cols) bool, edges that may stay (the live ones of an earlier plan), or
            None for all. Degrees stay fractions of n_cols.

    Raises:
        Infeasible: bounds that no k edges can meet (sums checked; a subtler conflict is found
            by the solver).
    """

    score: np.ndarray
    k: int
    attachment: float = 0.0
    reading: Literal["a", "b"] = "b"
    delta0: float = 0.01
    row_min: np.ndarray | None = None
    row_max: np.ndarray | None = None
    col_min: np.ndarray | None = None
    col_max: np.ndarray | None = None
    allowed: np.ndarray | None = None

    def __post_init__(self) -> None:
        score = np.asarray(self.score, dtype=np.float64)
        if score.ndim != 2:
            raise ValueError(f"score must be (n_rows, n_cols), found shape {score.shape}")
        if not np.all(np.isfinite(score)):
            raise ValueError("score must be finite")
        if score.size and score.min() < 0:
            raise ValueError(f"score must be >= 0, found {score.min():g}")
        object.__setattr__(self, "score", read_only(score))
        rows, cols = score.shape
        if not isinstance(self.k, (int, np.integer)) or not 0 <= self.k <= rows * cols:
            raise Infeasible(f"cannot keep exactly {self.k!r} of {rows * cols} edges")
        if not (np.isfinite(self.attachment) and self.attachment >= 0):
            raise ValueError(f"attachment must be >= 0, found {self.attachment!r}")
        if self.reading not in ("a", "b"):
            raise ValueError(f"unknown reading {self.reading!r} of Eq. 1; expected 'a' or 'b'")
        if not self.delta0 > 0:
            raise ValueError(f"delta0 must be > 0, found {self.delta0!r}")
        available = {"row": np.full(rows, cols, np.int64), "col": np.full(cols, rows, np.int64)}
        if self.allowed is not None:
            allowed = np.asarray(self.allowed, dtype=bool)
            if allowed.shape != score.shape:
                raise ValueError(f"allowed has shape {allowed.shape}, expected {score.shape}")
            if self.k > allowed.sum():
                raise Infeasible(f"only {int(allowed.sum())} edges are allowed, but k={self.k} must stay")
            object.__setattr__(self, "allowed", read_only(allowed))
            available = {"row": allowed.sum(axis=1), "col": allowed.sum(axis=0)}
        for side, n in (("row", rows), ("col", cols)):
            other = available[side]
            given = getattr(self, f"{side}_min"), getattr(self, f"{side}_max")
            if given[0] is None and given[1] is None:
                continue
            low = np.zeros(n, np.int64) if given[0] is None else np.asarray(given[0], dtype=np.int64)
            high = other if given[1] is None else np.asarray(given[1], dtype=np.int64)
            if low.shape != (n,) or high.shape != (n,):
                raise ValueError(f"{side} bounds have shapes {low.shape}, {high.shape}; expected ({n},)")
            low, high = np.maximum(low, 0), np.minimum(high, other)
            if np.any(low > high):
                raise Infeasible(f"{side} {int(np.flatnonzero(low > high)[0])}: minimum degree above maximum")
            if not low.sum() <= self.k <= high.sum():
                raise Infeasible(f"{side} bounds allow {low.sum()}..{high.sum()} edges, but k={self.k}")
            object.__setattr__(self, f"{side}_min", read_only(low))
            object.__setattr__(self, f"{side}_max", read_only(high))

    @property
    def shape(self) -> tuple[int, int]:
        """(n_rows, n_cols)."""
        return self.score.shape[0], self.score.shape[1]

    @property
    def n(self) -> int:
        """Number of candidate edges."""
        return int(self.score.size)

    @property
    def sense(self) -> Sense:
        """This problem maximises."""
        return "max"

    def degree_cost(self, degree: np.ndarray) -> np.ndarray:
        """Return f(degree / n_cols), elementwise, without the factor `attachment`."""
        x = np.asarray(degree, dtype=np.float64) / max(self.shape[1], 1)
        return x - x * x / 2 if self.reading == "a" else np.log(x + self.delta0)

    def degree_cost_slope(self, degree: np.ndarray) -> np.ndarray:
        """Return f'(degree / n_cols), elementwise."""
        x = np.asarray(degree, dtype=np.float64) / max(self.shape[1], 1)
        return 1.0 - x if self.reading == "a" else 1.0 / (x + self.delta0)

    def objective(self, keep: np.ndarray) -> float:
        """Return the value of a flat (n_rows * n_cols,) mask."""
        mask = np.asarray(keep, dtype=bool).reshape(self.shape)
        total = float(self.score[mask].sum())
        if self.attachment:
            total -= self.attachment * float(self.degree_cost(mask.sum(axis=1)).sum())
        return total


Problem = DominatingSet | BudgetedDomination | SoftDomination | EdgeSelection

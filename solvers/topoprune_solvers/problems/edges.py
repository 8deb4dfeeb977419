"""Problem D: exactly k weight edges of a layer, attachment-weighted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from topoprune_solvers.csr import read_only
from topoprune_solvers.solution import Infeasible, Sense

__all__ = ["EdgeProblem", "EdgeSelection"]


class EdgeProblem:
    """What problems on the edges of one matrix share: flat, row-major keep masks, and a score to maximise."""

    score: np.ndarray

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


@dataclass(frozen=True, eq=False)
class EdgeSelection(EdgeProblem):
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
        with np.errstate(over="ignore", invalid="ignore"):
            total = score.sum()
        if not np.isfinite(total):
            raise ValueError("score must be finite, its sum included")
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

    def degree_cost(self, degree: np.ndarray) -> np.ndarray:
        """Return f(degree / n_cols), elementwise, without the factor `attachment`."""
        x = np.asarray(degree, dtype=np.float64) / max(self.shape[1], 1)
        return x - x * x / 2 if self.reading == "a" else np.log(x + self.delta0)

    def degree_cost_slope(self, degree: np.ndarray) -> np.ndarray:
        """Return f'(degree / n_cols), elementwise."""
        x = np.asarray(degree, dtype=np.float64) / max(self.shape[1], 1)
        return 1.0 - x if self.reading == "a" else 1.0 / (x + self.delta0)

    def parts(self, keep: np.ndarray) -> tuple[float, float]:
        """Return the score kept and the degree cost with its factor; the objective is their difference. O(n)."""
        mask = np.asarray(keep, dtype=bool).reshape(self.shape)
        # Row sums without a copy of the kept scores: several times faster than indexing by the mask.
        score = float(np.einsum("ij,ij->i", self.score, mask).sum())
        if not self.attachment:
            return score, 0.0
        return score, self.attachment * float(self.degree_cost(np.count_nonzero(mask, axis=1)).sum())

    def objective(self, keep: np.ndarray) -> float:
        """Return the value of a flat (n_rows * n_cols,) mask."""
        score, cost = self.parts(keep)
        return score - cost

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with a flat (n_rows * n_cols,) mask, or None. O(n_rows * n_cols)."""
        mask = keep.reshape(self.shape)
        kept = int(np.count_nonzero(mask))
        if kept != self.k:
            return f"{kept} edges kept, expected exactly {self.k}"
        if self.allowed is not None and np.any(mask & ~self.allowed):
            return "an edge that is not allowed was kept"
        for axis, low, high, side in (
            (1, self.row_min, self.row_max, "row"),
            (0, self.col_min, self.col_max, "column"),
        ):
            if low is None and high is None:
                continue
            degree = np.count_nonzero(mask, axis=axis)
            if low is not None and np.any(degree < low):
                return f"a {side} has too few edges"
            if high is not None and np.any(degree > high):
                return f"a {side} has too many edges"
        return None

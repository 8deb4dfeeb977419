"""Problem D on small groups: N:M masks, in one direction or transposable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.csr import read_only
from topoprune_solvers.problems.edges import EdgeProblem
from topoprune_solvers.solution import Infeasible

__all__ = ["BlockMask"]


@dataclass(frozen=True, eq=False)
class BlockMask(EdgeProblem):
    """Keep exactly N of every M neighbouring edges (N:M sparsity), with the highest score.

    In every group of M consecutive columns of a row exactly N edges stay. A *transposable* mask does so in every
    M consecutive rows of a column too, so that a matrix and its transpose both run on N:M hardware (forward
    and backward pass): every M x M block has all row and column sums N. The groups are independent, so the
    problem is many small ones: sorting, or transportation problems.

    Args:
        score: (n_rows, n_cols) float64 >= 0, e.g. |w|.
        kept: N, edges that stay in a group, 0 <= kept <= group. group: M >= 1; divides n_cols, and n_rows
            too if transposable.
        transposable: whether columns obey the rule as well.

    Raises:
        ValueError: a score that is no finite matrix >= 0, or a shape that the group does not divide.
        Infeasible: kept outside 0..group.

    References:
        Mishra et al. (2021), Accelerating sparse deep neural networks, arXiv:2104.08378. Hubara et al. (2021),
        Accelerated sparse neural training: a provable and efficient method to find N:M transposable masks, NeurIPS.

    Example:
        >>> problem = BlockMask(np.array([[3.0, 1.0, 2.0, 0.0]]), kept=2, group=4)
        >>> problem.objective(np.array([True, False, True, False]))
        5.0
    """

    score: np.ndarray
    kept: int = 2
    group: int = 4
    transposable: bool = False

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
        for name in ("kept", "group"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
                raise ValueError(f"{name} must be an int, found {value!r}")
        if self.group < 1:
            raise ValueError(f"group must be >= 1, found {self.group}")
        if not 0 <= self.kept <= self.group:
            raise Infeasible(f"cannot keep {self.kept} of every {self.group} edges")
        for side, length in (("rows", score.shape[0]), ("columns", score.shape[1])):
            if length % self.group and (side == "columns" or self.transposable):
                raise ValueError(
                    f"score has {length} {side}, not a multiple of group={self.group}; pad the matrix or choose a "
                    f"group that divides {length}"
                )
        object.__setattr__(self, "score", read_only(score))

    def blocks(self, values: np.ndarray) -> np.ndarray:
        """Return (b, group, group) blocks of an array of n entries, row-major; of a transposable problem."""
        (rows, cols), size = self.shape, self.group
        cut = values.reshape(rows // size, size, cols // size, size)
        return np.ascontiguousarray(cut.swapaxes(1, 2)).reshape(-1, size, size)

    def from_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """Return the (n_rows, n_cols) array whose `blocks` these are."""
        (rows, cols), size = self.shape, self.group
        return blocks.reshape(rows // size, cols // size, size, size).swapaxes(1, 2).reshape(rows, cols)

    def objective(self, keep: np.ndarray) -> float:
        """Return the score kept by a flat (n_rows * n_cols,) mask."""
        mask = np.asarray(keep, dtype=bool).reshape(self.shape)
        return float(np.einsum("ij,ij->i", self.score, mask).sum())

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with a flat (n_rows * n_cols,) mask, or None. O(n_rows * n_cols)."""
        mask = np.asarray(keep, dtype=bool).reshape(self.shape)
        views = [("row", mask)] + ([("column", mask.T)] if self.transposable else [])
        for side, lines in views:
            counts = lines.reshape(lines.shape[0], -1, self.group).sum(axis=2) if mask.size else np.zeros((0, 0))
            wrong = np.argwhere(counts != self.kept)
            if wrong.size:
                line, group = (int(index) for index in wrong[0])
                found = int(counts[line, group])
                return f"{side} {line} keeps {found} edges in group {group}, expected exactly {self.kept}"
        return None

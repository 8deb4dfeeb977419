"""Problem C with repair: the subset whose loss is least after the kept units are refitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.csr import read_only
from topoprune_solvers.problems.quadratic import CHECK_UNITS, check_budget, check_semidefinite, symmetric_matrix
from topoprune_solvers.solution import Sense

__all__ = ["RepairedSubset", "repaired_weight"]


@dataclass(frozen=True, eq=False)
class RepairedSubset:
    """Keep exactly k units of a projection's input; the weight of the kept ones is refitted by least squares.

    With P the columns of the pruned and S those of the kept units,

        damage(P) = min over B with B_P = 0 of tr((W - B) C (W - B)^T) = tr(W_P [(C^-1)_PP]^-1 W_P^T),

    which is E||W x - B x||^2 for C = E[x x^T]. It grows with P. C is often singular, so the damage is defined with
    ``C + ridge * mean(diag C) * I`` in the place of C: an exact least-squares problem that also charges the change
    of the weight.

    Args:
        moment: (d, d) float64, C, symmetric positive semidefinite (tolerances as in `QuadraticSubset`). A
            read-only float64 array is used without a copy.
        weight: (o, d) float64, W.
        blocks: which columns each unit owns: an int, the width of every unit (1 for neurons, d_h for heads), or
            (n + 1,) int offsets from 0 to d, unit u owning columns ``blocks[u]:blocks[u + 1]``.
        k: number of units that stay. forced, forbidden: (n,) bool, units that must stay, must go.
        ridge: > 0, relative to the mean diagonal of C.

    Raises:
        Infeasible: k out of range, or forced units that are forbidden too.
        ValueError: matrices that are not finite or do not fit each other; a C that is not positive semidefinite.

    Example:
        >>> import numpy as np
        >>> moment = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])  # input 2 repeats input 0
        >>> problem = RepairedSubset(moment, np.array([[1.0, 1.0, 5.0]]), 1, k=2)
        >>> round(problem.objective(np.array([True, True, False])), 2)
        0.0
    """

    moment: np.ndarray
    weight: np.ndarray
    blocks: np.ndarray | int
    k: int
    forced: np.ndarray | None = None
    forbidden: np.ndarray | None = None
    ridge: float = 1e-4

    def __post_init__(self) -> None:
        moment = symmetric_matrix("moment", self.moment)
        check_semidefinite("moment", moment)
        object.__setattr__(self, "moment", moment)
        d = moment.shape[0]
        weight = np.asarray(self.weight, dtype=np.float64)
        if weight.ndim != 2 or weight.shape[1] != d:
            raise ValueError(f"weight has shape {weight.shape}, expected (o, {d}): one column per row of the moment")
        if not np.all(np.isfinite(weight)):
            raise ValueError("weight must be finite")
        object.__setattr__(self, "weight", read_only(weight))
        object.__setattr__(self, "blocks", read_only(_offsets(self.blocks, d)))
        if not (np.isfinite(self.ridge) and self.ridge > 0):
            raise ValueError(f"ridge must be > 0, found {self.ridge!r}: moments are often singular")
        if d <= CHECK_UNITS:
            try:
                np.linalg.cholesky(self.regular_moment(np.arange(d)))
            except np.linalg.LinAlgError:
                raise ValueError(self.not_definite) from None
        if self.k is None:
            raise ValueError("k must be a whole number of units, found None")
        check_budget(self, self.n)

    @property
    def n(self) -> int:
        """Number of units."""
        return int(self.offsets.size - 1)

    @property
    def sense(self) -> Sense:
        """This problem minimises."""
        return "min"

    @property
    def offsets(self) -> np.ndarray:
        """(n + 1,) int64: first column of each unit, then d."""
        assert isinstance(self.blocks, np.ndarray)
        return self.blocks

    @property
    def width(self) -> np.ndarray:
        """(n,) int64: number of columns of each unit."""
        return np.diff(self.offsets)

    @property
    def ridge_value(self) -> float:
        """What is added to the diagonal of the moment, in its units."""
        d = self.moment.shape[0]
        # An all-zero moment: any ridge makes the system regular, and the weight is judged alone.
        mean = float(self.moment.diagonal().mean()) if d else 0.0
        return self.ridge * (mean if mean > 0 else 1.0)

    @property
    def not_definite(self) -> str:
        """What to say when a factorisation of the moment with its ridge fails."""
        return (
            f"moment is not positive definite even with ridge={self.ridge:g} of its mean diagonal: rounding in it is "
            f"larger than the ridge; raise ridge or accumulate the moment in float64"
        )

    def columns(self, units: np.ndarray) -> np.ndarray:
        """Return the column indices that a mask or an index array of units owns, in the order given."""
        units = np.flatnonzero(units) if np.asarray(units).dtype == bool else np.asarray(units)
        starts, width = self.offsets[:-1][units], self.width[units]
        ends = np.cumsum(width)
        return np.arange(int(width.sum())) + np.repeat(starts - (ends - width), width)

    def regular_moment(self, columns: np.ndarray) -> np.ndarray:
        """Return C + ridge on the given columns and rows, as a fresh array."""
        part = self.moment[np.ix_(columns, columns)]
        part[np.diag_indices_from(part)] += self.ridge_value
        return part

    def objective(self, keep: np.ndarray) -> float:
        """Return the damage of an (n,) keep mask.

        With the kept columns first, the last block L_PP of the Cholesky factor of C satisfies
        ``L_PP L_PP^T = C_PP - C_PS C_SS^-1 C_SP``, so the damage is ||W_P L_PP||^2: a sum of squares, free of
        cancellation. O(d^3 / 3) time and one (d, d) array.
        """
        from scipy.linalg import cholesky

        keep = np.asarray(keep, dtype=bool)
        pruned = self.columns(~keep)
        if not pruned.size:
            return 0.0
        kept = self.columns(keep)
        order = np.concatenate([kept, pruned])
        # Fortran order by the transpose of a symmetric matrix: factorised in place.
        try:
            factor = cholesky(self.regular_moment(order).T, lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            raise ValueError(self.not_definite) from None
        return float(np.square(self.weight[:, pruned] @ np.tril(factor[kept.size :, kept.size :])).sum())

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with an (n,) keep mask, or None. O(n)."""
        if np.any(self.forced & ~keep):  # type: ignore[operator]
            return "a forced unit was pruned"
        if np.any(self.forbidden & keep):  # type: ignore[operator]
            return "a forbidden unit was kept"
        kept = int(np.count_nonzero(keep))
        return None if kept == self.k else f"{kept} units kept, expected exactly {self.k}"


def repaired_weight(problem: RepairedSubset, keep: np.ndarray) -> np.ndarray:
    """Return W with pruned columns zero and the kept ones refitted: ``W_S + W_P C_PS C_SS^-1``.

    Args:
        problem: the problem. keep: (n,) bool, any number of units.

    Returns:
        (o, d) float64, the minimiser of the problem's ridge least squares; its damage is ``problem.objective(keep)``.

    Complexity: O(s^3 / 3 + o d s) for s kept columns.

    Example:
        >>> import numpy as np
        >>> twins = RepairedSubset(np.ones((2, 2)), np.array([[1.0, 3.0]]), 1, k=1)
        >>> repaired_weight(twins, np.array([True, False])).round(3).tolist()
        [[4.0, 0.0]]
    """
    from scipy.linalg import cho_factor, cho_solve

    keep = np.asarray(keep, dtype=bool)
    if keep.shape != (problem.n,):
        raise ValueError(f"keep has shape {keep.shape}, expected ({problem.n},)")
    kept, pruned = problem.columns(keep), problem.columns(~keep)
    refitted = np.zeros_like(problem.weight)
    refitted[:, kept] = problem.weight[:, kept]
    if kept.size and pruned.size:
        lost = problem.moment[np.ix_(kept, pruned)] @ problem.weight[:, pruned].T
        factor = cho_factor(problem.regular_moment(kept), lower=True, overwrite_a=True, check_finite=False)
        refitted[:, kept] += cho_solve(factor, lost, check_finite=False).T
    return refitted


def _offsets(blocks: np.ndarray | int, d: int) -> np.ndarray:
    if isinstance(blocks, (int, np.integer)) and not isinstance(blocks, bool):
        if blocks < 1 or d % blocks:
            raise ValueError(f"blocks of width {blocks} do not divide the {d} columns of the moment")
        return np.arange(0, d + 1, blocks, dtype=np.int64)
    offsets = np.asarray(blocks)
    if offsets.ndim != 1 or offsets.size < 1 or not np.issubdtype(offsets.dtype, np.integer):
        raise ValueError(f"blocks must be an int width or (n + 1,) int offsets, found {blocks!r}")
    if offsets[0] != 0 or offsets[-1] != d or np.any(np.diff(offsets) < 1):
        raise ValueError(f"block offsets must rise from 0 to {d}, found {offsets.tolist()[:10]}")
    return offsets.astype(np.int64)

"""Problem C: the subset of units whose removal damages a layer's output least, by its output Gram."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from topoprune_solvers.csr import read_only
from topoprune_solvers.problems.units import vector
from topoprune_solvers.solution import Infeasible, Sense

__all__ = ["CHECK_UNITS", "QuadraticSubset", "check_budget", "check_semidefinite", "symmetric_matrix"]

SYMMETRY = 1e-5  # largest |G - G^T|, relative to the largest entry: the rounding of a float32 Gram
NEGATIVE = 1e-6  # most negative eigenvalue, relative to the largest absolute row sum
CHECK_UNITS = 2048  # a Cholesky factorisation of this size takes a fraction of a second
_BLOCK = 512  # rows handled at once: temporaries of _BLOCK * n numbers, not n * n


@dataclass(frozen=True, eq=False)
class QuadraticSubset:
    """Problem C: prune a set P of units with least damage ``1_P^T G 1_P``.

    With ``G[u, v] = E<y_u, y_v>``, y_u the part of a projection's output that unit u contributes, the
    damage is E||sum of y_u over P||^2: what dropping P does to the output. Exactly one of `k` and
    `budget` says how much may stay.

    Args:
        gram: (n, n) float64, symmetric positive semidefinite up to float rounding. Asymmetry up to 1e-5 of the
            largest entry is averaged away. A read-only float64 array is used without a copy.
        k: number of units that stay, or None.
        cost: (n,) float64 >= 0, cost of keeping each unit, or None; goes with `budget`.
        budget: most the kept units may cost together, or None.
        forced: (n,) bool, units that must stay. forbidden: (n,) bool, units that must go.

    Raises:
        Infeasible: k out of range, forced units that are forbidden too or dearer than the budget.
        ValueError: a Gram that is not square, finite, symmetric and positive semidefinite. Above 2048 units
            semidefiniteness is checked on consecutive diagonal blocks of 2048 units and all 2 x 2 minors.

    Example:
        >>> import numpy as np
        >>> gram = np.array([[4.0, 0.0, 0.0], [0.0, 2.0, -1.5], [0.0, -1.5, 2.0]])
        >>> QuadraticSubset(gram, k=1).objective(np.array([True, False, False]))
        1.0
    """

    gram: np.ndarray
    k: int | None = None
    cost: np.ndarray | None = None
    budget: float | None = None
    forced: np.ndarray | None = None
    forbidden: np.ndarray | None = None

    def __post_init__(self) -> None:
        gram = symmetric_matrix("gram", self.gram)
        check_semidefinite("gram", gram)
        object.__setattr__(self, "gram", gram)
        n = gram.shape[0]
        if (self.k is None) == (self.budget is None):
            raise ValueError("give either k (units that stay) or cost and budget, and not both")
        if (self.cost is None) != (self.budget is None):
            raise ValueError("cost and budget belong together: give both or neither")
        check_budget(self, n)
        if self.budget is not None:
            cost = vector("cost", self.cost, n, 0.0, np.float64)
            if cost.size and cost.min() < 0:
                raise ValueError(f"cost must be >= 0, found {cost.min():g} at unit {int(cost.argmin())}")
            object.__setattr__(self, "cost", cost)
            if not math.isfinite(self.budget):
                raise ValueError(f"budget must be a finite number, found {self.budget!r}")
            object.__setattr__(self, "budget", float(self.budget))
            least = float(cost[self.forced].sum())
            if least > self.budget + self.cost_slack:
                raise Infeasible(f"the forced units alone cost {least:g}, more than the budget of {self.budget:g}")

    @property
    def n(self) -> int:
        """Number of units."""
        return int(self.gram.shape[0])

    @property
    def sense(self) -> Sense:
        """This problem minimises."""
        return "min"

    @property
    def cost_slack(self) -> float:
        """Excess over the budget that counts as rounding of the sum of costs."""
        return 0.0 if self.cost is None else 1e-12 * float(np.abs(self.cost).sum())

    def objective(self, keep: np.ndarray) -> float:
        """Return the damage of an (n,) keep mask; a sum that rounding made negative counts as 0. O(n |P|)."""
        pruned = np.flatnonzero(~np.asarray(keep, dtype=bool))
        total = 0.0
        for start in range(0, pruned.size, _BLOCK):
            rows = self.gram[pruned[start : start + _BLOCK]]
            total += float(rows[:, pruned].sum())
        return max(total, 0.0)

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with an (n,) keep mask, or None. O(n)."""
        if np.any(self.forced & ~keep):  # type: ignore[operator]
            return "a forced unit was pruned"
        if np.any(self.forbidden & keep):  # type: ignore[operator]
            return "a forbidden unit was kept"
        if self.k is not None:
            kept = int(np.count_nonzero(keep))
            return None if kept == self.k else f"{kept} units kept, expected exactly {self.k}"
        assert self.cost is not None and self.budget is not None
        spent = float(self.cost[keep].sum())
        if spent > self.budget + self.cost_slack:
            return f"the kept units cost {spent:g}, more than the budget of {self.budget:g}"
        return None


def symmetric_matrix(name: str, value: np.ndarray) -> np.ndarray:
    """Return a read-only, exactly symmetric float64 matrix; ValueError for anything that is not nearly one.

    Memory: no n x n temporary beside the one copy that a writeable or asymmetric input needs.
    """
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} must be square, found shape {matrix.shape}")
    n = matrix.shape[0]
    largest = asymmetry = 0.0
    where = (0, 0)
    for start in range(0, n, _BLOCK):
        rows = matrix[start : start + _BLOCK]
        if not np.all(np.isfinite(rows)):
            row, col = np.argwhere(~np.isfinite(rows))[0].tolist()
            raise ValueError(f"{name} must be finite; entry ({start + row}, {col}) is {rows[row, col]}")
        largest = max(largest, float(rows.max()), -float(rows.min()))
        apart = np.abs(rows[:, start:] - matrix[start:, start : start + _BLOCK].T)
        if apart.max() > asymmetry:
            row, col = np.unravel_index(int(apart.argmax()), apart.shape)
            asymmetry, where = float(apart.max()), (start + int(row), start + int(col))
    if asymmetry > SYMMETRY * largest:
        raise ValueError(
            f"{name} must be symmetric; entries {where} and {where[::-1]} differ by {asymmetry:g}. "
            f"Pass (A + A.T) / 2 if that is meant"
        )
    if asymmetry == 0:
        return read_only(matrix)
    matrix = matrix.copy()
    for start in range(0, n, _BLOCK):
        here = slice(start, start + _BLOCK)
        mean = (matrix[here, start:] + matrix[start:, here].T) / 2
        matrix[here, start:] = mean
        matrix[start:, here] = mean.T
    matrix.setflags(write=False)
    return matrix


def check_semidefinite(name: str, matrix: np.ndarray) -> None:
    """Raise ValueError unless the symmetric matrix is positive semidefinite up to 1e-6 of its largest row sum."""
    n = matrix.shape[0]
    if n == 0:
        return
    diagonal = matrix.diagonal()
    scale = max(float(np.abs(matrix[start : start + _BLOCK]).sum(axis=1).max()) for start in range(0, n, _BLOCK))
    advice = f"expected a positive semidefinite {name}, such as A.T @ A"
    worst = int(diagonal.argmin())
    if diagonal[worst] < -NEGATIVE * scale:
        raise ValueError(f"{name} has {diagonal[worst]:g} on the diagonal at unit {worst}; {advice}")
    root = np.sqrt(np.maximum(diagonal, 0.0))
    for start in range(0, n, _BLOCK):
        beyond = np.abs(matrix[start : start + _BLOCK]) - root[start : start + _BLOCK, None] * root
        if beyond.max() > NEGATIVE * scale:
            row, col = np.unravel_index(int(beyond.argmax()), beyond.shape)
            raise ValueError(
                f"{name} is not positive semidefinite: entry ({start + int(row)}, {int(col)}) is larger than the "
                f"diagonal allows; {advice}"
            )
    for start in range(0, n, CHECK_UNITS):
        block = matrix[start : start + CHECK_UNITS, start : start + CHECK_UNITS].copy()
        if scale > 0:
            block /= scale  # keeps the factorisation away from under- and overflow
        block[np.diag_indices_from(block)] += NEGATIVE
        try:
            np.linalg.cholesky(block)
        except np.linalg.LinAlgError:
            least = float(np.linalg.eigvalsh(block)[0] - NEGATIVE) * scale
            if least >= -NEGATIVE * scale:
                continue
            raise ValueError(
                f"{name} is not positive semidefinite: smallest eigenvalue {least:g}, "
                f"lowest accepted {-NEGATIVE * scale:g} ({NEGATIVE:g} of the largest row sum); {advice}"
            ) from None


def check_budget(problem: object, n: int) -> None:
    """Check and store the fields forced, forbidden and k (may be None) of a subset problem on n units."""
    for name in ("forced", "forbidden"):
        object.__setattr__(problem, name, vector(name, getattr(problem, name), n, 0, bool))
    forced, forbidden, k = (getattr(problem, name) for name in ("forced", "forbidden", "k"))
    both = np.flatnonzero(forced & forbidden)
    if both.size:
        raise Infeasible(f"units {both.tolist()[:10]} are both forced and forbidden")
    if k is None:
        return
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise ValueError(f"k must be a whole number of units, found {k!r}")
    if not 0 <= k <= n:
        raise Infeasible(f"cannot keep exactly {k} of {n} units")
    if not forced.sum() <= k <= n - forbidden.sum():
        raise Infeasible(
            f"cannot keep exactly {k} of {n} units: {int(forced.sum())} are forced to stay "
            f"and {int(forbidden.sum())} are forbidden"
        )
    object.__setattr__(problem, "k", int(k))

"""Problem B: exactly k units, by smallest covering distance or by most importance explained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.problems.units import UnitProblem, vector
from topoprune_solvers.solution import Infeasible, Sense

__all__ = ["BudgetedDomination", "SoftDomination"]


@dataclass(frozen=True, eq=False)
class BudgetedDomination(UnitProblem):
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
        object.__setattr__(self, "importance", vector("importance", self.importance, self.n, 0.0, np.float64))
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

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with an (n,) keep mask, or None. O(n)."""
        return super().violation(keep) or _count_violation(keep, self.k)


@dataclass(frozen=True, eq=False)
class SoftDomination(UnitProblem):
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
        importance = vector("importance", self.importance, self.n, 1.0, np.float64)
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

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with an (n,) keep mask, or None. O(n)."""
        return super().violation(keep) or _count_violation(keep, self.k)


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


def _count_violation(keep: np.ndarray, k: int) -> str | None:
    kept = int(keep.sum())
    return None if kept == k else f"{kept} units kept, expected exactly {k}"

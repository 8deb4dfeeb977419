"""Problem B: exactly k units, by smallest covering distance or by most importance explained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.csr import read_only
from topoprune_solvers.problems.units import UnitProblem, vector
from topoprune_solvers.solution import Infeasible, Sense

__all__ = ["BudgetProblem", "BudgetedDomination", "SoftDomination"]


@dataclass(frozen=True, eq=False)
class BudgetProblem(UnitProblem):
    """What the budgeted problems share: exactly k units, and bounds on the kept units of each group.

    Groups are a partition of the units, e.g. the layers of a model (a floor for each) or the KV groups of
    grouped-query attention (the same number of query heads in each: `group_min` = `group_max` = k / groups).
    The selections that can be completed within all bounds form a matroid.

    Args:
        k: number of units to keep, 0 <= k <= n (k = 0 only for n = 0).
        importance: (n,) float64.
        group: (n,) int, the group of each unit, numbered from 0; None for no groups.
        group_min: (g,) int, least units to keep in each group, or one number for all; default 0.
        group_max: (g,) int, most units to keep in each group, or one number for all; default no limit.

    Raises:
        ValueError: numbers of the wrong kind or shape.
        Infeasible: no selection meets k, the groups' bounds and the forced and forbidden units.
    """

    k: int = 0
    importance: np.ndarray | None = None
    group: np.ndarray | None = None
    group_min: np.ndarray | int | None = None
    group_max: np.ndarray | int | None = None

    _default_importance: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        importance = vector("importance", self.importance, self.n, self._default_importance, np.float64)
        object.__setattr__(self, "importance", importance)
        self._check_count()
        self._check_groups()

    def limits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (n,) int64 labels and (g,) int64 fewest and most kept units of each group.

        Forced and forbidden units are taken into account; without groups all units form one, of exactly k.
        """
        if self.group is None:
            return np.zeros(self.n, dtype=np.int64), np.array([self.k]), np.array([self.k])
        assert isinstance(self.group_min, np.ndarray) and isinstance(self.group_max, np.ndarray)
        groups = self.group_min.size
        low = np.maximum(self.group_min, np.bincount(self.group[self.forced], minlength=groups))
        high = np.minimum(self.group_max, np.bincount(self.group[~self.forbidden], minlength=groups))  # type: ignore[operator]
        return self.group, low, high

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with an (n,) keep mask, or None. O(n)."""
        wrong = super().violation(keep)
        if wrong is not None:
            return wrong
        kept = int(keep.sum())
        if kept != self.k:
            return f"{kept} units kept, expected exactly {self.k}"
        if self.group is None:
            return None
        assert isinstance(self.group_min, np.ndarray) and isinstance(self.group_max, np.ndarray)
        count = np.bincount(self.group[keep], minlength=self.group_min.size)
        bad = np.flatnonzero((count < self.group_min) | (count > self.group_max))
        if not bad.size:
            return None
        first = int(bad[0])
        span = f"{self.group_min[first]} to {self.group_max[first]}"
        return f"{count[first]} units kept in group {first}, expected {span}"

    def _check_count(self) -> None:
        k, n = self.k, self.n
        forced, forbidden = int(self.forced.sum()), int(self.forbidden.sum())  # type: ignore[union-attr]
        if not isinstance(k, (int, np.integer)) or isinstance(k, bool):
            raise ValueError(f"k must be an integer number of units, found {k!r}")
        object.__setattr__(self, "k", int(k))
        if not 0 <= k <= n or (k == 0 and n > 0):
            raise Infeasible(f"cannot keep exactly {k} of {n} units; expected 1 <= k <= {n}")
        if k < forced:
            raise Infeasible(f"{forced} units are forced, but only k={k} may stay")
        if k > n - forbidden:
            raise Infeasible(f"only {n - forbidden} units are allowed, but k={k} must stay")

    def _check_groups(self) -> None:
        if self.group is None:
            if self.group_min is not None or self.group_max is not None:
                raise ValueError("group_min and group_max need group=, the (n,) group of each unit")
            return
        label = _integers("group", self.group)
        if label.shape != (self.n,):
            raise ValueError(f"group has shape {label.shape}, expected ({self.n},): one group number a unit")
        sizes = [np.size(bound) for bound in (self.group_min, self.group_max) if np.ndim(bound) > 0]  # type: ignore[arg-type]
        groups = max(sizes, default=int(label.max(initial=-1)) + 1)
        if label.size and not 0 <= label.min() <= label.max() < groups:
            raise ValueError(f"group numbers must lie in [0, {groups}), found {label.min()}..{label.max()}")
        object.__setattr__(self, "group", read_only(label))
        for name, default in (("group_min", 0), ("group_max", self.n)):
            value = getattr(self, name)
            bound = _integers(name, default if value is None else value)
            if bound.ndim > 1 or (bound.ndim == 1 and bound.size != groups):
                raise ValueError(f"{name} has shape {bound.shape}, expected ({groups},): one bound a group")
            if bound.size and bound.min() < 0:
                raise ValueError(f"{name} must be >= 0, found {int(bound.min())}")
            object.__setattr__(self, name, read_only(np.broadcast_to(bound, (groups,)).copy()))
        _, low, high = self.limits()
        for number in np.flatnonzero(low > high).tolist():
            raise Infeasible(
                f"group {number} must keep at least {low[number]} units (group_min, forced), but may keep at most "
                f"{high[number]} (group_max, units that are not forbidden)"
            )
        if low.sum() > self.k:
            raise Infeasible(f"the groups must keep at least {int(low.sum())} units together, but only k={self.k} may")
        if high.sum() < self.k:
            raise Infeasible(f"the groups may keep at most {int(high.sum())} units together, but k={self.k} must stay")


@dataclass(frozen=True, eq=False)
class BudgetedDomination(BudgetProblem):
    """Problem B (hard): exactly k units, minimise the largest distance to a kept neighbour (k-centre).

    The objective is the largest edge weight between a pruned unit and its nearest kept
    neighbour; inf where a pruned unit has none, 0 where nothing is pruned. `importance` (default all 0)
    says which units fill up a cover smaller than k. Further fields: see `BudgetProblem`.
    """

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
class SoftDomination(BudgetProblem):
    """Problem B (soft): exactly k units, maximise the importance the kept ones explain.

    Facility location: ``max_S sum_i importance_i * max_{j in S} similarity_ij`` with
    similarity_ii = 1, similarity_ij = 1 - weight_ij on edges and 0 elsewhere. `weight` lies in [0, 1];
    `importance` (default all 1) is >= 0, e.g. output energy. Further fields: see `BudgetProblem`.

    Raises:
        ValueError: also for weights above 1 (the measure has no similarity in [0, 1]) or negative importance.
    """

    _default_importance: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        importance: Any = self.importance
        if importance.size and importance.min() < 0:
            raise ValueError(f"importance must be >= 0, found {importance.min():g} at unit {int(importance.argmin())}")
        assert self.weight is not None
        if self.weight.size and self.weight.max() > 1 + 1e-9:
            raise ValueError(
                f"soft domination needs distances in [0, 1], found {self.weight.max():g}; "
                "use a normalised measure such as 'output-gram' or the k-centre objective"
            )

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


def _integers(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and not (array.size == 0 and array.dtype.kind == "f"):
        raise ValueError(f"{name} must hold integers, found {array.dtype}")
    return array.astype(np.int64)

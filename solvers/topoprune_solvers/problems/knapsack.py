"""Problem E: one choice per site under budgets, a multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topoprune_solvers.csr import read_only
from topoprune_solvers.solution import Infeasible, Sense

__all__ = ["BUDGET_TOLERANCE", "MultipleChoiceKnapsack"]

# Relative. A budget summed in another order than the costs still holds them; whole costs below 1e12 stay exact.
BUDGET_TOLERANCE = 1e-12
LARGEST = 1e300  # sums and their products with tolerances stay finite below


@dataclass(frozen=True, eq=False)
class MultipleChoiceKnapsack:
    """Problem E: pick exactly one choice per site, least total damage within every budget.

    A site is a layer (or its heads, its neurons), a choice how many units of it stay. Minimise
    ``sum damage[c]`` over the chosen c, subject to ``sum cost[c, j] <= budget[j]`` for each
    resource j, up to the relative `BUDGET_TOLERANCE` of this module.

    Args:
        damage: (n,) float64, finite, of any sign: loss proxy of each choice, sites one after another.
        cost: (n, r) float64 >= 0, or (n,) for one resource: e.g. parameters and latency.
        budget: (r,) float64 >= 0, or a number for one resource.
        start: (sites + 1,) int; site s owns the choices ``start[s]:start[s + 1]``.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite numbers, a negative cost or budget, an empty site.
        Infeasible: even the cheapest choice of each site breaks a budget. A conflict between
            budgets is found by the exact solvers.

    Example:
        >>> problem = MultipleChoiceKnapsack.from_curves([[5.0, 1.0], [3.0, 0.0]], [[1, 4], [2, 4]], 6)
        >>> problem.chosen(problem.mask([1, 0])).tolist()
        [1, 0]
        >>> problem.objective(problem.mask([1, 0]))
        4.0
    """

    damage: np.ndarray
    cost: np.ndarray
    budget: np.ndarray
    start: np.ndarray

    def __post_init__(self) -> None:
        damage = np.asarray(self.damage, dtype=np.float64)
        cost = np.asarray(self.cost, dtype=np.float64)
        budget = np.atleast_1d(np.asarray(self.budget, dtype=np.float64))
        if damage.ndim != 1:
            raise ValueError(f"damage must be (n,), one number per choice, found shape {damage.shape}")
        if cost.ndim == 1:
            cost = cost[:, None]
        if budget.ndim != 1 or budget.size == 0:
            raise ValueError(f"budget must be (r,) with r >= 1 resources, found shape {budget.shape}")
        if cost.shape != (damage.size, budget.size):
            raise ValueError(
                f"cost has shape {cost.shape}, expected ({damage.size}, {budget.size}): one row per choice, "
                "one column per budget"
            )
        for name, value in (("damage", damage), ("cost", cost), ("budget", budget)):
            if not np.all(np.isfinite(value)):
                where = int(np.flatnonzero(~np.isfinite(value).reshape(value.shape[0], -1).all(axis=1))[0])
                raise ValueError(f"{name} must be finite, found {value[where]} at index {where}")
            if value.size and not float(np.abs(value).max()) < LARGEST / value.size:
                raise ValueError(f"{name} is too large to add up: {np.abs(value).max():g}; measure it in larger units")
        if cost.size and cost.min() < 0:
            raise ValueError(f"cost must be >= 0, found {cost.min():g} at choice {int(cost.argmin()) // budget.size}")
        if budget.min() < 0:
            raise ValueError(f"budget must be >= 0, found {budget.min():g} for resource {int(budget.argmin())}")
        start = _offsets(self.start, damage.size)
        for name, array in (("damage", damage), ("cost", cost), ("budget", budget), ("start", start)):
            object.__setattr__(self, name, read_only(array))
        if self.sites:
            cheapest = np.minimum.reduceat(cost, start[:-1], axis=0)
            for j, limit in enumerate(self.limit.tolist()):
                least = _sum(cheapest[:, j])
                if least > limit:
                    raise Infeasible(
                        f"resource {j}: the cheapest choice of each site costs {least:g} in total, "
                        f"the budget is {budget[j]:g}"
                    )

    @classmethod
    def from_curves(
        cls, damages: Sequence[Any], costs: Sequence[Any], budget: float | Sequence[float] | np.ndarray
    ) -> MultipleChoiceKnapsack:
        """Build the problem from one damage curve and one cost curve per site.

        Args:
            damages: per site (c_i,) numbers. costs: per site (c_i,) or (c_i, r) numbers.
            budget: (r,) numbers, or one.
        """
        if len(damages) != len(costs):
            raise ValueError(f"{len(damages)} damage curves, but {len(costs)} cost curves; expected one each per site")
        r = np.atleast_1d(np.asarray(budget)).size
        damage_of = [np.atleast_1d(np.asarray(curve, dtype=np.float64)) for curve in damages]
        cost_of = []
        for site, (curve, given) in enumerate(zip(damage_of, costs, strict=True)):
            rows = np.asarray(given, dtype=np.float64)
            if curve.ndim == 1 and r == 1 and rows.ndim <= 1:
                rows = rows.reshape(-1, 1)
            if curve.ndim != 1 or rows.shape != (curve.size, r):
                raise ValueError(
                    f"site {site}: damage has shape {curve.shape} and cost {rows.shape}; "
                    f"expected (c,) and (c, {r}) with c choices and {r} budget(s)"
                )
            cost_of.append(rows)
        start = np.concatenate([[0], np.cumsum([curve.size for curve in damage_of], dtype=np.int64)])
        none = np.zeros(0)
        return cls(
            np.concatenate([none, *damage_of]),
            np.concatenate([none.reshape(0, r), *cost_of]),
            np.atleast_1d(np.asarray(budget, dtype=np.float64)),
            start,
        )

    @property
    def n(self) -> int:
        """Number of choices of all sites."""
        return int(self.damage.size)

    @property
    def sites(self) -> int:
        """Number of sites."""
        return int(self.start.size - 1)

    @property
    def limit(self) -> np.ndarray:
        """(r,) float64: the budgets with `BUDGET_TOLERANCE` added; what every solver and the checker compare with."""
        return np.asarray(self.budget * (1 + BUDGET_TOLERANCE))

    @property
    def sense(self) -> Sense:
        """This problem minimises."""
        return "min"

    def mask(self, index: Any) -> np.ndarray:
        """Return the (n,) keep mask of (sites,) choice indices, each counted within its site."""
        picked = np.asarray(index, dtype=np.int64).reshape(-1)
        size = np.diff(self.start)
        if picked.shape != size.shape or np.any((picked < 0) | (picked >= size)):
            raise ValueError(f"expected {size.size} indices, each below its site's number of choices; found {index!r}")
        keep = np.zeros(self.n, dtype=bool)
        keep[self.start[:-1] + picked] = True
        return keep

    def chosen(self, keep: np.ndarray) -> np.ndarray:
        """Return the (sites,) int64 index of the choice made at each site, counted within the site.

        Raises:
            ValueError: a site without, or with more than one, choice.
        """
        wrong = self._not_one(np.asarray(keep, dtype=bool))
        if wrong is not None:
            raise ValueError(wrong)
        return np.asarray(np.flatnonzero(keep) - self.start[:-1], dtype=np.int64)

    def spent(self, keep: np.ndarray) -> np.ndarray:
        """Return the (r,) total cost of a mask, correctly rounded, so that the order of sites does not matter."""
        return np.array([_sum(column) for column in self.cost[np.asarray(keep, dtype=bool)].T])

    def objective(self, keep: np.ndarray) -> float:
        """Return the total damage of a mask, correctly rounded."""
        return _sum(self.damage[np.asarray(keep, dtype=bool)])

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with a mask, or None. O(n)."""
        keep = np.asarray(keep, dtype=bool)
        wrong = self._not_one(keep)
        if wrong is not None:
            return wrong
        spent = self.spent(keep)
        over = np.flatnonzero(spent > self.limit)
        if over.size:
            j = int(over[0])
            return f"resource {j}: the choices cost {float(spent[j])!r}, the budget is {float(self.budget[j])!r}"
        return None

    def _not_one(self, keep: np.ndarray) -> str | None:
        if keep.shape != (self.n,):
            return f"keep has shape {keep.shape}, expected ({self.n},)"
        count = np.add.reduceat(keep.astype(np.int64), self.start[:-1]) if self.sites else np.zeros(0, dtype=np.int64)
        off = np.flatnonzero(count != 1)
        return f"site {int(off[0])} has {int(count[off[0]])} choices, expected exactly one" if off.size else None


def _sum(values: np.ndarray) -> float:
    return math.fsum(values.tolist())


def _offsets(given: Any, n: int) -> np.ndarray:
    start = np.asarray(given)
    if start.ndim != 1 or start.size == 0 or not (start.dtype.kind in "iu" or np.all(start == np.floor(start))):
        raise ValueError(f"start must be (sites + 1,) whole offsets, found {given!r}")
    start = start.astype(np.int64)
    if start[0] != 0 or start[-1] != n:
        raise ValueError(f"start must run from 0 to the number of choices {n}, found {start[0]} to {start[-1]}")
    size = np.diff(start)
    if np.any(size < 0):
        raise ValueError(f"start must not decrease, it does after site {int(np.flatnonzero(size < 0)[0])}")
    if np.any(size == 0):
        raise ValueError(f"site {int(np.flatnonzero(size == 0)[0])} has no choices; give it one, or leave it out")
    return start

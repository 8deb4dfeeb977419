"""Problem A: the cheapest set of units that covers every unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.csr import read_only
from topoprune_solvers.problems.units import UnitProblem, vector
from topoprune_solvers.solution import Infeasible, Sense

__all__ = ["DominatingSet"]


@dataclass(frozen=True, eq=False)
class DominatingSet(UnitProblem):
    """Problem A: minimise the cost of kept units so that enough of them are in every closed neighbourhood.

    ``min sum_i cost_i x_i  subject to  sum_{j in N[i]} x_j >= demand_i`` with N[i] the unit and its neighbours.

    Args:
        cost: (n,) float64 >= 0, default 1 each (minimum cardinality).
        demand: (n,) int64 >= 0 or one int, how many kept units each closed neighbourhood needs; default 1
            (every unit is kept or has a kept neighbour). 0 asks nothing of a unit, more than 1 is a
            cover that survives the loss of units (r-fold domination).
        Others as in every unit problem; `weight` only decides which kept neighbour is named
        as dominator (the nearest, ties to the lower index).

    Raises:
        ValueError: negative or non-finite costs, demands that are no integers >= 0.
        Infeasible: a demand above degree + 1, or above the allowed units of a closed neighbourhood.

    Example:
        >>> path = DominatingSet.from_edges(3, [(0, 1), (1, 2)])
        >>> path.objective(np.array([False, True, False]))
        1.0
    """

    cost: np.ndarray | None = None
    demand: np.ndarray | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        cost = vector("cost", self.cost, self.n, 1.0, np.float64)
        if cost.size and cost.min() < 0:
            raise ValueError(f"costs must be >= 0, found {cost.min():g} at unit {int(cost.argmin())}")
        with np.errstate(over="ignore"):
            if not np.isfinite(cost.sum()):
                raise ValueError("the costs add up to more than a float64 holds; divide them all by the largest")
        object.__setattr__(self, "cost", cost)
        object.__setattr__(self, "demand", _demand(self.demand, self.n))
        short = np.flatnonzero(self.counts(~self.forbidden) < self.demand)  # type: ignore[operator]
        if short.size:
            unit = int(short[0])
            closed = 1 + int(self.indptr[unit + 1] - self.indptr[unit])
            asked = int(self.demand[unit])  # type: ignore[index]
            if asked > closed:
                raise Infeasible(f"unit {unit} demands {asked} kept units, but its closed neighbourhood has {closed}")
            if asked == 1:
                raise Infeasible(f"units {short.tolist()[:10]} and all their neighbours are forbidden")
            raise Infeasible(
                f"unit {unit} demands {asked} kept units, but too many of its {closed} closed neighbours are forbidden"
            )

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

    def counts(self, keep: np.ndarray) -> np.ndarray:
        """Return (n,) int64: kept units in each closed neighbourhood. O(n + nnz)."""
        hits = np.concatenate([[0], np.cumsum(keep[self.indices], dtype=np.int64)])
        return keep + (hits[self.indptr[1:]] - hits[self.indptr[:-1]])

    def covered(self, keep: np.ndarray) -> np.ndarray:
        """Return (n,) bool: units whose closed neighbourhood holds as many kept units as they demand. O(n + nnz)."""
        assert self.demand is not None
        return self.counts(keep) >= self.demand

    @property
    def simple(self) -> bool:
        """True if every demand is 1: plain domination."""
        return bool(np.all(self.demand == 1))

    def violation(self, keep: np.ndarray) -> str | None:
        """Return what is wrong with an (n,) keep mask, or None. O(n + nnz)."""
        wrong = super().violation(keep)
        if wrong is not None:
            return wrong
        bare = np.flatnonzero(~self.covered(keep))
        return f"units {bare.tolist()[:10]} are not covered" if bare.size else None

    def objective(self, keep: np.ndarray) -> float:
        """Return the total cost of the kept units."""
        assert self.cost is not None
        return float(self.cost[keep].sum())


def _demand(value: np.ndarray | int | None, n: int) -> np.ndarray:
    array = np.asarray(1 if value is None else value)
    if array.dtype.kind not in "iu" and not (array.dtype.kind == "f" and np.all(array == np.floor(array))):
        raise ValueError(f"demand must be integers >= 0, found {array.reshape(-1)[:5].tolist()}")
    if array.ndim == 0:
        array = np.full(n, int(array))
    if array.shape != (n,):
        raise ValueError(f"demand has shape {array.shape}, expected ({n},) or one integer")
    array = array.astype(np.int64)
    if array.size and array.min() < 0:
        raise ValueError(f"demand must be >= 0, found {array.min()} at unit {int(array.argmin())}")
    return read_only(array)

"""Lower bounds for set cover from feasible solutions of the dual (a packing): no LP solver needed.

The dual gives every element a price y_i >= 0 such that the prices in any allowed candidate add up to at most
its cost. Any such prices bound every cover from below by ``sum_i r_i y_i`` with demands r (weak duality).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from topoprune_solvers.compiled import choose, enabled
from topoprune_solvers.domination.covering import Cover, SetCover
from topoprune_solvers.scaling import is_integral
from topoprune_solvers.solution import Bound

__all__ = ["Pricing", "dual_ascent_bound", "rounded_up"]

_ROUNDING = 1e-12  # relative, beside the float error of a sum over all entries


@dataclass(frozen=True, eq=False)
class Pricing:
    """What dual bounds need to know of a covering instance.

    Args:
        row_start, row: candidates of each element. col_start, col: elements of each candidate.
        cost: (c,) float64, inf for candidates that are out of the question.
        demand: (e,) float64, 0 for elements that ask for nothing.
        fixed: cost of what is chosen already.
        integral: True if every cover's cost is an integer, so that bounds may be rounded up.
    """

    row_start: np.ndarray
    row: np.ndarray
    col_start: np.ndarray
    col: np.ndarray
    cost: np.ndarray
    demand: np.ndarray
    fixed: float
    integral: bool

    @classmethod
    def of(cls, instance: Cover | SetCover) -> Pricing:
        """Build from either form of an instance. O(n + nnz) with forced units, else O(n)."""
        if isinstance(instance, SetCover):
            return cls(
                instance.row_start, instance.row, instance.col_start, instance.col, instance.cost,
                instance.demand.astype(np.float64), 0.0, is_integral(instance.cost),
            )  # fmt: skip
        demand, cost, fixed = instance.demand, instance.cost, 0.0
        if instance.forced.any():
            demand = np.maximum(demand - instance.counts(instance.forced), 0)
            fixed = float(cost[instance.forced].sum())
        cost = np.where(instance.forced | instance.forbidden, np.inf, cost)
        return cls(
            instance.indptr, instance.indices, instance.indptr, instance.indices, cost, demand.astype(np.float64),
            fixed, is_integral(instance.cost),
        )  # fmt: skip

    def degree_prices(self) -> np.ndarray:
        """Return the (e,) feasible prices ``min_j c_j / size_j``; 0 for elements that ask for nothing."""
        asks = self.demand > 0
        size = np.diff(self.col_start) if asks.all() else line_sums(self.col_start, self.col, asks.astype(np.float64))
        share = (self.cost / np.maximum(size, 1))[self.row]
        price = np.zeros(asks.size)
        filled = np.flatnonzero(np.diff(self.row_start))
        if filled.size:
            price[filled] = np.minimum.reduceat(share, self.row_start[filled])
        # Elements without an allowed candidate have forced ones.
        return np.where(asks & np.isfinite(price), price, 0.0)


def dual_ascent_bound(instance: Cover | SetCover) -> Bound:
    """Return the better of two dual-ascent bounds on the cheapest cover.

    The first ascent starts from zero (good on sparse, cycle-like graphs: it finds a packing), the
    second from the degree prices ``y_i = min_j c_j / |N[j]|`` (good on dense, irregular graphs).
    Each then raises the prices one by one, elements with few candidates first, until none can rise.
    With integral costs the bound is rounded up.

    Complexity: O(n log n + nnz).
    References: Beasley, J. E. (1987), An algorithm for set covering problem, EJOR 31; Balas and Ho (1980).

    Example:
        >>> from topoprune_solvers import DominatingSet
        >>> from topoprune_solvers.domination.covering import cover_of
        >>> cycle = DominatingSet.from_edges(6, [(i, (i + 1) % 6) for i in range(6)])
        >>> dual_ascent_bound(cover_of(cycle)).value
        2.0
    """
    pricing = Pricing.of(instance)
    elements = np.flatnonzero(pricing.demand > 0)
    if not elements.size:
        return Bound(pricing.fixed, "forced units")
    open_ = np.isfinite(pricing.cost)
    if open_.all():
        size = np.diff(pricing.row_start)
    else:
        size = line_sums(pricing.row_start, pricing.row, open_.astype(np.float64))
    order = elements[np.argsort(size[elements], kind="stable")]
    best = max(_ascend(pricing, order, None), _ascend(pricing, order, pricing.degree_prices()))
    margin = _ROUNDING + np.finfo(np.float64).eps * pricing.row.size
    return Bound(rounded_up(pricing.fixed + best * (1.0 - margin), pricing.integral), "dual ascent")


def rounded_up(value: float, integral: bool) -> float:
    """Return a lower bound raised to the next integer where all costs are integers."""
    # floor of the error, not of the bound: an integral optimum cannot lie strictly between
    return float(math.ceil(value - 1e-9 * max(1.0, abs(value)))) if integral and math.isfinite(value) else value


def line_sums(start: np.ndarray, items: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the sum of the values of each line's items. O(nnz)."""
    sums = np.concatenate([[0.0], np.cumsum(value[items])])
    return sums[start[1:]] - sums[start[:-1]]


def _ascend(pricing: Pricing, order: np.ndarray, prices: np.ndarray | None) -> float:
    slack, total = pricing.cost.copy(), 0.0
    if prices is not None:
        slack -= line_sums(pricing.col_start, pricing.col, prices)
        np.maximum(slack, 0.0, out=slack)  # rounding only: degree prices are feasible
        total = math.fsum((prices * pricing.demand).tolist())
    from topoprune_solvers.domination.greedy_kernels import ascent_kernel

    arrays = [pricing.row_start, pricing.row, order, pricing.demand, slack]
    if not enabled():
        arrays = [array.tolist() for array in arrays]
    return total + float(choose(ascent_kernel)(*arrays))

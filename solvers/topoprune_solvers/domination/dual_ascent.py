"""Lower bounds for set cover from feasible solutions of the dual (a packing): no LP solver needed.

The dual gives every uncovered element a price y_i >= 0 such that the prices in any allowed closed
neighbourhood add up to at most its cost. Any such prices bound every cover from below (weak duality).
"""

from __future__ import annotations

import math

import numpy as np

from topoprune_solvers.domination.covering import Cover
from topoprune_solvers.scaling import is_integral
from topoprune_solvers.solution import Bound

__all__ = ["dual_ascent_bound"]

_ROUNDING = 1e-12  # relative: larger than the float error of n additions, far below any tolerance


def dual_ascent_bound(cover: Cover) -> Bound:
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
    fixed = float(cover.cost[cover.forced].sum())
    elements = np.flatnonzero(cover.counts(cover.forced) == 0)
    if not elements.size:
        return Bound(fixed, "forced units")
    # Only allowed candidates carry constraints; inf slack makes the others harmless.
    slack = np.where(cover.forbidden, np.inf, cover.cost)
    candidates = cover.counts(~cover.forbidden)
    order = elements[np.argsort(candidates[elements], kind="stable")]
    best = max(_ascend(cover, order, slack, None), _ascend(cover, order, slack, _degree_prices(cover, elements, slack)))
    value = fixed + best * (1.0 - _ROUNDING)
    if is_integral(cover.cost):
        # floor of the error, not of the bound: an integral optimum cannot lie strictly between
        value = float(math.ceil(value - 1e-9 * max(1.0, value)))
    return Bound(value, "dual ascent")


def _degree_prices(cover: Cover, elements: np.ndarray, slack: np.ndarray) -> np.ndarray:
    is_element = np.zeros(cover.n, dtype=bool)
    is_element[elements] = True
    size = np.maximum(cover.counts(is_element), 1)
    prices = np.minimum.reduceat((slack / size)[cover.indices], cover.indptr[:-1])
    return np.where(is_element, prices, 0.0)


def _ascend(cover: Cover, order: np.ndarray, slack: np.ndarray, prices: np.ndarray | None) -> float:
    slack = slack.copy()
    total = 0.0
    if prices is not None:
        slack -= np.add.reduceat(prices[cover.indices], cover.indptr[:-1])
        np.maximum(slack, 0.0, out=slack)  # rounding only: degree prices are feasible
        total = math.fsum(prices.tolist())
    indices, bounds = cover.indices, cover.indptr.tolist()
    for element in order.tolist():
        row = indices[bounds[element] : bounds[element + 1]]
        rise = slack[row].min()
        if rise > 0:
            slack[row] -= rise
            total += float(rise)
    return total

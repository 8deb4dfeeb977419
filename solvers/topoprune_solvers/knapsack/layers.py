"""Site by site over all partial picks that a bound does not exclude: exact, or a beam that knows what it dropped.

A partial pick is excluded when, for one of several price vectors, its Lagrangian bound reaches a known
objective, when the cheapest remaining choices break a budget, or when another partial pick costs no more and
damages no more (several resources: costs the same and damages no more). Where more than `width` survive,
those with the best bounds stay; the least bound among the dropped ones is then the proven bound.

References:
    Nemhauser, Ullmann (1969), Discrete dynamic programming and capital allocation, Management Science.
    Balas, Zemel (1980), An algorithm for large zero-one knapsack problems, Operations Research (the core).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import numpy as np

from topoprune_solvers.knapsack.core import Core
from topoprune_solvers.knapsack.dual import EPSILON, lagrangian_bound
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["Sweep", "open_choices", "price_fan", "sweep"]

RESOLUTION = 1e-10  # relative: picks that improve by less are not looked for
FACTORS = (0.0, 0.7, 0.9, 1.1, 1.4)


@dataclass(frozen=True, eq=False)
class Sweep:
    """Result of one pass.

    Args:
        pick: (s,) best pick found that is better than `upper`, or None.
        bound: proven lower bound on the optimum; at most `upper`.
        dropped: partial picks dropped for lack of width. largest: most partial picks kept at a site.
        finished: False if the clock stopped the pass; `bound` is then -inf.
    """

    pick: np.ndarray | None
    bound: float
    dropped: int
    largest: int
    finished: bool = True


def price_fan(price: np.ndarray) -> np.ndarray:
    """Return (k, a) price vectors around the best one (first row), for partial picks that spend unevenly."""
    rows = [price]
    if price.size <= 3:
        for factors in product((1.0, *FACTORS), repeat=price.size):
            rows.append(price * np.array(factors))
    else:
        for j in range(price.size):
            for factor in FACTORS:
                row = price.copy()
                row[j] *= factor
                rows.append(row)
    unique = {tuple(row.tolist()): None for row in rows}
    return np.array(list(unique))


def open_choices(core: Core, prices: np.ndarray, upper: float) -> np.ndarray:
    """Return the (m,) mask of choices that a pick better than `upper` can contain (reduced-cost fixing).

    Args:
        prices: (k, a) price vectors; a choice is closed if one of them proves it.
    """
    open_choice = np.ones(core.damage.size, dtype=bool)
    for price in prices:
        value = core.damage + core.cost @ price
        bound, _ = lagrangian_bound(core, price)
        open_choice &= bound + (value - core.site_min(value)[core.site]) < upper
    return open_choice


def sweep(
    core: Core, prices: np.ndarray, upper: float, *, width: int, deadline: Deadline = NEVER, skyline: bool = True
) -> Sweep:
    """Look for a pick of less damage than `upper`, keeping at most `width` partial picks after each site.

    Args:
        prices: (k, a) float64 >= 0, the price vectors of the bounds, the best one first.
        upper: objective of a known pick, or inf.

    Complexity: O(width * choices * (k + a)) per site.
    """
    cut = upper - RESOLUTION * abs(upper) if math.isfinite(upper) else math.inf
    value = core.damage[:, None] + core.cost @ prices.T
    rise = value - core.site_min(value)[core.site]
    # Sums of `rise` carry at most one rounding per site of numbers below this magnitude.
    peak = np.maximum.reduceat(np.abs(core.damage)[:, None] + core.cost @ prices.T, core.start[:-1], axis=0)
    slack = 8 * EPSILON * peak.sum(axis=0)
    bounds = np.array([lagrangian_bound(core, price)[0] for price in prices]) - slack
    cheapest = core.site_min(core.cost)
    sites = _order(core, rise[:, 0])
    rest = cheapest.sum(axis=0)
    room = core.outer * (1 + 1e-14) + 1e-14 * rest
    state, spent = bounds[:, None], np.zeros((core.resource.size, 1))
    parents: list[np.ndarray] = []
    choices: list[np.ndarray] = []
    dropped_bound, dropped, largest = math.inf, 0, 1
    for site in sites.tolist():
        rest = rest - cheapest[site]
        states, costs, origin, taken = [], [], [], []
        for c in range(core.start[site], core.start[site + 1]):
            if deadline.passed():
                return Sweep(None, -math.inf, dropped, largest, False)
            alive = np.flatnonzero(state[0] + rise[c, 0] < cut)
            after = spent[:, alive] + core.cost[c][:, None]
            bound = state[:, alive] + rise[c][:, None]
            good = np.all(after + rest[:, None] <= room[:, None], axis=0)
            good &= np.max(bound, axis=0) < cut
            states.append(bound[:, good])
            costs.append(after[:, good])
            origin.append(alive[good])
            taken.append(np.full(origin[-1].size, c))
        state, spent = np.concatenate(states, axis=1), np.concatenate(costs, axis=1)
        parent, choice = np.concatenate(origin), np.concatenate(taken)
        if skyline:
            left = _undominated(state[0], spent, prices[0])
            state, spent, parent, choice = state[:, left], spent[:, left], parent[left], choice[left]
        if parent.size > width:
            bound = state.max(axis=0)
            order = np.argpartition(bound, width)
            dropped_bound = min(dropped_bound, float(bound[order[width:]].min()))
            dropped += parent.size - width
            left = np.sort(order[:width])
            state, spent, parent, choice = state[:, left], spent[:, left], parent[left], choice[left]
        largest = max(largest, parent.size)
        parents.append(parent.astype(np.int32))
        choices.append(choice.astype(np.int32))
        if parent.size == 0:
            return Sweep(None, min(upper, cut, dropped_bound), dropped, largest)
    damage = state[0] - prices[0] @ (spent - core.outer[:, None])
    for last in np.argsort(damage, kind="stable")[:64].tolist():
        pick = _trace(core, sites, parents, choices, last)
        if core.objective(pick) < upper and core.feasible(pick):
            return Sweep(pick, min(cut, dropped_bound, core.objective(pick), float(damage.min())), dropped, largest)
    return Sweep(None, min(cut, dropped_bound, float(damage.min())), dropped, largest)


def _order(core: Core, rise: np.ndarray) -> np.ndarray:
    # Sites with few choices of low rise first: they multiply the partial picks least.
    size = np.diff(core.start)
    second = np.array([np.partition(rise[a:b], 1)[1] if b - a > 1 else np.inf for a, b in _spans(core)])
    return np.lexsort((-second, size > 1)) if size.size else np.zeros(0, dtype=np.int64)


def _spans(core: Core) -> list[tuple[int, int]]:
    return list(zip(core.start[:-1].tolist(), core.start[1:].tolist(), strict=True))


def _undominated(state: np.ndarray, spent: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Return ascending positions without partial picks that cost the same and damage as much as another.

    With one resource, without those that another beats in cost and damage.
    """
    if spent.shape[0] == 0:
        return np.array([int(state.argmin())]) if state.size else np.zeros(0, dtype=np.int64)
    damage = state - price @ spent
    if spent.shape[0] == 1:
        order = np.lexsort((damage, spent[0]))
        sorted_damage = damage[order]
        before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_damage[:-1]]))
        return np.sort(order[sorted_damage < before])
    order = np.lexsort((damage, *spent))
    ordered = spent[:, order]
    first = np.ones(order.size, dtype=bool)
    first[1:] = np.any(ordered[:, 1:] != ordered[:, :-1], axis=0)
    return np.sort(order[first])


def _trace(core: Core, sites: np.ndarray, parents: list[np.ndarray], choices: list[np.ndarray], at: int) -> np.ndarray:
    pick = np.zeros(core.sites, dtype=np.int64)
    for site, parent, choice in zip(sites[::-1].tolist(), reversed(parents), reversed(choices), strict=True):
        pick[site] = choice[at]
        at = int(parent[at])
    return pick

"""Compiled loops of `halves`: one site's extension of all partial picks, and the search through windows of pairs.

Shape legend: w partial picks, k choices of a site, a resources, q windows.
"""

from __future__ import annotations

import numpy as np

from topoprune_solvers.compiled import kernel

__all__ = ["extend", "search_windows"]


@kernel
def extend(
    total: np.ndarray, cost: np.ndarray, rise: np.ndarray, own: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return parents, choice numbers, totals and costs of the extensions below the reach, choice by choice.

    Args:
        total: (w,) float64. cost: (a, w) float64. rise: (k,) float64. own: (k, a) float64.
    """
    count = 0
    for c in range(rise.size):
        below = reach - rise[c]
        for i in range(total.size):
            if total[i] < below:
                count += 1
    resources = cost.shape[0]
    parent = np.empty(count, dtype=np.int32)
    choice = np.empty(count, dtype=np.int32)
    new_total = np.empty(count, dtype=np.float64)
    new_cost = np.empty((resources, count), dtype=np.float64)
    at = 0
    for c in range(rise.size):
        below = reach - rise[c]
        for i in range(total.size):
            if total[i] < below:
                parent[at] = i
                choice[at] = c
                new_total[at] = total[i] + rise[c]
                for j in range(resources):
                    new_cost[j, at] = cost[j, i] + own[c, j]
                at += 1
    return parent, choice, new_total, new_cost


@kernel
def search_windows(
    rise: np.ndarray,
    cost: np.ndarray,
    partner_rise: np.ndarray,
    room: np.ndarray,
    begin: np.ndarray,
    size: np.ndarray,
    price: np.ndarray,
    best: float,
    first: int,
    pairs: int,
) -> tuple[float, int, int, int, int]:
    """Search windows from number `first` on, until about `pairs` pairs were looked at.

    Args:
        rise: (w,) float64. cost: (a, w) float64. partner_rise: (p,) float64. room: (a, p) float64.
        begin, size: (q,) int64; window v belongs to partner ``v % p``.

    Returns:
        Least excess, its position and partner (-1, -1 if none is below `best`), pairs looked at, next window.
    """
    where, who, looked = -1, -1, 0
    v = first
    while v < begin.size and looked < pairs:
        partner = v % partner_rise.size
        start = partner_rise[partner]
        if start < best:
            looked += size[v]
            for i in range(begin[v], begin[v] + size[v]):
                value = rise[i] + start
                if value >= best:
                    continue
                fits = True
                for j in range(price.size):
                    unspent = room[j, partner] - cost[j, i]
                    if unspent < 0.0:
                        fits = False
                        break
                    value += price[j] * unspent
                if fits and value < best:
                    best, where, who = value, i, partner
        v += 1
    return best, where, who, looked, v

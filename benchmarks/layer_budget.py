"""Layer budgets under two resources, parameters and latency: certified gap and seconds of every solver."""

from __future__ import annotations

import numpy as np

from topoprune_solvers import MultipleChoiceKnapsack


def planted_curves(sites: int, choices: int, share: float, seed: int) -> MultipleChoiceKnapsack:
    """Return a model's layer budgets: damage falls with the units kept, noisily; latency grows in steps.

    Both budgets bind: they lie within 1 % of what a model spends that pays for both resources at
    the price at which it spends `share` of the dense model's parameters.

    Args:
        sites, choices: number of sites, and of choices at each (1/choices up to all units kept).
        share: of the dense model's parameters, in (0, 1).
    """
    rng = np.random.default_rng(seed)
    damage, cost = np.zeros((sites, choices)), np.zeros((sites, choices, 2))
    units = np.arange(1, choices + 1)
    kept = units / choices
    for site in range(sites):
        size = rng.lognormal(0.0, 0.7)
        fall = -np.diff((1 - np.concatenate([[0.0], kept])) ** rng.uniform(1.2, 4.0))
        fall *= rng.lognormal(0.0, 0.6, choices)  # noise on each step keeps the curve monotone
        damage[site] = rng.lognormal(0.0, 0.8) * (fall.sum() - np.cumsum(fall))
        tile = int(rng.choice([2, 4, 8]))
        steps = np.ceil(units / tile) * tile / choices
        cost[site, :, 0] = 1e6 * size * (kept + rng.uniform(0, 0.02))
        cost[site, :, 1] = 1e-3 * size * rng.lognormal(0.0, 0.5) * (rng.uniform(0.05, 0.3) + steps + 0.05 * kept)
    dense = cost[:, -1].sum(axis=0)
    low, high = 0.0, 1e6
    for _ in range(60):
        price = (low + high) / 2
        pick = (damage + price * (cost / dense).sum(axis=2)).argmin(axis=1)
        spent = cost[np.arange(sites), pick].sum(axis=0)
        low, high = (price, high) if spent[0] > share * dense[0] else (low, price)
    budget = spent * rng.uniform(0.99, 1.01, 2)
    return MultipleChoiceKnapsack.from_curves(list(damage), list(cost), budget)

"""Large neighbourhoods: free a few sites, keep the others, and solve what is free exactly by meet in the middle."""

from __future__ import annotations

import numpy as np

from topoprune_solvers.knapsack.core import Core
from topoprune_solvers.knapsack.dual import Dual, reduced_damage
from topoprune_solvers.knapsack.halves import best_pair, count_partial_picks, partial_picks, split_sites
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["search_neighbourhoods"]

FREE_SITES = 12
PARTIAL_PICKS = 4000  # per half


def search_neighbourhoods(
    core: Core, dual: Dual, pick: np.ndarray, *, rounds: int, seed: int = 0, deadline: Deadline = NEVER
) -> np.ndarray:
    """Return a pick at least as good as the given feasible one.

    Each round draws sites, frees as many of them as keep the enumeration small, and replaces their
    choices by the best that fit together.

    Args:
        dual: prices and bound of the core. rounds: neighbourhoods tried. seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    rise = reduced_damage(core, dual.price)
    upper = core.objective(pick)
    free = min(FREE_SITES, core.sites)
    for _ in range(rounds):
        reach = upper - dual.value
        if deadline.passed() or not reach > 1e-12 * abs(upper):
            break
        order = rng.permutation(core.sites)
        while free > 1:
            freed = np.zeros(core.sites, dtype=bool)
            freed[order[:free]] = True
            open_choice = freed[core.site] & (rise < reach)
            open_choice[pick] = True
            part = core.only(open_choice)
            if count_partial_picks(part, rise[open_choice], reach) <= PARTIAL_PICKS:
                break
            free = max(1, free * 3 // 4)
        if free < 2:
            break
        better = _best_in(core, part, rise[open_choice], dual.price, reach, deadline)
        if better is not None and core.feasible(better) and core.objective(better) < upper:
            pick, upper = better, core.objective(better)
            free = min(free + 2, core.sites)
    return pick


def _best_in(
    core: Core, part: Core, rise: np.ndarray, price: np.ndarray, reach: float, deadline: Deadline
) -> np.ndarray | None:
    halves = []
    for sites in split_sites(part, rise):
        half = partial_picks(part, sites, rise, reach, most=4 * PARTIAL_PICKS, deadline=deadline)
        if half is None or half.rise.size == 0:
            return None
        halves.append(half)
    found = best_pair(part, halves[0], halves[1], price, reach, deadline=deadline).pick
    return None if found is None else np.searchsorted(core.choice, part.choice[found])

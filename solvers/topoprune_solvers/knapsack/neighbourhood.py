"""Large neighbourhoods: free a few sites, keep the others, and solve what is free exactly by meet in the middle."""

from __future__ import annotations

import numpy as np

from topoprune_solvers.knapsack.core import Core
from topoprune_solvers.knapsack.dual import Dual, reduced_damage
from topoprune_solvers.knapsack.halves import best_pair, count_partial_picks, partial_picks, split_sites
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["search_neighbourhoods"]

PARTIAL_PICKS = 30000  # per half
REACHES = (0.12, 0.25, 0.5, 1.0)  # of the gap that is left


def search_neighbourhoods(
    core: Core, dual: Dual, pick: np.ndarray, *, rounds: int, seed: int = 0, deadline: Deadline = NEVER
) -> np.ndarray:
    """Return a pick at least as good as the given feasible one.

    Each round draws sites, frees as many of them as keep the enumeration small, fixes the others at their best
    priced choice (every fifth round: at the current one) and takes the best choices that fit together.

    Args:
        dual: prices and bound of the core. rounds: neighbourhoods tried. seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    rise = reduced_damage(core, dual.price)
    priced = core.site_argmin(rise)
    runner_up = _second_lowest(core, rise)
    upper = core.objective(pick)
    for number in range(rounds):
        reach = upper - dual.value
        if deadline.passed() or not reach > 1e-12 * abs(upper):
            break
        # A shorter reach leaves room for more sites, a longer one for dearer choices at fewer.
        reach *= REACHES[number % len(REACHES)]
        # Sites whose second choice costs little more are drawn first, mostly.
        order = np.argsort(runner_up * rng.exponential(size=core.sites), kind="stable")
        base = pick if number % 5 == 4 else priced
        part = _freed(core, rise, base, order, reach)
        better = _best_in(core, part, rise[np.searchsorted(core.choice, part.choice)], dual.price, reach, deadline)
        if better is not None and core.feasible(better) and core.objective(better) < upper:
            pick, upper = better, core.objective(better)
    return pick


def _second_lowest(core: Core, rise: np.ndarray) -> np.ndarray:
    others = rise.copy()
    others[core.site_argmin(rise)] = np.inf
    second = core.site_min(others)
    least = second[second > 0].min(initial=np.inf)
    return np.maximum(second, least if np.isfinite(least) else 1.0)


def _freed(core: Core, rise: np.ndarray, base: np.ndarray, order: np.ndarray, reach: float) -> Core:
    """Free the first sites of an order, as many as keep each half below `PARTIAL_PICKS`; fix the others at `base`."""
    low, high = 1, core.sites
    best: Core | None = None
    while low <= high:
        middle = (low + high) // 2
        freed = np.zeros(core.sites, dtype=bool)
        freed[order[:middle]] = True
        open_choice = freed[core.site] & (rise < reach)
        open_choice[base] = True
        part = core.only(open_choice)
        if best is None or count_partial_picks(part, rise[open_choice], reach) <= PARTIAL_PICKS:
            best, low = part, middle + 1
        else:
            high = middle - 1
    assert best is not None
    return best


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

"""Feasible picks and better ones: repair of a pick that breaks budgets, then single and double exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from topoprune_solvers.knapsack.core import Core, NoChoiceFound
from topoprune_solvers.knapsack.dual import best_prices, reduced_damage
from topoprune_solvers.result import NEVER, Deadline
from topoprune_solvers.solution import Infeasible

__all__ = ["best_repaired", "improve", "repair"]

PAIRED = 128  # single changes that are tried in pairs
STARTS = 6
NOISE = 1e-13  # relative; smaller gains are rounding


def best_repaired(
    core: Core,
    picks: Sequence[np.ndarray],
    price: np.ndarray,
    deadline: Deadline = NEVER,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Return the best feasible pick reached from several starting points.

    Args:
        picks: starting points, most promising last; the last 6 are used, and all while none led to a feasible pick.
        price: (a,) float64, prices of the budgets that rank the changes.
        known: (s,) a feasible pick; the answer is at least as good.

    Raises:
        Infeasible: no pick exists, proven by prices at which even the cheapest picks cost more than the budgets.
        NoChoiceFound: nothing feasible was found, which proves nothing.
    """
    rank = reduced_damage(core, price)
    best = known
    for number, start in enumerate(reversed(picks)):
        if best is not None and (number >= STARTS or deadline.passed()):
            break
        pick = repair(core, start, rank)
        if pick is None:
            continue
        pick = improve(core, pick, rank, deadline)
        if core.feasible(pick) and (best is None or core.objective(pick) < core.objective(best)):
            best = pick
    if best is not None:
        return best
    feasibility = replace(core, damage=np.zeros(core.damage.size))
    conflict = best_prices(feasibility)
    if conflict.value > 0:
        raise Infeasible(
            f"the budgets of resources {', '.join(map(str, core.resource.tolist()))} conflict: weighted with prices "
            f"{', '.join(f'{value:.3g}' for value in conflict.price)}, the cheapest choices cost more than the budgets"
        )
    for start in reversed(conflict.picks):
        pick = repair(core, start, np.zeros(core.damage.size))
        if pick is not None and core.feasible(pick):
            return improve(core, pick, rank, deadline)
    raise NoChoiceFound(
        "no choice within all budgets was found; this does not prove that there is none: solver 'exact' decides it"
    )


def repair(core: Core, pick: np.ndarray, rank: np.ndarray) -> np.ndarray | None:
    """Change choices until every budget holds: least `rank` per unit of excess removed, then pairs; None if stuck.

    Args:
        pick: (s,) start. rank: (m,) float64, priced damage of each choice.

    Complexity: O(m a) per change.
    """
    pick = pick.copy()
    scale = np.where(core.inner > 0, core.inner, 1.0)
    for _ in range(core.damage.size):
        spent = core.cost[pick].sum(axis=0)
        if np.all(spent <= core.inner):
            return pick
        excess = _excess(spent, core, scale)
        change = core.cost - core.cost[pick][core.site]
        gain = excess - _excess(spent + change, core, scale)
        worth = gain > NOISE * excess
        if worth.any():
            price = np.where(worth, (rank - rank[pick][core.site]) / np.where(worth, gain, 1.0), np.inf)
            best = int(price.argmin())
            pick[core.site[best]] = best
            continue
        pair = _pair(core, pick, -gain, change, spent, target=scale, enough=-NOISE * float(excess))
        if pair is None:
            return None
        pick[core.site[list(pair)]] = pair
    return None


def improve(core: Core, pick: np.ndarray, rank: np.ndarray, deadline: Deadline = NEVER) -> np.ndarray:
    """Exchange one choice, then two at once, while the damage falls and the budgets hold. O(m a) per exchange."""
    pick = pick.copy()
    while not deadline.passed():
        spent = core.cost[pick].sum(axis=0)
        change = core.cost - core.cost[pick][core.site]
        damage = core.damage - core.damage[pick][core.site]
        noise = NOISE * (np.abs(core.damage[pick]).sum() + 1e-300)
        fits = np.all(spent + change <= core.inner, axis=1)
        single = np.where(fits, damage, np.inf)
        best = int(single.argmin()) if single.size else 0
        if single.size and single[best] < -noise:
            pick[core.site[best]] = best
            continue
        pair = _pair(core, pick, rank - rank[pick][core.site], change, spent, damage=damage, enough=-noise)
        if pair is None:
            return pick
        pick[core.site[list(pair)]] = pair
    return pick


def _excess(spent: np.ndarray, core: Core, scale: np.ndarray) -> np.ndarray:
    return np.asarray((np.maximum(spent - core.inner, 0.0) / scale).sum(axis=-1))


def _pair(
    core: Core,
    pick: np.ndarray,
    rank: np.ndarray,
    change: np.ndarray,
    spent: np.ndarray,
    *,
    damage: np.ndarray | None = None,
    target: np.ndarray | None = None,
    enough: float = 0.0,
) -> tuple[int, int] | None:
    """Return the best two changes at different sites among the `PAIRED` lowest ranks, or None.

    Best is least total `damage` within the budgets, or with `target` (the scale of excess) least excess.
    """
    moved = np.ones(core.damage.size, dtype=bool)
    moved[pick] = False
    tried = np.flatnonzero(moved)
    if tried.size < 2:
        return None
    if tried.size > PAIRED:
        tried = np.sort(tried[np.argpartition(rank[tried], PAIRED)[:PAIRED]])
    total = spent + change[tried][:, None, :] + change[tried][None, :, :]
    if target is not None:
        before = float(_excess(spent, core, target))
        value = _excess(total, core, target) - before
    else:
        assert damage is not None
        value = damage[tried][:, None] + damage[tried][None, :]
        value[np.any(total > core.inner, axis=2)] = np.inf
    site = core.site[tried]
    value[site[:, None] == site[None, :]] = np.inf
    i, j = divmod(int(value.argmin()), tried.size)
    return (int(tried[i]), int(tried[j])) if value[i, j] < enough else None

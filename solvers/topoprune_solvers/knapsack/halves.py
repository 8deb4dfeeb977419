"""Meet in the middle: every pick within `reach` of the Lagrangian bound, from two halves of the sites.

At prices p a feasible pick damages ``L(p) + sum of reduced damages + p . (unspent budget)``, all terms >= 0. So a pick
within `reach` of L(p) takes a partial pick of little reduced damage at each half, and both together must
spend each priced budget almost exactly: a search by two sorted costs finds the few pairs that fit.

References:
    Horowitz, Sahni (1974), Computing partitions with applications to the knapsack problem, JACM.
    Balas, Zemel (1980), An algorithm for large zero-one knapsack problems, Operations Research.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from topoprune_solvers.compiled import enabled
from topoprune_solvers.knapsack.core import Core
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["Half", "Pairing", "best_pair", "count_partial_picks", "partial_picks", "split_sites"]

COUNTING_STEPS = 500
GROWTH = 64  # extensions looked at per partial pick allowed
BATCH = 1 << 14
CHUNK = 1 << 19  # pairs looked at between two looks at the clock
WIDEN = 1e-9  # relative: windows of candidate pairs are this much too wide, so that no rounding loses one


@dataclass(frozen=True, eq=False)
class Half:
    """All partial picks of some sites whose reduced damages sum to less than the reach.

    Args:
        rise: (w,) float64, summed reduced damage. cost: (a, w) float64, summed cost.
        sites: (h,) int64. parents, choices: per site (w_site,) int32 links back to the partial pick before it.
    """

    rise: np.ndarray
    cost: np.ndarray
    sites: np.ndarray
    parents: list[np.ndarray]
    choices: list[np.ndarray]

    def write(self, pick: np.ndarray, at: int) -> None:
        """Write the choices of partial pick `at` into a (s,) pick."""
        for site, parent, choice in zip(self.sites[::-1], reversed(self.parents), reversed(self.choices), strict=True):
            pick[site] = choice[at]
            at = int(parent[at])


def split_sites(core: Core, rise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deal the sites out to two halves in the order of their second-lowest reduced damage."""
    second = np.full(core.sites, np.inf)
    for site, (first, last) in enumerate(zip(core.start[:-1].tolist(), core.start[1:].tolist(), strict=True)):
        if last - first > 1:
            second[site] = np.partition(rise[first:last], 1)[1]
    # Sites that decide most come first: few partial picks live long.
    order = np.argsort(-second, kind="stable")
    return order[::2], order[1::2]


def count_partial_picks(core: Core, rise: np.ndarray, reach: float) -> float:
    """Estimate, from below, the partial picks of the larger half: a convolution over reduced damages in 500 steps."""
    largest = 0.0
    for sites in split_sites(core, rise):
        count = np.zeros(COUNTING_STEPS + 1)
        count[0] = 1.0
        for site in sites.tolist():
            part = rise[core.start[site] : core.start[site + 1]]
            part = part[part < reach]
            if part.size == 1 and part[0] == 0:
                continue
            added = np.zeros(COUNTING_STEPS + 1)
            for step in np.ceil(part / reach * COUNTING_STEPS).astype(np.int64).tolist():
                added[step:] += count[: COUNTING_STEPS + 1 - step]
            count = np.minimum(added, 1e300 / (COUNTING_STEPS + 1))
        largest = max(largest, float(count.sum()))
    return largest


def partial_picks(
    core: Core, sites: np.ndarray, rise: np.ndarray, reach: float, *, most: int, deadline: Deadline = NEVER
) -> Half | None:
    """Enumerate a half; None if it has more than `most` partial picks or the clock stops.

    Args:
        rise: (m,) float64 >= 0 reduced damages. reach: their largest sum, exclusive.
    """
    total, cost = np.zeros(1), np.zeros((core.resource.size, 1))
    parents: list[np.ndarray] = []
    choices: list[np.ndarray] = []
    next_merge = 64
    for site in sites.tolist():
        first, last = int(core.start[site]), int(core.start[site + 1])
        own = np.arange(first, last)[rise[first:last] < reach]
        if deadline.passed() or total.size * own.size > GROWTH * most:
            return None
        parent, choice, total, cost = _extend(total, cost, rise[own], core.cost[own], reach)
        choice = own[choice]
        if parent.size >= next_merge:
            left = _merged(total, cost)
            # Merging pays where costs repeat (equal layers); where it does not, try again later, and then no more.
            if left.size > 0.95 * parent.size:
                next_merge = 8 * parent.size if parent.size < 4096 else 1 << 62
            parent, choice, total, cost = parent[left], choice[left], total[left], cost[:, left]
        if parent.size > most:
            return None
        parents.append(parent.astype(np.int32))
        choices.append(choice.astype(np.int32))
    return Half(total, cost, sites, parents, choices)


def _extend(
    total: np.ndarray, cost: np.ndarray, rise: np.ndarray, own: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    if enabled():
        from topoprune_solvers.knapsack.halves_kernels import extend

        return extend(total, cost, rise, np.ascontiguousarray(own), reach)
    alive = [np.flatnonzero(total < reach - value) for value in rise.tolist()]
    parent = np.concatenate([np.zeros(0, dtype=np.int64), *alive])
    choice = np.repeat(np.arange(rise.size), [index.size for index in alive])
    return parent, choice, total[parent] + rise[choice], cost[:, parent] + own[choice].T


def _merged(total: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Return ascending positions of one partial pick per cost vector, that of least reduced damage.

    Equal costs mean equal priced costs, so the order by reduced damage is the order by damage.
    """
    order = np.lexsort((total, *cost))
    ordered = cost[:, order]
    first = np.ones(order.size, dtype=bool)
    first[1:] = np.any(ordered[:, 1:] != ordered[:, :-1], axis=0)
    return np.sort(order[first])


def best_pair(
    core: Core, left: Half, right: Half, price: np.ndarray, reach: float, *, deadline: Deadline = NEVER
) -> Pairing:
    """Return the pair of partial picks that keeps all budgets with least excess over the bound.

    Args:
        price: (a,) float64 >= 0. reach: excess (reduced damage + priced unspent budget) to stay below.

    Complexity: O((w + pairs) log w) with w partial picks a half; a pair is looked at only if it spends
        two budgets to within the reach.
    """
    if core.resource.size == 0 or left.rise.size * right.rise.size == 0:
        return _unbounded(core, left, right, reach)
    best, looked = float(reach), 0
    pair: tuple[int, int] | None = None
    # Of two partners one has less than half the reach: the few such picks are indexed, all others look them up.
    low_left, low_right = left.rise <= reach / 2, right.rise <= reach / 2
    everyone = np.ones(right.rise.size, dtype=bool)
    for indexed, low, asking, part in ((left, low_left, right, everyone), (right, low_right, left, ~low_left)):
        members, partners = np.flatnonzero(low), np.flatnonzero(part)
        match = _match(core, indexed, members, asking, partners, price, best, deadline)
        looked += match.pairs
        if match.members is not None:
            best = match.excess
            pair = match.members if indexed is left else match.members[::-1]
        if not match.finished:
            return _pairing(core, left, right, pair, best, looked, finished=False)
    return _pairing(core, left, right, pair, best, looked, finished=True)


@dataclass(frozen=True)
class _Match:
    members: tuple[int, int] | None
    excess: float
    pairs: int
    finished: bool


def _match(
    core: Core,
    indexed: Half,
    members: np.ndarray,
    asking: Half,
    partners: np.ndarray,
    price: np.ndarray,
    best: float,
    deadline: Deadline,
) -> _Match:
    """Match partners, in the given order, with indexed members; a pair counts if its excess is below `best`."""
    if members.size == 0 or partners.size == 0:
        return _Match(None, best, 0, True)
    index = _Windows.of(indexed.cost[:, members], price, best)
    order = members[index.order]
    rise, cost = indexed.rise[order], np.ascontiguousarray(indexed.cost[:, order])
    search = _search_windows
    if enabled():
        from topoprune_solvers.knapsack.halves_kernels import search_windows

        search = search_windows
    looked = 0
    found: tuple[int, int] | None = None
    for at in range(0, partners.size, BATCH):
        some = partners[at : at + BATCH]
        room = core.outer[:, None] - asking.cost[:, some]
        begin, size = index.look_up(room, best - asking.rise[some])
        row = 0
        while row < size.size:
            if deadline.passed():
                return _Match(found, best, looked, False)
            excess, where, who, count, row = search(
                rise, cost, asking.rise[some], room, begin, size, price, best, row, CHUNK
            )
            looked += count
            if excess < best:
                best, found = excess, (int(order[where]), int(some[who]))
    return _Match(found, best, looked, True)


def _pairing(
    core: Core,
    left: Half,
    right: Half,
    pair: tuple[int, int] | None,
    excess: float,
    looked: int,
    *,
    finished: bool,
) -> Pairing:
    if pair is None:
        return Pairing(None, excess, looked, finished)
    pick = np.zeros(core.sites, dtype=np.int64)
    left.write(pick, pair[0])
    right.write(pick, pair[1])
    return Pairing(pick, excess, looked, finished)


def _search_windows(
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
    """Do what the kernel `search_windows` does, in numpy."""
    ends = np.cumsum(size[first:])
    stop = first + min(int(np.searchsorted(ends, pairs)) + 1, ends.size)
    part = np.arange(first, stop)
    part = part[(size[part] > 0) & (partner_rise[part % partner_rise.size] < best)]
    if part.size == 0:
        return best, -1, -1, 0, stop
    count = size[part]
    where = np.arange(int(count.sum())) + np.repeat(begin[part] - np.cumsum(count) + count, count)
    who = np.repeat(part % partner_rise.size, count)
    unspent = room[:, who] - cost[:, where]
    value = rise[where] + partner_rise[who]
    for j in range(price.size):
        value += price[j] * unspent[j]
    value[np.any(unspent < 0, axis=0)] = np.inf
    k = int(value.argmin())
    if not value[k] < best:
        return best, -1, -1, value.size, stop
    return float(value[k]), int(where[k]), int(who[k]), value.size, stop


def _unbounded(core: Core, left: Half, right: Half, reach: float) -> Pairing:
    # No budget can bind, or a half has no partial pick at all.
    pick = np.zeros(core.sites, dtype=np.int64)
    total = 0.0
    for half in (left, right):
        if half.rise.size == 0:
            return Pairing(None, reach, 0, True)
        least = int(half.rise.argmin())
        half.write(pick, least)
        total += float(half.rise[least])
    return Pairing(pick, total, 1, True) if total < reach else Pairing(None, reach, 1, True)


@dataclass(frozen=True, eq=False)
class Pairing:
    """Result of `best_pair`: the (s,) pick or None, its excess, pairs looked at, and whether all were."""

    pick: np.ndarray | None
    excess: float
    pairs: int
    finished: bool


@dataclass(frozen=True, eq=False)
class _Windows:
    """Partial picks by cell of their first cost and, within the cell, by their second.

    A window of the first cost is never wider than a cell, so it touches two cells at most.
    """

    order: np.ndarray
    key: np.ndarray  # (w,) ascending: 2 * rank of the cell + second cost scaled into [0, 1]
    cells: np.ndarray
    price: np.ndarray
    axes: tuple[int, int]
    width: float
    low: float
    scale: float

    @classmethod
    def of(cls, cost: np.ndarray, price: np.ndarray, reach: float) -> _Windows:
        # The two resources whose windows are narrowest against what the partial picks spend.
        spread = np.ptp(cost, axis=1) * price
        ranked = np.argsort(-spread, kind="stable").tolist()
        axes = (ranked[0], ranked[1] if len(ranked) > 1 else ranked[0])
        width = reach / float(price[axes[0]]) * (1 + WIDEN) if price[axes[0]] > 0 else math.inf
        # A cell no narrower than the costs' own rounding.
        width = max(width, WIDEN * float(np.abs(cost[axes[0]]).max()), np.finfo(float).tiny)
        cells, rank = np.unique(np.floor(cost[axes[0]] / width), return_inverse=True)
        second = cost[axes[1]]
        low = float(second.min())
        scale = float(np.ptp(second)) or 1.0
        key = 2.0 * rank + (second - low) / scale
        order = np.argsort(key, kind="stable")
        return cls(order, key[order], cells, price, axes, width, low, scale)

    def look_up(self, room: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (2 q,) first positions and sizes of the windows of q partners, both cells.

        Args:
            room: (a, q) budget left. reach: (q,) excess left; none where it is not positive.
        """
        first, second = self.axes
        upper = np.floor(room[first] / self.width)
        hang = np.maximum(reach, 0.0)
        # Past the last cost of the cell above and before the first of the cell below: half a step outside [0, 1].
        top = np.clip((room[second] - self.low) / self.scale + WIDEN, -0.25, 1.25)
        if self.price[second] > 0:
            wide = hang / self.price[second] * (1 + WIDEN)
            base = np.clip((room[second] - wide - self.low) / self.scale - WIDEN, -0.25, 1.25)
        else:
            base = np.full(top.size, -0.25)
        begins = np.zeros((2, top.size), dtype=np.int64)
        sizes = np.zeros((2, top.size), dtype=np.int64)
        for row, cell in enumerate((upper, upper - 1)):
            rank = np.minimum(np.searchsorted(self.cells, cell), self.cells.size - 1)
            known = np.flatnonzero((self.cells[rank] == cell) & (reach > 0))
            block = 2.0 * rank[known]
            begins[row, known] = np.searchsorted(self.key, block + base[known])
            end = np.searchsorted(self.key, block + top[known], side="right")
            sizes[row, known] = np.maximum(end - begins[row, known], 0)
        return begins.reshape(-1), sizes.reshape(-1)

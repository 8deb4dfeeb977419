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

from topoprune_solvers.knapsack.core import Core
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["Half", "Pairing", "best_pair", "count_partial_picks", "partial_picks", "split_sites"]

COUNTING_STEPS = 500
BATCH = 4096
CHUNK = 1 << 18  # pairs looked at between two looks at the clock
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
            if part.size == 1:
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
        own = [c for c in range(core.start[site], core.start[site + 1]) if rise[c] < reach]
        if deadline.passed():
            return None
        alive = [np.flatnonzero(total < reach - rise[c]) for c in own]
        if sum(index.size for index in alive) > 2 * most:
            return None
        parent = np.concatenate(alive)
        choice = np.repeat(own, [index.size for index in alive])
        total = total[parent] + rise[choice]
        cost = cost[:, parent] + core.cost[choice].T
        if parent.size >= next_merge or core.resource.size == 1:
            left = _merged(total, cost, core, choice)
            # Merging pays where costs repeat (equal layers); where it does not, try again much later.
            next_merge = 0 if left.size < 0.95 * parent.size else 8 * parent.size
            parent, choice, total, cost = parent[left], choice[left], total[left], cost[:, left]
        if parent.size > most:
            return None
        parents.append(parent.astype(np.int32))
        choices.append(choice.astype(np.int32))
    return Half(total, cost, sites, parents, choices)


def _merged(total: np.ndarray, cost: np.ndarray, core: Core, choice: np.ndarray) -> np.ndarray:
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
    if right.rise.size > left.rise.size:
        left, right = right, left
    index = _Windows.of(left, price, reach)
    rise, cost = left.rise[index.order], left.cost[:, index.order]
    # Low reduced damage first: good pairs come early and narrow the windows of the rest.
    queue = np.argsort(right.rise, kind="stable")
    best, pair, looked, finished = reach, None, 0, True
    for at in range(0, queue.size, BATCH):
        some = queue[at : at + BATCH]
        room = core.outer[:, None] - right.cost[:, some]
        begin, size = index.look_up(room, best - right.rise[some])
        ends = np.cumsum(size)
        row = 0
        while row < size.size and not deadline.passed():
            before = int(ends[row - 1]) if row else 0
            stop = max(row + 1, int(np.searchsorted(ends, before + CHUNK, side="right")))
            part = np.arange(row, stop)
            row = stop
            part = part[(size[part] > 0) & (right.rise[some[part % some.size]] < best)]
            if part.size == 0:
                continue
            count = size[part]
            where = np.arange(int(count.sum())) + np.repeat(begin[part] - np.cumsum(count) + count, count)
            who = np.repeat(part % some.size, count)
            unspent = room[:, who] - cost[:, where]
            value = rise[where] + right.rise[some[who]] + price @ unspent
            value[np.any(unspent < 0, axis=0)] = np.inf
            looked += value.size
            k = int(value.argmin())
            if value[k] < best:
                best, pair = float(value[k]), (int(index.order[where[k]]), int(some[who[k]]))
        if row < size.size:
            finished = False
            break
    if pair is None:
        return Pairing(None, best, looked, finished)
    pick = np.zeros(core.sites, dtype=np.int64)
    left.write(pick, pair[0])
    right.write(pick, pair[1])
    return Pairing(pick, best, looked, finished)


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
    def of(cls, half: Half, price: np.ndarray, reach: float) -> _Windows:
        # The two resources whose windows are narrowest against what the partial picks spend.
        spread = np.ptp(half.cost, axis=1) * price
        ranked = np.argsort(-spread, kind="stable").tolist()
        axes = (ranked[0], ranked[1] if len(ranked) > 1 else ranked[0])
        width = reach / float(price[axes[0]]) * (1 + WIDEN) if price[axes[0]] > 0 else math.inf
        # A cell no narrower than the costs' own rounding.
        width = max(width, WIDEN * float(np.abs(half.cost[axes[0]]).max()), np.finfo(float).tiny)
        cells, rank = np.unique(np.floor(half.cost[axes[0]] / width), return_inverse=True)
        second = half.cost[axes[1]]
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
        begins, sizes = [], []
        for cell in (upper, upper - 1):
            rank = np.minimum(np.searchsorted(self.cells, cell), self.cells.size - 1)
            known = (self.cells[rank] == cell) & (reach > 0)
            begin = np.searchsorted(self.key, 2.0 * rank + base)
            end = np.searchsorted(self.key, 2.0 * rank + top, side="right")
            begins.append(begin)
            sizes.append(np.where(known, np.maximum(end - begin, 0), 0))
        return np.concatenate(begins), np.concatenate(sizes)

"""Weighted greedy dominating set and set cover with backward pruning, for any demand."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.compiled import enabled
from topoprune_solvers.domination.covering import Cover, SetCover, cover_of
from topoprune_solvers.domination.lagrangian import cover_bound
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import check_start, unit_solution
from topoprune_solvers.solution import Solution

__all__ = ["GreedyDominatingSet", "best_greedy_cover", "greedy_choice", "greedy_cover", "prune_redundant"]

BOUND_EFFORT = 4_000_000  # keeps the bound at some milliseconds, a few times the greedy cover itself


@dataclass(frozen=True)
class GreedyDominatingSet:
    """Keep the unit that newly helps most elements per cost, again and again; then drop what became redundant.

    An element is helped until it is covered as often as it demands. Weak where many units tie (regular
    graphs); never worse than H(Δ + 1) times the optimum. The bound is that of `cover_bound` (dual ascent,
    above 64 units also some Lagrangian steps), much closer than the guarantee. A time limit is not needed:
    the work is bounded.
    """

    name: str = "greedy"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=False,
        guarantee="at most H(largest degree + 1) times the optimum, with a dual bound",
        complexity="O((n + m) log n); O(n + m) up to sorting for equal costs",
        reference="Chvatal (1979), A greedy heuristic for the set-covering problem, Math. Oper. Res. 4; "
        "Dobson (1982) for demands",
        when="milliseconds matter, also on neuron graphs",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the greedy cover, or the repaired warm start where that is cheaper."""
        cover = cover_of(problem)
        keep = best_greedy_cover(cover, check_start(problem, warm_start))
        bound = cover_bound(cover, problem.objective(keep), effort=BOUND_EFFORT)
        return unit_solution(problem, keep, self.name, bound=bound)


def best_greedy_cover(cover: Cover, start: np.ndarray | None = None) -> np.ndarray:
    """Return the cheaper of the greedy cover and the repaired, pruned start; (n,) bool."""
    keep = prune_redundant(cover, greedy_cover(cover))
    if start is not None:
        repaired = prune_redundant(cover, greedy_cover(cover, start))
        if cover.cost[repaired].sum() < cover.cost[keep].sum():
            return repaired
    return keep


def greedy_cover(cover: Cover, start: np.ndarray | None = None, limit: int | None = None) -> np.ndarray:
    """Add units in greedy order until every demand is met or `limit` units are kept.

    Free units come first, then the most newly helped elements per cost; ties go to the unit that
    helps more, then to the lower index.

    Args:
        cover: the instance. start: (n,) bool of units already kept, none by default.
        limit: largest number of kept units (forced and start included), or None.

    Returns:
        (n,) bool. A cover unless `limit` cut it short.

    Complexity: O((n + m) log n), for equal costs O(n + m) up to sorting within equal gains. Gains only
        fall, so an entry whose recorded gain is still true is the best one, and each element lowers its
        candidates' gains once.
    """
    keep = cover.forced.copy() if start is None else start | cover.forced
    need = cover.demand - cover.counts(keep) if keep.any() else cover.demand.copy()
    room = cover.n if limit is None else limit - int(keep.sum())
    left = _extend(
        cover.indptr, cover.indices, cover.indptr, cover.indices, cover.cost, need, keep, cover.forbidden, room
    )
    assert limit is not None or not left, "the problem was checked to have a cover"
    return keep


def prune_redundant(cover: Cover, keep: np.ndarray) -> np.ndarray:
    """Drop kept units that no demand in their neighbourhood needs, dearest first (ties: higher index first).

    Forced units stay. Complexity: O(n log n + m).
    """
    keep = keep.copy()
    order = _dearest_first(cover.cost, np.flatnonzero(keep & ~cover.forced))
    _prune(cover.indptr, cover.indices, cover.counts(keep) - cover.demand, keep, order)
    return keep


def greedy_choice(instance: SetCover, start: np.ndarray | None = None) -> np.ndarray:
    """Return a (c,) bool cover of a set cover instance: the start, completed greedily, then pruned.

    Same order and ties as `greedy_cover` and `prune_redundant`.
    """
    chosen = np.zeros(instance.n_candidates, dtype=bool) if start is None else start.copy()
    need = instance.demand - instance.counts(chosen) if chosen.any() else instance.demand.copy()
    barred = np.zeros(chosen.size, dtype=bool)
    left = _extend(
        instance.row_start, instance.row, instance.col_start, instance.col, instance.cost, need, chosen, barred,
        chosen.size,
    )  # fmt: skip
    assert not left, "the instance was checked to have a cover"
    order = _dearest_first(instance.cost, np.flatnonzero(chosen))
    _prune(instance.col_start, instance.col, instance.counts(chosen) - instance.demand, chosen, order)
    return chosen


def _extend(
    row_start: np.ndarray, row: np.ndarray, col_start: np.ndarray, col: np.ndarray, cost: np.ndarray,
    need: np.ndarray, keep: np.ndarray, barred: np.ndarray, room: int,
) -> int:  # fmt: skip
    """Complete `keep` in place with at most `room` candidates; return how many elements still need one."""
    if not enabled():
        return _heap_greedy(row_start, row, col_start, col, cost, need, keep, barred, room)
    from topoprune_solvers.domination.greedy_kernels import bucket_greedy_kernel, heap_greedy_kernel

    if cost.size and np.all(cost == cost[0]):
        return int(bucket_greedy_kernel(row_start, row, col_start, col, need, keep, barred, room))
    return int(heap_greedy_kernel(row_start, row, col_start, col, cost, need, keep, barred, room))


def _heap_greedy(
    row_start: np.ndarray, row: np.ndarray, col_start: np.ndarray, col: np.ndarray, cost: np.ndarray,
    need: np.ndarray, keep: np.ndarray, barred: np.ndarray, room: int,
) -> int:  # fmt: skip
    """The twin of the kernels: a lazy queue in Python, rows in numpy."""
    wanting = need > 0
    left = int(wanting.sum())
    gain = np.bincount(row[np.repeat(wanting, np.diff(row_start))], minlength=keep.size)
    price = cost.tolist()
    candidates = np.flatnonzero(~keep & ~barred & (gain > 0)).tolist()
    counts = gain[candidates].tolist()
    queue = [(_price(price[unit], count), -count, unit) for unit, count in zip(candidates, counts, strict=True)]
    heapq.heapify(queue)
    rows, columns = row_start.tolist(), col_start.tolist()
    while left and room > 0 and queue:
        _, recorded, unit = queue[0]
        count = int(gain[unit])
        if count != -recorded:
            if count:
                heapq.heapreplace(queue, (_price(price[unit], count), -count, unit))
            else:
                heapq.heappop(queue)
            continue
        heapq.heappop(queue)
        keep[unit] = True
        room -= 1
        reached = col[columns[unit] : columns[unit + 1]]
        done = reached[need[reached] == 1]
        need[reached] -= 1
        left -= done.size
        for element in done.tolist():
            gain[row[rows[element] : rows[element + 1]]] -= 1
    return left


def _prune(col_start: np.ndarray, col: np.ndarray, spare: np.ndarray, keep: np.ndarray, order: np.ndarray) -> None:
    if enabled():
        from topoprune_solvers.domination.greedy_kernels import prune_kernel

        prune_kernel(col_start, col, spare, keep, order)
        return
    columns = col_start.tolist()
    for unit in order.tolist():
        reached = col[columns[unit] : columns[unit + 1]]
        if not reached.size or spare[reached].min() > 0:
            keep[unit] = False
            spare[reached] -= 1


def _dearest_first(cost: np.ndarray, units: np.ndarray) -> np.ndarray:
    return units[::-1][np.argsort(-cost[units[::-1]], kind="stable")]


def _price(cost: float, count: int) -> float:
    # A free unit is always worth taking; -inf sorts it before every priced one.
    return cost / count if cost else -math.inf


register(GreedyDominatingSet())

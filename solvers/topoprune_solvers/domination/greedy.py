"""Weighted greedy dominating set with a lazy queue and backward pruning."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import Cover, cover_of
from topoprune_solvers.domination.lagrangian import cover_bound
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import check_start, unit_solution
from topoprune_solvers.solution import Solution

__all__ = ["GreedyDominatingSet", "best_greedy_cover", "greedy_cover", "prune_redundant"]


@dataclass(frozen=True)
class GreedyDominatingSet:
    """Keep the unit that newly covers most per cost, again and again; then drop what became redundant.

    Weak where many units tie (regular graphs); never worse than H(Δ + 1) times the optimum.
    The bound is that of `cover_bound` (dual ascent, above 64 units also Lagrangian), much closer than the guarantee.
    A time limit is not needed: the work is bounded.
    """

    name: str = "greedy"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=False,
        guarantee="at most H(largest degree + 1) times the optimum, with a dual bound",
        complexity="O((n + m) log n)",
        reference="Chvatal (1979), A greedy heuristic for the set-covering problem, Math. Oper. Res. 4",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the greedy cover, or the repaired warm start where that is cheaper."""
        cover = cover_of(problem)
        keep = best_greedy_cover(cover, check_start(problem, warm_start))
        bound = cover_bound(cover, problem.objective(keep))
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
    """Add units in greedy order until everything is covered or `limit` units are kept.

    Free units come first, then the most newly covered units per cost; ties go to the unit that
    covers more, then to the lower index.

    Args:
        cover: the instance. start: (n,) bool of units already kept, none by default.
        limit: largest number of kept units (forced and start included), or None.

    Returns:
        (n,) bool. A cover unless `limit` cut it short.

    Complexity: O((n + m) log n). A unit's gain only falls, so an entry whose recorded gain is
    still true is the best one (lazy evaluation), and each element lowers its candidates' gains once.
    """
    keep = cover.forced.copy() if start is None else start | cover.forced
    uncovered = cover.counts(keep) == 0
    gain = cover.counts(uncovered)
    cost = cover.cost.tolist()
    candidates = np.flatnonzero(~keep & ~cover.forbidden & (gain > 0)).tolist()
    counts = gain[candidates].tolist()
    queue = [(_price(cost[unit], count), -count, unit) for unit, count in zip(candidates, counts, strict=True)]
    heapq.heapify(queue)
    left = int(uncovered.sum())
    room = cover.n if limit is None else limit - int(keep.sum())
    indices, bounds = cover.indices, cover.indptr.tolist()
    while left and room > 0 and queue:
        _, recorded, unit = queue[0]
        count = int(gain[unit])
        if count != -recorded:
            if count:
                heapq.heapreplace(queue, (_price(cost[unit], count), -count, unit))
            else:
                heapq.heappop(queue)
            continue
        heapq.heappop(queue)
        keep[unit] = True
        room -= 1
        row = indices[bounds[unit] : bounds[unit + 1]]
        fresh = row[uncovered[row]]
        uncovered[fresh] = False
        left -= fresh.size
        for element in fresh.tolist():
            gain[indices[bounds[element] : bounds[element + 1]]] -= 1
    assert limit is not None or not left, "the problem was checked to have a cover"
    return keep


def prune_redundant(cover: Cover, keep: np.ndarray) -> np.ndarray:
    """Drop kept units whose whole neighbourhood stays covered, dearest first (ties: higher index first).

    Forced units stay. Complexity: O(n log n + m).
    """
    keep = keep.copy()
    counts = cover.counts(keep)
    units = np.flatnonzero(keep & ~cover.forced)
    order = units[np.lexsort((-units, -cover.cost[units]))]
    for unit in order.tolist():
        row = cover.row(unit)
        if counts[row].min() > 1:
            keep[unit] = False
            counts[row] -= 1
    return keep


def _price(cost: float, count: int) -> float:
    # A free unit is always worth taking; -inf sorts it before every priced one.
    return cost / count if cost else -math.inf


register(GreedyDominatingSet())

"""Greedy elimination and its mirror image, followed by exchanges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import QuadraticSubset
from topoprune_solvers.quadratic.common import PROVEN, Search, feasible_start, resolution, subset_solution
from topoprune_solvers.result import NEVER, Deadline
from topoprune_solvers.solution import Solution

__all__ = ["GreedyElimination", "eliminate", "grow", "improve", "starts"]

PASSES = 4  # passes over the pruned units that `greedy` spends on exchanges, at least
WORK = 1e8  # exchanges it looks at in any case: some tenths of a second
_ENTRIES = 1 << 17  # exchanges looked at in one go: 1 MiB


@dataclass(frozen=True)
class GreedyElimination:
    """Prune the unit that adds least damage, one at a time; also keep units one at a time; exchange; take the better.

    Pruning j next to P adds ``G_jj + 2 (G 1_P)_j``; G 1_P is kept up to date in O(n) a step. Under a knapsack
    budget the damage per unit of cost decides, and units whose removal lowers the damage go in any case.
    """

    name: str = "greedy"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=QuadraticSubset,
        exact=False,
        guarantee="none in general; no single exchange improves the result if the passes suffice",
        complexity="O(n^2), exchanges O(n^2) a pass, 4 passes or more",
        reference="backward elimination; exchange as in Kernighan, Lin (1970)",
        when="the default at every size: thousands of units in a second",
    )

    def solve(
        self, problem: QuadraticSubset, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best of elimination, growth and the warm start, each improved by exchanges."""
        deadline = Deadline.after(time_limit)
        passes = max(PASSES, WORK / max(problem.n, 1) ** 2)
        best = min(
            (improve(search, deadline, passes) for search in starts(problem, warm_start, deadline)),
            key=lambda search: search.value,
        )
        keep = ~best.pruned
        return subset_solution(
            problem, keep, self.name, timed_out=deadline.passed(), rounding=resolution(problem, ~keep)
        )


def starts(problem: QuadraticSubset, warm_start: Any, deadline: Deadline = NEVER) -> list[Search]:
    """Return the searches to improve: warm start (if it fits the budget), elimination, growth."""
    start = feasible_start(problem, warm_start)
    first = [] if start is None else [Search.at(problem, ~start)]
    if first and deadline.passed():
        return first
    first.append(eliminate(problem, deadline))
    return first if deadline.passed() else [*first, grow(problem, deadline)]


def eliminate(problem: QuadraticSubset, deadline: Deadline = NEVER) -> Search:
    """Prune greedily from the full set. O(n^2); past the deadline the rest goes by its last scores."""
    assert problem.forced is not None and problem.forbidden is not None
    search = Search.at(problem, problem.forbidden)
    score = problem.gram.diagonal() + 2 * search.pull
    score[problem.forced | problem.forbidden] = np.inf  # stays inf under every update
    missing = 0 if problem.k is None else problem.n - problem.k - int(search.pruned.sum())
    late = False
    while problem.k is None or missing > 0:
        rating = score
        if problem.k is None:
            if search.room < 0 and not score.min(initial=np.inf) < 0:
                rating = _per_cost(problem, score)
            elif not score.min(initial=np.inf) < 0:
                break
        late = late or deadline.passed()
        if late:
            _finish(search, rating, missing)
            break
        unit = int(rating.argmin())
        search.prune(unit)
        score += 2 * problem.gram[unit]
        score[unit] = np.inf
        missing -= 1
    return search


def _per_cost(problem: QuadraticSubset, score: np.ndarray) -> np.ndarray:
    # Pruning a free unit helps no budget.
    assert problem.cost is not None
    rating = np.full(problem.n, np.inf)
    with np.errstate(over="ignore"):  # a tiny cost: the unit comes last, as it should
        return np.divide(score, problem.cost, out=rating, where=problem.cost > 0)


def _finish(search: Search, rating: np.ndarray, missing: int) -> None:
    """Prune in the order of the ratings until the budget is met, without further updates of scores."""
    problem = search.problem
    order = np.argsort(rating, kind="stable")
    order = order[np.isfinite(rating[order])]
    if problem.k is None:
        assert problem.cost is not None
        missing = int(np.searchsorted(np.cumsum(problem.cost[order]), -search.room)) + 1 if search.room < 0 else 0
    pruned = search.pruned.copy()
    pruned[order[:missing]] = True
    settled = Search.at(problem, pruned)
    search.pruned, search.pull, search.spent = settled.pruned, settled.pull, settled.spent


def grow(problem: QuadraticSubset, deadline: Deadline = NEVER) -> Search:
    """Keep greedily from the empty set: each time the unit whose return lowers the damage most. O(n^2)."""
    assert problem.forced is not None and problem.forbidden is not None
    search = Search.at(problem, ~problem.forced)
    score = problem.gram.diagonal() - 2 * search.pull  # change of the damage when a unit returns
    score[problem.forced | problem.forbidden] = np.inf
    missing = problem.n if problem.k is None else problem.k - int(problem.forced.sum())
    for _ in range(missing):
        rating = score
        if problem.k is None:
            assert problem.cost is not None
            useful = (score < 0) & (problem.cost <= search.room)
            # Free units come first, by their gain.
            free = problem.cost == 0
            with np.errstate(over="ignore"):  # a tiny cost: the unit comes first, as it should
                rating = np.where(useful, score / np.where(free, 1.0, problem.cost), np.inf)
            if (useful & free).any():
                rating = np.where(useful & free, score, np.inf)
            if not useful.any() or deadline.passed():
                break
        unit = int(rating.argmin())
        search.restore(unit)
        score += 2 * problem.gram[unit]
        score[unit] = np.inf
        if problem.k is not None and deadline.passed():
            rest = np.argsort(score, kind="stable")[: problem.k - int((~search.pruned).sum())]
            pruned = search.pruned.copy()
            pruned[rest] = False
            return Search.at(problem, pruned)
    return search


def improve(search: Search, deadline: Deadline = NEVER, passes: float = float("inf")) -> Search:
    """Exchange a pruned for a kept unit while that lowers the damage; under a knapsack also move single units.

    Exchanging i in P for j kept changes the damage by
    ``(G_ii - 2 (G 1_P)_i) + (G_jj + 2 (G 1_P)_j) - 2 G_ij``. A few pruned units at a time are compared with all
    kept ones, and the best exchange among them is made: the best of all on small problems, the first good one
    on large problems. Changes `search` in place and returns it.

    Complexity: O(n |P|) a pass.
    """
    problem = search.problem
    assert problem.forced is not None and problem.forbidden is not None
    diagonal = problem.gram.diagonal()
    units = np.flatnonzero(search.pruned & ~problem.forbidden)
    group = max(1, _ENTRIES // max(problem.n, 1))
    position, seen, budget = 0, 0, passes * max(units.size, 1)
    # Exchanges that gain less than rounding could go on for ever.
    least = PROVEN * max(search.value, 0.0) + resolution(problem, search.pruned)
    while seen < max(units.size, 1) and budget > 0 and not deadline.passed():
        if problem.k is None and _move_single(search, diagonal, least):
            units = np.flatnonzero(search.pruned & ~problem.forbidden)
            position, seen = 0, 0
        if not units.size:
            break
        position = position if position < units.size else 0
        here = np.arange(position, min(position + group, units.size))
        rows = units[here]
        entering = diagonal + 2 * search.pull
        entering[search.pruned | problem.forced] = np.inf
        change = -2.0 * problem.gram[rows]
        change += (diagonal[rows] - 2 * search.pull[rows])[:, None]
        change += entering
        if problem.cost is not None:
            change[problem.cost[rows][:, None] - problem.cost > search.room] = np.inf
        best = int(change.argmin())
        row, unit = divmod(best, problem.n)
        budget -= here.size
        if change[row, unit] < -least:
            search.restore(int(rows[row]))
            search.prune(unit)
            units[here[row]] = unit
            seen = 0
            if units.size <= group:
                continue
        else:
            seen += here.size
        position += here.size
    return search


def _move_single(search: Search, diagonal: np.ndarray, least: float) -> bool:
    """Prune or return the one unit that lowers the damage most within the budget; False if there is none."""
    problem = search.problem
    assert problem.cost is not None and problem.forced is not None and problem.forbidden is not None
    change = diagonal + np.where(search.pruned, -2, 2) * search.pull
    barred = np.where(search.pruned, problem.forbidden | (problem.cost > search.room), problem.forced)
    change[barred] = np.inf
    unit = int(change.argmin()) if change.size else -1
    if unit < 0 or not change[unit] < -least:
        return False
    (search.restore if search.pruned[unit] else search.prune)(unit)
    return True


register(GreedyElimination())

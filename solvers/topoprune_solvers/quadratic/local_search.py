"""Iterated exchange search: descend, disturb the best set, descend again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import QuadraticSubset
from topoprune_solvers.quadratic.common import Search, resolution, subset_solution
from topoprune_solvers.quadratic.greedy import improve, starts
from topoprune_solvers.result import Deadline
from topoprune_solvers.solution import Solution

__all__ = ["SHARE", "IteratedExchange", "iterate", "patience_of"]

SMALLEST_SHARE, SHARE = 0.03, 0.6


@dataclass(frozen=True)
class IteratedExchange:
    """Exchange units until no exchange helps, then restart from the best set with some random exchanges.

    Args:
        patience: restarts in a row without a better set before the search ends; None: 100 up to some 450 units,
            fewer on larger problems, at least 3.
        share: largest part of the pruned units exchanged at random in a restart; the part is drawn between 3 % and
            this, at least two units.
    """

    name: str = "local-search"
    patience: int | None = None
    share: float = SHARE
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=QuadraticSubset,
        exact=False,
        guarantee="never worse than greedy run to a local optimum; no single exchange improves the result",
        complexity="O(n^2) a pass of exchanges; ends after a number of restarts without gain or at the time limit",
        reference="Lourenco, Martin, Stuetzle (2003), Iterated local search",
        when="where a better set is worth seconds and no bound is needed",
    )

    def solve(
        self, problem: QuadraticSubset, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best set found; repeats exactly for a seed unless the time limit ends it."""
        deadline = Deadline.after(time_limit)
        searches = [improve(search, deadline) for search in starts(problem, warm_start, deadline)]
        best = min(searches, key=lambda search: search.value)
        patience = patience_of(problem.n) if self.patience is None else self.patience
        best, restarts = iterate(best, deadline, patience, self.share, np.random.default_rng(seed))
        return subset_solution(
            problem,
            ~best.pruned,
            self.name,
            timed_out=deadline.passed(),
            rounding=resolution(problem, best.pruned),
            stats={"restarts": restarts},
        )


def patience_of(n: int) -> int:
    """Return how many restarts without gain are affordable: 100 up to some 450 units, fewer above, at least 3."""
    return int(np.clip(20_000_000 // max(n, 1) ** 2, 3, 100))


def iterate(
    best: Search, deadline: Deadline, patience: int, share: float, rng: np.random.Generator
) -> tuple[Search, int]:
    """Restart from disturbed copies of the best set until `patience` of them in a row bring nothing.

    Returns:
        The best search and the number of restarts.
    """
    problem = best.problem
    assert problem.forced is not None and problem.forbidden is not None
    restarts = idle = 0
    open_units = ~problem.forced & ~problem.forbidden
    value = best.value
    while idle < patience and not deadline.passed():
        pruned, kept = np.flatnonzero(best.pruned & open_units), np.flatnonzero(~best.pruned & open_units)
        # Small steps find sets near by, large ones leave the valley: sizes on a logarithmic scale.
        size = math.exp(rng.uniform(math.log(SMALLEST_SHARE), math.log(share)))
        count = min(max(2, round(size * pruned.size)), pruned.size, kept.size)
        if count == 0:
            break
        search = Search(problem, best.pruned.copy(), best.pull.copy(), best.spent)
        for unit in rng.choice(kept, count, replace=False).tolist():
            search.prune(unit)
        for unit in rng.choice(pruned, count, replace=False).tolist():
            if problem.cost is None or problem.cost[unit] <= search.room:
                search.restore(unit)
        # From the set itself, not by updates: no rounding piles up over many restarts.
        search = improve(Search.at(problem, search.pruned), deadline)
        restarts += 1
        if search.value < value - resolution(problem, search.pruned):
            best, value, idle = search, search.value, 0
        else:
            idle += 1
    return best, restarts


register(IteratedExchange())

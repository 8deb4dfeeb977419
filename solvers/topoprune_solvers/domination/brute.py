"""Exhaustive search: the slow and obvious twin every dominating-set solver is tested against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import unit_solution
from topoprune_solvers.solution import Bound, Solution

__all__ = ["BruteDominatingSet"]

MAX_UNITS = 20


@dataclass(frozen=True)
class BruteDominatingSet:
    """Try all subsets of at most 20 units; ignores the time limit (about half a second at 20 units)."""

    name: str = "brute"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=True,
        guarantee="optimal, by trying every subset",
        complexity="O(2^n n)",
        when="a check of other solvers on at most 20 units",
        max_units=MAX_UNITS,
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the first cheapest cover in order of the subsets' binary numbers."""
        assert problem.cost is not None and problem.forced is not None and problem.forbidden is not None
        assert problem.demand is not None and not isinstance(problem.demand, int)
        n = problem.n
        subset = np.arange(1 << n, dtype=np.uint32)
        total = np.zeros(1)
        for cost in problem.cost.tolist():
            total = np.concatenate([total, total + cost])
        forced, forbidden = _bits(problem.forced), _bits(problem.forbidden)
        feasible = (subset & forced == forced) & (subset & forbidden == 0)
        for unit, demand in enumerate(problem.demand.tolist()):
            closed = np.uint32((1 << unit) | sum(1 << other for other in problem.neighbours(unit).tolist()))
            feasible &= _count_bits(subset & closed) >= demand
        candidates = np.flatnonzero(feasible)
        assert candidates.size, "the problem was checked to have a cover"
        best = int(candidates[np.argmin(total[candidates])])
        keep = np.array([best >> i & 1 for i in range(n)], dtype=bool)
        bound = Bound(problem.objective(keep), "enumeration of all subsets")
        return unit_solution(problem, keep, self.name, bound=bound, stats={"subsets": 1 << n})


def _bits(mask: np.ndarray) -> np.uint32:
    return np.uint32(sum(1 << i for i in np.flatnonzero(mask).tolist()))


def _count_bits(words: np.ndarray) -> np.ndarray:
    table = np.zeros(1, dtype=np.uint8)
    for _ in range(10):
        table = np.concatenate([table, table + np.uint8(1)])
    return table[words & np.uint32(1023)] + table[words >> np.uint32(10)]


register(BruteDominatingSet())

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
    """Try all subsets of at most 20 units; ignores the time limit (about a second at 20 units)."""

    name: str = "brute"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=True,
        guarantee="optimal, by trying every subset",
        complexity="O(2^n)",
        max_units=MAX_UNITS,
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the first cheapest cover in order of the subsets' binary numbers."""
        assert problem.cost is not None and problem.forced is not None and problem.forbidden is not None
        n = problem.n
        closed = [(1 << i) | sum(1 << j for j in problem.neighbours(i).tolist()) for i in range(n)]
        forced, forbidden = _bits(problem.forced), _bits(problem.forbidden)
        cost = problem.cost.tolist()
        covered, total = [0] * (1 << n), [0.0] * (1 << n)
        best = None
        for subset in range(1 << n):
            if subset:
                unit = subset.bit_length() - 1
                rest = subset ^ (1 << unit)
                covered[subset] = covered[rest] | closed[unit]
                total[subset] = total[rest] + cost[unit]
            if covered[subset] != (1 << n) - 1 or subset & forbidden or subset & forced != forced:
                continue
            if best is None or total[subset] < total[best]:
                best = subset
        assert best is not None, "the problem was checked to have a cover"
        keep = np.array([best >> i & 1 for i in range(n)], dtype=bool)
        bound = Bound(problem.objective(keep), "enumeration of all subsets")
        return unit_solution(problem, keep, self.name, bound=bound, stats={"subsets": 1 << n})


def _bits(mask: np.ndarray) -> int:
    return sum(1 << i for i in np.flatnonzero(mask).tolist())


register(BruteDominatingSet())

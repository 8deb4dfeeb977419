"""Exhaustive search: the slow and obvious twin the budgeted solvers are tested against."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import BudgetedDomination, SoftDomination
from topoprune_solvers.result import unit_solution
from topoprune_solvers.solution import Bound, Solution

__all__ = ["BruteBudget"]

MAX_UNITS = 20


@dataclass(frozen=True)
class BruteBudget:
    """Try all ways to keep exactly k of at most 20 units; ignores the time limit."""

    capabilities: Capabilities
    name: str = "brute"

    def solve(
        self,
        problem: BudgetedDomination | SoftDomination,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return the first best selection in lexicographic order."""
        assert problem.forced is not None and problem.forbidden is not None
        free = np.flatnonzero(~problem.forced & ~problem.forbidden)
        sign = 1.0 if problem.sense == "min" else -1.0
        best, best_value, tried = None, np.inf, 0
        for chosen in combinations(free.tolist(), problem.k - int(problem.forced.sum())):
            keep = problem.forced.copy()
            keep[list(chosen)] = True
            if problem.group is not None and problem.violation(keep) is not None:
                continue
            value = sign * problem.objective(keep)
            tried += 1
            if best is None or value < best_value:
                best, best_value = keep, value
        assert best is not None, "the problem was checked to have a selection"
        bound = Bound(problem.objective(best), "enumeration of all selections")
        return unit_solution(problem, best, self.name, bound=bound, stats={"selections": tried})


def _budget_capabilities(problem: type) -> Capabilities:
    return Capabilities(
        problem=problem,
        exact=True,
        guarantee="optimal, by trying every selection of k units",
        complexity="O(C(n, k) (n + m))",
        max_units=MAX_UNITS,
        when="tests: slow and obvious",
    )


register(BruteBudget(_budget_capabilities(BudgetedDomination)))
register(BruteBudget(_budget_capabilities(SoftDomination)))

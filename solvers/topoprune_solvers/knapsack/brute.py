"""Exhaustive layer budgets: the slow and obvious twin."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import MultipleChoiceKnapsack
from topoprune_solvers.result import mask_solution
from topoprune_solvers.solution import Bound, Infeasible, Solution

__all__ = ["BruteKnapsack"]


@dataclass(frozen=True)
class BruteKnapsack:
    """Try every combination of choices, of at most 24 choices in total (6,561 combinations at worst)."""

    name: str = "brute"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=MultipleChoiceKnapsack,
        exact=True,
        guarantee="optimal, by trying every combination of choices",
        complexity="O(product of the sites' choices)",
        max_units=24,
        when="tests",
    )

    def solve(
        self,
        problem: MultipleChoiceKnapsack,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return the first best combination in lexicographic order; ignores the time limit.

        Raises:
            Infeasible: no combination keeps all budgets.
        """
        best, least, tried = None, np.inf, 0
        for index in product(*(range(size) for size in np.diff(problem.start).tolist())):
            keep = problem.mask(index)
            tried += 1
            damage = problem.objective(keep)
            if (best is None or damage < least) and problem.violation(keep) is None:
                best, least = keep, damage
        if best is None:
            raise Infeasible(f"none of the {tried} combinations of choices keeps all budgets")
        bound = Bound(least, "enumeration of all combinations")
        return mask_solution(problem, best, self.name, bound=bound, stats={"combinations": tried})


register(BruteKnapsack())

"""Exhaustive subset selection: the slow and obvious twin of both forms of problem C."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import QuadraticSubset, RepairedSubset
from topoprune_solvers.quadratic.common import subset_solution
from topoprune_solvers.solution import Bound, Solution

__all__ = ["BruteSubset"]


@dataclass(frozen=True)
class BruteSubset:
    """Evaluate the objective of every mask of at most 14 units."""

    capabilities: Capabilities
    name: str = "brute"

    def solve(
        self,
        problem: QuadraticSubset | RepairedSubset,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return the first best mask; ignores the time limit."""
        best, best_value, tried = None, np.inf, 0
        for mask in product((True, False), repeat=problem.n):
            keep = np.array(mask, dtype=bool)
            if problem.violation(keep) is not None:
                continue
            tried += 1
            value = problem.objective(keep)
            if best is None or value < best_value:
                best, best_value = keep, value
        assert best is not None, "the problem was feasible on construction"
        bound = Bound(best_value, "enumeration of all masks")
        return subset_solution(problem, best, self.name, bounds=[bound], stats={"masks": tried})


for _problem in (QuadraticSubset, RepairedSubset):
    register(
        BruteSubset(
            Capabilities(
                problem=_problem,
                exact=True,
                guarantee="optimal, by evaluating every mask",
                complexity="O(2^n n^2)" if _problem is QuadraticSubset else "O(2^n d^3)",
                max_units=14,
                when="only to check other solvers",
            )
        )
    )

"""Certified layer budgets in tens of milliseconds: Lagrangian prices, repair, exchanges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.knapsack.core import core_of, start_pick
from topoprune_solvers.knapsack.dual import SOURCE, best_prices, reduced_damage
from topoprune_solvers.knapsack.local_search import best_repaired, improve
from topoprune_solvers.knapsack.neighbourhood import search_neighbourhoods
from topoprune_solvers.problems import MultipleChoiceKnapsack
from topoprune_solvers.result import Deadline, mask_solution
from topoprune_solvers.solution import Bound, Solution

__all__ = ["LagrangianKnapsack"]


@dataclass(frozen=True)
class LagrangianKnapsack:
    """Price the budgets, repair the sites' own best choices, exchange one, two, then many sites' choices at once.

    Args:
        rounds: neighbourhoods that are solved exactly, one after another.
    """

    rounds: int = 6
    name: str = "lagrangian"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=MultipleChoiceKnapsack,
        exact=False,
        guarantee="a feasible choice with a certified gap to the LP relaxation (at most one split site per budget)",
        complexity="O(n r) per price vector and per exchange; tens of price vectors",
        reference="Fisher (1981), The Lagrangian relaxation method; Sinha, Zoltners (1979), The multiple-choice "
        "knapsack problem",
        when="several budgets, a certified answer in tens of milliseconds",
    )

    def solve(
        self,
        problem: MultipleChoiceKnapsack,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return a feasible pick and the Lagrangian bound.

        Raises:
            Infeasible: the budgets conflict, proven by their prices.
            NoChoiceFound: nothing feasible was found, which proves nothing.
        """
        deadline = Deadline.after(time_limit)
        core = core_of(problem)
        if core.sites == 0:
            return mask_solution(problem, np.zeros(0, dtype=bool), self.name, bound=Bound(0.0, "no sites"))
        dual = best_prices(core, deadline=deadline)
        warm = start_pick(core, warm_start)
        if warm is not None:
            warm = improve(core, warm, reduced_damage(core, dual.price), deadline)
        pick = best_repaired(core, dual.picks, dual.price, deadline, known=warm)
        pick = search_neighbourhoods(core, dual, pick, rounds=self.rounds, seed=seed, deadline=deadline)
        return mask_solution(
            problem,
            core.keep(pick),
            self.name,
            bound=Bound(dual.value, SOURCE),
            timed_out=deadline.passed(),
            stats={"prices": dual.rounds},
        )


register(LagrangianKnapsack())

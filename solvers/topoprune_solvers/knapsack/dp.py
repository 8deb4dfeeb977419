"""Dynamic programming over undominated partial picks: exact for one budget, with float costs as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.knapsack.core import PROVEN, core_of, start_pick
from topoprune_solvers.knapsack.dual import SOURCE, best_prices
from topoprune_solvers.knapsack.layers import open_choices, price_fan, sweep
from topoprune_solvers.knapsack.local_search import best_repaired
from topoprune_solvers.problems import MultipleChoiceKnapsack
from topoprune_solvers.result import Deadline, mask_solution
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["DpKnapsack"]


@dataclass(frozen=True)
class DpKnapsack:
    """Extend partial picks site by site; keep those that no other beats in cost and damage.

    Costs are not rounded. Lagrangian bounds at several prices drop partial picks that cannot win.

    Args:
        widths: partial picks kept after a site, pass by pass; a pass that drops none is a proof.
    """

    widths: tuple[int, ...] = (1 << 10, 1 << 14, 1 << 18, 1 << 20)
    name: str = "dp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=MultipleChoiceKnapsack,
        exact=True,
        guarantee="optimal (to 1e-9) while the undominated partial picks number below a million a site, else the "
        "incumbent with a proven gap",
        complexity="O(n L), L <= distinct total costs",
        reference="Nemhauser, Ullmann (1969); Dyer, Kayal, Walker (1984), A branch and bound algorithm for the "
        "multiple-choice knapsack problem",
        when="one budget, without OR-Tools",
        lacks=("several budgets",),
    )

    def solve(
        self,
        problem: MultipleChoiceKnapsack,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return the least damage under one budget.

        Raises:
            ValueError: several budgets that can bind. Infeasible: no choice fits.
        """
        deadline = Deadline.after(time_limit)
        core = core_of(problem)
        if core.resource.size > 1:
            raise ValueError(
                f"solver {self.name!r} takes one budget, {core.resource.size} of this problem can bind; "
                "use 'exact' or 'lagrangian'"
            )
        if core.sites == 0:
            return mask_solution(problem, np.zeros(0, dtype=bool), self.name, bound=Bound(0.0, "no sites"))
        dual = best_prices(core, deadline=deadline)
        pick = best_repaired(core, dual.picks, dual.price, deadline, known=start_pick(core, warm_start))
        upper, bound = core.objective(pick), Bound(dual.value, SOURCE)
        prices = price_fan(dual.price)
        largest = 0
        for width in self.widths:
            if deadline.passed() or upper - bound.value <= PROVEN / 2 * abs(upper):
                break
            open_choice = open_choices(core, prices, upper)
            open_choice[pick] = True
            part = core.only(open_choice)
            result = sweep(part, prices, upper, width=width, deadline=deadline)
            largest = max(largest, result.largest)
            if result.pick is not None:
                pick = np.searchsorted(core.choice, part.choice[result.pick])
                upper = core.objective(pick)
            # Choices closed by their reduced damage, like those of the pass, are not below `upper` by more than 1e-10.
            found = Bound(min(result.bound, upper), "dynamic programming")
            bound = best_bound("min", [bound, found]) or found
            if result.finished and result.dropped == 0:
                break
        unproven = upper - bound.value > PROVEN * abs(upper)
        return mask_solution(
            problem,
            core.keep(pick),
            self.name,
            bound=bound,
            timed_out=unproven and deadline.passed(),
            stats={"partial_picks": largest},
        )


register(DpKnapsack())

"""Baselines of layer budgets: a random pick, and the same relative position on every curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.knapsack.core import Core, core_of
from topoprune_solvers.knapsack.local_search import best_repaired, repair
from topoprune_solvers.problems import MultipleChoiceKnapsack
from topoprune_solvers.result import Deadline, mask_solution
from topoprune_solvers.solution import Solution

__all__ = ["KnapsackBaseline"]

POSITIONS = 1025


@dataclass(frozen=True)
class KnapsackBaseline:
    """Pick without looking at the damage.

    Args:
        name: ``"random"``: sites in random order each draw a choice that still leaves room for the
            others' cheapest. ``"uniform"``: every site stands at the same relative position between
            its cheapest and its dearest choice, the highest that keeps the budgets.
    """

    name: str
    capabilities: Capabilities

    def solve(
        self,
        problem: MultipleChoiceKnapsack,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return a feasible pick; only `seed` matters, and only to ``"random"``.

        Raises:
            Infeasible, NoChoiceFound: as the solver ``"lagrangian"``, where budgets conflict.
        """
        Deadline.after(time_limit)
        core = core_of(problem)
        if core.sites == 0:
            return mask_solution(problem, np.zeros(0, dtype=bool), self.name)
        pick = _random(core, seed) if self.name == "random" else _uniform(core)
        if not core.feasible(pick):
            mended = repair(core, pick, np.zeros(core.damage.size))
            if mended is None or not core.feasible(mended):
                mended = best_repaired(core, [pick], np.zeros(core.resource.size))
            pick = mended
        return mask_solution(problem, core.keep(pick), self.name)


def _random(core: Core, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pick = core.start[:-1].copy()
    cheapest = core.site_min(core.cost)
    spent = cheapest.sum(axis=0)
    for site in rng.permutation(core.sites).tolist():
        own = np.arange(core.start[site], core.start[site + 1])
        fits = own[np.all(spent - cheapest[site] + core.cost[own] <= core.inner, axis=1)]
        # With several budgets the site's cheapest choice may differ from one to the other, and none fit both.
        pick[site] = rng.choice(fits if fits.size else own)
        spent = spent - cheapest[site] + core.cost[pick[site]]
    return pick


def _uniform(core: Core) -> np.ndarray:
    size = np.diff(core.start)
    scale = np.where(core.outer > 0, core.outer, 1.0)
    order = np.lexsort((core.damage, (core.cost / scale).sum(axis=1), core.site))
    pick = order[core.start[:-1]]
    for position in np.linspace(1.0, 0.0, POSITIONS).tolist():
        pick = order[core.start[:-1] + np.rint(position * (size - 1)).astype(np.int64)]
        if np.all(core.cost[pick].sum(axis=0) <= core.inner):
            break
    return pick


for _name, _when in (("random", "a baseline to compare with"), ("uniform", "the usual practice to compare with")):
    register(
        KnapsackBaseline(
            _name,
            Capabilities(
                problem=MultipleChoiceKnapsack,
                exact=False,
                guarantee="none: a baseline",
                complexity="O(n r)",
                when=_when,
            ),
        )
    )

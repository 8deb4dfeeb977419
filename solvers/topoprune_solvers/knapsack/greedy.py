"""Greedy layer budgets: steps along the lower convex hull of each site's curve, best damage per cost first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.knapsack.core import Core, core_of, start_pick
from topoprune_solvers.knapsack.dual import lagrangian_bound
from topoprune_solvers.knapsack.local_search import best_repaired
from topoprune_solvers.problems import MultipleChoiceKnapsack
from topoprune_solvers.result import Deadline, mask_solution
from topoprune_solvers.solution import Bound, Solution

__all__ = ["GreedyKnapsack", "hull_steps"]


@dataclass(frozen=True)
class GreedyKnapsack:
    """Start every site at its cheapest choice and take the hull steps that save most damage per cost.

    Several budgets are added up to one cost, each weighted by how scarce it is; the weights are adapted to
    what the greedy spends and the best of some passes stays. Exchanges fill up what is left of the budgets.

    Args:
        passes: weightings tried when there are several budgets.
    """

    passes: int = 8
    name: str = "greedy"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=MultipleChoiceKnapsack,
        exact=False,
        guarantee="one budget: within one hull step of the LP relaxation, which is the bound reported; "
        "several: a certified gap from the added-up budget",
        complexity="O(n log n) per pass, then O(n r) per exchange",
        reference="Sinha, Zoltners (1979), The multiple-choice knapsack problem; Toyoda (1975), A simplified "
        "algorithm for obtaining approximate solutions to zero-one programming problems",
        when="one budget, or thousands of sites",
    )

    def solve(
        self,
        problem: MultipleChoiceKnapsack,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return a feasible pick and the bound of the steps' last price.

        Raises:
            Infeasible: the budgets conflict, proven by prices.
            NoChoiceFound: nothing feasible was found, which proves nothing.
        """
        deadline = Deadline.after(time_limit)
        core = core_of(problem)
        if core.sites == 0:
            return mask_solution(problem, np.zeros(0, dtype=bool), self.name, bound=Bound(0.0, "no sites"))
        free = np.zeros(core.resource.size)
        bound, pick = lagrangian_bound(core, free)
        price, picks = free, [pick]
        if core.resource.size and np.any(core.cost[pick].sum(axis=0) > core.inner):
            scale = np.where(core.outer > 0, core.outer, 1.0)
            weight = 1.0 / scale
            for _ in range(self.passes if core.resource.size > 1 else 1):
                pick, ratio = _pass(core, weight)
                picks.append(pick)
                value, _ = lagrangian_bound(core, ratio * weight)
                if value > bound or not price.any():
                    bound, price = max(bound, value), ratio * weight
                if deadline.passed():
                    break
                # What the pass spends too much of becomes dearer.
                weight = weight * np.clip(core.cost[pick].sum(axis=0) / scale, 0.2, 5.0) ** 2
                weight /= (weight * scale).sum()
        pick = best_repaired(core, picks, price, deadline, known=start_pick(core, warm_start))
        source = "LP relaxation of the added-up budgets" if core.resource.size > 1 else "LP relaxation (hull steps)"
        return mask_solution(
            problem, core.keep(pick), self.name, bound=Bound(bound, source), timed_out=deadline.passed()
        )


def hull_steps(core: Core, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first pick and all steps along the lower convex hulls, best ratio first.

    Args:
        weight: (a,) float64 > 0, turns the costs of a choice into one.

    Returns:
        (s,) pick of least weighted cost; (t,) position each step leads to; (t,) damage saved per weighted
        cost, not increasing. Steps of one site keep their order along its hull.
    """
    cost = core.cost @ weight
    order = np.lexsort((core.damage, cost, core.site))
    first = np.zeros(core.sites, dtype=np.int64)
    steps: list[int] = []
    ratios: list[float] = []
    price, damage = cost.tolist(), core.damage.tolist()
    bounds = core.start.tolist()
    positions = order.tolist()
    for site in range(core.sites):
        hull: list[int] = []
        slope: list[float] = []  # slope[i]: damage saved per cost on the way to hull[i]; falls along the hull
        for c in positions[bounds[site] : bounds[site + 1]]:
            if hull and damage[c] >= damage[hull[-1]]:
                continue
            while hull:
                wide = price[c] - price[hull[-1]]
                gain = (damage[hull[-1]] - damage[c]) / wide if wide > 0 else np.inf
                if len(hull) > 1 and gain >= slope[-1]:
                    hull.pop()
                    slope.pop()
                    continue
                break
            hull.append(c)
            slope.append(np.inf if len(hull) == 1 else gain)
        first[site] = hull[0]
        steps += hull[1:]
        ratios += slope[1:]
    ratio = np.array(ratios)
    ranked = np.argsort(-ratio, kind="stable")
    return first, np.array(steps, dtype=np.int64)[ranked], ratio[ranked]


def _pass(core: Core, weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Take hull steps while they fit; return the pick and the ratio of the first step that did not."""
    pick, steps, ratios = hull_steps(core, weight)
    spent = core.cost[pick].sum(axis=0)
    critical = 0.0
    stopped = np.zeros(core.sites, dtype=bool)
    for step, ratio in zip(steps.tolist(), ratios.tolist(), strict=True):
        site = core.site[step]
        if stopped[site]:
            continue
        after = spent - core.cost[pick[site]] + core.cost[step]
        if np.any(after > core.inner) and np.any((after > core.inner) & (after > spent)):
            critical = max(critical, ratio)
            stopped[site] = True
            continue
        spent = after
        pick[site] = step
    return pick, critical if np.isfinite(critical) else 0.0


register(GreedyKnapsack())

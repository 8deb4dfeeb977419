"""Lagrangian relaxation of soft domination: a strong upper bound, and selections close to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.budgeted.facility_location import Prepared, greedy_with_bound
from topoprune_solvers.budgeted.facility_swaps import swap_while_better
from topoprune_solvers.budgeted.service import path_bound
from topoprune_solvers.problems import SoftDomination
from topoprune_solvers.result import NEVER, Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["LagrangianFacilityLocation", "Relaxed", "relax"]

ITERATIONS = 400
PATIENCE = 12  # iterations without a better bound before the steps are halved
SMALLEST_STEP = 1e-3
MEMORY = 0.6  # share of the last direction in the next one: damps the zigzag of plain subgradients
FIRST_LOOK = 20  # iteration whose selection is first improved by swaps; then at each doubling, and at the end
PROVEN = 1e-9  # relative gap that counts as closed


@dataclass(frozen=True)
class LagrangianFacilityLocation:
    """Price what each unit receives: the units then decouple, and every vector of prices gives an upper bound.

    With prices u >= 0, ``sum_i u_i + max_S sum_{j in S} sum_i max(0, importance_i s_ij - u_i)`` is at least the
    optimum; the best u reaches the bound of the LP relaxation, which for facility location is tight or
    nearly so. Prices start at what the greedy selection explains (there the bound is that of
    submodularity) and follow deflected subgradients; selections met on the way are improved by swaps.

    Args:
        iterations: most subgradient steps, each O(n log n + m).
        gap: relative gap at which to stop.
    """

    iterations: int = ITERATIONS
    gap: float = 1e-4
    name: str = "lagrangian"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=SoftDomination,
        exact=False,
        guarantee="never below greedy with swaps, with a bound close to the LP relaxation's",
        complexity="O(iterations (n log n + m))",
        reference="Cornuejols, Fisher, Nemhauser (1977); Fisher (1981), The Lagrangian relaxation method",
        when="thousands of units and a certificate is wanted: a gap of per cents or less within seconds",
    )

    def solve(
        self, problem: SoftDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best selection found, with the best bound."""
        deadline = Deadline.after(time_limit)
        case = Prepared.of(problem)
        keep, bound = greedy_with_bound(case, check_start(problem, warm_start), deadline)
        relaxed = relax(case, keep, deadline, iterations=self.iterations, gap=self.gap)
        combined = best_bound("max", [bound, relaxed.bound])
        stats = {"iterations": relaxed.iterations}
        return unit_solution(problem, relaxed.keep, self.name, bound=combined, timed_out=deadline.passed(), stats=stats)


@dataclass(frozen=True, eq=False)
class Relaxed:
    """What the relaxation found.

    Args:
        keep: (n,) bool, the best selection. bound: on the optimum.
        price: (n,) float64, prices that give the bound. iterations: steps taken.
    """

    keep: np.ndarray
    bound: Bound
    price: np.ndarray
    iterations: int


def relax(
    case: Prepared,
    keep: np.ndarray,
    deadline: Deadline = NEVER,
    *,
    iterations: int = ITERATIONS,
    gap: float = PROVEN,
) -> Relaxed:
    """Lower the Lagrangian bound by subgradient steps, starting from a feasible selection.

    Args:
        case: the problem. keep: (n,) bool, feasible. deadline: ends the steps early.
        iterations: most steps. gap: relative gap at which to stop.
    """
    problem, service, groups = case.problem, case.service, case.groups
    assert problem.importance is not None
    importance = problem.importance
    value = problem.objective(keep)
    price = service.reached(keep)
    best_price, best = price, np.inf
    direction = np.zeros(problem.n)
    step, stale, done, look = 1.0, 0, 0, FIRST_LOOK
    chosen = keep
    while done < iterations and step > SMALLEST_STEP and not deadline.passed():
        bound, chosen = path_bound(groups, problem, price, service.priced(price))
        if bound < best * (1 - 1e-7):
            stale = 0
        else:
            stale += 1
        if bound < best:
            best, best_price = bound, price
        if done == look:
            keep, value, look = *_better(case, chosen, keep, value, deadline), 2 * look
        if best <= value * (1 + gap):
            break
        if stale >= PATIENCE:
            # Go on from the best prices with smaller steps.
            step, stale, price, direction = step / 2, 0, best_price, np.zeros(problem.n)
            bound, chosen = path_bound(groups, problem, price, service.priced(price))
        slope = 1.0 - service.served(price, chosen)
        slope[(price <= 0) & (slope > 0)] = 0.0
        direction = slope + MEMORY * direction
        length = float(direction @ direction)
        if length == 0:
            break
        price = np.clip(price - step * (bound - value) / length * direction, 0.0, importance)
        done += 1
    if best > value * (1 + gap):
        keep, value = _better(case, chosen, keep, value, deadline)
    return Relaxed(keep, Bound(best, "Lagrangian relaxation"), best_price, done)


def _better(
    case: Prepared, chosen: np.ndarray, keep: np.ndarray, value: float, deadline: Deadline
) -> tuple[np.ndarray, float]:
    """Return the selection of a relaxation after swaps if it beats the known one, else that."""
    swapped = swap_while_better(case.problem, case.service, case.groups, chosen, deadline)
    reached = case.problem.objective(swapped)
    return (swapped, reached) if reached > value else (keep, value)


register(LagrangianFacilityLocation())

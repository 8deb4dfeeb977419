"""Lagrangian dual of a multiple-choice knapsack: the best lower bound that prices of the budgets prove.

Priced at ``price >= 0`` the sites separate: ``L(price) = sum_s min_c (damage + price . cost) - price . limit``
bounds the optimum from below for every price, and its maximum equals the LP relaxation. L is concave and
piecewise linear: one budget is solved exactly by intersecting two lines (Dinkelbach), several by cutting
planes (Kelley) whose next point lies between the master's optimum and the best price so far.

References:
    Fisher (1981), The Lagrangian relaxation method for solving integer programming problems, Management Science.
    Kelley (1960), The cutting-plane method for solving convex programs, J. SIAM.
    Ben-Ameur, Neto (2007), Acceleration of cutting-plane and column generation algorithms, Networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from topoprune_solvers.knapsack.core import Core
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["SOURCE", "Dual", "best_prices", "lagrangian_bound", "reduced_damage"]

SOURCE = "Lagrangian dual (LP relaxation)"
EPSILON = 2.0**-52
ITERATIONS = 120
INWARD = 0.6  # weight of the master's optimum against the best price
CONVERGED = 1e-8  # relative


@dataclass(frozen=True, eq=False)
class Dual:
    """Best prices found.

    Args:
        price: (a,) float64 >= 0, damage per unit of each active resource.
        value: lower bound on the optimum, safe under float rounding.
        picks: the picks of the prices tried, best bounds last: starting points for repair.
        rounds: number of price vectors tried.
    """

    price: np.ndarray
    value: float
    picks: list[np.ndarray] = field(default_factory=list)
    rounds: int = 0


def lagrangian_bound(core: Core, price: np.ndarray) -> tuple[float, np.ndarray]:
    """Return L(price), rounded down safely, and the pick that attains it. O(m a).

    Args:
        price: (a,) float64 >= 0.
    """
    value = core.damage + core.cost @ price
    pick = core.site_argmin(value)
    budget = float(core.outer @ price)
    # Each value carries at most (a + 1) roundings of numbers no larger than the magnitude below.
    magnitude = math.fsum((np.abs(core.damage[pick]) + core.cost[pick] @ price).tolist()) + budget
    slack = (core.resource.size + 3) * EPSILON * magnitude
    return math.fsum(value[pick].tolist()) - budget - slack, pick


def reduced_damage(core: Core, price: np.ndarray) -> np.ndarray:
    """Return (m,) float64 >= 0: by how much the bound rises at least if a choice is forced, rounded down safely."""
    priced = core.cost @ price
    value = core.damage + priced
    slack = (core.resource.size + 3) * EPSILON * (np.abs(core.damage) + priced)
    return np.asarray(np.maximum(value - core.site_min(value)[core.site] - slack, 0.0))


def best_prices(
    core: Core, *, start: np.ndarray | None = None, deadline: Deadline = NEVER, iterations: int = ITERATIONS
) -> Dual:
    """Maximise the Lagrangian bound.

    Args:
        start: (a,) float64 >= 0, prices of a similar problem, or None.

    Complexity: O(m a) per price vector; about 10 of them for one budget, 30 to 80 for two or three.
    """
    free = np.zeros(core.resource.size)
    value, pick = lagrangian_bound(core, free)
    first = Dual(free, value, [pick], 1)
    if core.resource.size == 0 or np.all(core.cost[pick].sum(axis=0) <= core.inner):
        return first
    if core.resource.size == 1:
        return _one_budget(core, first, deadline, iterations)
    return _cutting_planes(core, first, start, deadline, iterations)


def _line(core: Core, pick: np.ndarray) -> tuple[float, np.ndarray]:
    # L <= damage + over . price at every price, with equality where the pick is best.
    return core.objective(pick), core.cost[pick].sum(axis=0) - core.outer


def _cheapest(core: Core, resource: int) -> np.ndarray:
    # Least cost of one resource at each site; ties to the least damage.
    least = core.cost[:, resource] == core.site_min(core.cost[:, resource])[core.site]
    return core.site_argmin(np.where(least, core.damage, np.inf))


def _one_budget(core: Core, first: Dual, deadline: Deadline, iterations: int) -> Dual:
    over, under = first.picks[0], _cheapest(core, 0)
    best = first
    picks = [over, under]
    for count in range(2, iterations):
        (damage_over, slope_over), (damage_under, slope_under) = _line(core, over), _line(core, under)
        fall = float(slope_over[0] - slope_under[0])
        if not fall > 0 or deadline.passed():
            break
        price = np.array([max(0.0, (damage_under - damage_over) / fall)])
        value, pick = lagrangian_bound(core, price)
        if value > best.value:
            best = Dual(price, value, [], count)
        corner = damage_over + float(slope_over[0]) * float(price[0])
        slope = core.cost[pick].sum(axis=0) - core.outer
        picks.append(pick)
        if value >= corner - 1e-13 * (abs(corner) + abs(damage_over)):
            break
        if slope[0] > 0:
            over = pick
        else:
            under = pick
    # The two picks whose lines cross at the best price are the LP's fractional point.
    return Dual(best.price, best.value, [*picks, over, under], len(picks))


def _cutting_planes(core: Core, first: Dual, start: np.ndarray | None, deadline: Deadline, iterations: int) -> Dual:
    resources = core.resource.size
    picks = [first.picks[0], *(_cheapest(core, j) for j in range(resources))]
    scale = np.maximum(core.outer, np.finfo(float).tiny ** 0.5)
    spread = float((np.maximum.reduceat(core.damage, core.start[:-1]) - core.site_min(core.damage)).sum())
    spread = spread or 1.0
    box = np.full(resources, 10.0)  # of prices in units of spread / scale; grows when the optimum touches it
    lines = [_line(core, pick) for pick in picks]
    offset = core.objective(picks[0])
    best = first
    found: list[tuple[float, np.ndarray]] = [(first.value, pick) for pick in picks]
    rounds = 1
    if start is not None:
        # Around a good start the lines of small steps describe L where it matters.
        nearby = [1 + 0.01 * sign * row for row in np.eye(resources) for sign in (-1.0, 1.0)]
        for price in [start, *(start * factor for factor in nearby)]:
            value, pick = lagrangian_bound(core, price)
            rounds += 1
            lines.append(_line(core, pick))
            found.append((value, pick))
            if value > best.value:
                best = Dual(price, value)
    while rounds < iterations and not deadline.passed():
        solved = _master(
            np.array([(damage - offset) / spread for damage, _ in lines]), np.array([g / scale for _, g in lines]), box
        )
        if solved is None:
            break
        top, target = solved
        ceiling = top * spread + offset
        if ceiling - best.value <= CONVERGED * max(abs(ceiling - offset), abs(best.value), 1e-300):
            grown = target >= 0.999 * box
            if not grown.any() or box.max() > 1e12:
                break
            box[grown] *= 100.0
            continue
        aim = target * spread / scale
        improved = False
        for price in (INWARD * aim + (1 - INWARD) * best.price, aim):
            value, pick = lagrangian_bound(core, price)
            rounds += 1
            lines.append(_line(core, pick))
            found.append((value, pick))
            if value > best.value:
                best = Dual(price, value)
                improved = True
                break
        if not improved and np.any(target >= 0.999 * box):
            box = np.where(target >= 0.999 * box, np.minimum(box * 100.0, 1e14), box)
    ordered = [pick for _, pick in sorted(found, key=lambda entry: entry[0])]
    return Dual(best.price, best.value, ordered, rounds)


def _master(damage: np.ndarray, over: np.ndarray, box: np.ndarray) -> tuple[float, np.ndarray] | None:
    """Maximise t subject to ``t <= damage + over . x`` for every line and 0 <= x <= box."""
    from scipy.optimize import linprog

    resources = box.size
    done = linprog(
        np.concatenate([[-1.0], np.zeros(resources)]),
        A_ub=np.column_stack([np.ones(damage.size), -over]),
        b_ub=damage,
        bounds=[(None, None), *((0.0, limit) for limit in box.tolist())],
        method="highs-ds",
    )
    if done.status != 0 or done.x is None:
        return None
    return float(done.x[0]), np.clip(done.x[1:], 0.0, box)

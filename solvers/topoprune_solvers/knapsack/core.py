"""The open part of a multiple-choice knapsack: choices that fit, resources that can bind, sums per site.

Every algorithm of this package works on a `Core` and a *pick*: (sites,) int64, for each site the
position of its choice in the core's arrays.

Shape legend: m open choices, a active resources, s sites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from topoprune_solvers.problems import MultipleChoiceKnapsack
from topoprune_solvers.problems.knapsack import BUDGET_TOLERANCE
from topoprune_solvers.solution import Infeasible

__all__ = ["PROVEN", "Core", "NoChoiceFound", "core_of", "start_pick"]

PROVEN = 1e-9  # relative distance of objective and bound that counts as equal


class NoChoiceFound(ValueError):
    """The solver found no choice within all budgets, and did not prove that there is none."""


@dataclass(frozen=True, eq=False)
class Core:
    """Choices that are still open, grouped by site.

    Args:
        problem: where the numbers come from.
        choice: (m,) int64, ascending positions in the problem's arrays.
        start: (s + 1,) int64 offsets of the sites.
        site: (m,) int64, site of each open choice.
        damage: (m,) float64. cost: (m, a) float64.
        resource: (a,) int64, the resources that can bind at all; the others are left out.
        inner, outer: (a,) float64, just below and just above the problem's limit. Heuristics stay within
            `inner`, relaxations allow `outer`: sums that a rounding moves across the limit harm neither.
    """

    problem: MultipleChoiceKnapsack
    choice: np.ndarray
    start: np.ndarray
    site: np.ndarray
    damage: np.ndarray
    cost: np.ndarray
    resource: np.ndarray
    inner: np.ndarray
    outer: np.ndarray

    @property
    def sites(self) -> int:
        """Number of sites."""
        return int(self.start.size - 1)

    def site_min(self, value: np.ndarray) -> np.ndarray:
        """Return the (s, ...) smallest entry of each site of (m, ...) values."""
        return np.asarray(np.minimum.reduceat(value, self.start[:-1], axis=0))

    def site_argmin(self, value: np.ndarray) -> np.ndarray:
        """Return the pick of the smallest (m,) value at each site; ties to the lower index."""
        least = self.site_min(value)
        hit = np.flatnonzero(value == least[self.site])
        owner = self.site[hit]
        first = np.ones(hit.size, dtype=bool)
        first[1:] = owner[1:] != owner[:-1]
        return np.asarray(hit[first], dtype=np.int64)

    def keep(self, pick: np.ndarray) -> np.ndarray:
        """Return the (n,) keep mask of a pick."""
        mask = np.zeros(self.problem.n, dtype=bool)
        mask[self.choice[pick]] = True
        return mask

    def feasible(self, pick: np.ndarray) -> bool:
        """Return True if a pick keeps every budget of the problem, by the checker's own sums."""
        return self.problem.violation(self.keep(pick)) is None

    def objective(self, pick: np.ndarray) -> float:
        """Return the total damage of a pick."""
        return math.fsum(self.damage[pick].tolist())

    def only(self, open_choice: np.ndarray) -> Core:
        """Return the core without the choices where the (m,) mask is False; every site keeps one at least."""
        site = self.site[open_choice]
        start = np.concatenate([[0], np.cumsum(np.bincount(site, minlength=self.sites), dtype=np.int64)])
        assert np.all(np.diff(start) > 0), "a site lost its last choice"
        return Core(
            self.problem,
            self.choice[open_choice],
            start,
            site,
            self.damage[open_choice],
            self.cost[open_choice],
            self.resource,
            self.inner,
            self.outer,
        )

    def pick_of(self, keep: np.ndarray) -> np.ndarray | None:
        """Return the pick of a keep mask, or None where it uses a choice that is not open."""
        picked = np.flatnonzero(keep)
        where = np.minimum(np.searchsorted(self.choice, picked), max(self.choice.size - 1, 0))
        return where if np.array_equal(self.choice[where], picked) else None


def core_of(problem: MultipleChoiceKnapsack) -> Core:
    """Drop choices that fit no budget even beside the cheapest others, and resources that can never bind.

    Raises:
        Infeasible: a site is left without a choice, which proves that the budgets conflict.
    """
    sites = problem.sites
    choice = np.arange(problem.n)
    site = np.repeat(np.arange(sites), np.diff(problem.start))
    outer = problem.limit * (1 + BUDGET_TOLERANCE / 2)
    for _ in range(max(sites, 1)):
        if choice.size == 0:
            break
        cost = problem.cost[choice]
        first = np.searchsorted(site[choice], np.arange(sites))
        least = np.minimum.reduceat(cost, first, axis=0)
        others = least.sum(axis=0) - least
        # The margin covers the sums' rounding: a choice is dropped only when it surely does not fit.
        fits = np.all(cost + others[site[choice]] <= outer + 1e-13 * least.sum(axis=0), axis=1)
        if fits.all():
            break
        choice = choice[fits]
        missing = np.setdiff1d(np.arange(sites), site[choice])
        if missing.size:
            raise Infeasible(
                f"site {int(missing[0])}: no choice fits all budgets, even beside the cheapest choices of all other "
                "sites; raise a budget"
            )
    start = np.searchsorted(site[choice], np.arange(sites + 1))
    cost = problem.cost[choice]
    largest = np.maximum.reduceat(cost, start[:-1], axis=0) if sites else np.zeros((0, problem.budget.size))
    most = [math.fsum(column) for column in largest.T.tolist()]
    resource = np.flatnonzero(np.array(most) > problem.limit)
    return Core(
        problem,
        choice,
        start,
        site[choice],
        problem.damage[choice],
        np.ascontiguousarray(cost[:, resource]),
        resource,
        (problem.budget * (1 + BUDGET_TOLERANCE / 2))[resource],
        outer[resource],
    )


def start_pick(core: Core, warm_start: Any) -> np.ndarray | None:
    """Return a warm start as a pick, or None where there is none or it breaks a budget.

    Raises:
        ValueError: a mask of another shape, or without exactly one choice per site.
    """
    if warm_start is None:
        return None
    keep = np.array(warm_start, dtype=bool)
    if keep.shape != (core.problem.n,):
        raise ValueError(
            f"warm_start has shape {keep.shape}, expected ({core.problem.n},): a keep mask of this problem"
        )
    core.problem.chosen(keep)
    return core.pick_of(keep) if core.problem.violation(keep) is None else None

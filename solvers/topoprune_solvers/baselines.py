"""Baselines every method has to beat: random units, and units by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.covering import cover_of
from topoprune_solvers.problems import BudgetedDomination, DominatingSet, SoftDomination
from topoprune_solvers.result import unit_solution
from topoprune_solvers.solution import Solution

__all__ = ["BudgetBaseline", "CoverBaseline"]


@dataclass(frozen=True)
class CoverBaseline:
    """Go through the units in some order and keep each that covers something new.

    Args:
        name: ``"random"`` (a seeded permutation) or ``"magnitude"`` (cheapest first, ties to the
            lower index: a dominating-set problem has costs but no importances).
    """

    name: str
    capabilities: Capabilities

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return a cover; only `seed` matters, and only to ``"random"``."""
        assert problem.cost is not None
        cover = cover_of(problem)
        order = _order(self.name, -problem.cost, seed)
        keep = cover.forced.copy()
        uncovered = cover.counts(keep) == 0
        for unit in order[~cover.forbidden[order]].tolist():
            row = cover.row(unit)
            if uncovered[row].any():
                keep[unit] = True
                uncovered[row] = False
        return unit_solution(problem, keep, self.name)


@dataclass(frozen=True)
class BudgetBaseline:
    """Keep exactly k units: the forced ones, then at random or by descending importance.

    Args:
        name: ``"random"`` or ``"magnitude"`` (ties to the lower index).
    """

    name: str
    capabilities: Capabilities

    def solve(
        self,
        problem: BudgetedDomination | SoftDomination,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return k units; only `seed` matters, and only to ``"random"``."""
        assert problem.importance is not None and problem.forced is not None and problem.forbidden is not None
        order = _order(self.name, problem.importance, seed)
        spare = order[~problem.forced[order] & ~problem.forbidden[order]]
        keep = problem.forced.copy()
        keep[spare[: problem.k - int(problem.forced.sum())]] = True
        return unit_solution(problem, keep, self.name)


def _order(name: str, score: np.ndarray, seed: int) -> np.ndarray:
    if name == "random":
        return np.random.default_rng(seed).permutation(score.size)
    return np.argsort(-score, kind="stable")


def _capabilities(problem: type, name: str) -> Capabilities:
    guarantee = f"none: a baseline ({name} order)"
    return Capabilities(problem=problem, exact=False, guarantee=guarantee, complexity="O(n log n + m)")


for _name in ("random", "magnitude"):
    register(CoverBaseline(_name, _capabilities(DominatingSet, _name)))
    register(BudgetBaseline(_name, _capabilities(BudgetedDomination, _name)))
    register(BudgetBaseline(_name, _capabilities(SoftDomination, _name)))

"""Baselines every dominating-set solver has to beat: random units, and units by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import cover_of
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import baseline_order, unit_solution
from topoprune_solvers.solution import Solution

__all__ = ["CoverBaseline"]


@dataclass(frozen=True)
class CoverBaseline:
    """Go through the units in some order and keep each that helps an element not yet covered as often as it demands.

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
        order = baseline_order(self.name, -problem.cost, seed)
        keep = cover.forced.copy()
        need = cover.demand - cover.counts(keep)
        for unit in order[~(cover.forbidden | cover.forced)[order]].tolist():
            row = cover.row(unit)
            if need[row].max() > 0:
                keep[unit] = True
                need[row] -= 1
        return unit_solution(problem, keep, self.name)


def _capabilities(name: str) -> Capabilities:
    guarantee = f"none: a baseline ({name} order)"
    return Capabilities(
        problem=DominatingSet,
        exact=False,
        guarantee=guarantee,
        complexity="O(n log n + m)",
        when="a baseline that any method has to beat",
    )


for _name in ("random", "magnitude"):
    register(CoverBaseline(_name, _capabilities(_name)))

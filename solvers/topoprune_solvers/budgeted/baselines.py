"""Baselines every budgeted solver has to beat: random units, and units by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.problems import BudgetedDomination, SoftDomination
from topoprune_solvers.result import baseline_order, unit_solution
from topoprune_solvers.solution import Solution

__all__ = ["BudgetBaseline"]


@dataclass(frozen=True)
class BudgetBaseline:
    """Keep exactly k units: the forced ones, then at random or by descending importance what fits its group.

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
        order = baseline_order(self.name, problem.importance, seed)
        keep = Groups.of(problem).extend(problem.forced, order[~problem.forbidden[order]])
        return unit_solution(problem, keep, self.name)


def _capabilities(problem: type, name: str) -> Capabilities:
    guarantee = f"none: a baseline ({name} order)"
    return Capabilities(
        problem=problem,
        exact=False,
        guarantee=guarantee,
        complexity="O(n log n + m)",
        when="to see what a graph is worth",
    )


for _name in ("random", "magnitude"):
    register(BudgetBaseline(_name, _capabilities(BudgetedDomination, _name)))
    register(BudgetBaseline(_name, _capabilities(SoftDomination, _name)))

"""Baselines every solver of problem C has to beat: random units, and units by their damage alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import QuadraticSubset, RepairedSubset
from topoprune_solvers.quadratic.common import subset_solution
from topoprune_solvers.result import baseline_order
from topoprune_solvers.solution import Solution

__all__ = ["SubsetBaseline"]


@dataclass(frozen=True)
class SubsetBaseline:
    """Prune units in some order until the budget is met.

    Args:
        name: ``"random"`` (seeded) or ``"magnitude"`` (least damage alone first: the diagonal of the Gram, with
            repair the unrepaired tr(W_u C_uu W_u^T); ties keep the lower index).
    """

    name: str
    capabilities: Capabilities

    def solve(
        self,
        problem: QuadraticSubset | RepairedSubset,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return a set that meets the budget; only `seed` matters, and only to ``"random"``."""
        assert problem.forced is not None and problem.forbidden is not None
        alone = problem.gram.diagonal() if isinstance(problem, QuadraticSubset) else _alone(problem)
        order = baseline_order(self.name, alone, seed)[::-1]
        order = order[~problem.forced[order] & ~problem.forbidden[order]]
        keep = ~problem.forbidden
        if problem.k is not None:
            missing = int(keep.sum()) - problem.k
        else:
            assert isinstance(problem, QuadraticSubset) and problem.cost is not None and problem.budget is not None
            excess = float(problem.cost[keep].sum()) - problem.budget - problem.cost_slack / 2
            missing = int(np.searchsorted(np.cumsum(problem.cost[order]), excess)) + 1 if excess > 0 else 0
        keep[order[:missing]] = False
        return subset_solution(problem, keep, self.name)


def _alone(problem: RepairedSubset) -> np.ndarray:
    # (n,) float64: what each unit contributes to the output, E||W_u x_u||^2.
    if problem.width.max(initial=1) == 1:
        return np.square(problem.weight).sum(axis=0) * problem.moment.diagonal()
    energy = np.zeros(problem.n)
    for unit in range(problem.n):
        own = slice(*problem.offsets[unit : unit + 2].tolist())
        part = problem.weight[:, own]
        energy[unit] = float(((part @ problem.moment[own, own]) * part).sum())
    return energy


for _problem in (QuadraticSubset, RepairedSubset):
    for _name in ("random", "magnitude"):
        register(
            SubsetBaseline(
                _name,
                Capabilities(
                    problem=_problem,
                    exact=False,
                    guarantee=f"none: a baseline ({_name} order)",
                    complexity="O(n log n)",
                    when="only to compare with",
                ),
            )
        )

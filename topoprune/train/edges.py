"""Single weights instead of units: edge selection on every counted matrix."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from topoprune.architectures import counted_matrices
from topoprune.graph import Site
from topoprune.planning import Plan
from topoprune.sparsity import row_view
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune.train.decision import Decision
from topoprune.train.schedule import spread
from topoprune_solvers import EdgeSelection
from topoprune_solvers import solve as solve_problem

__all__ = ["EdgeChooser"]


class EdgeChooser:
    """Decides which single weights stay.

    Args:
        model: live. sites: its prunable sites. recipe: with ``granularity="edge"``. clock: for `Decision.seconds`.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        recipe: BudgetRecipe,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.sites, self.recipe, self._clock = model, tuple(sites), recipe, clock
        self._matrices = _edge_matrices(sites)
        matrices = counted_matrices(sites)
        sizes = [math.prod(shape) for shape in matrices.values()]
        assert recipe.sparsity is not None
        self._edges = dict(zip(matrices, spread(round(recipe.sparsity * sum(sizes)), sizes), strict=True))

    def decide(self, done: float, plan: Plan, seed: int, request: dict[str, Any]) -> Decision:
        """Solve every matrix for the share of its target that the ramp asks for."""
        solutions, axes = dict(plan.solutions), {}
        seconds = {"extract": 0.0, "solve": 0.0, "repair": 0.0}
        for name, row_axis in self._matrices.items():
            started = self._clock()
            view = row_view(self.model.get_parameter(name).detach(), row_axis)
            score = view.abs().double().cpu().numpy()
            if not np.all(np.isfinite(score)):
                raise ValueError(f"parameter {name!r} has non-finite values; training has diverged")
            before = plan.solutions.get(name)
            goal = self._edges[name]
            count = score.size - (goal if done == 1.0 else math.floor(goal * done))
            extracted = self._clock()
            problem = EdgeSelection(
                score,
                k=min(count, score.size if before is None else before.n_kept),
                attachment=self.recipe.attachment * float(score.mean()) * score.shape[1],
                reading=self.recipe.eq1,
                allowed=None if before is None else before.keep.reshape(score.shape),
            )
            solutions[name] = solve_problem(problem, "greedy", seed=seed)
            axes[name] = (row_axis, (score.shape[0], score.shape[1]))
            seconds["extract"] += extracted - started
            seconds["solve"] += self._clock() - extracted
        return Decision(Plan(self.sites, solutions, axes, request), seconds=seconds)


def _edge_matrices(sites: Sequence[Site]) -> dict[str, int]:
    """Return parameter name -> row axis, rows as in Eq. 1 and Eq. 2 (see `BipartiteGraph`)."""
    axes: dict[str, int] = {}
    for site in sites:
        if site.kind == "neuron":
            axes |= {p.param: p.axis for p in site.reads if len(p.shape) == 2}
            axes |= {p.param: 1 - p.axis for p in site.writes}
        elif site.kind == "input_dim":
            axes |= {p.param: p.axis for p in site.reads}
        else:
            axes |= {p.param: 1 - p.axis for p in site.writes}
    return axes

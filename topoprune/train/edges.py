"""Single weights instead of units: edge selection on every counted matrix, free or in blocks (n:m)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from topoprune.architectures import counted_matrices
from topoprune.graph import Site
from topoprune.planning import Plan
from topoprune.sparsity import row_view
from topoprune.train.block_edges import choose_in_blocks
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune.train.decision import Decision
from topoprune.train.schedule import spread
from topoprune_solvers import EdgeSelection, Solution
from topoprune_solvers import solve as solve_problem

__all__ = ["EdgeChooser"]


class EdgeChooser:
    """Decides which single weights stay.

    Args:
        model: live. sites: its prunable sites. recipe: with ``granularity="edge"`` or ``"n:m"``.
        clock: for `Decision.seconds`.

    Raises:
        ValueError: n:m, and matrices whose number of inputs m does not divide; names them.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        recipe: BudgetRecipe,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.sites, self.recipe, self._clock = model, tuple(sites), recipe, clock
        matrices = counted_matrices(sites)
        sizes = [math.prod(shape) for shape in matrices.values()]
        if recipe.pattern is None:
            self._matrices = _edge_matrices(sites)
            assert recipe.sparsity is not None
            goals = spread(round(recipe.sparsity * sum(sizes)), sizes)
        else:
            n, m = recipe.pattern
            self._matrices = _output_axes(sites)
            _check_blocks(matrices, self._matrices, recipe)
            goals = [size // m * (m - n) for size in sizes]
        self._edges = dict(zip(matrices, goals, strict=True))

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
            allowed = None if before is None else before.keep.reshape(score.shape)
            solutions[name] = self._choose(score, min(count, score.size if before is None else before.n_kept), allowed)
            axes[name] = (row_axis, (score.shape[0], score.shape[1]))
            seconds["extract"] += extracted - started
            seconds["solve"] += self._clock() - extracted
        return Decision(Plan(self.sites, solutions, axes, request), seconds=seconds)

    def _choose(self, score: np.ndarray, k: int, allowed: np.ndarray | None) -> Solution:
        strength = self.recipe.attachment * float(score.mean())
        if self.recipe.pattern is not None:
            return choose_in_blocks(
                score,
                k,
                self.recipe.pattern,
                attachment=strength * score.shape[0],
                reading=self.recipe.eq1,
                allowed=allowed,
            )
        problem = EdgeSelection(
            score, k=k, attachment=strength * score.shape[1], reading=self.recipe.eq1, allowed=allowed
        )
        return solve_problem(problem, "greedy")


def _check_blocks(matrices: Mapping[str, tuple[int, ...]], axes: Mapping[str, int], recipe: BudgetRecipe) -> None:
    assert recipe.pattern is not None
    m = recipe.pattern[1]
    inputs = {name: shape[1 - axes[name]] for name, shape in matrices.items()}
    odd = [f"{name} ({count} inputs)" for name, count in inputs.items() if count % m]
    if odd:
        raise ValueError(
            f"granularity={recipe.granularity!r} takes blocks of {m} weights along the inputs of every matrix, and "
            f"{m} does not divide those of {', '.join(odd)}; use an m that does, or granularity='edge'"
        )


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


def _output_axes(sites: Sequence[Site]) -> dict[str, int]:
    """Return parameter name -> axis of the outputs: 0 in ``nn.Linear``, 1 in GPT-2's ``Conv1D``."""
    axes: dict[str, int] = {}
    for site in sites:
        # What makes a unit has it among its outputs; input dimensions and what a unit is written by are inputs.
        own = 1 if site.kind == "input_dim" else 0
        for pieces, flip in ((site.reads + site.shared, own), (site.writes, 1)):
            axes |= {p.param: abs(flip - p.axis) for p in pieces if len(p.shape) == 2}
    return axes

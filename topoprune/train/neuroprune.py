"""The paper's training method: two penalties at each step, a head decision after each epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.extraction import extract
from topoprune.graph import Graph, Site
from topoprune.planning import Plan, resolve_theta
from topoprune.repair import merged_weights
from topoprune.sharding import is_sharded, local, local_part, weights_of, whole, write
from topoprune.sparsity import row_view
from topoprune.train.body import Body
from topoprune.train.decision import Decision, Draft, Job, expand
from topoprune.train.lag import solved
from topoprune.train.penalties import (
    Scratch,
    attachment_weights,
    group_sqrt_gradient,
    prox_group_sqrt,
    prox_weighted_l1,
    weighted_l1_gradient,
)
from topoprune.train.recipe import NeuroPruneRecipe
from topoprune_solvers import DominatingSet, Solution, Status, best_bound
from topoprune_solvers import solve as solve_problem

__all__ = ["NeuroPruneDriver"]


class NeuroPruneDriver:
    """Runs a `NeuroPruneRecipe` on behalf of a `Pruner` (Alg. 1)."""

    def __init__(
        self,
        body: Body,
        recipe: NeuroPruneRecipe,
        total_steps: int,
        steps_per_epoch: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self.body, self.model, self.sites, self.recipe = body, body.model, body.sites, recipe
        model, sites = body.model, body.sites
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.attention = [site for site in sites if site.kind in ("head", "kv_group")]
        if recipe.merge == "paper":
            # Dry run with every head pruned into the first: refuses here, before training, what it cannot do.
            merged_weights(model, sites, _everything_into_first(self.sites, self.attention), "paper", {})
        self._scratch = Scratch()
        self._rows = list(_attachment_rows(model, sites))
        self._groups = list(_group_rows(model, sites))

    def close(self) -> None:
        """Nothing to remove."""

    def follow(self, before: Mapping[str, np.ndarray]) -> None:
        """Nothing to adapt: the penalties hold parameters, which stay the same objects."""

    def collected_seconds(self) -> float:
        """Nothing is collected in the forwards."""
        return 0.0

    def due(self, step: int) -> bool:
        """True after the last step of an epoch."""
        return step % self.steps_per_epoch == 0

    def watch(self, step: int) -> None:
        """Nothing to collect: heads are compared by their weights."""

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """With ``penalty="loss"``: add the penalties' subgradients to the loss gradient."""
        if self.recipe.penalty != "loss":
            return
        # Fused optimizers unscale AMP gradients inside the step, so what joins them is scaled too.
        scale = getattr(optimizer, "grad_scale", None)
        factor = 1.0 if scale is None else float(scale)
        for rows in self._groups:
            for pair, slope in zip(rows, group_sqrt_gradient(_views(rows)), strict=True):
                _add_to_gradient(pair, slope, self.recipe.alpha * factor)
        for rows in self._rows:
            parts = _views(rows)
            weights = attachment_weights(parts, self.recipe.epsilon, self.recipe.eq1, scratch=self._scratch)
            for pair, part in zip(rows, parts, strict=True):
                if pair[0].grad is not None:
                    _add_to_gradient(pair, weighted_l1_gradient(part, weights), self.recipe.beta * factor)

    @torch.no_grad()
    def after_step(self, learning_rates: Mapping[nn.Parameter, float]) -> None:
        """With ``penalty="proximal"``: take the decoupled proximal steps (T3)."""
        if self.recipe.penalty != "proximal":
            return
        for rows in self._groups:
            strength = self._step(rows[0][0], learning_rates) * self.recipe.alpha
            if strength:
                parts = _views(rows)
                prox_group_sqrt(parts, strength, scratch=self._scratch)
                _write_back(rows, parts)
        for rows in self._rows:
            strength = self._step(rows[0][0], learning_rates) * self.recipe.beta
            if strength:
                parts = _views(rows)
                weights = attachment_weights(parts, self.recipe.epsilon, self.recipe.eq1, scratch=self._scratch)
                prox_weighted_l1(parts, weights.mul_(strength), self._scratch)
                _write_back(rows, parts)

    def _step(self, parameter: nn.Parameter, learning_rates: Mapping[nn.Parameter, float]) -> float:
        if parameter not in learning_rates:
            return 0.0  # frozen: not trained, so not penalised either
        return learning_rates[parameter] if self.recipe.prox_scale == "lr" else 1.0

    def last_decision(self) -> int:
        """Return the step of the last decision; 0 if the length of training is not known."""
        return self.total_steps // self.steps_per_epoch * self.steps_per_epoch

    def lag(self, step: int) -> int:
        """Return how many steps after `step` its decision is applied; 0 where training would end before."""
        lag = self.recipe.solve_lag
        return lag if step + lag <= self.total_steps else 0

    def decide(self, step: int, plan: Plan, seed: int) -> Decision:
        """Alg. 2 and 3 on the live heads of every attention layer, with the paper's merge."""
        return self.finish(solved(self.draft(step, plan, seed), self._clock), plan)

    def draft(self, step: int, plan: Plan, seed: int, *, beside: bool = False) -> Draft:
        """Extract the graphs of all heads (Alg. 2); they are copies in any case."""
        started = self._clock()
        heads = self.body.of_kind("head", "kv_group")
        graph = extract(self.model, measure="weights-linf", sites=heads, include=("heads",), digest_weights=False)
        draft, jobs = Draft(step, {}), []
        for site in self.attention:
            live = np.flatnonzero(plan.keep(site.name))
            at = self.body.positions(site.name, live)
            alive = Graph.from_dense(graph.redundancy[site.name].to_dense()[np.ix_(at, at)])
            draft.thetas[site.name] = resolve_theta(self.recipe.theta, alive)
            near = alive.at_most(draft.thetas[site.name])
            jobs.append(Job(site.name, partial(_dominate, site, near, live, plan.solutions.get(site.name), seed)))
        draft.request, draft.jobs = {**self.recipe.to_dict(), "step": step, "thetas": draft.thetas}, jobs
        draft.seconds["extract"] = self._clock() - started
        return draft

    def finish(self, draft: Draft, before: Plan) -> Decision:
        """Merge, on today's weights, what goes now."""
        started = self._clock()
        plan = draft.plan(before)
        # Only heads that go now are merged: the columns of those gone before were handed over then.
        fresh = {name: _going(plan.solutions[name], before.keep(name)) for name in draft.solutions}
        # The paper's merge speaks of FFN columns by head, so heads keep the numbers they had in the beginning.
        around = (*self.attention, *self.body.of_kind("neuron"))
        changed = merged_weights(weights_of(self.model), around, Plan(self.sites, fresh), self.recipe.merge, {})
        return Decision(plan, changed, draft.thetas, {**draft.seconds, "repair": self._clock() - started})

    def state_dict(self) -> dict[str, Any]:
        """Nothing beyond the plan and the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def _dominate(site: Site, near: Graph, live: np.ndarray, previous: Solution | None, seed: int) -> dict[str, Solution]:
    """Alg. 3 on the live heads of one site."""
    problem = DominatingSet(near.indptr, near.indices, near.weight)
    solution = solve_problem(problem, "neuroprune", seed=seed)
    # Alg. 3 says nothing about its own quality; the exact solver (microseconds here) does.
    bounds = [solution.bound, solve_problem(problem, "exact", time_limit=1.0, seed=seed).bound]
    solution = replace(solution, bound=best_bound("min", bounds))
    return {site.name: expand(solution, live, site.n_units, previous)}


def _going(solution: Solution, kept_before: np.ndarray) -> Solution:
    """Return a solution in which the units that were gone before count as kept."""
    assert solution.dominator is not None
    own = np.arange(kept_before.size, dtype=np.int32)
    return replace(
        solution,
        keep=solution.keep | ~kept_before,
        dominator=np.where(kept_before, solution.dominator, own),
        dominator_distance=None,
    )


Rows = list[tuple[nn.Parameter, int]]  # matrices that share rows, each with the axis the rows lie on


def _views(rows: Rows) -> list[torch.Tensor]:
    """Return the matrices, rows first; gathered copies of sharded ones, to `_write_back`."""
    return [row_view(whole(parameter.detach()), axis) for parameter, axis in rows]


def _write_back(rows: Rows, parts: list[torch.Tensor]) -> None:
    for (parameter, axis), part in zip(rows, parts, strict=True):
        if is_sharded(parameter):
            write(parameter, row_view(part, axis))


def _add_to_gradient(pair: tuple[nn.Parameter, int], slope: torch.Tensor, factor: float) -> None:
    parameter, axis = pair
    if parameter.grad is not None:
        local(parameter.grad).add_(local_part(row_view(slope, axis), parameter.grad), alpha=factor)


def _attachment_rows(model: nn.Module, sites: Iterable[Site]) -> Iterable[Rows]:
    """Yield Eq. 1's matrices: [gate_i, up_i] or in_i per neuron, then out rows per residual dimension."""
    for site in sites:
        if site.kind == "neuron":
            yield [(model.get_parameter(p.param), p.axis) for p in site.reads if len(p.shape) == 2]
            yield [(model.get_parameter(p.param), 1 - p.axis) for p in site.writes]


def _group_rows(model: nn.Module, sites: Iterable[Site]) -> Iterable[Rows]:
    """Yield Eq. 2's matrices: the rows of [Q; K; V] over input dimensions."""
    for site in sites:
        if site.kind == "input_dim":
            axes = {p.param: p.axis for p in site.reads}  # a fused projection counts once
            yield [(model.get_parameter(name), axis) for name, axis in axes.items()]


def _everything_into_first(sites: tuple[Site, ...], attention: Sequence[Site]) -> Plan:
    solutions = {}
    for site in attention:
        keep = np.zeros(site.n_units, dtype=bool)
        keep[:1] = True
        solutions[site.name] = Solution(keep, 1.0, "min", Status.FEASIBLE, "dry-run", dominator=np.zeros(site.n_units))
    return Plan(sites, solutions)

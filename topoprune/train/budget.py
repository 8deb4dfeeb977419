"""Our training method: one budget, met exactly at the end of a cubic ramp."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.extraction import GramCollector
from topoprune.graph import Site
from topoprune.planning import Plan
from topoprune.repair import consumer_matrix, least_squares
from topoprune.train.allocation import UniformAllocation
from topoprune.train.body import Body
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune.train.decision import Decision, expand
from topoprune.train.edges import EdgeChooser
from topoprune.train.schedule import ramp, solve_steps
from topoprune.train.selection import SiteView, choose, needs_moment, view_site
from topoprune.train.targets import uniform_targets
from topoprune_solvers import SoftDomination, Solution, get_solver

__all__ = ["BudgetDriver"]


class BudgetDriver:
    """Runs a `BudgetRecipe` on behalf of a `Pruner`.

    All targets are fixed on construction, so an impossible budget is refused before training.
    """

    def __init__(
        self,
        body: Body,
        recipe: BudgetRecipe,
        total_steps: int,
        steps_per_epoch: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self.body, self.model, self.sites, self.recipe = body, body.model, body.sites, recipe
        sites = self.sites
        self.steps = solve_steps(total_steps, recipe.ramp, recipe.solves)
        self.heads = [site for site in sites if site.kind in ("head", "kv_group")]
        self.neurons = [site for site in sites if site.kind == "neuron"]
        self.inputs = [site for site in sites if site.kind == "input_dim"]
        self.removed: dict[str, int] = {}
        if recipe.granularity != "unit":
            self._edges = EdgeChooser(self.model, sites, recipe, clock)
        else:
            get_solver(recipe.solver, SoftDomination)  # an unknown one is refused now, not at the first decision
            self.removed = uniform_targets(self.sites, recipe)
            self._allocation = UniformAllocation(self.removed)
        self._collector: GramCollector | None = None
        self._tokens_per_step = 0.0
        self._window_start = 0
        self._following = self.steps[0]  # the decision that tokens are being collected for
        self._spent = self._reported = 0.0

    # -- collecting tokens from the training forwards -------------------------------------------

    def _watched(self) -> list[Site]:
        """Today's sites whose moments the next decision needs."""
        now = self.body.now
        return [now[s.name] for s in self.heads + self.neurons if self.removed.get(s.name) and s.name in now]

    def _tokens_needed(self, step: int) -> int:
        """Tokens for the decision at a step: a few for each input feature of the widest consumer that is refitted."""
        fitted = [s for s in self.heads + self.neurons if self._refits(s, step)] or self.heads or self.neurons
        return self.recipe.tokens_per_unit * max((s.n_units * s.unit_width for s in fitted), default=1)

    def _window(self, following: int) -> int:
        """Steps of collecting before a decision; all steps until it while the pace is unknown."""
        return math.ceil(self._tokens_needed(following) / self._tokens_per_step) if self._tokens_per_step else following

    def watch(self, step: int) -> None:
        """Open or close the collection of tokens; called after every step, so that the latest are used."""
        following = next((s for s in self.steps if s > step), None)
        if following is None or not self._watched():
            return
        if self._collector is None:
            if following - step <= self._window(following):
                self._open(following)
                self._window_start = step
        elif not self._tokens_per_step and self._collector.done:
            self._tokens_per_step = self._tokens_needed(following) / (step - self._window_start)
            if following - step > self._window(following):
                self._close_collector()  # the pace is known now: collect again, later and fresher

    def _open(self, following: int) -> None:
        """Collect for the decision at step `following`."""
        self._following = following
        watched = self._watched()
        diagonal = {s.name for s in watched if not (needs_moment(s, self.recipe) or self._refits(s, following))}
        self._collector = GramCollector(
            self.model,
            watched,
            max_tokens=self._tokens_needed(following),
            diagonal=diagonal,
            grad_only=True,
            clock=self._clock,
        )

    def collected_seconds(self) -> float:
        """Return the seconds spent collecting tokens since the last call."""
        running = self._spent + (self._collector.seconds if self._collector is not None else 0.0)
        fresh, self._reported = running - self._reported, running
        return fresh

    def _close_collector(self) -> None:
        if self._collector is not None:
            self._collector.close()
            self._spent += self._collector.seconds
            self._collector = None

    def follow(self, before: Mapping[str, np.ndarray]) -> None:
        """Go on collecting in a model from which units were cut out since (DDP: later than they were pruned).

        Args:
            before: site name -> planned units there were until now.
        """
        if self._collector is None:
            return
        state = self._collector.state_dict()
        self._close_collector()
        self._open(self._following)
        assert self._collector is not None
        sums = {}
        for site in self._watched():
            if site.name in state["sums"]:
                units = np.searchsorted(before[site.name], self.body.live[site.name])
                width = site.unit_width
                features = torch.from_numpy((units[:, None] * width + np.arange(width)).reshape(-1))
                total = state["sums"][site.name]
                index = features.to(total.device)
                total = total.index_select(0, index)
                sums[site.name] = total if total.ndim == 1 else total.index_select(1, index)
        tokens = {name: count for name, count in state["tokens"].items() if name in self._collector.sites}
        self._collector.load_state_dict({"sums": sums, "tokens": tokens})

    def close(self) -> None:
        """Remove the hooks that collect tokens."""
        self._close_collector()

    def due(self, step: int) -> bool:
        """True after the steps of the schedule."""
        return step in self.steps

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """No penalties."""

    def after_step(self, learning_rates: Mapping[nn.Parameter, float]) -> None:
        """No proximal steps."""

    # -- deciding -------------------------------------------------------------------------------

    @torch.no_grad()
    def decide(self, step: int, plan: Plan, seed: int) -> Decision:
        """Solve every site for the share of its target that the ramp asks for at this step."""
        last = step == self.steps[-1]
        done = 1.0 if last else ramp((self.steps.index(step) + 1) / len(self.steps), self.recipe.ramp_shape)
        request = {**self.recipe.to_dict(), "step": step, "ramp_progress": done}
        if self.recipe.granularity != "unit":
            return self._edges.decide(done, plan, seed, request)
        seconds = {"extract": 0.0, "solve": 0.0, "repair": 0.0}
        solutions: dict[str, Solution] = dict(plan.solutions)
        changed: dict[str, torch.Tensor] = {}
        goals = self._allocation.goals(done)
        for site in self.heads + self.neurons + self.inputs:
            live = np.flatnonzero(plan.keep(site.name))
            count = site.n_units - goals.get(site.name, 0)
            if count >= live.size or site.name not in self.body.now:
                continue
            started = self._clock()
            view = self._view(site, live)
            extracted = self._clock()
            solution = choose(view, count, self.recipe, seed)
            solutions[site.name] = expand(solution, live, site.n_units, plan.solutions.get(site.name))
            solved = self._clock()
            if view.moment is not None and self._refits(site, step):
                kept = solutions[site.name].keep[self.body.live[site.name]]
                changed |= self._repair(view.site, kept, view.moment)
            seconds["extract"] += extracted - started
            seconds["solve"] += solved - extracted
            seconds["repair"] += self._clock() - solved
        self._close_collector()
        return Decision(Plan(self.sites, solutions, request=request), changed, seconds=seconds)

    def _view(self, site: Site, live: np.ndarray) -> SiteView:
        """Return what the decision sees of a planned site's live units."""
        today = self.body.now[site.name]
        moment = None
        if site.kind != "input_dim":
            assert self._collector is not None
            if not self._collector.tokens[site.name]:
                raise RuntimeError(
                    f"no training tokens reached {site.consumer!r} before the decision on {site.name!r}; the forwards "
                    "of training must run with gradients, on the model the Pruner was made for"
                )
            moment = self._collector.moment(site.name)
        return view_site(self.model, today, self.body.positions(site.name, live), moment, self.recipe)

    def _refits(self, site: Site, step: int) -> bool:
        """Whether the decision at a step refits the consumer of a site."""
        which = self.recipe.repair
        if step == self.steps[-1] and self.recipe.final_repair is not None:
            which = self.recipe.final_repair
        return which == "all" or (which == "heads" and site.kind != "neuron")

    def _repair(self, site: Site, keep: np.ndarray, moment: torch.Tensor) -> dict[str, torch.Tensor]:
        """Refit the consumer on its live inputs by least squares."""
        piece = site.writes[0]
        weight = self.model.get_parameter(piece.param).detach()
        mask = torch.from_numpy(np.repeat(keep, site.unit_width)).to(weight.device)
        new = least_squares(consumer_matrix(site, weight), moment, mask, ridge=self.recipe.ridge)
        if not torch.isfinite(new).all():
            raise ValueError(f"least-squares repair of {piece.param!r} is not finite; check the training loss")
        return {piece.param: new if piece.axis == 1 else new.t().contiguous()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to decide as this one would (T7)."""
        return {
            "tokens_per_step": self._tokens_per_step,
            "window_start": self._window_start,
            "following": self._following,
            "collector": None if self._collector is None else self._collector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, half-filled accumulators included."""
        self._tokens_per_step = float(state["tokens_per_step"])
        self._window_start = int(state["window_start"])
        self._close_collector()
        if state.get("collector") is not None:
            self._open(int(state.get("following", self.steps[-1])))
            assert self._collector is not None
            self._collector.load_state_dict(state["collector"])

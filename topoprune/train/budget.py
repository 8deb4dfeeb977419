"""Our training method: one budget, met exactly at the end of a cubic ramp."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import counted_matrices
from topoprune.extraction import GramCollector
from topoprune.graph import Site
from topoprune.planning import Plan
from topoprune.repair import consumer_matrix, least_squares
from topoprune.sharding import weights_of
from topoprune.train.allocation import CurveAllocation, UniformAllocation, refit_is_cheap
from topoprune.train.body import Body
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune.train.compiled import EagerForwards
from topoprune.train.curves import OutputMeter
from topoprune.train.decision import Decision, Draft, Job, expand
from topoprune.train.distributed import of_first_rank, ranks, sum_over_ranks
from topoprune.train.edges import EdgeChooser
from topoprune.train.lag import solved
from topoprune.train.regrowth import Overlay, Regrowth
from topoprune.train.schedule import ramp, solve_steps
from topoprune.train.selection import SiteView, check_selection, choose, needs_moment, view_site
from topoprune.train.targets import Targets, find_targets
from topoprune_solvers import Solution

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
        calibrating: bool = False,
    ) -> None:
        """Set up; `calibrating`: forwards over calibration data, without gradients, stand for training."""
        self._clock, self._calibrating = clock, calibrating
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
            check_selection(sites, recipe)  # an unknown solver is refused now, not at the first decision
            self._allocate(find_targets(body, recipe))
        self._regrowth: Regrowth | None = None
        if recipe.regrow is not None:
            freeze = self.steps[-1] if recipe.freeze_at is None else round(recipe.freeze_at * total_steps)
            self._regrowth = Regrowth(self.model, sites, recipe, freeze)
        self._collector: GramCollector | None = None
        self._eager = EagerForwards()
        self._tokens_per_step = 0.0
        self._window_start = 0
        self._following = self.steps[0]  # the decision that tokens are being collected for
        self._spent = self._reported = 0.0

    def _allocate(self, targets: Targets) -> None:
        """Take final targets, and what shares them out over the layers."""
        self.targets, self.removed = targets, dict(targets.removed)
        self._allocation: CurveAllocation | UniformAllocation = UniformAllocation(self.removed)
        if self.recipe.allocation == "output-kl":
            self._allocation = CurveAllocation(
                self.body, self.recipe, targets, self.steps, calibrating=self._calibrating, clock=self._clock
            )

    # -- collecting tokens from the training forwards -------------------------------------------

    def _watched(self) -> list[Site]:
        """Today's sites whose moments the next decision needs."""
        now = self.body.now
        names = self._allocation.prunable if self.recipe.granularity == "unit" else ()
        return [now[s.name] for s in self.heads + self.neurons if s.name in names and s.name in now]

    def _tokens_needed(self, step: int) -> int:
        """Tokens for the decision at a step: a few for each input feature of the widest consumer that is refitted."""
        sites = self.heads + self.neurons
        fitted = [s for s in sites if self._refits(s, step) or needs_moment(s, self.recipe)] or sites
        needed = self.recipe.tokens_per_unit * max((s.n_units * s.unit_width for s in fitted), default=1)
        return -(-needed // ranks())

    def _window(self, following: int) -> int:
        """Steps of collecting before a decision; all steps until it while the pace is unknown."""
        return math.ceil(self._tokens_needed(following) / self._tokens_per_step) if self._tokens_per_step else following

    def watch(self, step: int) -> None:
        """Open or close the collection of tokens; called after every step, so that the latest are used."""
        if self.recipe.granularity == "unit":
            self._allocation.watch(step)
        following = next((s for s in self.steps if s > step), None)
        if following is None or not self._watched():
            return
        if self._collector is None:
            if following - step <= self._window(following):
                self._open(following)
                self._window_start = step
        elif self._collector.done:
            self._collector.close()  # without its hooks, and only then, what is compiled now stays as it is
            self._eager.set(False)
        if self._collector is None or step == self._window_start:
            return
        if not self._tokens_per_step and self._collector.done:
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
            max_tokens=None if self._calibrating else self._tokens_needed(following),
            diagonal=diagonal,
            grad_only=not self._calibrating,
            clock=self._clock,
        )
        self._eager.set(True)

    def collected_seconds(self) -> float:
        """Return the seconds spent collecting tokens since the last call."""
        running = self._spent + (self._collector.seconds if self._collector is not None else 0.0)
        fresh, self._reported = running - self._reported, running
        return fresh

    def _close_collector(self) -> None:
        self._eager.set(False)
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
                sums[site.name] = _features(
                    site, before[site.name], self.body.live[site.name], state["sums"][site.name]
                )
        tokens = {name: count for name, count in state["tokens"].items() if name in self._collector.sites}
        self._collector.load_state_dict({"sums": sums, "tokens": tokens})

    def close(self) -> None:
        """Remove the hooks that collect tokens."""
        self._close_collector()
        if self.recipe.granularity == "unit":
            self._allocation.close()
        if self._regrowth is not None:
            self._regrowth.close()

    def due(self, step: int) -> bool:
        """True after the steps of the schedule."""
        return step in self.steps

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """No penalties; with regrowth, the gradients of masked weights count."""
        if self._regrowth is not None:
            self._regrowth.before_step()

    def after_step(self, learning_rates: Mapping[nn.Parameter, float]) -> None:
        """No proximal steps."""

    def last_decision(self) -> int:
        """Return the step of the last decision."""
        return self.steps[-1]

    def lag(self, step: int) -> int:
        """Return how many steps after `step` its decision is applied."""
        return self.recipe.solve_lag

    # -- deciding -------------------------------------------------------------------------------

    def decide(self, step: int, plan: Plan, seed: int) -> Decision:
        """Solve every site for the share of its target that the ramp asks for at this step."""
        return self.finish(solved(self.draft(step, plan, seed), self._clock), plan)

    @torch.no_grad()
    def draft(self, step: int, plan: Plan, seed: int, *, beside: bool = False) -> Draft:
        """Extract what a decision needs.

        Args:
            step: optimizer steps done. plan: the one in force. seed: for solvers.
            beside: training goes on while the jobs run: extract everything now, from copies. Otherwise site by
                site, as the jobs are taken.
        """
        last = step == self.steps[-1]
        done = 1.0 if last else ramp((self.steps.index(step) + 1) / len(self.steps), self.recipe.ramp_shape)
        draft = Draft(step, {**self.recipe.to_dict(), "step": step, "ramp_progress": done})
        if self.recipe.granularity != "unit":
            # On every rank: where parameters are sharded, all must gather them together.
            draft.jobs, draft.shared = [self._edge_job(beside, done, plan, seed, draft)], False
            return draft
        weights = weights_of(self.model, copy=beside)
        if self._collector is not None:
            sum_over_ranks(self._collector)
        started = self._clock()
        with EagerForwards():  # measuring runs forwards with hooks
            goals, told = of_first_rank(self._goals(weights, step, done, plan, seed))
        draft.request = {**draft.request, **told}
        draft.seconds["extract"] += self._clock() - started
        draft.jobs = self._unit_jobs(weights, goals, plan, seed, draft)
        if beside:
            draft.jobs = list(draft.jobs)
        return draft

    def _goals(
        self, weights: nn.Module, step: int, done: float, plan: Plan, seed: int
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """Return site name -> units that are gone after this decision, and what goes into its request."""
        if isinstance(self._allocation, UniformAllocation):
            return self._allocation.goals(done), {}

        def measure(site: Site, counts: Sequence[int], meter: OutputMeter) -> dict[int, float]:
            """Cut what the recipe would cut, refitted as it would be where that is cheap."""
            today = self.body.now[site.name]
            view = self._view(weights, site, np.flatnonzero(plan.keep(site.name)), again=True)
            moment = view.moment if self._refits(site, step) and refit_is_cheap(today) else None
            damage = {}
            for count in counts:
                keep = np.zeros(today.n_units, dtype=bool)
                keep[view.at[choose(view, count, self.recipe, seed).keep]] = True
                new = None if moment is None else self._repair(weights, today, keep, moment)[today.writes[0].param]
                damage[count] = meter.divergence(
                    today, keep, new if new is None or today.writes[0].axis == 1 else new.t()
                )
            return damage

        return self._allocation.goals(step, done, plan, measure)

    def _unit_jobs(
        self, weights: nn.Module, goals: Mapping[str, int], plan: Plan, seed: int, draft: Draft
    ) -> Iterator[Job]:
        for site in self.heads + self.neurons + self.inputs:
            live = np.flatnonzero(plan.keep(site.name))
            goal = goals.get(site.name, 0)
            if site.kind == "input_dim":
                goal -= goal % self.recipe.input_group  # blocks go whole, on the ramp as well
            count = site.n_units - goal
            if count > live.size or site.name not in self.body.now:
                continue
            started = self._clock()
            back, seen = np.zeros(0, dtype=np.int64), weights
            if self._regrowth is not None:
                back = self._regrowth.returning(site, draft.step + self.lag(draft.step), count)
                seen = self._regrowth.overlay(weights, site, back)
            if count == live.size and not back.size:
                continue
            live = np.union1d(live, back)
            with torch.no_grad():
                view = self._view(seen, site, live)
            if view.moment is not None and self._refits(site, draft.step):
                draft.moments[site.name] = view.moment
                draft.units[site.name] = self.body.live[site.name].copy()
            if site.kind in ("head", "kv_group"):
                draft.energy[site.name] = np.full(site.n_units, np.nan)
                draft.energy[site.name][live] = view.energy
            draft.seconds["extract"] += self._clock() - started
            previous = plan.solutions.get(site.name)
            yield Job(site.name, partial(self._solve, view, count, seed, live, site, previous, back))
        self._close_collector()

    def _solve(
        self,
        view: SiteView,
        count: int,
        seed: int,
        live: np.ndarray,
        site: Site,
        previous: Solution | None,
        back: np.ndarray,
    ) -> dict[str, Solution]:
        solution = choose(view, count, self.recipe, seed, forced=np.isin(live, back) if back.size else None)
        return {site.name: expand(solution, live, site.n_units, previous)}

    def _edge_job(self, beside: bool, done: float, plan: Plan, seed: int, draft: Draft) -> Job:
        chooser = copy(self._edges)
        names = counted_matrices(self.sites) if beside else ()
        chooser.model = weights_of(self.model, copies=names)
        return Job("the single weights", partial(chooser.decide, done, plan, seed, dict(draft.request)))

    @torch.no_grad()
    def finish(self, draft: Draft, before: Plan) -> Decision:
        """Refit on today's weights what a solved draft leaves, and return what to apply."""
        started = self._clock()
        changed: dict[str, torch.Tensor] = {}
        weights = weights_of(self.model)
        if self._regrowth is not None:
            changed = self._regrowth.settle(weights, draft.plan(before))
            self._regrowth.watch(draft.step, self.steps)
            weights = Overlay(weights, changed)
        for name, moment in draft.moments.items():
            if name in self.body.now:
                kept = draft.solutions[name].keep[self.body.live[name]]
                today = _features(self.body.now[name], draft.units[name], self.body.live[name], moment)
                changed |= self._repair(weights, self.body.now[name], kept, today)
        seconds = dict(draft.seconds)
        seconds["repair"] += self._clock() - started
        return Decision(draft.plan(before), changed, draft.thetas, seconds, draft.energy)

    def _view(self, weights: nn.Module, site: Site, live: np.ndarray, *, again: bool = False) -> SiteView:
        """Return what the decision sees of a planned site's live units; `again`: it will be asked for once more."""
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
            if not again:
                self._collector.discard(site.name)  # the moment is a copy: the two of all sites need not coexist
        return view_site(weights, today, self.body.positions(site.name, live), moment, self.recipe)

    def _refits(self, site: Site, step: int) -> bool:
        """Whether the decision at a step refits the consumer of a site."""
        which = self.recipe.repair
        if step == self.steps[-1] and self.recipe.final_repair is not None:
            which = self.recipe.final_repair
        return which == "all" or (which == "heads" and site.kind != "neuron")

    def _repair(
        self, weights: nn.Module, site: Site, keep: np.ndarray, moment: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Refit the consumer on its live inputs by least squares."""
        piece = site.writes[0]
        weight = weights.get_parameter(piece.param).detach()
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
            **({} if self._regrowth is None else {"regrowth": self._regrowth.state_dict()}),
            **self._targets_state(),
        }

    def _targets_state(self) -> dict[str, Any]:
        """Return the targets where they were measured, or are not the same for every site."""
        if self.recipe.granularity != "unit":
            return {}
        measured = {"targets": json.dumps(self.targets.to_dict())} if self.recipe.latency is not None else {}
        shared = self._allocation.state_dict()
        return {**measured, **({"allocation": shared} if shared else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, half-filled accumulators included."""
        self._tokens_per_step = float(state["tokens_per_step"])
        self._window_start = int(state["window_start"])
        self._close_collector()
        if "targets" in state:
            self._allocation.close()
            self._allocate(Targets.from_dict(json.loads(state["targets"])))
        if "allocation" in state:
            self._allocation.load_state_dict(state["allocation"])
        if self._regrowth is not None:
            self._regrowth.load_state_dict(state["regrowth"])
        if state.get("collector") is not None:
            self._open(int(state.get("following", self.steps[-1])))
            assert self._collector is not None
            self._collector.load_state_dict(state["collector"])


def _features(site: Site, before: np.ndarray, now: np.ndarray, moment: torch.Tensor) -> torch.Tensor:
    """Return the part of a moment (or of its diagonal) that is left after units were cut out.

    Args:
        before: (units,) planned units that the features belong to, rising. now: those left of them.
    """
    if before.size == now.size:
        return moment
    units = np.searchsorted(before, now)
    width = site.unit_width
    index = torch.from_numpy((units[:, None] * width + np.arange(width)).reshape(-1)).to(moment.device)
    part = moment.index_select(0, index)
    return part if part.ndim == 1 else part.index_select(1, index)

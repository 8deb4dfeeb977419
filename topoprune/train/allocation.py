"""How much of every site has gone at each decision: a budget shared out over layers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from topoprune.planning import Plan
from topoprune.sites import Site
from topoprune.train.body import Body
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune.train.costs import Costs
from topoprune.train.curves import Curve, InputSampler, OutputMeter, curve_of, option_counts
from topoprune.train.distributed import ranks
from topoprune.train.latency import LatencyMeter, meet
from topoprune.train.targets import ATTENTION, Targets, fit_uniform
from topoprune_solvers import Infeasible, MultipleChoiceKnapsack
from topoprune_solvers import solve as solve_problem

__all__ = ["CurveAllocation", "UniformAllocation", "allocate", "measuring_steps", "predicted", "refit_is_cheap"]

GRID = 48  # counts of a site that the knapsack chooses from
ROWS = 32  # sequences measured on in training; 4 times as many of calibration data
WINDOW = 8  # training steps whose inputs may be taken
REPAIRED = 1024  # input features of a consumer up to which a refit for every point is cheap

Measure = Callable[[Site, Sequence[int], OutputMeter], Mapping[int, float]]


@dataclass(frozen=True)
class UniformAllocation:
    """All sites move towards their final counts side by side.

    Args:
        removed: site name -> units to remove in the end.
    """

    removed: Mapping[str, int]

    @property
    def prunable(self) -> frozenset[str]:
        """Names of the sites that lose units."""
        return frozenset(name for name, count in self.removed.items() if count)

    def goals(self, done: float) -> dict[str, int]:
        """Return site name -> units that are gone when the ramp is at `done`, in [0, 1]."""
        return {name: goal if done == 1.0 else math.floor(goal * done) for name, goal in self.removed.items()}

    def watch(self, step: int) -> None:
        """Nothing is measured."""

    def close(self) -> None:
        """Nothing is open."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""


class CurveAllocation:
    """Shares out the budget of every decision by what cuts of single sites do to the model's output.

    Per site a curve (`topoprune.train.curves`) says how far the output moves with fewer of its units; a
    multiple-choice knapsack picks counts of least total damage at the cost that the ramp has come to. Curves of
    single sites do not add up where much goes at once; hence decisions in stages, `remeasure`, and `floor`. The
    result is compared with the same share of every site, on the same curves, and never worse by them.

    Args:
        body: the live model. recipe: with ``allocation="output-kl"``. targets: what it asks for.
        steps: after which decisions are taken. calibrating: forwards without gradients are calibration data.
        clock: for the seconds reported.
    """

    def __init__(
        self,
        body: Body,
        recipe: BudgetRecipe,
        targets: Targets,
        steps: Sequence[int],
        *,
        calibrating: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.body, self.recipe, self.targets, self.steps = body, recipe, targets, tuple(steps)
        self.measuring = measuring_steps(steps, recipe.remeasure)
        self._clock = clock
        wanted = (*ATTENTION, "neuron") if targets.costs is not None else ATTENTION
        self.sites = [s for s in body.sites if s.kind in wanted and targets.least[s.name] < s.n_units]
        self._attention = [s for s in self.sites if s.kind in ATTENTION]
        self.curves: dict[str, Curve] = {}
        rows = 4 * ROWS if calibrating else ROWS
        self._sampler = InputSampler(body.model, rows=rows, grad_only=not calibrating)

    @property
    def prunable(self) -> frozenset[str]:
        """Names of the sites that may lose units."""
        return frozenset(site.name for site in self.sites)

    def watch(self, step: int) -> None:
        """Take inputs of the last training steps before curves are measured."""
        following = next((s for s in self.steps if s > step), None)
        if following in self.measuring and following is not None and following - step <= WINDOW:
            self._sampler.watch()

    def goals(self, step: int, done: float, plan: Plan, measure: Measure) -> tuple[dict[str, int], dict[str, Any]]:
        """Return site name -> units that are gone at this decision, and what to report.

        Args:
            step: of the decision. done: of the ramp, in [0, 1]. plan: in force.
            measure: (site, numbers of units that stay, meter) -> number -> damage.

        Raises:
            ValueError: no training forward was seen, outputs that are not finite.
        """
        started, forwards = self._clock(), 0
        live = {site.name: int(plan.keep(site.name).sum()) for site in self.sites}
        if step in self.measuring or not self.curves:
            forwards = self._measure(live, measure)
        measured = self._clock() - started
        final = done == 1.0
        kept, uniform = self._counts(live, done), self._uniform(live, done)
        costs = self.targets.costs
        latency: dict[str, Any] = {}
        if final and costs is not None and costs.name == "latency":
            kept, latency = self._verified(live, kept)
        report = {
            "allocated": dict(kept),
            "predicted": {
                "chosen": predicted(self.curves, kept),
                "uniform": predicted(self.curves, uniform),
                "curve_seconds": measured,
                "curve_forwards": forwards,
                **latency,
            },
        }
        gone = {site.name: site.n_units - kept[site.name] for site in self.sites}
        inputs = {s.name: self.targets.removed.get(s.name, 0) for s in self.body.sites if s.kind == "input_dim"}
        return gone | UniformAllocation(inputs).goals(done), report

    def _measure(self, live: Mapping[str, int], measure: Measure) -> int:
        batches = self._sampler.batches[: _least_of_ranks(len(self._sampler.batches))]
        if not batches:
            raise RuntimeError(
                "no training forward was seen before the curves of allocation='output-kl' were due; the forwards of "
                "training must run with gradients, on the model the Pruner was made for"
            )
        meter = OutputMeter(self.body.model, self.body.sites_now, batches, self._sampler.autocast)
        for site in self.sites:
            if site.name in self.body.now and live[site.name]:
                counts = option_counts(self.targets.least[site.name], live[site.name], max(1, site.equal_groups))
                self.curves[site.name] = curve_of(measure(site, counts, meter), live[site.name])
        self._sampler.clear()
        return meter.forwards

    def _bounds(self, live: Mapping[str, int], done: float) -> dict[str, dict[str, int]]:
        """Return the fewest and the most units of each site that may stay, and its steps: whole ones in the end."""
        steps = {s.name: self.targets.steps[s.name] if done == 1.0 else max(1, s.equal_groups) for s in self.sites}
        most = {name: count // steps[name] * steps[name] for name, count in live.items()}
        least = dict(self.targets.least)
        if done < 1.0 and self.targets.costs is not None:
            # Neurons to make up for the coarsest head, so that later budgets can be met exactly.
            reserve = least | {name: min(count, live[name]) for name, count in self._reserve().items()}
            costs = self.targets.costs.at(done)
            least = reserve if costs.total(reserve) <= costs.budget else least
        return {"least": least, "most": most, "steps": steps}

    def _reserve(self) -> dict[str, int]:
        """Return site name -> neurons kept before the last decision: the fewest, and a head's worth in all."""
        costs, neurons = self.targets.costs, [s for s in self.sites if s.kind not in ATTENTION]
        if costs is None or self.recipe.heads is not None or not neurons:
            return {}
        step = self.targets.steps
        dearest = max((float(np.diff(costs.tables[s.name][:: step[s.name]]).max()) for s in self._attention), default=0)
        kept = {}
        for s in neurons:
            price = float(costs.tables[s.name][-1]) / s.n_units
            spare = math.ceil(dearest / len(neurons) / price) if price > 0 else 0
            kept[s.name] = min(s.n_units, self.targets.least[s.name] + (spare // step[s.name] + 2) * step[s.name])
        return kept

    def _head_costs(self, done: float) -> Costs | None:
        """Return the number of heads as a cost and a budget; None where they are not counted apart."""
        if self.recipe.heads is None:
            return None
        every = [s for s in self.body.sites if s.kind in ATTENTION]
        whole = sum(s.n_units for s in every)
        untouched = whole - sum(s.n_units for s in self._attention)  # where the fewest are all
        stay = whole - math.floor((whole - self.recipe.heads) * done + 1e-9) - untouched
        tables = {s.name: np.arange(s.n_units + 1.0) for s in self._attention}
        return Costs("heads", "heads", 0.0, tables, float(stay))

    def _costs(self, done: float, costs: Costs | None, heads: Mapping[str, int]) -> Costs | None:
        """Return the costs with the budget of the ramp, given how many heads stay (empty: not counted apart)."""
        if costs is None or done == 1.0 or not heads:
            return None if costs is None else costs.at(done)
        # Heads and neurons each follow the ramp to what they come to in the end.
        neurons = {s.name: 0 for s in self.sites if s.kind not in ATTENTION}
        ends = {s.name: s.n_units - self.targets.removed[s.name] for s in self.sites if s.kind in ATTENTION}
        whole = costs.dense - costs.total(neurons)
        end = min(whole, costs.budget - costs.total({**neurons, **ends}))
        return replace(costs, budget=costs.total({**neurons, **heads}) + whole - done * (whole - end))

    def _counts(self, live: Mapping[str, int], done: float, costs: Costs | None = None) -> dict[str, int]:
        """Return the counts of least damage, or those of equal shares where they are no worse."""
        costs = self.targets.costs if costs is None else costs
        uniform = self._uniform(live, done, costs)
        bounds, heads = self._bounds(live, done), self._head_costs(done)
        try:
            kept = {} if heads is None else allocate(self._attention, self.curves, heads, **bounds)
            now = self._costs(done, costs, kept)
            if now is not None:
                kept = allocate(self.sites, self.curves, now, fixed=kept, **bounds)
        except Infeasible:  # heads that cost more than those of equal shares, and no room for the fewest neurons
            return uniform
        return kept if predicted(self.curves, kept) < predicted(self.curves, uniform) else uniform

    def _uniform(self, live: Mapping[str, int], done: float, costs: Costs | None = None) -> dict[str, int]:
        """Return the counts that come nearest to the same share of every site, from what is left of them."""
        bounds, heads = self._bounds(live, done), self._head_costs(done)
        kept = {} if heads is None else fit_uniform(self._attention, heads, **bounds)
        now = self._costs(done, self.targets.costs if costs is None else costs, kept)
        return kept if now is None else fit_uniform(self.sites, now, fixed=kept, **bounds)

    def _verified(self, live: Mapping[str, int], kept: Mapping[str, int]) -> tuple[dict[str, int], dict[str, Any]]:
        """Return counts whose latency was measured on a compacted copy of the model, and what it is."""
        costs, known = self.targets.costs, self.targets.measured
        assert costs is not None
        meter = LatencyMeter(self.body, self.recipe.shape, None if known is None else known.dense)
        bottom = dict(self.targets.least)
        if self.recipe.heads is not None:
            bottom |= {s.name: kept[s.name] for s in self.sites if s.kind in ATTENTION}
        bottom = {name: min(bottom[name], live[name]) for name in kept}
        found, _, measured = meet(costs, meter, lambda c: self._counts(live, 1.0, c), bottom)
        return found, {"latency": measured.ratio, "latency_noise": measured.noise}

    def close(self) -> None:
        """Remove the hook that takes inputs."""
        self._sampler.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to allocate as this one would (T7): curves, and inputs taken so far."""
        curves = {name: curve.to_list() for name, curve in self.curves.items()}
        return {"curves": json.dumps(curves), "sampler": self._sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.curves = {
            name: Curve(np.array(kept, dtype=np.int64), np.array(damage))
            for name, (kept, damage) in json.loads(state["curves"]).items()
        }
        self._sampler.load_state_dict(state["sampler"])


def measuring_steps(steps: Sequence[int], remeasure: int) -> frozenset[int]:
    """Return the decisions at which curves are measured: so many, evenly spread, the first among them.

    >>> sorted(measuring_steps([10, 20, 30, 40, 50, 60], 2))
    [10, 40]
    """
    count = min(remeasure, len(steps))
    return frozenset(steps[i * len(steps) // count] for i in range(count))


def predicted(curves: Mapping[str, Curve], kept: Mapping[str, int]) -> float:
    """Return the damage of cutting all sites at once, if damages of single cuts added up."""
    return math.fsum(float(curve.at(np.array([kept[name]]))[0]) for name, curve in curves.items() if name in kept)


def allocate(
    sites: Sequence[Site],
    curves: Mapping[str, Curve],
    costs: Costs,
    *,
    least: Mapping[str, int],
    most: Mapping[str, int],
    steps: Mapping[str, int],
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return site name -> units kept, of least total damage by the curves at a cost within the budget.

    A knapsack chooses from a grid of counts per site. Then single units (or steps) return where they save most
    damage for their cost, until none fits. Where more than a neuron is left of the budget, because heads went that
    the neurons there are cannot make up for, heads stay and more neurons go.

    Args:
        sites: to prune. curves: of each; none: no damage. costs: with the budget.
        least, most, steps: site name -> bounds on what stays, and units that go together.
        fixed: site name -> units that stay, decided before.

    Raises:
        Infeasible: not even the least of every site fits.
    """
    held = dict(fixed or {})
    free = [s for s in sites if s.name not in held]
    if not free:
        return held
    damage = {s.name: _damage(s, curves.get(s.name)) for s in free}
    nothing = replace(costs, tables={n: t for n, t in costs.tables.items() if n not in damage})
    room = costs.budget - nothing.total(held)
    kept = _knapsack(free, damage, costs, room, least, most, steps)
    state = _Filling(free, damage, costs.tables, room, least, most, steps)
    kept = state.filled(kept)
    while state.short(kept):
        better = [trial for s in free if s.kind in ATTENTION if (trial := state.with_more(kept, s)) is not None]
        if not better:
            break
        kept = state.filled(min(better, key=state.total_damage))
    return held | kept


def _damage(site: Site, curve: Curve | None) -> np.ndarray:
    """Return (n_units + 1,) damage of every count."""
    counts = np.arange(site.n_units + 1)
    return np.zeros(counts.size) if curve is None else curve.at(counts)


def _knapsack(
    sites: Sequence[Site],
    damage: Mapping[str, np.ndarray],
    costs: Costs,
    room: float,
    least: Mapping[str, int],
    most: Mapping[str, int],
    steps: Mapping[str, int],
) -> dict[str, int]:
    options = []
    for s in sites:
        blocks = max(0, (most[s.name] - least[s.name]) // steps[s.name])
        grid = np.unique(np.linspace(0, blocks, min(GRID, blocks + 1)).round()).astype(np.int64)
        options.append(least[s.name] + grid * steps[s.name])
    problem = MultipleChoiceKnapsack.from_curves(
        [damage[s.name][counts] for s, counts in zip(sites, options, strict=True)],
        [costs.tables[s.name][counts] for s, counts in zip(sites, options, strict=True)],
        max(room, 0.0),
    )
    chosen = problem.chosen(solve_problem(problem, "lagrangian").keep)
    return {s.name: int(counts[i]) for s, counts, i in zip(sites, options, chosen, strict=True)}


@dataclass(frozen=True, eq=False)
class _Filling:
    """Single units at the margin of a budget; `room`: what the free sites may cost."""

    sites: Sequence[Site]
    damage: Mapping[str, np.ndarray]
    tables: Mapping[str, np.ndarray]
    room: float
    least: Mapping[str, int]
    most: Mapping[str, int]
    steps: Mapping[str, int]

    def cost(self, kept: Mapping[str, int]) -> float:
        return math.fsum(float(self.tables[name][count]) for name, count in kept.items())

    def total_damage(self, kept: Mapping[str, int]) -> float:
        return math.fsum(float(self.damage[name][count]) for name, count in kept.items())

    def fits(self, cost: float) -> bool:
        return cost <= self.room * (1 + 1e-12)

    def filled(self, kept: Mapping[str, int]) -> dict[str, int]:
        """Give units back, most damage saved for their cost first, until none fits."""
        kept, spent = dict(kept), self.cost(kept)
        while True:
            ranked: list[tuple[float, float, int, Site]] = []
            for s in self.sites:
                more, now = kept[s.name] + self.steps[s.name], kept[s.name]
                price = self.tables[s.name][min(more, s.n_units)] - self.tables[s.name][now]
                if more <= self.most[s.name] and self.fits(spent + price):
                    saved = self.damage[s.name][now] - self.damage[s.name][more]
                    # Equal worth: the site that has lost the larger share, then the earlier one.
                    ranked.append((-saved / max(price, 1e-300), now / s.n_units, len(ranked), s))
            if not ranked:
                return kept
            site = min(ranked)[-1]
            kept[site.name] += self.steps[site.name]
            spent = self.cost(kept)

    def short(self, kept: Mapping[str, int]) -> bool:
        """Whether what is left of the budget would buy a step of neurons, were there one to give back."""
        prices = [
            float(self.tables[s.name][-1]) / s.n_units * self.steps[s.name]
            for s in self.sites
            if s.kind not in ATTENTION
        ]
        gone = any(kept[s.name] < s.n_units for s in self.sites)
        return gone and bool(prices) and min(prices) > 0 and self.fits(self.cost(kept) + min(prices))

    def with_more(self, kept: Mapping[str, int], site: Site) -> dict[str, int] | None:
        """Return counts with one step more of a site, and as many neurons fewer as it takes; None if that fails."""
        trial = {**kept, site.name: kept[site.name] + self.steps[site.name]}
        if trial[site.name] > self.most[site.name]:
            return None
        while not self.fits(self.cost(trial)):
            ranked: list[tuple[float, float, int, Site]] = []
            for s in self.sites:
                fewer, now = trial[s.name] - self.steps[s.name], trial[s.name]
                if s.kind not in ATTENTION and fewer >= self.least[s.name]:
                    saved = self.tables[s.name][now] - self.tables[s.name][fewer]
                    lost = self.damage[s.name][fewer] - self.damage[s.name][now]
                    ranked.append((lost / max(saved, 1e-300), -now / s.n_units, len(ranked), s))
            if not ranked:
                return None
            other = min(ranked)[-1]
            trial[other.name] -= self.steps[other.name]
        return trial


def refit_is_cheap(site: Site) -> bool:
    """Whether the curve of a site is measured with its consumer refitted, where the decision refits it."""
    return site.n_units * site.unit_width <= REPAIRED


def _least_of_ranks(count: int) -> int:
    """Return the smallest of the ranks' counts: where parameters are sharded, all must run as many forwards."""
    found: list[Any] = [count] * ranks()
    if ranks() > 1:
        torch.distributed.all_gather_object(found, count)
    return min(found)

"""Our training method: one budget, met exactly at the end of a cubic ramp."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import counted_matrices
from topoprune.budgets import rounding_step
from topoprune.extraction import GramCollector, consumer_blocks, named_tensors, site_graph, unit_energy
from topoprune.graph import Graph, Site
from topoprune.planning import Plan
from topoprune.repair import consumer_matrix, least_squares
from topoprune.sparsity import row_view
from topoprune.train.body import Body
from topoprune.train.decision import Decision, expand
from topoprune.train.recipe import BudgetRecipe
from topoprune.train.schedule import cubic_ramp, share_out, solve_steps, spread
from topoprune_solvers import EdgeSelection, SoftDomination, Solution, Status, get_solver
from topoprune_solvers import solve as solve_problem

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
        if recipe.granularity == "edge":
            self._matrices = _edge_matrices(self.sites)
            sizes = [math.prod(shape) for shape in counted_matrices(self.sites).values()]
            assert recipe.sparsity is not None
            self._edges = dict(
                zip(counted_matrices(self.sites), spread(round(recipe.sparsity * sum(sizes)), sizes), strict=True)
            )
        else:
            get_solver(recipe.solver, SoftDomination)  # an unknown one is refused now, not at the first decision
            self.removed = _targets(self.sites, recipe)
        self._collector: GramCollector | None = None
        self._tokens_per_step = 0.0
        self._window_start = 0
        self._spent = self._reported = 0.0

    # -- collecting tokens from the training forwards -------------------------------------------

    def _watched(self) -> list[Site]:
        """Today's sites whose moments the next decision needs."""
        now = self.body.now
        return [now[s.name] for s in self.heads + self.neurons if self.removed.get(s.name) and s.name in now]

    @property
    def _tokens_needed(self) -> int:
        """Tokens per decision: a few for each input feature of the widest consumer that is refitted."""
        fitted = self.heads + self.neurons if self.recipe.repair == "all" else self.heads or self.neurons
        return self.recipe.tokens_per_unit * max((s.n_units * s.unit_width for s in fitted), default=1)

    def _window(self, following: int) -> int:
        """Steps of collecting before a decision; all steps until it while the pace is unknown."""
        return math.ceil(self._tokens_needed / self._tokens_per_step) if self._tokens_per_step else following

    def watch(self, step: int) -> None:
        """Open or close the collection of tokens; called after every step, so that the latest are used."""
        following = next((s for s in self.steps if s > step), None)
        if following is None or not self._watched():
            return
        if self._collector is None:
            if following - step <= self._window(following):
                self._open()
                self._window_start = step
        elif not self._tokens_per_step and self._collector.done:
            self._tokens_per_step = self._tokens_needed / (step - self._window_start)
            if following - step > self._window(following):
                self._close_collector()  # the pace is known now: collect again, later and fresher

    def _open(self) -> None:
        watched = self._watched()
        diagonal = {s.name for s in watched if s.kind == "neuron" and self.recipe.repair != "all"}
        self._collector = GramCollector(
            self.model,
            watched,
            max_tokens=self._tokens_needed,
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
        self._open()
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
        done = 1.0 if step == self.steps[-1] else cubic_ramp((self.steps.index(step) + 1) / len(self.steps))
        request = {**self.recipe.to_dict(), "step": step, "ramp_progress": done}
        if self.recipe.granularity == "edge":
            return self._decide_edges(done, plan, seed, request)
        seconds = {"extract": 0.0, "solve": 0.0, "repair": 0.0}
        solutions: dict[str, Solution] = dict(plan.solutions)
        changed: dict[str, torch.Tensor] = {}
        for site in self.heads + self.neurons + self.inputs:
            goal = self.removed.get(site.name, 0)
            live = np.flatnonzero(plan.keep(site.name))
            count = site.n_units - (goal if done == 1.0 else math.floor(goal * done))
            if count >= live.size or site.name not in self.body.now:
                continue
            started = self._clock()
            graph, importance, moment = self._view(site, live)
            extracted = self._clock()
            solution = _choose(graph, importance, count, self.recipe.solver if site in self.heads else "greedy", seed)
            solutions[site.name] = expand(solution, live, site.n_units, plan.solutions.get(site.name))
            solved = self._clock()
            if moment is not None and self.recipe.repair != "none":
                kept = solutions[site.name].keep[self.body.live[site.name]]
                changed |= self._repair(self.body.now[site.name], kept, moment)
            seconds["extract"] += extracted - started
            seconds["solve"] += solved - extracted
            seconds["repair"] += self._clock() - solved
        self._close_collector()
        return Decision(Plan(self.sites, solutions, request=request), changed, seconds=seconds)

    def _view(self, site: Site, live: np.ndarray) -> tuple[Graph, np.ndarray, torch.Tensor | None]:
        """Return the graph and the importance of the live units, and the consumer's input moment (today's inputs)."""
        at = self.body.positions(site.name, live)
        site = self.body.now[site.name]
        if site.kind == "input_dim":
            score = _group_norms(self.model, site)
            return _no_edges(live.size), self._attach(site, score, at), None
        assert self._collector is not None
        if not self._collector.tokens[site.name]:
            raise RuntimeError(
                f"no training tokens reached {site.consumer!r} before the decision on {site.name!r}; the forwards "
                "of training must run with gradients, on the model the Pruner was made for"
            )
        tensors = named_tensors(self.model)
        moment = self._collector.moment(site.name)
        energy = unit_energy(consumer_blocks(tensors, site), moment).double().cpu().numpy()
        full = moment if moment.ndim == 2 else None
        if site.kind == "neuron":
            return _no_edges(live.size), self._attach(site, energy, at), full
        distance = site_graph(tensors, site, "output-gram", moment).to_dense()[np.ix_(at, at)]
        _require_finite(site, distance)
        return Graph.from_dense(distance, normalised=True), energy[at], full

    def _attach(self, site: Site, score: np.ndarray, live: np.ndarray) -> np.ndarray:
        """Return attachment-weighted scores >= 0: relative score minus the slope of Eq. 1's degree cost.

        The degree of a unit is the share of its entries at or above the median of the layer's live units, so
        that differences show before any weight is zero.
        """
        _require_finite(site, score)
        relative = score[live] / max(score[live].mean(), np.finfo(float).tiny)
        degree = _relative_degree(self.model, site, live)
        slope = 1.0 - degree if self.recipe.eq1 == "a" else 1.0 / (degree + 0.01)
        weighted = relative - self.recipe.attachment * slope
        return weighted - weighted.min()

    def _repair(self, site: Site, keep: np.ndarray, moment: torch.Tensor) -> dict[str, torch.Tensor]:
        """Refit the consumer on its live inputs by least squares; heads, and neurons with repair='all'."""
        if site.kind == "neuron" and self.recipe.repair != "all":
            return {}
        piece = site.writes[0]
        weight = self.model.get_parameter(piece.param).detach()
        mask = torch.from_numpy(np.repeat(keep, site.unit_width)).to(weight.device)
        new = least_squares(consumer_matrix(site, weight), moment, mask, ridge=self.recipe.ridge)
        if not torch.isfinite(new).all():
            raise ValueError(f"least-squares repair of {piece.param!r} is not finite; check the training loss")
        return {piece.param: new if piece.axis == 1 else new.t().contiguous()}

    def _decide_edges(self, done: float, plan: Plan, seed: int, request: dict[str, Any]) -> Decision:
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

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to decide as this one would (T7)."""
        return {
            "tokens_per_step": self._tokens_per_step,
            "window_start": self._window_start,
            "collector": None if self._collector is None else self._collector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, half-filled accumulators included."""
        self._tokens_per_step = float(state["tokens_per_step"])
        self._window_start = int(state["window_start"])
        self._close_collector()
        if state.get("collector") is not None:
            self._open()
            assert self._collector is not None
            self._collector.load_state_dict(state["collector"])


def _choose(graph: Graph, importance: np.ndarray, count: int, solver: str, seed: int) -> Solution:
    if count == 0:  # a layer may lose all its heads; no domination problem has an answer then
        none = np.zeros(importance.size, dtype=bool)
        return Solution(none, 0.0, "max", Status.FEASIBLE, "budget", dominator=none.astype(int) - 1,
                        dominator_distance=np.full(importance.size, np.inf))  # fmt: skip
    problem = SoftDomination(graph.indptr, graph.indices, graph.weight, k=count, importance=importance)
    return solve_problem(problem, solver, seed=seed)


def _no_edges(n: int) -> Graph:
    return Graph(np.zeros(n + 1, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(0), normalised=True)


def _require_finite(site: Site, values: np.ndarray) -> None:
    if not np.all(np.isfinite(values)):
        raise ValueError(f"scores of {site.name!r} are not finite; training has diverged")


def _group_norms(model: nn.Module, site: Site) -> np.ndarray:
    total = torch.zeros(site.n_units, dtype=torch.float64)
    for name, axis in {p.param: p.axis for p in site.reads}.items():
        total += row_view(model.get_parameter(name).detach(), axis).abs().double().sum(dim=1).cpu()
    return total.numpy()


def _relative_degree(model: nn.Module, site: Site, live: np.ndarray) -> np.ndarray:
    """Return (live,) the share of each live unit's matrix entries at or above the median of their tensor.

    Units that are gone count nowhere, so that it makes no difference whether they were zeroed or cut out.
    The median is that of at most 65,536 evenly spaced entries: sorting millions at every decision
    would cost more than all the rest of it.
    """
    linked, entries = torch.zeros(live.size), 0
    if live.size == 0:
        return linked.numpy()
    pieces = {(p.param, p.axis): p for p in site.slices if len(p.shape) == 2}
    for name, axis in pieces:
        tensor = row_view(model.get_parameter(name).detach(), axis)
        tensor = tensor[torch.from_numpy(live).to(tensor.device)].float().abs()
        if site.kind == "input_dim":  # columns of heads that are gone
            tensor = tensor[:, tensor.any(dim=0)]
        flat = tensor.reshape(-1)
        if not flat.numel():
            continue
        middle = flat[:: max(1, flat.numel() // 65536)].median()
        linked += tensor.ge_(middle).sum(dim=1).cpu()
        entries += tensor.shape[1]
    return (linked / max(entries, 1)).double().numpy()


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


def _targets(sites: Sequence[Site], recipe: BudgetRecipe) -> dict[str, int]:
    """Return site name -> number of units to remove in the end; ValueError if it cannot be reached."""
    steps = {s.name: rounding_step(s, recipe.rounding) if recipe.rounding is not None else 1 for s in sites}
    removed = _head_targets([s for s in sites if s.kind in ("head", "kv_group")], recipe, steps)
    if recipe.sparsity is not None:
        removed |= _neuron_targets(sites, recipe, steps, removed)
    if recipe.input_dims:
        inputs = [s for s in sites if s.kind == "input_dim"]
        removed |= {s.name: round(recipe.input_dims * s.n_units) for s in inputs}
        if recipe.rounding is not None:
            removed |= {s.name: _upto(s, removed[s.name], steps[s.name], up=True) for s in inputs}
    return removed


def _upto(site: Site, removed: int, step: int, *, up: bool) -> int:
    """Return how many units to remove so that a multiple of step stays: about `removed`, at least one step stays."""
    kept = site.n_units - removed
    blocks = kept // step if up else min(-(-kept // step), site.n_units // step)
    return site.n_units - step * max(1, blocks)


def _head_targets(heads: Sequence[Site], recipe: BudgetRecipe, steps: Mapping[str, int]) -> dict[str, int]:
    if recipe.heads is None:
        # Rounded down, so that neurons, the finer units, can make up the rest exactly.
        share = recipe.sparsity or 0.0
        return {s.name: _upto(s, int(share * s.n_units), steps[s.name], up=False) for s in heads}
    everything = sum(s.n_units for s in heads)
    if recipe.heads > everything:
        raise ValueError(f"heads={recipe.heads} asks for more heads than exist: this model has {everything}")
    if recipe.rounding is None:
        gone = spread(everything - recipe.heads, [s.n_units for s in heads])
        return {s.name: g for s, g in zip(heads, gone, strict=True)}
    room = [s.n_units // steps[s.name] for s in heads]
    sizes = sorted({steps[s.name] for s in heads})
    if len(sizes) > 1:
        raise ValueError(
            f"rounding={recipe.rounding} is {' or '.join(map(str, sizes))} heads, depending on the layer: give "
            "sparsity= alone, which rounds every layer on its own, or no rounding"
        )
    step = sizes[0] if sizes else 1
    blocks, left = divmod(recipe.heads, step)
    if left or blocks > sum(room):
        near = [str(b * step) for b in (min(blocks, sum(room)), blocks + 1) if b <= sum(room)]
        raise ValueError(
            f"heads={recipe.heads} cannot be rounded: rounding={recipe.rounding} features are {step} heads of a layer "
            f"here; ask for heads={' or '.join(near)}"
        )
    gone = spread(sum(room) - blocks, room)
    return {s.name: s.n_units - step * (r - g) for s, r, g in zip(heads, room, gone, strict=True)}


def _neuron_targets(
    sites: Sequence[Site], recipe: BudgetRecipe, steps: Mapping[str, int], by_head: Mapping[str, int]
) -> dict[str, int]:
    """Return what neurons have to make up for the sparsity that the heads' share leaves."""
    assert recipe.sparsity is not None
    neurons = [s for s in sites if s.kind == "neuron"]
    units, costs = [s.n_units for s in neurons], [s.matrix_parameters_per_unit for s in neurons]
    own = [steps[s.name] for s in neurons]
    rounded = recipe.rounding is not None
    total = sum(math.prod(shape) for shape in counted_matrices(sites).values())
    by_heads = sum(by_head[s.name] * s.matrix_parameters_per_unit for s in sites if s.name in by_head)
    rest = recipe.sparsity * total - by_heads
    # What does not fill a step goes in any case; without rounding that is nothing.
    least = sum(n % step * cost for n, step, cost in zip(units, own, costs, strict=True))
    block = max((step * cost for step, cost in zip(own, costs, strict=True)), default=0)
    if least - rest > (block if rounded else block / 2):
        what = "rounding every site" if recipe.heads is None else f"keeping {recipe.heads} heads"
        raise ValueError(
            f"{what} already removes {(by_heads + least) / total:.1%}, more than "
            f"sparsity={recipe.sparsity:.1%}; keep more heads or ask for more sparsity"
        )
    try:
        shares = share_out(rest if rounded else max(rest, 0.0), units, costs, own if rounded else None)
    except ValueError:
        most = by_heads + sum((n - step) * cost for n, step, cost in zip(units, own, costs, strict=True))
        left = f"{recipe.rounding} features" if rounded else "one neuron"
        raise ValueError(
            f"sparsity={recipe.sparsity:.1%} cannot be reached: with {recipe.heads or 'these'} heads and {left} "
            f"left in each layer at most {most / total:.1%} of the weights go"
        ) from None
    return {s.name: share for s, share in zip(neurons, shares, strict=True)}

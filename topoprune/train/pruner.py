"""Prune while training: one line in a plain loop.

    pruner = Pruner(model, Recipe.budget(sparsity=0.5), total_steps=1000, steps_per_epoch=250).attach(optimizer)

The pruner works through the optimizer's own step hooks (T4): before a step it masks gradients,
after it it takes proximal steps, enforces masks and, when the recipe says so, extracts a graph,
solves it and puts the new plan in force.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import find_sites
from topoprune.compaction.inplace import UnknownState
from topoprune.extraction import check_finite, named_tensors
from topoprune.graph import Site, structure_digest
from topoprune.masks import MaskHandle, check_optimizer, open_handle, unwrap
from topoprune.planning import Plan
from topoprune.sparsity import Sparsity
from topoprune.train.body import Body
from topoprune.train.budget import BudgetDriver
from topoprune.train.decision import Decision
from topoprune.train.distributed import find_replica, restart_replica, same_everywhere
from topoprune.train.neuroprune import NeuroPruneDriver
from topoprune.train.recipe import BudgetRecipe, NeuroPruneRecipe, Recipe
from topoprune_solvers import Bound, Solution, Status

__all__ = ["Pruner", "SolveEvent"]

STATE_VERSION = 2
READABLE_STATES = (1, 2)  # 1: no sites, nothing cut out


@dataclass(frozen=True)
class SolveEvent:
    """One decision during training.

    Args:
        step: optimizer steps done. solver: registry names used.
        removed: site (or parameter) name -> number of units (or edges) that went now.
        kept: site name -> units that stay, heads and KV groups.
        gap: worst relative gap of the solutions; nan if one has no bound.
        seconds: ``extract``, ``solve``, ``repair``.
        thetas: resolved distance thresholds (NeuroPrune).
        zeros, removable: shares after the decision.
    """

    step: int
    solver: str
    removed: Mapping[str, int]
    kept: Mapping[str, int]
    gap: float
    seconds: Mapping[str, float]
    thetas: Mapping[str, float] = field(default_factory=dict)
    zeros: float = 0.0
    removable: float = 0.0


class Pruner:
    """Runs a recipe on a live model.

    Args:
        model: a supported transformers model (or any module, with `sites`).
        recipe: from `Recipe.neuroprune` or `Recipe.budget`.
        total_steps: optimizer steps of the whole training (budget: the ramp lies on it).
        steps_per_epoch: optimizer steps of an epoch (neuroprune: heads are decided after each).
        seed: for solvers that draw random numbers.
        sites: prunable sites by hand; default: found by the model's family.
        clock: what `seconds` is measured with; pass one that synchronises to time an accelerator.
        compact: cut out what a decision prunes at once (T10), so that the steps behind it are faster: weights,
            gradients and optimizer state shrink in place, and the parameters stay the same objects. The model
            becomes a ``Compact<class>`` (see `topoprune.compact`). Under DistributedDataParallel, which must be
            what is passed as `model`, that happens at the end of an epoch (`steps_per_epoch`).
        resume: state of an interrupted run (`state_dict`) to continue from; needed where `model` has the
            smaller shapes of a compacted checkpoint already.

    Raises:
        ValueError: a missing value the recipe needs, a budget the model cannot reach, a merge it
            does not admit, a model already masked, non-finite weights, `compact` where nothing can be cut out.
            The model is untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: NeuroPruneRecipe | BudgetRecipe,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        sites: tuple[Site, ...] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        compact: bool = False,
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = unwrap(model)
        self._replica = find_replica(model)
        self.recipe, self.seed = recipe, seed
        if not isinstance(recipe, (NeuroPruneRecipe, BudgetRecipe)):
            raise ValueError(f"recipe is {recipe!r}; use Recipe.neuroprune(...) or Recipe.budget(...)")
        self.total_steps = _needed("total_steps", total_steps, isinstance(recipe, BudgetRecipe), recipe)
        self.steps_per_epoch = _needed("steps_per_epoch", steps_per_epoch, isinstance(recipe, NeuroPruneRecipe), recipe)
        if open_handle(self.model) is not None:
            raise ValueError("this model is already pruned by an open MaskHandle or Pruner; close() it first")
        if sites is None and resume is not None:
            sites = sites_of_state(resume)
        self.sites = tuple(find_sites(self.model) if sites is None else sites)
        self.compact = compact
        self._body = Body(self.model, self.sites)
        if resume is not None:
            self._check_state(resume)
            self._body.take_shape(live_of_state(resume))
        check_finite(named_tensors(self.model), self._body.sites_now)
        driver = NeuroPruneDriver if isinstance(recipe, NeuroPruneRecipe) else BudgetDriver
        self._driver = driver(self._body, recipe, self.total_steps, self.steps_per_epoch, clock)  # type: ignore[arg-type]
        if compact:
            self._check_compact()
        self._plan = Plan(self.sites, {})
        self._mask()
        self.step = 0
        self.history: list[SolveEvent] = []
        self.seconds = {"hooks": 0.0, "extract": 0.0, "solve": 0.0, "repair": 0.0, "apply": 0.0}
        self._clock = clock
        self.on_solve: Callable[[SolveEvent], None] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[Any] = []
        if resume is not None:
            self.load_state_dict(resume)

    @property
    def plan(self) -> Plan:
        """The plan in force, in the units the model had when training began."""
        return self._plan

    def _check_compact(self) -> None:
        if isinstance(self.recipe, BudgetRecipe) and self.recipe.granularity != "unit":
            raise ValueError(
                f"compact=True has nothing to cut out with single weights (granularity={self.recipe.granularity!r}); "
                "use granularity='unit'"
            )
        if self._replica is not None and not self.steps_per_epoch:
            raise ValueError("compact=True under DistributedDataParallel works at epoch ends; give steps_per_epoch=")
        self._body.check()

    def _mask(self) -> None:
        """Put masks on today's tensors in force."""
        today = self._body.down(self._plan)
        self.handle = MaskHandle(self.model, today, sites=self._body.sites_now, stash=False)

    def attach(self, optimizer: torch.optim.Optimizer) -> Pruner:
        """Hook into an optimizer; returns the pruner. Once per pruner.

        Raises:
            ValueError: attached already, or the optimizer trains none of the model's parameters.
        """
        if self._optimizer is not None:
            raise ValueError("this Pruner is attached to an optimizer already; make a new one")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
        check_optimizer(self.model, optimizer)
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self._driver.watch(self.step)
        return self

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        started = self._clock()
        self._driver.before_step(optimizer)  # penalties first: what they add to masked weights goes too
        self.handle.mask_gradients()
        self.seconds["hooks"] += self._clock() - started

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        started = self._clock()
        rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self._driver.after_step(rates)
        self.handle.enforce()
        self.step += 1
        self.seconds["hooks"] += self._clock() - started
        if self._driver.due(self.step):
            self._decide(optimizer)
        if self.compact and (self._replica is None or self.step % self.steps_per_epoch == 0):
            self._shrink(optimizer)
        self.seconds["extract"] += self._driver.collected_seconds()
        self._driver.watch(self.step)

    def _decide(self, optimizer: torch.optim.Optimizer) -> None:
        started = self._clock()
        check_finite(named_tensors(self.model), self._body.sites_now)
        before = self.plan
        decision = same_everywhere(self._driver.decide(self.step, before, self.seed))
        with torch.no_grad():
            for name, tensor in decision.changed.items():
                self.model.get_parameter(name).copy_(tensor)
        self._plan = decision.plan
        self.handle.refresh(self._body.down(decision.plan))
        self.handle.clear_optimizer_state(optimizer)
        event = self._event(before, decision)
        self.history.append(event)
        for part, value in decision.seconds.items():
            self.seconds[part] += value
        self.seconds["apply"] += self._clock() - started - sum(decision.seconds.values())
        if self.on_solve is not None:
            self.on_solve(event)

    def _shrink(self, optimizer: torch.optim.Optimizer) -> None:
        """Cut out what is masked by now (T10)."""
        started = self._clock()
        before = dict(self._body.live)
        try:
            gone = self._body.shrink(self._plan, [optimizer])
        except UnknownState as error:
            self.compact = False
            warnings.warn(f"{error}; training goes on with masks", stacklevel=2)
            return
        if gone:
            self.handle.close(restore=False)
            self._mask()
            self._driver.follow(before)
            if self._replica is not None:
                restart_replica(self._replica)
            self.seconds["apply"] += self._clock() - started

    def _event(self, before: Plan, decision: Decision) -> SolveEvent:
        plan = decision.plan
        removed = {}
        for name, solution in plan.solutions.items():
            earlier = before.solutions[name].n_kept if name in before.solutions else solution.n_units
            removed[name] = earlier - solution.n_kept
        kept = {s.name: int(plan.keep(s.name).sum()) for s in self.sites if s.kind in ("head", "kv_group")}
        figures = self.sparsity()
        return SolveEvent(
            self.step,
            ", ".join(sorted({s.solver for s in plan.solutions.values()})),
            removed,
            kept,
            plan.gap,
            dict(decision.seconds),
            dict(decision.thetas),
            figures.zeros,
            figures.removable,
        )

    def sparsity(self) -> Sparsity:
        """Return zeros, removable and gatherable shares; what was cut out counts as before."""
        return self._body.sparsity()

    def close(self) -> None:
        """Detach from the optimizer and release the model; the zeros stay in the weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._driver.close()
        self.handle.close(restore=False)

    def __enter__(self) -> Pruner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all a resumed run needs (T7): step, plan, half-collected moments, history.

        Tensors, numbers and strings only, so it survives ``torch.save`` with ``weights_only`` loading.
        """
        solutions: dict[str, Any] = {}
        for name, s in self.plan.solutions.items():
            solutions[name] = {
                "keep": torch.from_numpy(s.keep.copy()),
                "dominator": None if s.dominator is None else torch.from_numpy(s.dominator.copy()),
                "distance": None if s.dominator_distance is None else torch.from_numpy(s.dominator_distance.copy()),
                "meta": json.dumps([s.objective, s.sense, s.status.name, s.solver, s.seconds,
                                    None if s.bound is None else [s.bound.value, s.bound.source]]),
            }  # fmt: skip
        return {
            "version": STATE_VERSION,
            "structure_digest": structure_digest(self.sites),
            "sites": json.dumps([site.to_dict() for site in self.sites]),
            "live": {name: torch.from_numpy(units.copy()) for name, units in self._body.live.items()},
            "recipe": json.dumps(self.recipe.to_dict()),
            "step": self.step,
            "total_steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "seed": self.seed,
            "solutions": solutions,
            "edge_axes": json.dumps({k: [axis, list(shape)] for k, (axis, shape) in self.plan.edge_axes.items()}),
            "request": json.dumps(dict(self.plan.request), default=str),
            "history": json.dumps([asdict(event) for event in self.history]),
            "driver": self._driver.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Load the model's and the optimizer's state as well.

        If units had been cut out of the saved model, they are cut out of this one first, so that the
        saved weights fit; load those, and the optimizer's state, afterwards.

        Raises:
            ValueError: a state of another model, recipe or schedule; nothing is changed then.
        """
        self._check_state(state)
        axes = {name: (axis, (shape[0], shape[1])) for name, (axis, shape) in json.loads(state["edge_axes"]).items()}
        solutions = {name: _solution(entry) for name, entry in state["solutions"].items()}
        self.handle.close(restore=False)
        self._body.take_shape(live_of_state(state))
        self._plan = Plan(self.sites, solutions, axes, json.loads(state["request"]))
        self._mask()
        self.step = int(state["step"])
        self.history = [SolveEvent(**event) for event in json.loads(state["history"])]
        self._driver.load_state_dict(state["driver"])
        self._driver.watch(self.step)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("version") not in READABLE_STATES:
            raise ValueError(f"pruner state has version {state.get('version')!r}, expected {STATE_VERSION}")
        if state["structure_digest"] != structure_digest(self.sites):
            raise ValueError("the pruner state is of another model (structure digests differ)")
        here = json.loads(json.dumps(self.recipe.to_dict()))
        # Through the recipe: a state from before a field existed means its default.
        if json.loads(json.dumps(Recipe.from_dict(json.loads(state["recipe"])).to_dict())) != here:
            raise ValueError(f"the pruner state is of recipe {state['recipe']}, this run has {json.dumps(here)}")
        for name in ("total_steps", "steps_per_epoch"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the pruner state has {name}={state[name]}, this run {getattr(self, name)}")


def sites_of_state(state: Mapping[str, Any]) -> tuple[Site, ...] | None:
    """Return the sites a saved run began with; None in states written before they were recorded."""
    return tuple(Site.from_dict(site) for site in json.loads(state["sites"])) if "sites" in state else None


def live_of_state(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return site name -> units that had not been cut out when a state was saved."""
    return {name: units.numpy() for name, units in state.get("live", {}).items()}


def _solution(entry: Mapping[str, Any]) -> Solution:
    objective, sense, status, solver, seconds, bound = json.loads(entry["meta"])
    return Solution(
        keep=entry["keep"].numpy(),
        objective=objective,
        sense=sense,
        status=Status[status],
        solver=solver,
        bound=None if bound is None else Bound(*bound),
        dominator=None if entry["dominator"] is None else entry["dominator"].numpy(),
        dominator_distance=None if entry["distance"] is None else entry["distance"].numpy(),
        seconds=seconds,
    )


def _needed(name: str, value: int | None, needed: bool, recipe: object) -> int:
    if value is None:
        if needed:
            raise ValueError(f"{type(recipe).__name__} needs {name}=, the number of optimizer steps")
        return 0
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a number of optimizer steps >= 1")
    return int(value)

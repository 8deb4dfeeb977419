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
from dataclasses import asdict
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
from topoprune.sharding import sharded, weights_of, write
from topoprune.sparsity import Sparsity
from topoprune.train.body import Body
from topoprune.train.budget import BudgetDriver
from topoprune.train.checkpoint import solution_of_state, solution_state
from topoprune.train.checks import steps_needed
from topoprune.train.decision import Decision, SolveEvent
from topoprune.train.distillation import Distiller
from topoprune.train.distributed import (
    find_replica,
    plan_digest,
    ranks,
    require_same,
    restart_replica,
    state_of_ranks,
    states_to_first,
    weights_checksum,
)
from topoprune.train.fixed import FixedPlanDriver, FixedPlanRecipe, plan_on_model
from topoprune.train.lag import PendingDecision, check_schedule
from topoprune.train.neuroprune import NeuroPruneDriver
from topoprune.train.recipe import BudgetRecipe, NeuroPruneRecipe, Recipe
from topoprune.train.record import StepRecord, head_importance, step_record

__all__ = ["Pruner", "SolveEvent"]

STATE_VERSION = 3
_DRIVERS: dict[type, Any] = {
    NeuroPruneRecipe: NeuroPruneDriver,
    BudgetRecipe: BudgetDriver,
    FixedPlanRecipe: FixedPlanDriver,
}
READABLE_STATES = (1, 2, 3)  # 1: no sites, nothing cut out; 2: one rank, nothing pending


class Pruner:
    """Runs a recipe on a live model.

    Mixed precision: masks and repairs work in the parameters' own dtype, under autocast as well. A step counts when
    the optimizer takes it: steps that a GradScaler skips do not, and micro-batches of gradient accumulation do not.
    Clipping before the step sees the gradients of masked single weights and input dimensions too (those of whole
    units are 0 by themselves).

    torch.compile: give the compiled model or the one inside; compile before making the Pruner. Masks and repairs
    change values only, so nothing is compiled again, except with `compact`. While a decision's activations are
    collected, forwards run uncompiled.

    torch.distributed: all ranks make the same calls (`state_dict` and `sparsity` too), and every decision is compared
    across them. Under FSDP2 (``fully_shard``) make the optimizer and then the Pruner after sharding.

    Args:
        model: a supported transformers model (or any module, with `sites`).
        recipe: from `Recipe.neuroprune`, `Recipe.budget` or `Recipe.fixed`.
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
        teacher: the dense model to learn from, where the recipe says ``distill``; it is set to eval mode, never
            changed, and brought to the model's device. Default: a frozen copy of the model as it is now, so it
            should have been fine-tuned on the task (a head with fresh weights teaches noise). A resumed run needs
            the same teacher; by default make the Pruner before you load the checkpoint's weights.

    Raises:
        ValueError: a missing value the recipe needs, a budget the model cannot reach, a merge it
            does not admit, a model already masked, non-finite weights, `compact` where nothing can be cut out.
            The model is untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: NeuroPruneRecipe | BudgetRecipe | FixedPlanRecipe,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        sites: tuple[Site, ...] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        compact: bool = False,
        resume: Mapping[str, Any] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model = unwrap(model)
        self._replica = find_replica(model)
        self.recipe, self.seed = recipe, seed
        if not isinstance(recipe, (NeuroPruneRecipe, BudgetRecipe, FixedPlanRecipe)):
            raise ValueError(
                f"recipe is {recipe!r}; use Recipe.budget(...), Recipe.neuroprune(...) or Recipe.fixed(...)"
            )
        self.total_steps = steps_needed("total_steps", total_steps, isinstance(recipe, BudgetRecipe), recipe)
        self.steps_per_epoch = steps_needed(
            "steps_per_epoch", steps_per_epoch, isinstance(recipe, NeuroPruneRecipe), recipe
        )
        if open_handle(self.model) is not None:
            raise ValueError("this model is already pruned by an open MaskHandle or Pruner; close() it first")
        if sites is None and resume is not None:
            sites = sites_of_state(resume)
        held = plan_on_model(self.model, recipe, sites) if isinstance(recipe, FixedPlanRecipe) and not resume else None
        sites = sites if held is None else held.sites
        self.sites = tuple(find_sites(self.model) if sites is None else sites)
        self.compact = compact
        self._body = Body(self.model, self.sites)
        if resume is not None:
            self._check_state(resume)
        self._distiller = self._find_teacher(teacher, resume)  # before anything is cut out
        if resume is not None:
            self._body.take_shape(live_of_state(resume))
        check_finite(named_tensors(self.model), self._body.sites_now)
        driver = next(made for kind, made in _DRIVERS.items() if isinstance(recipe, kind))
        self._driver = driver(self._body, recipe, self.total_steps, self.steps_per_epoch, clock)
        check_schedule(recipe, self._driver, self.total_steps, self.steps_per_epoch)
        if compact:
            self._check_compact()
        self._plan = Plan(self.sites, {}) if held is None else held
        self._mask()
        self.step = 0
        self.history: list[SolveEvent] = []
        self.records: list[StepRecord] = []
        self.seconds = {"hooks": 0.0, "extract": 0.0, "solve": 0.0, "repair": 0.0, "apply": 0.0}
        self._clock = clock
        self.on_solve: Callable[[SolveEvent], None] | None = None
        self._pending: PendingDecision | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._attached = False
        self._hooks: list[Any] = []
        if resume is not None:
            self.load_state_dict(resume)
        else:
            self.records.append(self.measure())

    @property
    def plan(self) -> Plan:
        """The plan in force, in the units the model had when training began."""
        return self._plan

    @property
    def distilled(self) -> dict[str, torch.Tensor]:
        """The parts of the last training forward's loss, before weighting: ``task``, ``logits``, ``hidden``."""
        return {} if self._distiller is None else dict(self._distiller.parts)

    def _find_teacher(self, teacher: nn.Module | None, resume: Mapping[str, Any] | None) -> Distiller | None:
        """Return what distils, if the recipe asks for it (before the model is masked)."""
        settings = self.recipe.distill if isinstance(self.recipe, BudgetRecipe) else None
        if settings is None:
            if teacher is not None:
                raise ValueError("teacher= has no effect without Recipe.budget(..., distill=Distillation(...))")
            return None
        distiller = Distiller(self.model, self.sites, settings, teacher)
        if resume is not None:
            distiller.check_state(resume)
        return distiller

    def _check_compact(self) -> None:
        if isinstance(self.recipe, FixedPlanRecipe) and self.recipe.plan.edge_axes:
            raise ValueError("compact=True has nothing to cut out with a plan on single weights; leave it out")
        if isinstance(self.recipe, BudgetRecipe) and self.recipe.granularity != "unit":
            raise ValueError(
                f"compact=True has nothing to cut out with single weights (granularity={self.recipe.granularity!r}); "
                "use granularity='unit'"
            )
        if isinstance(self.recipe, BudgetRecipe) and self.recipe.regrow is not None:
            raise ValueError(
                f"compact=True cuts out what goes, so nothing can return (regrow={self.recipe.regrow!r}); leave one out"
            )
        if sharded(self.model):
            raise ValueError(
                "compact=True cannot cut parameters that are sharded over ranks (FSDP2); prune with masks, gather the "
                "model after training and give it to topoprune.compact with the pruner's plan"
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
        require_same(
            "before training",
            recipe=json.dumps(self.recipe.to_dict(), default=str),
            schedule=f"total_steps={self.total_steps} steps_per_epoch={self.steps_per_epoch} seed={self.seed}",
            model=structure_digest(self.sites),
            step=str(self.step),
            plan=plan_digest(self.plan),
        )
        self._optimizer, self._attached = optimizer, True
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        if self._distiller is not None:
            self._distiller.attach()
        self._driver.watch(self.step)
        return self

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        started = self._clock()
        self._driver.before_step(optimizer)  # penalties first: what they add to masked weights goes too
        self.handle.mask_gradients()
        self.seconds["hooks"] += self._clock() - started

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Fused optimizers are called by GradScaler even for a step with infinite gradients, and leave it out
        # themselves; the others are not called at all. Neither is a step.
        found = getattr(optimizer, "found_inf", None)
        if found is not None and float(found):
            return
        started = self._clock()
        rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        self._driver.after_step(rates)
        self.handle.enforce()
        self.step += 1
        self.seconds["hooks"] += self._clock() - started
        if self._pending is not None and self._pending.due == self.step:
            self._apply_pending(optimizer)
        if self._driver.due(self.step):
            self._decide(optimizer)
        if self.compact and (self._replica is None or self.step % self.steps_per_epoch == 0):
            self._shrink(optimizer)
        self.seconds["extract"] += self._driver.collected_seconds()
        self._driver.watch(self.step)

    def _decide(self, optimizer: torch.optim.Optimizer) -> None:
        started = self._clock()
        check_finite(named_tensors(self.model), self._body.sites_now)
        lag = self._driver.lag(self.step)
        if lag:
            draft = self._driver.draft(self.step, self.plan, self.seed, beside=True)
            extracted = draft.seconds["extract"]
            self._pending = PendingDecision(draft, self.step + lag, self._clock)
            self.seconds["extract"] += extracted
            self.seconds["apply"] += self._clock() - started - extracted
            return
        decision = self._driver.decide(self.step, self.plan, self.seed)
        for part, value in decision.seconds.items():
            self.seconds[part] += value
        self._apply(decision, self.step, optimizer)
        self.seconds["apply"] += self._clock() - started - sum(decision.seconds.values())

    def _apply_pending(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply what was solved beside training; only waiting for it counts as solving."""
        started = self._clock()
        assert self._pending is not None
        draft = self._pending.result()
        self._pending = None
        waited = self._clock()
        check_finite(named_tensors(self.model), self._body.sites_now)
        decision = self._driver.finish(draft, self.plan)
        self.seconds["solve"] += waited - started
        self.seconds["repair"] += decision.seconds["repair"]
        self._apply(decision, draft.step, optimizer)
        self.seconds["apply"] += self._clock() - waited - decision.seconds["repair"]

    def _apply(self, decision: Decision, decided: int, optimizer: torch.optim.Optimizer) -> None:
        before = self.plan
        importance = head_importance(weights_of(self.model), self._body, before)
        for name, tensor in decision.changed.items():
            write(self.model.get_parameter(name), tensor)
        self._plan = decision.plan
        self.handle.refresh(self._body.down(decision.plan))
        self.handle.clear_optimizer_state(optimizer)
        if ranks() > 1:
            require_same(
                f"after the decision of step {decided}",
                step=str(self.step),
                plan=plan_digest(self.plan),
                weights=weights_checksum(self.model),
            )
        event = self._event(before, decision, importance, decided)
        self.history.append(event)
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

    def _event(self, before: Plan, decision: Decision, importance: Mapping[str, Any], decided: int) -> SolveEvent:
        plan = decision.plan
        removed = {}
        for name, solution in plan.solutions.items():
            earlier = before.solutions[name].n_kept if name in before.solutions else solution.n_units
            removed[name] = earlier - solution.n_kept
        kept = {s.name: int(plan.keep(s.name).sum()) for s in self.sites if s.kind in ("head", "kv_group")}
        figures = self.sparsity()
        self.records.append(
            step_record(
                weights_of(self.model), self._body, self.step, figures, before, plan, importance, decision.energy
            )
        )
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
            decided,
            dict(plan.request.get("predicted", {})),
        )

    def sparsity(self) -> Sparsity:
        """Return zeros, removable and gatherable shares; what was cut out counts as before."""
        return self._body.sparsity()

    def measure(self) -> StepRecord:
        """Return what a `RunRecord` says of the model as it is now; no decision."""
        return step_record(weights_of(self.model), self._body, self.step, self.sparsity(), self.plan, self.plan)

    def close(self) -> None:
        """Detach from the optimizer and release the model; the zeros stay in the weights.

        Warns if training ended before the last decision: the budget is not met then.
        """
        self._release()
        if self._pending is not None:
            missed = (
                f"the decision of step {self._pending.draft.step}, due after step {self._pending.due}, was not applied"
            )
        elif self._driver.last_decision() > self.step:
            missed = f"the last decision, after step {self._driver.last_decision()}, was not taken"
        else:
            return
        if self._attached:
            self._attached = False
            warnings.warn(
                f"training ended after step {self.step}"
                + (f" of total_steps={self.total_steps}" if self.total_steps else "")
                + f": {missed}, so the recipe is not met. Steps that a GradScaler skips do not count",
                stacklevel=2,
            )

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._distiller is not None:
            self._distiller.close()
        self._driver.close()
        self.handle.close(restore=False)

    def __enter__(self) -> Pruner:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.close()
        else:
            self._release()  # what was not reached is no news then

    def state_dict(self) -> dict[str, Any]:
        """Return all a resumed run needs (T7): step, plan, half-collected moments, history.

        Tensors, numbers and strings only, so it survives ``torch.save`` with ``weights_only`` loading.
        """
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
            "solutions": {name: solution_state(s) for name, s in self.plan.solutions.items()},
            "edge_axes": json.dumps({k: [axis, list(shape)] for k, (axis, shape) in self.plan.edge_axes.items()}),
            "request": json.dumps(dict(self.plan.request), default=str),
            "history": json.dumps([asdict(event) for event in self.history]),
            "records": json.dumps([asdict(record) for record in self.records]),
            "driver": states_to_first(self._driver.state_dict()),
            **({} if self._pending is None else {"pending": self._pending.state_dict()}),
            **({} if self._distiller is None else {"teacher": self._distiller.digest}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Load the model's and the optimizer's state as well.

        If units had been cut out of the saved model, they are cut out of this one first, so that the
        saved weights fit; load those, and the optimizer's state, afterwards.

        Raises:
            ValueError: a state of another model, recipe or schedule; nothing is changed then.
        """
        self._check_state(state)
        if self._distiller is not None:
            self._distiller.check_state(state)
        axes = {name: (axis, (shape[0], shape[1])) for name, (axis, shape) in json.loads(state["edge_axes"]).items()}
        solutions = {name: solution_of_state(entry) for name, entry in state["solutions"].items()}
        self.handle.close(restore=False)
        self._body.take_shape(live_of_state(state))
        self._plan = Plan(self.sites, solutions, axes, json.loads(state["request"]))
        self._mask()
        self.step = int(state["step"])
        self.history = [SolveEvent(**event) for event in json.loads(state["history"])]
        if "records" in state:
            self.records = [StepRecord(**record) for record in json.loads(state["records"])]
        pending = state.get("pending")
        self._pending = None if pending is None else PendingDecision.from_state(pending, self._clock)
        self._driver.load_state_dict(state_of_ranks(state["driver"]))
        self._driver.watch(self.step)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("version") not in READABLE_STATES:
            raise ValueError(f"pruner state has version {state.get('version')!r}, expected {STATE_VERSION}")
        if state["structure_digest"] != structure_digest(self.sites):
            raise ValueError("the pruner state is of another model (structure digests differ)")
        here = json.loads(json.dumps(self.recipe.to_dict()))
        # Through the recipe: a state from before a field existed means its default.
        there = json.loads(json.dumps(Recipe.from_dict(json.loads(state["recipe"])).to_dict()))
        for name in (*there, *here):
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"the pruner state is of recipe with {name}={there.get(name)!r}, this run has {name}="
                    f"{here.get(name)!r}; resume with the recipe of the interrupted run, or start anew"
                )
        for name in ("total_steps", "steps_per_epoch"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the pruner state has {name}={state[name]}, this run {getattr(self, name)}")


def sites_of_state(state: Mapping[str, Any]) -> tuple[Site, ...] | None:
    """Return the sites a saved run began with; None in states written before they were recorded."""
    return tuple(Site.from_dict(site) for site in json.loads(state["sites"])) if "sites" in state else None


def live_of_state(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return site name -> units that had not been cut out when a state was saved."""
    return {name: units.numpy() for name, units in state.get("live", {}).items()}

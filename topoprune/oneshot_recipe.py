"""A recipe of training carried out without training: forwards over calibration data feed the same decisions."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, replace
from typing import Any

import torch
from torch import nn

from topoprune.architectures import find_sites
from topoprune.compaction.equivalence import check_equivalence
from topoprune.extraction import check_finite, named_tensors
from topoprune.graph import Site
from topoprune.masks import MaskHandle, open_handle, unwrap
from topoprune.planning import Plan
from topoprune.pruned_model import (
    Clock,
    Progress,
    PrunedModel,
    compacted,
    consumers,
    damages,
    evaluating,
    sizes,
    timed,
)
from topoprune.sparsity import measure_sparsity
from topoprune.speed import probe
from topoprune.train.body import Body
from topoprune.train.budget import BudgetDriver
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune.train.neuroprune import NeuroPruneDriver
from topoprune.train.recipe import NeuroPruneRecipe

__all__ = ["calibration_only", "prune_by_recipe", "training_fields"]

# What says when in training to decide, what to learn meanwhile, or how to watch training.
_TRAINING = (
    "ramp",
    "solves",
    "regrow",
    "regrow_share",
    "freeze_at",
    "tokens_per_unit",
    "distill",
    "solve_lag",
)


def prune_by_recipe(
    model: nn.Module,
    recipe: BudgetRecipe | NeuroPruneRecipe,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    stages: int = 1,
    seed: int = 0,
    gqa: str = "groups",
    progress: Progress | None = None,
) -> PrunedModel:
    """Return a smaller model, decided by a recipe on calibration data alone: no labels, no gradients, no training.

    The driver that prunes in training decides here: the same targets, allocation, choice of units and repair, fed
    by forwards over the calibration batches instead of training steps. With `stages` it cuts along the recipe's
    `ramp_shape`, and takes the moments of every stage from the model that the stage before has left. The given
    model is as it was before, bit for bit.

    Args:
        model: of a known family, under any task head.
        recipe: from `Recipe.budget`, or `Recipe.neuroprune` (heads by theta and the paper's merge; alpha and beta,
            which act through training steps, must be 0). With single weights (``granularity="edge"``, ``"n:m"``)
            nothing can be cut out: the result has the shapes of the model, with zeros.
        calibration: batches, dicts of what the model takes; all their tokens count. Recipes on units need some.
        stages: number of decisions, >= 1.
        seed: for solvers that draw random numbers. gqa: units of grouped-query attention, see `find_sites`.
        progress: called with (stage, stages done, stages in all).

    Returns:
        A `PrunedModel`; its plan is over the units the model has now.

    Raises:
        ValueError: fields of the recipe that mean nothing without training (see `calibration_only`), a budget the
            model cannot reach, no calibration data where the recipe needs some, a model that is masked already,
            non-finite weights, a compacted model that is not equal to the masked one.

    Complexity: a pass over the calibration data per stage (and one to measure the damage), one moment of (n, n)
        float32 per site that is refitted in memory, and what the recipe's solvers and curves take.

    References: calibration-only pruning with refitted consumers follows the layer-wise reconstruction of Frantar &
        Alistarh 2022 (arXiv 2208.11580); the staged form is a one-shot counterpart of gradual pruning.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from topoprune import Recipe
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
        ... )
        >>> data = [{"input_ids": torch.arange(8).reshape(2, 4)}]
        >>> pruned = prune_by_recipe(BertModel(config), Recipe.budget(heads=2), calibration=data, stages=2)
        >>> sum(kept for name, kept in pruned.kept.items() if name.endswith("attention"))
        2
    """
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise ValueError(f"stages is {stages!r}; expected a number of decisions >= 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected an integer >= 0")
    _check_recipe(recipe, stages)
    model = unwrap(model)
    if open_handle(model) is not None:
        raise ValueError("this model is already pruned by an open MaskHandle or Pruner; close() it first")
    batches = _batches(calibration, recipe)
    sites = find_sites(model, gqa=gqa)
    check_finite(named_tensors(model), sites)
    clock = Clock(progress, _stage_names(stages))
    inputs = batches[0] if batches else probe(model, seed)
    with evaluating(model), _restored(model, sites):
        driver = _driver(Body(model, sites), recipe, stages)
        try:
            plan = _carry_out(model, sites, driver, batches, stages, seed, clock)
        finally:
            driver.close()
        after = consumers(model, sites, plan)
        handle = MaskHandle(model, plan, sites=sites, stash=False)
        try:
            result = _result(model, plan, inputs, clock, gqa == "any-query-heads")
        finally:
            handle.close(restore=False)
    with evaluating(model):
        clock.stage("measuring damage")
        damage, dropped = damages(model, sites, after, plan, batches) if batches and after else ({}, {})
        return timed(replace(result, damage=damage, dropped=dropped), model, inputs, clock)


def training_fields(recipe: BudgetRecipe) -> tuple[str, ...]:
    """Return the fields of a recipe that are set and mean nothing without training."""
    defaults = {f.name: f.default for f in fields(BudgetRecipe) if f.default is not MISSING}
    return tuple(name for name in _TRAINING if name in defaults and getattr(recipe, name) != defaults[name])


def calibration_only(recipe: BudgetRecipe) -> BudgetRecipe:
    """Return a recipe without what belongs to training: its ramp, regrowth, distillation and solver lag.

    What would be refitted by the last decision is refitted by all, as every decision counts the same here.

    Example:
        >>> from topoprune import Recipe
        >>> calibration_only(Recipe.budget(0.5, solves=12, final_repair="all")) == Recipe.budget(0.5, repair="all")
        True
    """
    defaults: dict[str, Any] = {f.name: f.default for f in fields(BudgetRecipe) if f.name in _TRAINING}
    return replace(recipe, **defaults, repair=recipe.final_repair or recipe.repair, final_repair=None)


def _check_recipe(recipe: BudgetRecipe | NeuroPruneRecipe, stages: int) -> None:
    if isinstance(recipe, NeuroPruneRecipe):
        if recipe.alpha or recipe.beta:
            raise ValueError(
                f"alpha={recipe.alpha:g} and beta={recipe.beta:g} are penalties of training steps, and there are none "
                "here: give 0 for both (theta decides on the heads), or train with this recipe"
            )
        if stages > 1:
            raise ValueError(f"stages is {stages}, but a threshold theta cuts at once; leave it out")
        return
    if not isinstance(recipe, BudgetRecipe):
        raise ValueError(f"recipe is {recipe!r}; use Recipe.budget(...) or Recipe.neuroprune(0, 0, theta)")
    foreign = training_fields(recipe)
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} of the recipe belong to training, and there is none here; leave them out "
            "(topoprune.oneshot_recipe.calibration_only does), and say stages= to cut in several steps"
        )


def _batches(
    calibration: Iterable[Mapping[str, Any]] | None, recipe: BudgetRecipe | NeuroPruneRecipe
) -> list[Mapping[str, Any]]:
    batches = [] if calibration is None else [calibration] if isinstance(calibration, Mapping) else list(calibration)
    if calibration is not None and not batches:
        raise ValueError("calibration set is empty; pass at least one batch, e.g. calibration=[tokenizer(texts, ...)]")
    for index, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise ValueError(f"calibration batch {index} is a {type(batch).__name__}; expected a dict of tensors")
    if not batches and isinstance(recipe, BudgetRecipe) and recipe.granularity == "unit":
        raise ValueError("a budget of units is decided on activations: give calibration=[batch, ...], dicts of what "
                         "the model takes")  # fmt: skip
    return batches


def _stage_names(stages: int) -> tuple[str, ...]:
    decisions = [name for i in range(stages) for name in (_numbered("collecting", i, stages), _numbered("deciding", i,
                 stages))]  # fmt: skip
    return (*decisions, "compacting", "checking", "measuring damage", "timing")


def _numbered(what: str, index: int, stages: int) -> str:
    return what if stages == 1 else f"{what} {index + 1} of {stages}"


def _driver(body: Body, recipe: BudgetRecipe | NeuroPruneRecipe, stages: int) -> BudgetDriver | NeuroPruneDriver:
    """Return what decides, with one optimizer step standing for one stage."""
    if isinstance(recipe, NeuroPruneRecipe):
        return NeuroPruneDriver(body, recipe, stages, 1)
    spread = replace(recipe, ramp=(1 / stages, 1.0), solves=stages)
    return BudgetDriver(body, spread, stages, 1, calibrating=True)


def _carry_out(
    model: nn.Module,
    sites: tuple[Site, ...],
    driver: BudgetDriver | NeuroPruneDriver,
    batches: Sequence[Mapping[str, Any]],
    stages: int,
    seed: int,
    clock: Clock,
) -> Plan:
    """Write every stage's repair and zeros into the model; return the last plan."""
    plan = Plan(sites, {})
    device = next(model.parameters()).device
    for stage in range(stages):
        clock.stage(_numbered("collecting", stage, stages))
        driver.watch(stage)
        with torch.no_grad():
            for batch in batches:
                model(**{name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()})
        clock.stage(_numbered("deciding", stage, stages))
        decision = driver.decide(stage + 1, plan, seed)
        plan = decision.plan
        with torch.no_grad():
            for name, tensor in decision.changed.items():
                model.get_parameter(name).copy_(tensor)
        MaskHandle(model, plan, sites=sites, stash=False).close(restore=False)
    return Plan(plan.sites, plan.solutions, plan.edge_axes, {**plan.request, "stages": stages}, joint=plan.joint)


def _result(model: nn.Module, plan: Plan, inputs: Mapping[str, Any], clock: Clock, duplicate_kv: bool) -> PrunedModel:
    """Compact the masked model; with zeros alone, which cannot be cut out, copy it."""
    if plan.unit_solutions():
        result = compacted(model, plan, inputs, clock, duplicate_kv=duplicate_kv)
    else:
        clock.stage("compacting")
        same = copy.deepcopy(model)
        clock.stage("checking")
        result = PrunedModel(same, plan, {}, *sizes(model, same), check_equivalence(model, same, inputs).require())
    return replace(result, zeros=measure_sparsity(model, find_sites(model)).zeros)


@contextmanager
def _restored(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Give the sites' tensors their values back at the end, bit for bit."""
    names = sorted({piece.param for site in sites for piece in site.tensors})
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)

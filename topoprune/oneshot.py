"""One call from a dense model to a smaller one: extract, solve, repair, compact, check.

A thin composition of the public verbs; the command ``topoprune prune`` is a shell around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from topoprune.architectures import GQA, find_sites
from topoprune.budgets import budget_count, check_rounding
from topoprune.compaction.compacting import prepare
from topoprune.compaction.dead import dead_units
from topoprune.extraction import extract, get_measure
from topoprune.graph import ModelGraph
from topoprune.masks import apply, unwrap
from topoprune.planning import Plan, solve
from topoprune.pruned_model import (
    Clock,
    Progress,
    PrunedModel,
    compacted,
    consumers,
    damages,
    evaluating,
    kept_counts,
    timed,
)
from topoprune.repair import MERGES
from topoprune.speed import probe

if TYPE_CHECKING:
    from topoprune.train import BudgetRecipe, NeuroPruneRecipe

__all__ = ["OneShot", "PrunedModel", "check_request", "compact_once", "prune_once"]

_STAGES = (
    "extracting",
    "solving heads",
    "solving neurons",
    "repairing",
    "compacting",
    "checking",
    "measuring damage",
    "timing",
)


@dataclass(frozen=True)
class OneShot:
    """What to keep and how to choose it.

    Args:
        budget: share of the units *kept* in every site, in (0, 1].
        heads, neurons: what is kept of heads (or KV groups) and of FFN neurons instead: a share, or a number
            of units; 1.0 leaves them alone.
        measure: a distance measure; default ``"output-gram"`` with calibration data, else ``"circuit-cosine"``.
        merge: how survivors take over, see `topoprune.apply`; default ``"least-squares"`` with calibration data,
            else ``"none"``.
        ridge: of ``"least-squares"``, relative to the mean of the moment's diagonal.
        rounding: keep a multiple of so many features in every site, see `topoprune.solve`.
        gqa: units of grouped-query attention, see `topoprune.find_sites`.
        time_limit: seconds for the heads of a site; the best found so far stays then.
        seed: for solvers that draw random numbers.

    Raises:
        ValueError: numbers out of range, unknown names, nothing to prune.
    """

    budget: float = 0.5
    heads: float | None = None
    neurons: float | None = None
    measure: str | None = None
    merge: str | None = None
    ridge: float = 1e-2
    rounding: int | None = None
    gqa: str = "groups"
    time_limit: float | None = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_request(self)

    @property
    def kept(self) -> dict[str, float]:
        """``heads`` and ``neurons`` -> what is kept of them."""
        return {
            "heads": self.budget if self.heads is None else self.heads,
            "neurons": self.budget if self.neurons is None else self.neurons,
        }

    @property
    def include(self) -> tuple[str, ...]:
        """What is pruned at all."""
        return tuple(name for name, value in self.kept.items() if isinstance(value, int) or value < 1)

    def needs_data(self) -> bool:
        """Whether measure or merge cannot do without calibration data."""
        measured = self.measure is not None and get_measure(self.measure).calibrated
        return measured or self.merge in ("scale", "least-squares")


def check_request(request: OneShot) -> None:
    """Raise ValueError for numbers and names that cannot mean anything; asks for no model."""
    for name, value in (("budget", request.budget), ("heads", request.heads), ("neurons", request.neurons)):
        if value is None and name != "budget":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} is {value!r}; expected what to keep, a share in (0, 1]")
        if isinstance(value, int) and name == "budget":
            raise ValueError(
                f"budget is {value}; expected the share of units to keep in every site, in (0, 1]: numbers of units go "
                "to heads= and neurons="
            )
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} is {value}; expected a share in (0, 1] or a number of units to keep, at least 1")
        if isinstance(value, float) and not 0 < value <= 1:
            raise ValueError(f"{name} is {value!r}; as a share of units to keep it must lie in (0, 1]")
    if not request.include:
        raise ValueError("heads and neurons are both to be kept whole: nothing would be pruned; keep less than 1.0")
    if request.merge is not None and request.merge not in MERGES:
        raise ValueError(f"unknown merge {request.merge!r}; available: {', '.join(MERGES)}")
    if request.measure is not None:
        get_measure(request.measure)
    if request.gqa not in GQA:
        raise ValueError(f"unknown gqa {request.gqa!r}; choose from {', '.join(GQA)}")
    check_rounding(request.rounding)
    if not (math.isfinite(request.ridge) and request.ridge >= 0):
        raise ValueError(f"ridge is {request.ridge!r}; expected a finite number >= 0")
    if request.time_limit is not None and not request.time_limit >= 0:
        raise ValueError(f"time_limit is {request.time_limit!r}; expected seconds >= 0, or None")
    if request.seed < 0:
        raise ValueError(f"seed is {request.seed}; expected an integer >= 0")


def prune_once(
    model: nn.Module,
    budget: float | None = None,
    *,
    recipe: BudgetRecipe | NeuroPruneRecipe | None = None,
    stages: int | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PrunedModel:
    """Return a smaller model: by a share of the heads and neurons of every layer, or by a recipe.

    Heads by soft domination (exact), neurons by the same objective (greedy), survivors refitted by least
    squares on the calibration data, then compacted while the masks are in force, and checked: the masked
    and the compacted model must agree. The given model is as it was before, bit for bit.

    Args:
        model: of a known family, under any task head; dense or compacted before.
        budget: share of the units *kept* in every site, in (0, 1]; default: half.
        recipe: instead of a budget, what would prune in training (`topoprune.Recipe`), carried out on calibration
            data without training, see `topoprune.oneshot_recipe.prune_by_recipe`.
        stages: with a recipe: cut in so many steps, the later ones decided on the model that the earlier ones
            left; default 1.
        calibration: batches, dicts of what the model takes; the more like its later data, the better. None:
            distances and importances from the weights alone, and no repair.
        progress: called with (stage, stages done, stages in all).
        options: the other fields of `OneShot`: heads, neurons, measure, merge, ridge, rounding, gqa,
            time_limit, seed. With a recipe: seed and gqa.

    Returns:
        A `PrunedModel`.

    Raises:
        ValueError: see `OneShot`; a model of an unknown family, a measure or a merge that needs calibration
            data where there is none, a compacted model that is not equal to the masked one.

    Complexity: three passes over the calibration data (the solvers take far less), O(n^3) per site for
        the repair of n features.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        ... )
        >>> tokens = torch.arange(8).reshape(2, 4)
        >>> pruned = prune_once(BertModel(config), 0.5, calibration=[{"input_ids": tokens}], neurons=5)
        >>> [row["units"] for row in pruned.layers()], pruned.equivalence.equal
        ([{'heads': (1, 2), 'neurons': (5, 12)}], True)
    """
    if recipe is not None:
        from topoprune.oneshot_recipe import prune_by_recipe

        foreign = sorted({*options, *(["budget"] if budget is not None else [])} - {"seed", "gqa"})
        if foreign:
            raise ValueError(f"{', '.join(foreign)} cannot be given beside recipe=: say it in the recipe")
        return prune_by_recipe(
            model, recipe, calibration=calibration, stages=1 if stages is None else stages, progress=progress, **options
        )
    if stages is not None:
        raise ValueError("stages= goes with recipe=: a share of every layer is cut at once")
    request = OneShot(0.5 if budget is None else budget, **options)
    model = unwrap(model)
    batches = None if calibration is None else list(calibration)
    if batches is None and request.needs_data():
        what = request.merge if request.merge in ("scale", "least-squares") else request.measure
        raise ValueError(f"{what!r} needs calibration=[batch, ...], dicts of what the model takes")
    _check_counts(model, request)
    clock = Clock(progress, _STAGES)
    with evaluating(model):
        plan = _decide(model, request, batches, clock)
        merge: Any = request.merge or ("none" if batches is None else "least-squares")
        clock.stage("repairing")
        inputs = batches[0] if batches else probe(model, request.seed)
        with apply(model, plan, merge=merge, calibration=batches, ridge=request.ridge) as handle:
            sites, after = handle.sites, consumers(model, handle.sites, plan)
            result = compacted(model, plan, inputs, clock, duplicate_kv=request.gqa == "any-query-heads")
        clock.stage("measuring damage")
        damage, dropped = ({}, {}) if batches is None else damages(model, sites, after, plan, batches)
        return timed(replace(result, damage=damage, dropped=dropped), model, inputs, clock)


def compact_once(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    rounding: int | None = None,
    duplicate_kv: bool = False,
    allow_changed_weights: bool = False,
    progress: Progress | None = None,
) -> PrunedModel:
    """Return `topoprune.compact` of a model, checked against the masked model, with figures as `prune_once`.

    Args:
        model: dense, or with the plan's zeros in its weights; it is as before afterwards, bit for bit.
        plan: what stays; None for all units that have no effect in the model as it is.
        calibration: the first of these batches is what is checked and timed; default: random tokens or pixels.
        rounding, duplicate_kv, allow_changed_weights: see `topoprune.compact`.
        progress: as for `prune_once`.

    Raises:
        ValueError: as `topoprune.compact`; no plan and no unit without effect; models that are not equal.

    Complexity: that of compaction and a few forwards.
    """
    model = unwrap(model)
    batches = [] if calibration is None else list(calibration)
    inputs = batches[0] if batches else probe(model)
    clock = Clock(progress, _STAGES)
    options: dict[str, Any] = {"rounding": rounding, "duplicate_kv": duplicate_kv}
    with evaluating(model):
        clock.stage("compacting")
        if plan is None:
            dead, _ = dead_units(model, duplicate_kv=duplicate_kv)
            if not dead.solutions:
                raise ValueError(
                    "every head and neuron of this model has an effect, so nothing can be removed without a plan; "
                    "give one (plan=, --plan; `solve` makes it), or prune and compact at once (prune_once, "
                    "`topoprune prune`)"
                )
            result = compacted(model, None, inputs, clock, **options)
            result = replace(result, plan=dead, kept=kept_counts(dead, rounding))
        else:
            # Raises where the plan does not fit, before its masks hide the weights it was not made for.
            prepare(model, plan, **options, allow_changed_weights=allow_changed_weights)
            with apply(model, plan, allow_changed_weights=True):
                result = compacted(model, plan, inputs, clock, **options, allow_changed_weights=True)
        return timed(result, model, inputs, clock)


def _check_counts(model: nn.Module, request: OneShot) -> None:
    """Refuse a budget that a site cannot meet before anything takes time."""
    for kind in request.include:
        for site in find_sites(model, (kind,), gqa=request.gqa):
            budget_count(request.kept[kind], site, request.rounding)


def _decide(model: nn.Module, request: OneShot, batches: list[Mapping[str, Any]] | None, clock: Clock) -> Plan:
    clock.stage("extracting")
    measure = request.measure or ("circuit-cosine" if batches is None else "output-gram")
    graph = extract(
        model,
        measure=measure,
        calibration=batches,
        include=request.include,
        importance="auto" if batches is None else "gram-diagonal",
        gqa=request.gqa,
    )
    plans = []
    for kind in request.include:
        clock.stage(f"solving {kind}")
        plans.append(_solve(graph, kind, measure, request))
    return plans[0] if len(plans) == 1 else plans[0] | plans[1]


def _solve(graph: ModelGraph, kind: Any, measure: str, request: OneShot) -> Plan:
    return solve(
        graph,
        budget=request.kept[kind],
        problem=kind,
        objective="soft" if get_measure(measure).normalised else "k-centre",
        rounding=request.rounding,
        time_limit=request.time_limit,
        seed=request.seed,
    )

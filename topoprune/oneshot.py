"""One call from a dense model to a smaller one: extract, solve, repair, compact, check.

A thin composition of the public verbs; the command ``topoprune prune`` is a shell around it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from topoprune.architectures import GQA, counted_matrices, find_sites
from topoprune.budgets import budget_count, check_rounding
from topoprune.compaction.compacting import compact, prepare
from topoprune.compaction.cut import padded
from topoprune.compaction.dead import dead_units
from topoprune.extraction import collect_gram, extract, get_measure
from topoprune.graph import ModelGraph, Site
from topoprune.masks import apply, unwrap
from topoprune.planning import Plan, solve
from topoprune.repair import MERGES, consumer_matrix, repair_damage
from topoprune.speed import compare_speed, probe

if TYPE_CHECKING:
    from topoprune.compaction.equivalence import Equivalence

__all__ = ["OneShot", "PrunedModel", "check_request", "compact_once", "prune_once"]

Progress = Callable[[str, int, int], None]
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


@dataclass(frozen=True, eq=False)
class PrunedModel:
    """A compacted model and how it came about.

    Args:
        model: the smaller model, in eval mode. plan: what stayed, with certificates.
        kept: site -> number of units that stay; with rounding in compaction more than the plan's.
        parameters: number of all parameters, before and after.
        matrix_parameters: as `parameters`, attention and FFN matrices only: what sparsity is counted over.
        damage: site -> E|Wx - W'x|^2 / E|Wx|^2 at its consumer's output on the calibration data, for the weights
            as they are now; empty without data.
        dropped: as `damage`, had the units been dropped without repair.
        equivalence: masked against compacted model.
        seconds: stage -> wall-clock seconds.
        batch_seconds: seconds of one forward of a batch, before and after (medians of interleaved runs).
        batch_shape: shape of that batch.
    """

    model: nn.Module
    plan: Plan
    kept: Mapping[str, int]
    parameters: tuple[int, int]
    matrix_parameters: tuple[int, int]
    equivalence: Equivalence
    seconds: Mapping[str, float] = field(default_factory=dict)
    batch_seconds: tuple[float, float] = (math.nan, math.nan)
    batch_shape: tuple[int, ...] = ()
    damage: Mapping[str, float] = field(default_factory=dict)
    dropped: Mapping[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of the attention and FFN matrix parameters that is gone."""
        before, after = self.matrix_parameters
        return 1 - after / before if before else 0.0

    @property
    def speed(self) -> float:
        """How many times faster one batch runs than before."""
        before, after = self.batch_seconds
        return before / after

    def layers(self) -> list[dict[str, Any]]:
        """Return one row a layer: stack, layer, ``(kept, of)`` by kind of unit, worst gap, damage, dropped."""
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        for site in self.plan.sites:
            if site.kind == "input_dim":
                continue
            row = rows.setdefault(
                (site.stack, site.layer), {"stack": site.stack, "layer": site.layer, "units": {}, "gap": None}
            )
            row["units"][_label(site)] = (self.kept.get(site.name, site.n_units), site.n_units)
            solution = self.plan.solutions.get(site.name)
            if solution is not None and not math.isnan(solution.gap):
                row["gap"] = max(row["gap"] or 0.0, solution.gap)
            for name, values in (("damage", self.damage), ("dropped", self.dropped)):
                if site.name in values:
                    row.setdefault(name, {})[_label(site)] = values[site.name]
        return list(rows.values())

    def figures(self) -> dict[str, Any]:
        """Return the figures, JSON-ready."""
        return {
            "parameters": list(self.parameters),
            "sparsity": self.sparsity,
            "matrix_parameters": list(self.matrix_parameters),
            "damage": _mean(self.damage),
            "damage_without_repair": _mean(self.dropped),
            "equivalence": self.equivalence.to_dict(),
            "speed": self.speed,
            "batch_seconds": list(self.batch_seconds),
            "batch_shape": list(self.batch_shape),
            "gap": None if math.isnan(self.plan.gap) else self.plan.gap,
            "seconds": dict(self.seconds),
            "layers": self.layers(),
            "request": dict(self.plan.request),
        }


def prune_once(
    model: nn.Module,
    budget: float = 0.5,
    *,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PrunedModel:
    """Return a smaller model that keeps a share of the heads and neurons of every layer.

    Heads by soft domination (exact), neurons by the same objective (greedy), survivors refitted by least
    squares on the calibration data, then compacted while the masks are in force, and checked: the masked
    and the compacted model must agree. The given model is as it was before, bit for bit.

    Args:
        model: of a known family, under any task head; dense or compacted before.
        budget: share of the units *kept* in every site, in (0, 1].
        calibration: batches, dicts of what the model takes; the more like its later data, the better. None:
            distances and importances from the weights alone, and no repair.
        progress: called with (stage, stages done, stages in all).
        options: the other fields of `OneShot`: heads, neurons, measure, merge, ridge, rounding, gqa,
            time_limit, seed.

    Returns:
        A `PrunedModel`.

    Raises:
        ValueError: see `OneShot`; a model of an unknown family, a measure or a merge that needs calibration
            data where there is none, a compacted model that is not equal to the masked one.

    Complexity: three passes over the calibration data (the solvers take far less), O(n^3) per site for
        the repair of n features.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        ... )
        >>> tokens = torch.arange(8).reshape(2, 4)
        >>> pruned = prune_once(BertModel(config), 0.5, calibration=[{"input_ids": tokens}], neurons=5)
        >>> [row["units"] for row in pruned.layers()], pruned.equivalence.equal
        ([{'heads': (1, 2), 'neurons': (5, 12)}], True)
    """
    request = OneShot(budget, **options)
    model = unwrap(model)
    batches = None if calibration is None else list(calibration)
    if batches is None and request.needs_data():
        what = request.merge if request.merge in ("scale", "least-squares") else request.measure
        raise ValueError(f"{what!r} needs calibration=[batch, ...], dicts of what the model takes")
    _check_counts(model, request)
    clock = _Clock(progress)
    with _evaluating(model):
        plan = _decide(model, request, batches, clock)
        merge: Any = request.merge or ("none" if batches is None else "least-squares")
        clock.stage("repairing")
        inputs = batches[0] if batches else probe(model, request.seed)
        with apply(model, plan, merge=merge, calibration=batches, ridge=request.ridge) as handle:
            sites, consumers = handle.sites, _consumers(model, handle.sites, plan)
            result = _compacted(model, plan, inputs, clock, duplicate_kv=request.gqa == "any-query-heads")
        clock.stage("measuring damage")
        damage, dropped = ({}, {}) if batches is None else _damages(model, sites, consumers, plan, batches)
        return _timed(replace(result, damage=damage, dropped=dropped), model, inputs, clock)


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
    clock = _Clock(progress)
    options: dict[str, Any] = {"rounding": rounding, "duplicate_kv": duplicate_kv}
    with _evaluating(model):
        clock.stage("compacting")
        if plan is None:
            dead, _ = dead_units(model, duplicate_kv=duplicate_kv)
            if not dead.solutions:
                raise ValueError(
                    "every head and neuron of this model has an effect, so nothing can be removed without a plan; "
                    "give one (plan=, --plan; `solve` makes it), or prune and compact at once (prune_once, "
                    "`topoprune prune`)"
                )
            result = replace(_compacted(model, None, inputs, clock, **options), plan=dead, kept=_kept(dead, rounding))
        else:
            # Raises where the plan does not fit, before its masks hide the weights it was not made for.
            prepare(model, plan, **options, allow_changed_weights=allow_changed_weights)
            with apply(model, plan, allow_changed_weights=True):
                result = _compacted(model, plan, inputs, clock, **options, allow_changed_weights=True)
        return _timed(result, model, inputs, clock)


def _compacted(
    model: nn.Module, plan: Plan | None, inputs: Mapping[str, Any], clock: _Clock, **options: Any
) -> PrunedModel:
    """Compact a model with the plan's masks in force, and check that the result computes the same."""
    from topoprune.compaction.equivalence import check_equivalence

    clock.stage("compacting")
    smaller = compact(model, plan, **options)
    clock.stage("checking")
    equivalence = check_equivalence(model, smaller, inputs).require()
    plan = Plan(find_sites(model), {}) if plan is None else plan
    kept = _kept(plan, options.get("rounding"))
    return PrunedModel(smaller, plan, kept, *_sizes(model, smaller), equivalence)


def _kept(plan: Plan, rounding: int | None) -> dict[str, int]:
    by_name = {site.name: site for site in plan.sites}
    return {name: int(padded(by_name[name], s.keep, rounding).sum()) for name, s in plan.unit_solutions().items()}


def _timed(result: PrunedModel, model: nn.Module, inputs: Mapping[str, Any], clock: _Clock) -> PrunedModel:
    clock.stage("timing")
    seconds = compare_speed(model, result.model, inputs)
    clock.stage("done")
    return replace(result, batch_seconds=seconds, batch_shape=_shape(inputs), seconds=clock.seconds)


class _Clock:
    """Times the stages and tells them."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._now, self._since = progress, "", time.perf_counter()

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        if self._now:
            self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self._now, self._since = name, now
        if self._progress is not None:
            done = _STAGES.index(name) if name in _STAGES else len(_STAGES)
            self._progress(name, done, len(_STAGES))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_counts(model: nn.Module, request: OneShot) -> None:
    """Refuse a budget that a site cannot meet before anything takes time."""
    for kind in request.include:
        for site in find_sites(model, (kind,), gqa=request.gqa):
            budget_count(request.kept[kind], site, request.rounding)


def _decide(model: nn.Module, request: OneShot, batches: list[Mapping[str, Any]] | None, clock: _Clock) -> Plan:
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


def _consumers(model: nn.Module, sites: Sequence[Site], plan: Plan) -> dict[str, torch.Tensor]:
    """Return site -> copy of its consumer's (O, N) weight as it is now, of the sites that lose units."""
    params = dict(model.named_parameters())
    return {
        site.name: consumer_matrix(site, params[site.writes[0].param].detach()).clone()
        for site in sites
        if site.consumer and not plan.keep(site.name).all()
    }


def _damages(
    model: nn.Module,
    sites: Sequence[Site],
    after: Mapping[str, torch.Tensor],
    plan: Plan,
    batches: list[Mapping[str, Any]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Return site -> relative squared error at the consumer's output: as it is now, and if units were dropped."""
    params = dict(model.named_parameters())
    by_name = {site.name: site for site in sites if site.name in after}
    damage: dict[str, float] = {}
    dropped: dict[str, float] = {}
    for name, moment in collect_gram(model, by_name.values(), batches):
        site = by_name[name]
        weight = consumer_matrix(site, params[site.writes[0].param].detach())
        keep = torch.from_numpy(plan.keep(name).repeat(site.unit_width)).to(weight)
        energy = repair_damage(weight, torch.zeros_like(weight), moment)
        for result, changed in ((damage, after[name]), (dropped, weight * keep)):
            result[name] = repair_damage(weight, changed, moment) / energy if energy > 0 else 0.0
    return damage, dropped


def _sizes(before: nn.Module, after: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    names = counted_matrices(find_sites(before))
    matrices = [sum(model.get_parameter(name).numel() for name in names) for model in (before, after)]
    everything = [sum(parameter.numel() for parameter in model.parameters()) for model in (before, after)]
    return (everything[0], everything[1]), (matrices[0], matrices[1])


def _shape(inputs: Mapping[str, Any]) -> tuple[int, ...]:
    return next((tuple(value.shape) for value in inputs.values() if torch.is_tensor(value)), ())


def _label(site: Site) -> str:
    if site.kind == "neuron":
        return "neurons"
    units = "KV groups" if site.kind == "kv_group" else "heads"
    return f"cross {units}" if site.block == "cross_attention" else units


def _mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None

"""A model made smaller in one call: the result, the figures, and the steps that every way to it shares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from topoprune.architectures import counted_matrices, find_sites
from topoprune.compaction.compacting import compact
from topoprune.compaction.cut import padded
from topoprune.extraction import collect_gram
from topoprune.graph import Site
from topoprune.planning import Plan
from topoprune.repair import consumer_matrix, repair_damage
from topoprune.speed import compare_speed

if TYPE_CHECKING:
    from topoprune.compaction.equivalence import Equivalence

__all__ = [
    "Clock",
    "Progress",
    "PrunedModel",
    "compacted",
    "consumers",
    "damages",
    "evaluating",
    "kept_counts",
    "sizes",
    "timed",
]

Progress = Callable[[str, int, int], None]


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
        zeros: share of the attention and FFN matrix entries that are zero or gone.
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
    zeros: float = 0.0

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
            "zeros": max(self.zeros, self.sparsity),
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


def compacted(
    model: nn.Module, plan: Plan | None, inputs: Mapping[str, Any], clock: Clock, **options: Any
) -> PrunedModel:
    """Compact a model with the plan's masks in force, and check that the result computes the same."""
    from topoprune.compaction.equivalence import check_equivalence

    clock.stage("compacting")
    smaller = compact(model, plan, **options)
    clock.stage("checking")
    equivalence = check_equivalence(model, smaller, inputs).require()
    plan = Plan(find_sites(model), {}) if plan is None else plan
    kept = kept_counts(plan, options.get("rounding"))
    return PrunedModel(smaller, plan, kept, *sizes(model, smaller), equivalence)


def kept_counts(plan: Plan, rounding: int | None) -> dict[str, int]:
    """Return site -> units that stay where counts are rounded up in compaction."""
    by_name = {site.name: site for site in plan.sites}
    return {name: int(padded(by_name[name], s.keep, rounding).sum()) for name, s in plan.unit_solutions().items()}


def timed(result: PrunedModel, model: nn.Module, inputs: Mapping[str, Any], clock: Clock) -> PrunedModel:
    """Return the result with the seconds of a batch, before and after, and of the stages."""
    clock.stage("timing")
    seconds = compare_speed(model, result.model, inputs)
    clock.stage("done")
    return replace(result, batch_seconds=seconds, batch_shape=_shape(inputs), seconds=clock.seconds)


class Clock:
    """Times the stages and tells them."""

    def __init__(self, progress: Progress | None, stages: Sequence[str]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._stages, self._now, self._since = progress, stages, "", time.perf_counter()

    def stage(self, name: str) -> None:
        """End the stage before, begin this one."""
        now = time.perf_counter()
        if self._now:
            self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self._now, self._since = name, now
        if self._progress is not None:
            done = self._stages.index(name) if name in self._stages else len(self._stages)
            self._progress(name, done, len(self._stages))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while; afterwards each module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def consumers(model: nn.Module, sites: Sequence[Site], plan: Plan) -> dict[str, torch.Tensor]:
    """Return site -> copy of its consumer's (O, N) weight as it is now, of the sites that lose units."""
    params = dict(model.named_parameters())
    return {
        site.name: consumer_matrix(site, params[site.writes[0].param].detach()).clone()
        for site in sites
        if site.consumer and not plan.keep(site.name).all()
    }


def damages(
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


def sizes(before: nn.Module, after: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the numbers of all parameters and of those in attention and FFN matrices, (before, after) each."""
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

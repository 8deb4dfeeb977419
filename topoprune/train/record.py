"""The record of a run: after every decision, the figures that the paper draws.

References: Dhurandhar et al., NeuroPrune, Findings of ACL 2024, arXiv 2404.01306 (connectivity over sparsity, heads
lost by layer, importance of removed against kept heads, how often a head goes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from topoprune.extraction.importance import magnitude
from topoprune.files import atomic_path
from topoprune.planning import Plan
from topoprune.sites import Site
from topoprune.sparsity import Sparsity, connectivity_sd
from topoprune.train.body import Body

if TYPE_CHECKING:
    from topoprune.train.pruner import Pruner

__all__ = ["HISTORY_FILE", "HeadSite", "RunRecord", "StepRecord", "head_importance", "step_record"]

HISTORY_FILE = "history.json"
_FORMAT, _SCHEMA = "topoprune.RunRecord", 1
ATTENTION = ("head", "kv_group")


@dataclass(frozen=True)
class StepRecord:
    """The model after one decision, and what the decision did to its heads (or KV groups).

    Args:
        step: optimizer steps done; 0 for the model training began with.
        zeros, removable, gatherable: shares of the attention and FFN weights, see `Sparsity`.
        connectivity_sd: standard deviation of the connectivity of FFN rows, percentage points. attention_sd: the
            same for the rows of [Q; K; V]. What was cut out counts as missing links.
        kept: attention site -> heads that stay.
        removed, returned: attention site -> heads that went, or came back, at this decision.
        importance: attention site -> mean |W_O| of each head just before the decision (the paper's measure, per
            entry); None for heads that were gone.
        energy: the same with the head's mean squared output (diagonal of the output Gram), where it was measured.
    """

    step: int
    zeros: float
    removable: float
    gatherable: float
    connectivity_sd: float | None
    attention_sd: float | None
    kept: Mapping[str, int]
    removed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    returned: Mapping[str, Sequence[int]] = field(default_factory=dict)
    importance: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    energy: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadSite:
    """An attention layer as it was when training began.

    Args:
        name: of the site. stack, layer, block: where it lies. n_units: its heads (or KV groups).
    """

    name: str
    stack: str
    layer: int
    block: str
    n_units: int


@dataclass(frozen=True)
class RunRecord:
    """One run: what was asked, which heads there were, and a `StepRecord` for every decision.

    The first step is the model as it was given, the last one the model at the end of training.

    Args:
        name: of the run, such as its folder. recipe: its `to_dict`. seed: of the solvers.
        sites: attention layers in model order. steps: in order.
    """

    name: str
    recipe: Mapping[str, Any]
    seed: int
    sites: tuple[HeadSite, ...]
    steps: tuple[StepRecord, ...]

    @classmethod
    def of(cls, pruner: Pruner, name: str = "run") -> RunRecord:
        """Return the record of a run so far; works on a closed pruner, as long as its model is there."""
        sites = tuple(HeadSite(s.name, s.stack, s.layer, s.block, s.n_units) for s in _attention(pruner.sites))
        steps = [*pruner.records]
        if not steps or steps[-1].step < pruner.step:  # none in states of earlier versions
            steps.append(pruner.measure())
        return cls(name, pruner.recipe.to_dict(), pruner.seed, sites, tuple(steps))

    def gone(self) -> dict[str, np.ndarray]:
        """Return attention site -> (n_units,) bool, True for heads that are gone in the end."""
        result = {site.name: np.zeros(site.n_units, dtype=bool) for site in self.sites}
        for step in self.steps:
            for name, units in step.removed.items():
                result[name][list(units)] = True
            for name, units in step.returned.items():
                result[name][list(units)] = False
        return result

    def worth(self, measure: str = "importance") -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Return attention site -> values of heads when they were removed, and of those kept at the same decision.

        Args:
            measure: ``"importance"`` or ``"energy"``. Only decisions that removed a head of a site count for it.
        """
        removed: dict[str, list[float]] = {site.name: [] for site in self.sites}
        kept: dict[str, list[float]] = {site.name: [] for site in self.sites}
        for step in self.steps:
            values = getattr(step, measure)
            for name, units in step.removed.items():
                if not units or name not in values:
                    continue
                for unit, value in enumerate(values[name]):
                    if value is not None:
                        (removed if unit in units else kept)[name].append(float(value))
        return removed, kept

    def ratio(self, measure: str = "importance") -> float:
        """Return how many times as important removed heads were as kept ones, a mean over sites; nan if unknown.

        The paper finds 1.0 to 1.3 with its importance: it removes what is redundant, not what is small.
        """
        removed, kept = self.worth(measure)
        ratios = [
            float(np.mean(removed[name]) / np.mean(kept[name]))
            for name in removed
            if removed[name] and kept[name] and np.mean(kept[name]) > 0
        ]
        return float(np.mean(ratios)) if ratios else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {"format": _FORMAT, "schema_version": _SCHEMA, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON, atomically; a folder gets ``history.json``. Returns the path."""
        target = Path(path) / HISTORY_FILE if Path(path).is_dir() else Path(path)
        with atomic_path(target) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), default=str) + "\n", encoding="utf-8")
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunRecord:
        """Read what `save` wrote; a folder means the ``history.json`` in it.

        Raises:
            FileNotFoundError: no such file. ValueError: not such a file, damaged, or of a newer version.
        """
        source = Path(path) / HISTORY_FILE if Path(path).is_dir() else Path(path)
        if not source.is_file():
            raise FileNotFoundError(
                f"no {HISTORY_FILE} at {path}; expected the folder of a pruned run (topoprune train --output-dir ...)"
            )
        try:
            data = json.loads(source.read_text(encoding="utf-8"))
            if data.get("format") != _FORMAT:
                raise ValueError(f"it holds a {data.get('format')!r}, expected {_FORMAT!r}")
            if data["schema_version"] > _SCHEMA:
                raise ValueError(f"schema version {data['schema_version']} is newer than {_SCHEMA}; upgrade topoprune")
            known = {f.name for f in fields(StepRecord)}
            steps = tuple(StepRecord(**{k: v for k, v in step.items() if k in known}) for step in data["steps"])
            sites = tuple(HeadSite(**site) for site in data["sites"])
            return cls(data["name"], data["recipe"], data["seed"], sites, steps)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source} is not a readable record of a run: {error}") from error


def head_importance(model: nn.Module, body: Body, plan: Plan) -> dict[str, list[float | None]]:
    """Return attention site -> mean |W_O| of each planned head; None for those a plan has removed already.

    Complexity: one pass over the output projections.
    """
    result: dict[str, list[float | None]] = {}
    for site in _attention(body.sites):
        values: list[float | None] = [None] * site.n_units
        if site.name in body.now:
            today = body.now[site.name]
            tensors = {p.param: model.get_parameter(p.param).detach() for p in today.writes}
            entries = sum(math.prod(p.shape) // p.shape[p.axis] * p.width for p in today.writes if len(p.shape) == 2)
            keep = plan.keep(site.name)
            for unit, total in zip(body.live[site.name], magnitude(tensors, today).tolist(), strict=True):
                if keep[unit]:
                    values[int(unit)] = total / entries
        result[site.name] = values
    return result


@torch.no_grad()
def step_record(
    model: nn.Module,
    body: Body,
    step: int,
    figures: Sparsity,
    before: Plan,
    after: Plan,
    importance: Mapping[str, Sequence[float | None]] | None = None,
    energy: Mapping[str, np.ndarray] | None = None,
) -> StepRecord:
    """Measure the model after a decision.

    Args:
        model: with the new weights and masks. body: its sites. step: optimizer steps done.
        figures: its sparsity. before, after: plans in force before and after the decision, over planned units.
        importance: from `head_importance`, before anything was changed.
        energy: attention site -> (n_units,) mean squared output of each head, nan where it was gone.
    """
    now = body.sites_now
    removed, returned, kept = {}, {}, {}
    for site in _attention(body.sites):
        was, stays = before.keep(site.name), after.keep(site.name)
        kept[site.name] = int(stays.sum())
        if (was & ~stays).any():
            removed[site.name] = np.flatnonzero(was & ~stays).tolist()
        if (~was & stays).any():
            returned[site.name] = np.flatnonzero(~was & stays).tolist()
    spread = {
        kind: connectivity_sd(model, now, kind=kind, planned=body.sites)  # type: ignore[arg-type]
        for kind in ("neuron", "input_dim")
    }
    return StepRecord(
        step,
        figures.zeros,
        figures.removable,
        figures.gatherable,
        _number(spread["neuron"]),
        _number(spread["input_dim"]),
        kept,
        removed,
        returned,
        dict(importance or {}),
        {name: [_number(value) for value in values] for name, values in (energy or {}).items()},
    )


def _attention(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if site.kind in ATTENTION]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

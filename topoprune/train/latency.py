"""Seconds of a forward as a budget: a cost table measured on layers, verified on whole compacted models."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.compaction.compacting import compact
from topoprune.planning import Plan
from topoprune.sites import Site
from topoprune.train.body import Body
from topoprune.train.costs import Costs, evaluating, make_inputs
from topoprune_solvers import Solution, Status

__all__ = ["LatencyMeter", "Measured", "latency_costs", "layer_path", "meet", "seconds_of"]

POINTS = (0.75, 0.5, 0.25, 0.0)  # shares of the units of a site at which the table is measured, beside all of them
TABLE_SECONDS = 5.0  # for all points, in the fewest rounds in any case
VERIFY_SECONDS = 2.5  # for one model, in the fewest rounds in any case
ROUNDS, FEWEST = 15, 3
TRIES = 6
AIM = 0.99  # of the budget, so that noise does not need another try
SLACK = 0.03  # a model this much faster than the budget (relative) is near enough


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds a call takes, an accelerator's work included."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Measured:
    """Seconds of a smaller model beside those of the dense one.

    Args:
        ratio: median seconds over the dense model's median. noise: standard error of the ratio, from the scatter of
            the rounds (1.48 * median absolute deviation / sqrt(rounds)). dense: seconds of the dense model.
    """

    ratio: float
    noise: float
    dense: float


class LatencyMeter:
    """Measures forwards of a model cut to any number of units; what is cut, and its weights, make no difference.

    Args:
        body: the live model, dense or with units cut out already. shape: batch size and length.
        dense: seconds of the dense model, where `body` no longer holds it.
    """

    def __init__(self, body: Body, shape: tuple[int, int], dense: float | None = None) -> None:
        self.body, self.model = body, body.model
        self.inputs = make_inputs(body.model, shape)
        self.device = next(body.model.parameters()).device
        self._known_dense = dense if body.shrunk else None

    def cut(self, kept: Mapping[str, int]) -> nn.Module:
        """Return a compacted copy of the model that keeps the first so many units of the named sites."""
        solutions = {}
        for name, count in kept.items():
            site = self.body.now.get(name)
            if site is not None and count < site.n_units:
                keep = np.arange(site.n_units) < count
                if site.n_groups:  # equally many in each group
                    groups = np.arange(site.n_units) % (site.n_units // site.n_groups)
                    keep = groups < count // site.n_groups
                solutions[name] = Solution(keep, 0.0, "min", Status.FEASIBLE, "latency")
        if not solutions:
            return copy.deepcopy(self.model)
        plan = Plan(self.body.sites_now, solutions)
        return compact(self.model, plan, gather="never", allow_changed_weights=True)

    def measure(self, kept: Mapping[str, int]) -> Measured:
        """Return the seconds of a compacted copy, rounds interleaved with the dense model's."""
        smaller = self.cut(kept)
        models = [smaller] if self._known_dense is not None else [self.model, smaller]
        calls = [lambda model=model: model(**self.inputs) for model in models]
        with evaluating(smaller), evaluating(self.model):
            took = _interleaved(calls, self.device, VERIFY_SECONDS)
        dense = self._known_dense if self._known_dense is not None else statistics.median(took[0])
        base = took[0] if self._known_dense is None else [dense] * len(took[0])
        ratios = [small / whole for small, whole in zip(took[-1], base, strict=True)]
        ratio = statistics.median(took[-1]) / dense
        scatter = statistics.median(abs(r - statistics.median(ratios)) for r in ratios)
        return Measured(ratio, 1.4826 * scatter / math.sqrt(len(ratios)), dense)

    def layers(self, cuts: Sequence[tuple[Site, int]]) -> list[tuple[float, float]]:
        """Return (seconds of its layer dense, cut) for each of some (site, number of units kept)."""
        paths = {site.name: layer_path(self.model, self.body.sites_now, site) for site, _ in cuts}
        captured: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def keep_inputs(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                captured.setdefault(path, (args, kwargs))

            return hook

        hooks = [
            self.model.get_submodule(path).register_forward_pre_hook(keep_inputs(path), with_kwargs=True)
            for path in sorted(set(paths.values()))
        ]
        try:
            with evaluating(self.model):
                self.model(**self.inputs)
        finally:
            for hook in hooks:
                hook.remove()
        result: list[tuple[float, float]] = [(0.0, 0.0)] * len(cuts)
        for pack in _packs(cuts, paths):
            smaller = self.cut({cuts[i][0].name: cuts[i][1] for i in pack})
            with evaluating(smaller), evaluating(self.model):
                for i in pack:
                    path = paths[cuts[i][0].name]
                    args, kwargs = captured[path]
                    pair = [self.model.get_submodule(path), smaller.get_submodule(path)]
                    calls = [lambda m=m, a=args, k=kwargs: m(*a, **k) for m in pair]
                    took = _interleaved(calls, self.device, TABLE_SECONDS / len(cuts))
                    result[i] = statistics.median(took[0]), statistics.median(took[1])
        return result


def layer_path(model: nn.Module, sites: Sequence[Site], site: Site) -> str:
    """Return the module that runs a site's layer: the innermost around all tensors of the layer's sites."""
    own = [s for s in sites if (s.stack, s.layer) == (site.stack, site.layer)]
    names = [piece.param.rpartition(".")[0].split(".") for s in own for piece in s.tensors]
    common: list[str] = []
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and isinstance(model.get_submodule(".".join(common)), (nn.ModuleList, nn.ModuleDict)):
        common.pop()  # lists of modules do not run
    return ".".join(common)


def latency_costs(meter: LatencyMeter, share: float, sites: Sequence[Site]) -> Costs:
    """Return seconds per number of units kept, relative to the dense forward (whose cost is 1).

    One layer of each kind (same shapes, same place) stands for all of them. Between the points measured the
    table is linear; it never falls as units are added.

    Raises:
        ValueError: a model whose inputs cannot be made up, or that cannot be compacted.
    """
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        if site.kind != "input_dim":
            shapes = tuple((p.role, p.shape) for p in site.tensors)
            groups.setdefault((site.kind, site.stack, site.block, site.n_units, shapes), []).append(site)
    cuts: list[tuple[Site, int]] = []
    for number, group in enumerate(groups.values()):
        step = max(1, group[0].equal_groups)
        # Kinds take turns over the layers, so that one copy of the model serves several of them.
        site = group[(len(group) // 2 + number) % len(group)]
        counts = {max(step, int(point * site.n_units) // step * step) for point in POINTS} - {site.n_units}
        cuts += [(site, count) for count in sorted(counts)]
    seconds = meter.layers(cuts)
    dense = meter.measure({}).dense
    tables: dict[str, np.ndarray] = {}
    for group in groups.values():
        site = group[0]
        saved = {c: (a - b) / dense for (s, c), (a, b) in zip(cuts, seconds, strict=True) if s in group}
        points = np.array([*saved, site.n_units], dtype=np.float64)
        saving = np.maximum.accumulate(np.maximum(np.array([*saved.values(), 0.0]), 0.0)[::-1])[::-1]
        table = saving[0] - np.interp(np.arange(site.n_units + 1.0), points, saving)
        tables |= {s.name: table for s in group}
    whole = math.fsum(float(table[-1]) for table in tables.values())
    return Costs("latency", "of the dense forward", 1.0 - whole, tables, share)


def meet(
    costs: Costs, meter: LatencyMeter, choose: Callable[[Costs], dict[str, int]], least: Mapping[str, int]
) -> tuple[dict[str, int], Costs, Measured]:
    """Choose counts by the table, verify them on a compacted copy, and correct the table until they fit.

    The table is scaled by the saving measured over the saving predicted; counts that need less than the
    budget by more than `SLACK` and twice the noise are given another try. Of all that was verified at or below the
    budget the slowest is returned. What noise there is in the medians is left in them and reported.

    Args:
        costs: the table. choose: table with a budget -> counts kept. least: the fewest that may stay.

    Returns:
        The counts, the corrected table, and what was measured.

    Raises:
        ValueError: even the fewest units take longer.
    """
    share = costs.budget
    found: tuple[dict[str, int], Costs, Measured] | None = None
    tried: dict[tuple[tuple[str, int], ...], Measured] = {}
    aim = AIM
    for attempt in range(TRIES):
        # The budget of a table that cannot go so low is its least cost: then the fewest units are tried.
        bottom = costs.total(least)
        kept = choose(replace(costs, budget=max(aim * share, bottom * (1 + 1e-9))))
        key = tuple(sorted(kept.items()))
        if key in tried:
            break
        measured = tried[key] = meter.measure(kept)
        if measured.ratio <= share and (found is None or measured.ratio > found[2].ratio):
            found = kept, replace(costs, budget=share), measured
        if share - max(SLACK * share, 2 * measured.noise) <= measured.ratio <= share:
            break
        saving = costs.dense - costs.total(kept)
        real = 1.0 - measured.ratio
        scale = min(max(real / saving, 0.25), 4.0) if saving > 0 else 1.0
        tables = {name: scale * table for name, table in costs.tables.items()}
        # Cost 1 for the dense model, whatever the tables.
        fixed = 1.0 - math.fsum(float(table[-1]) for table in tables.values())
        costs = replace(costs, tables=tables, fixed=fixed)
        if measured.ratio > share:
            aim *= min(0.98, share / measured.ratio) if attempt else 1.0
    if found is None:
        smallest = meter.measure(least)
        if smallest.ratio > share:
            raise ValueError(
                f"latency={share:g} cannot be reached on {meter.device}: with the fewest units that may stay a forward "
                f"still takes {smallest.ratio:.1%} (+- {smallest.noise:.1%}) of the dense model's "
                f"{smallest.dense * 1e3:.3g} ms; ask for more, or for another shape="
            )
        found = dict(least), replace(costs, budget=share), smallest
    return found


def _packs(cuts: Sequence[tuple[Site, int]], paths: Mapping[str, str]) -> list[list[int]]:
    """Share out cuts over copies of the model, no layer cut twice in one of them."""
    packs: list[list[int]] = []
    for i, (site, _) in enumerate(cuts):
        path = paths[site.name]
        fits = (p for p in packs if all(paths[cuts[j][0].name] != path for j in p))
        pack = next(fits, None)
        if pack is None:
            packs.append([i])
        else:
            pack.append(i)
    return packs


def _interleaved(calls: Sequence[Callable[[], object]], device: torch.device, limit: float) -> list[list[float]]:
    """Return seconds per call and round: `FEWEST` rounds at least, more while they fit the limit."""
    took: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()  # warm-up
    started = time.perf_counter()
    for done in range(ROUNDS):
        if done >= FEWEST and time.perf_counter() - started > limit:
            break
        for call, seconds in zip(calls, took, strict=True):
            seconds.append(seconds_of(call, device))
    return took

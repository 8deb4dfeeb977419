"""The model in training: its sites as planned, and as they are once units have been cut out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import counted_matrices, matrix_parameters
from topoprune.compaction.cut import Cut, make_cut
from topoprune.compaction.inplace import shrink
from topoprune.graph import Site
from topoprune.planning import Plan
from topoprune.sparsity import Sparsity, measure_sparsity
from topoprune_solvers import Solution, Status

__all__ = ["Body"]


class Body:
    """Maps decisions on the planned units to the tensors there are now.

    Plans, targets and reports speak of the units the model had when training began; tensors hold those
    that were not cut out yet, in the same order.

    Args:
        model: the live model. sites: its sites when training began.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.model, self.sites = model, tuple(sites)
        self.now: dict[str, Site] = {site.name: site for site in sites}
        self.live: dict[str, np.ndarray] = {site.name: np.arange(site.n_units) for site in sites}

    @property
    def shrunk(self) -> bool:
        """Whether anything was cut out."""
        return any(self.live[site.name].size < site.n_units for site in self.sites)

    @property
    def sites_now(self) -> tuple[Site, ...]:
        """The sites that still have units, with today's shapes."""
        return tuple(self.now.values())

    def of_kind(self, *kinds: str) -> list[Site]:
        """Return today's sites of some kinds."""
        return [site for site in self.now.values() if site.kind in kinds]

    def positions(self, name: str, units: np.ndarray) -> np.ndarray:
        """Return where planned units lie in today's tensors, as unit indices; they must not be cut out."""
        where = np.searchsorted(self.live[name], units)
        assert np.array_equal(self.live[name][where], units), f"{name}: a unit was cut out already"
        return where

    def down(self, plan: Plan) -> Plan:
        """Return a plan over the planned units as one over today's."""
        if not self.shrunk:
            return plan
        solutions = {
            name: replace(
                s,
                keep=s.keep[self.live[name]],
                dominator=None,
                dominator_distance=None,
                importance=None,
                bound=None,
            )
            for name, s in plan.unit_solutions().items()
            if name in self.now
        }
        return Plan(self.sites_now, solutions, request=plan.request)

    def cut(self, plan: Plan) -> Cut | None:
        """Return what would be cut out by a plan over the planned units; None if nothing new goes."""
        today = self.down(plan)
        going = {
            name: solution
            for name, solution in today.unit_solutions().items()
            if self.now[name].kind != "input_dim" and not solution.keep.all()
        }
        return make_cut(self.model, self.sites_now, Plan(self.sites_now, going), gather="never") if going else None

    def check(self) -> None:
        """Raise ValueError if some site could not be cut; nothing is done."""
        first = {}
        for site in self.of_kind("head", "kv_group", "neuron"):
            if site.n_groups:
                raise ValueError(
                    f"compact=True cannot keep equally many query heads in the KV groups of {site.name!r}; find the "
                    "sites with gqa='groups'"
                )
            keep = np.arange(site.n_units) > 0
            first[site.name] = Solution(keep, 0.0, "min", Status.FEASIBLE, "dry-run")
        make_cut(self.model, self.sites_now, Plan(self.sites_now, first), gather="never")

    def shrink(self, plan: Plan, optimizers: Sequence[torch.optim.Optimizer] = ()) -> bool:
        """Cut out what a plan prunes, optimizer state included; True if anything went.

        Raises:
            UnknownState: an optimizer whose state cannot be cut. Nothing is changed.
        """
        cut = self.cut(plan)
        if cut is None:
            return False
        shrink(self.model, cut, optimizers)
        self._settle({name: np.flatnonzero(plan.keep(name)) for name in plan.unit_solutions()})
        return True

    def take_shape(self, live: Mapping[str, np.ndarray]) -> None:
        """Make the model have the units of a saved run: cut them out, or find that it was done before.

        Args:
            live: site name -> planned units that are there.

        Raises:
            ValueError: the model has neither the planned shapes nor these.
        """
        params = dict(self.model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in params.items()}
        dense = {piece.param: piece.shape for site in self.sites for piece in site.tensors}
        small = _shapes(self.sites, {**{s.name: np.arange(s.n_units) for s in self.sites}, **live})
        if all(shapes.get(name) == shape for name, shape in small.items()):
            self._settle(live)
            return
        for name, shape in dense.items():
            if shapes.get(name) != tuple(shape):
                raise ValueError(
                    f"{name!r} has shape {shapes.get(name)}, the saved run began with {tuple(shape)} and had "
                    f"{small[name]}; give the model it began with, or the checkpoint's own (topoprune.load)"
                )
        solutions = {}
        for site in self.sites:
            if site.kind != "input_dim":
                keep = np.isin(np.arange(site.n_units), live.get(site.name, np.arange(site.n_units)))
                solutions[site.name] = Solution(keep, 0.0, "min", Status.FEASIBLE, "resumed")
        self.shrink(Plan(self.sites, solutions))

    def _settle(self, live: Mapping[str, np.ndarray]) -> None:
        for site in self.sites:
            if site.kind != "input_dim" and site.name in live:
                self.live[site.name] = np.array(live[site.name], dtype=np.int64)
        shapes = _shapes(self.sites, self.live)
        empty = {
            (s.stack, s.layer, s.block) for s in self.sites if s.kind != "input_dim" and not self.live[s.name].size
        }
        # Nothing can be decided any more where no unit is left, nor on the inputs of such an attention.
        self.now = {
            site.name: _resized(site, self.live[site.name].size, shapes)
            for site in self.sites
            if (site.stack, site.layer, site.block) not in empty
        }

    def sparsity(self) -> Sparsity:
        """Return zeros, removable and gatherable shares, what was cut out counting as before."""
        today = measure_sparsity(self.model, self.sites_now)
        if not self.shrunk:
            return today
        total = matrix_parameters(self.sites)
        there = sum(math.prod(shape) for shape in _shapes(self.sites, self.live, counted_matrices(self.sites)).values())
        gone, counted = total - there, today.parameters
        kept = {}
        for site in self.sites:
            if site.kind != "input_dim":
                kept[site.name] = today.kept.get(site.name, (0, 0))[0], site.n_units
        return Sparsity(
            zeros=(gone + today.zeros * counted) / total,
            removable=(gone + today.removable * counted) / total,
            gatherable=today.gatherable * counted / total,
            parameters=total,
            kept=kept,
        )


def _shapes(
    sites: Sequence[Site], live: Mapping[str, np.ndarray], names: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return parameter name -> shape once only the live units are there."""
    shapes = {piece.param: list(piece.shape) for site in sites for piece in site.tensors}
    for site in sites:
        gone = site.n_units - len(live[site.name])
        for piece in site.slices if gone else ():
            shapes[piece.param][piece.axis] -= gone * piece.width
    return {name: tuple(shape) for name, shape in shapes.items() if names is None or name in names}


def _resized(site: Site, n_units: int, shapes: Mapping[str, tuple[int, ...]]) -> Site:
    """Return a site with fewer units, in tensors of other shapes."""

    def piece(old: Any) -> Any:
        # In fused projections a part begins after whole parts of the same size.
        offset = old.offset // max(1, site.n_units * old.width) * n_units * old.width
        return replace(old, shape=shapes[old.param], offset=offset)

    return replace(
        site,
        n_units=n_units,
        reads=tuple(piece(p) for p in site.reads),
        writes=tuple(piece(p) for p in site.writes),
        shared=tuple(piece(p) for p in site.shared),
    )

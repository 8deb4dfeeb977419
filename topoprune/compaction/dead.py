"""Units without effect in a model as it is: what compaction without a plan removes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import FAMILIES, FeedForward, find_sites, model_config
from topoprune.extraction.tensors import check_finite, unit_blocks
from topoprune.graph import Site, TensorSlice
from topoprune.planning import Plan
from topoprune.sparsity import units_zero
from topoprune_solvers import Solution, Status

__all__ = ["dead_units"]


@torch.no_grad()
def dead_units(model: nn.Module, *, duplicate_kv: bool = False) -> tuple[Plan, dict[str, torch.Tensor]]:
    """Return the plan that removes every head, KV group and neuron without effect, and the biases it folds.

    A unit has no effect if everything it writes is zero, or if its output is zero for every input (value or
    input weights and biases zero). One whose value or input *weights* are zero but not their bias gives the
    same output for every token: a head its value bias (attention weights sum to 1), a neuron its activated
    bias. It goes too, and what it wrote joins the bias of the projection behind, where there is one.
    Dropout inside the block makes that exact in evaluation only.

    Args:
        model: of a known family.
        duplicate_kv: where dead query heads would leave unequal numbers in the KV groups, remove them all;
            else as many stay, as they are, as make the numbers equal. Groups without a live head go whole.

    Returns:
        The plan, and parameter name -> new bias.

    Raises:
        ValueError: an unknown family, non-finite or quantised weights.

    Complexity: one pass over the weights.
    """
    sites = _unit_sites(model)
    params = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    check_finite(params, sites)
    solutions: dict[str, Solution] = {}
    folded: dict[str, torch.Tensor] = {}
    for site in sites:
        silent = _all_zero(site, params, site.writes)
        still, values = _outputs(model, site, params)
        nothing = (values == 0).all(dim=1).cpu().numpy()
        gone = silent | (still & nothing)
        bias = f"{site.consumer}.bias"
        fold = still & ~gone & (bias in params)
        gone |= fold
        if not duplicate_kv:
            gone = _levelled(site, gone)
        if gone.any():
            solutions[site.name] = Solution(~gone, float((~gone).sum()), "min", Status.OPTIMAL, "dead-units")
        if fold.any():
            new = params[bias].double() + _written(site, params, values, np.flatnonzero(fold))
            folded[bias] = new.to(params[bias].dtype)
    return Plan(sites, solutions, request={"problem": "units without effect"}), folded


def _unit_sites(model: nn.Module) -> tuple[Site, ...]:
    try:
        return find_sites(model, ("heads", "neurons"), gqa="any-query-heads")
    except ValueError:
        # Fused projections know whole KV groups only; whatever else is wrong is raised again.
        return find_sites(model, ("heads", "neurons"))


def _zero(site: Site, params: Mapping[str, torch.Tensor], piece: TensorSlice) -> np.ndarray:
    """Return (n_units,) bool: the unit's part of a tensor, or its run's, is zero."""
    owners = site.n_groups if piece in site.shared else site.n_units
    return units_zero(piece, params[piece.param], owners).cpu().numpy().repeat(site.n_units // owners)


def _all_zero(site: Site, params: Mapping[str, torch.Tensor], pieces: Sequence[TensorSlice]) -> np.ndarray:
    """Return (n_units,) bool: the unit's part of every one of the tensors is zero; True for no tensors."""
    return np.logical_and.reduce([np.ones(site.n_units, dtype=bool), *(_zero(site, params, p) for p in pieces)])


def _outputs(model: nn.Module, site: Site, params: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, torch.Tensor]:
    """Return which units give the same output for every input, and that output, (n_units, unit_width) float64."""
    pieces = {piece.role: piece for piece in site.tensors}
    device = params[site.writes[0].param].device
    values = torch.zeros((site.n_units, site.unit_width), dtype=torch.float64, device=device)
    if site.kind != "neuron":
        if "v_bias" in pieces:
            each = unit_blocks(params, site, pieces["v_bias"]).double()
            values = values + each.repeat(1, site.unit_width // each.shape[1])  # all query heads of a group
        return _zero(site, params, pieces["v"]), values
    act = _activation(model, site)
    if "in" not in pieces:
        # Only the zero is worth knowing: up and gate multiply, and so do their biases.
        still = _all_zero(site, params, [p for role, p in pieces.items() if role in ("up", "up_bias")])
        if act is not None and not act(torch.zeros(1, dtype=torch.float64)).any():
            still |= _all_zero(site, params, [p for role, p in pieces.items() if role in ("gate", "gate_bias")])
        return still, values
    if act is None:
        return np.zeros(site.n_units, dtype=bool), values
    if "in_bias" in pieces:
        values = values + unit_blocks(params, site, pieces["in_bias"]).double()
    return _zero(site, params, pieces["in"]), act(values)


def _levelled(site: Site, gone: np.ndarray) -> np.ndarray:
    """Return what may go if every KV group that stays keeps equally many query heads; all of `gone` elsewhere."""
    if not site.n_groups:
        return gone
    rows = gone.copy().reshape(site.n_groups, -1)
    alive = (~rows).sum(axis=1)
    for row, count in zip(rows, alive, strict=True):
        if count:
            row[np.flatnonzero(row)[: alive.max() - count]] = False
    return rows.reshape(-1)


def _written(site: Site, params: Mapping[str, torch.Tensor], values: torch.Tensor, units: np.ndarray) -> torch.Tensor:
    """Return (out,) float64, what units of constant output write."""
    out = site.writes[0]
    matrix = unit_blocks(params, site, out, units).double().flatten(0, 1)
    return values[torch.from_numpy(units).to(values.device)].reshape(-1) @ matrix


def _activation(model: nn.Module, site: Site) -> Any:
    """Return the activation of a feed-forward block; None if it is not known, or has parameters of its own."""
    from transformers.activations import ACT2FN

    config = model_config(model)
    family = FAMILIES.get(getattr(config, "model_type", None) or "")
    for block in () if family is None else family.blocks:
        if isinstance(block, FeedForward) and block.stack == site.stack:
            name = getattr(config, block.activation, None)
            act = ACT2FN[name] if isinstance(name, str) and name in ACT2FN else None
            return None if isinstance(act, nn.Module) and next(act.parameters(), None) is not None else act
    return None

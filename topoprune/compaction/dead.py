"""Units without effect in a model as it is: what compaction without a plan removes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import FAMILIES, FeedForward, model_config
from topoprune.graph import Site, TensorSlice
from topoprune.planning import Plan
from topoprune.sparsity import units_zero
from topoprune_solvers import Solution, Status

__all__ = ["dead_units"]


@torch.no_grad()
def dead_units(model: nn.Module, sites: Sequence[Site]) -> tuple[Plan, dict[str, torch.Tensor]]:
    """Return the plan that removes every head, KV group and neuron without effect, and the biases it folds.

    A unit has no effect if everything it writes is zero, or if its output is zero for every input (value or
    input weights and biases zero). One whose value or input *weights* are zero but not their bias gives the
    same output for every token: a head its value bias (attention weights sum to 1), a neuron its activated
    bias. It goes too, and what it wrote joins the bias of the projection behind, where there is one.
    Dropout inside the block makes that exact in evaluation only.

    Returns:
        The plan, and parameter name -> new bias.

    Complexity: one pass over the weights.
    """
    params = dict(model.named_parameters())
    solutions: dict[str, Solution] = {}
    folded: dict[str, torch.Tensor] = {}
    for site in sites:
        if site.kind == "input_dim":
            continue
        silent = _all(site, params, site.writes)
        weights = [p for p in site.reads if p.role in ("v", "in", "up")]
        biases = [p for p in site.reads if p.role in ("v_bias", "in_bias", "up_bias")]
        still = _all(site, params, weights) if weights else torch.zeros_like(silent)
        mute = still & _all(site, params, biases)
        constant = still & ~mute & ~silent
        gone = silent | mute
        bias = f"{site.consumer}.bias"
        if bool(constant.any()) and bias in params:
            output = _constants(model, site, params, np.flatnonzero(constant.numpy()))
            if output is not None:
                new = folded.get(bias, params[bias].detach()).double() + output
                folded[bias] = new.to(params[bias].dtype)
                gone |= constant
        keep = ~gone.numpy()
        if not keep.all():
            solutions[site.name] = Solution(keep, float(keep.sum()), "min", Status.OPTIMAL, "dead-units")
    return Plan(tuple(sites), solutions, request={"problem": "units without effect"}), folded


def _all(site: Site, params: Mapping[str, torch.Tensor], pieces: Sequence[TensorSlice]) -> torch.Tensor:
    """Return (n_units,) bool: the unit's part of every one of the tensors is zero; True for no tensors."""
    result = torch.ones(site.n_units, dtype=torch.bool)
    for piece in pieces:
        result &= units_zero(piece, params[piece.param], site.n_units).cpu()
    return result


def _constants(
    model: nn.Module, site: Site, params: Mapping[str, torch.Tensor], units: np.ndarray
) -> torch.Tensor | None:
    """Return (out,) float64, what units of constant output write; None if their activation is not known."""
    if site.kind == "neuron":
        act = _activation(model, site)
        if act is None:
            return None
        piece = site.one("in_bias")
        value = act(params[piece.param].detach()[torch.from_numpy(piece.indices(units))].double())
    else:
        piece = site.one("v_bias")
        each = params[piece.param].detach()[torch.from_numpy(piece.indices(units))].double()
        # Every query head of a KV group returns the group's value.
        value = each.reshape(len(units), 1, piece.width).expand(-1, site.unit_width // piece.width, -1).reshape(-1)
    out = site.writes[0]
    matrix = params[out.param].detach().movedim(out.axis, 0)[torch.from_numpy(out.indices(units))].double()
    return value @ matrix


def _activation(model: nn.Module, site: Site) -> Any:
    from transformers.activations import ACT2FN

    config = model_config(model)
    family = FAMILIES.get(getattr(config, "model_type", None) or "")
    for block in () if family is None else family.blocks:
        if isinstance(block, FeedForward) and block.stack == site.stack and block.into is not None:
            name = getattr(config, block.activation, None)
            return ACT2FN[name] if isinstance(name, str) and name in ACT2FN else None
    return None

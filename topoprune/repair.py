"""Merging and repair: what the survivors take over from the units that go.

Shape legend: O output features of the consumer, N input features (n_units * unit_width),
S surviving input features. W is the consumer's weight as (O, N); C = E[x x^T] is (N, N).

======================  ======================================================================
``none``                drop: nothing else changes
``scale``               W_j *= 1 + sum_i G_ij / G_jj over the units i that j dominates
``least-squares``       W_S <- W C_:S C_SS^-1, the best linear substitute on calibration data
``paper``               NeuroPrune: the dominated head's FFN input columns join its dominator's
======================  ======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from topoprune.extraction.grammath import unit_gram
from topoprune.graph import Site
from topoprune.planning import Plan

__all__ = ["MERGES", "Merge", "consumer_matrix", "least_squares", "merged_weights", "next_ffn", "repair_damage"]

Merge = Literal["none", "scale", "least-squares", "paper"]
MERGES: tuple[str, ...] = ("none", "scale", "least-squares", "paper")


def consumer_matrix(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """Return the (O, N) view of a consumer's weight, whatever its storage order."""
    axis = site.writes[0].axis
    return weight if axis == 1 else weight.t()


def least_squares(
    weight_ON: torch.Tensor, moment_NN: torch.Tensor, keep_N: torch.Tensor, *, ridge: float = 0.0
) -> torch.Tensor:
    """Return the (O, N) weight that best replaces the full one using only kept inputs.

    Minimises ``E |W x - W' x|^2`` over W' supported on `keep_N`; zero elsewhere. The result is never
    worse than dropping on the data behind the moment, row by row and after rounding to the weight's
    dtype: a row that rounding would spoil keeps its weights.

    Args:
        weight_ON: consumer weight.
        moment_NN: second moment of the consumer's input.
        keep_N: bool mask of surviving input features.
        ridge: added to the diagonal, as a multiple of its mean; pulls towards dropping.

    Complexity: O(S^3 + O S N). Reference: optimal brain surgeon in closed form for a block.
    """
    kept = torch.nonzero(keep_N).flatten()
    gone = torch.nonzero(~keep_N).flatten()
    weight, moment = weight_ON.double(), moment_NN.double()
    result = torch.zeros_like(weight)
    if kept.numel():
        system = moment[kept][:, kept]
        if ridge:
            system = system + ridge * system.diagonal().mean() * torch.eye(
                kept.numel(), dtype=system.dtype, device=system.device
            )
        # Correction to the kept part, not the whole part: an ill-conditioned solve then errs around dropping.
        cross = weight[:, gone] @ moment[gone][:, kept]
        change = _solve_psd(system, cross.t(), torch.finfo(moment_NN.dtype).eps).t()
        change = (weight[:, kept] + change).to(weight_ON.dtype).double() - weight[:, kept]
        # E|W_P x_P - D x_S|^2 = E|W_P x_P|^2 - 2 D cross^T + D C_SS D^T: what the change D of a row gains.
        gain = 2 * (change * cross).sum(1) - ((change @ moment[kept][:, kept]) * change).sum(1)
        result[:, kept] = weight[:, kept] + torch.where(gain[:, None] > 0, change, torch.zeros_like(change))
    return result.to(weight_ON.dtype)


def _solve_psd(system: torch.Tensor, right: torch.Tensor, eps: float) -> torch.Tensor:
    """Solve on the numerical range of a moment that was summed at relative precision `eps`."""
    # Unit diagonal first: rounding is relative to each feature, and features differ by orders of magnitude.
    scale = system.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(1)
    system, right = system / scale / scale.t(), right / scale
    noise = eps * system.shape[0]
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) == 0 and float(factor.diagonal().min()) ** 2 > noise:
        return torch.cholesky_solve(right, factor) / scale
    # Rank-deficient (dead units, few tokens): inverting the rounding noise would repair the calibration
    # tokens with huge weights that ruin all others, so directions never seen are left alone.
    values, vectors = torch.linalg.eigh(system)
    inverse = torch.where(values > noise, 1 / values, torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.t() @ right)) / scale


def repair_damage(before_ON: torch.Tensor, after_ON: torch.Tensor, moment_NN: torch.Tensor) -> float:
    """Return ``E |W x - W' x|^2``, the squared error at the consumer's output."""
    delta = before_ON.double() - after_ON.double()
    return float(((delta @ moment_NN.double()) * delta).sum())


def next_ffn(site: Site, sites: Sequence[Site]) -> Site | None:
    """Return the FFN site of the same stack and layer, the first one behind this attention.

    In a decoder with cross attention, self attention and cross attention have the same one: what either
    adds to the residual stream reaches an FFN there first.
    """
    for other in sites:
        if other.kind == "neuron" and (other.stack, other.layer) == (site.stack, site.layer):
            return other
    return None


def merged_weights(
    model: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    merge: Merge,
    moments: Mapping[str, torch.Tensor],
    *,
    ridge: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Compute (not write) the parameters that a merge changes, before pruned units are zeroed.

    Args:
        model: holds the dense weights.
        sites: the model's sites, with its own parameter names.
        plan: which units go and who dominates them.
        merge: one of `MERGES`.
        moments: site name -> (N, N) second moment of the consumer's input (``scale`` and
            ``least-squares``).
        ridge: see `least_squares`.

    Returns:
        Parameter name -> new tensor of the same shape and dtype.

    Raises:
        ValueError: unknown merge, no moment for a pruned site, ``paper`` where heads * head
            width is not the model width or there is no FFN behind the attention.
    """
    if merge not in MERGES:
        raise ValueError(f"unknown merge {merge!r}; available: {', '.join(MERGES)}")
    changed: dict[str, torch.Tensor] = {}
    by_name = {site.name: site for site in sites}
    for name, solution in plan.unit_solutions().items():
        site = by_name[name]
        if merge == "none" or site.consumer is None or solution.keep.all():
            continue
        if merge == "paper":
            if site.kind in ("head", "kv_group"):
                _merge_paper(model, sites, site, solution.keep, solution.dominator, changed)
            continue
        param = site.writes[0].param
        weight = changed.get(param, model.get_parameter(param).detach())
        if name not in moments:
            raise ValueError(f"merge {merge!r} needs calibration data for {name!r}; pass calibration=[batch, ...]")
        moment = moments[name].to(weight.device)
        matrix = consumer_matrix(site, weight)
        if merge == "scale":
            new = _merge_scale(site, weight, matrix, moment, solution.keep, solution.dominator)
        else:
            keep = torch.from_numpy(np.repeat(solution.keep, site.unit_width)).to(weight.device)
            new = least_squares(matrix, moment, keep, ridge=ridge)
        changed[param] = new if site.writes[0].axis == 1 else new.t().contiguous()
    for param, tensor in changed.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"merge {merge!r} gives non-finite values for {param!r}; check the calibration data")
    return changed


def _merge_scale(
    site: Site,
    weight: torch.Tensor,
    matrix_ON: torch.Tensor,
    moment_NN: torch.Tensor,
    keep: np.ndarray,
    dominator: np.ndarray | None,
) -> torch.Tensor:
    if dominator is None:
        raise ValueError(f"merge 'scale' needs dominators; the plan of {site.name!r} has none")
    gram = unit_gram(site, weight, moment_NN).double().cpu().numpy()
    factor = np.ones(site.n_units)
    for unit in np.flatnonzero(~keep):
        heir = int(dominator[unit])
        if heir >= 0 and gram[heir, heir] > 0:
            factor[heir] += gram[unit, heir] / gram[heir, heir]
    scale = torch.from_numpy(np.repeat(factor, site.unit_width)).to(matrix_ON)
    return matrix_ON * scale


def _merge_paper(
    model: nn.Module,
    sites: Sequence[Site],
    site: Site,
    keep: np.ndarray,
    dominator: np.ndarray | None,
    changed: dict[str, torch.Tensor],
) -> None:
    ffn = next_ffn(site, sites)
    if ffn is None:
        raise ValueError(f"merge 'paper' needs an FFN behind {site.name!r}; there is none in its layer; use 'none'")
    if dominator is None:
        raise ValueError(f"merge 'paper' needs dominators; the plan of {site.name!r} has none")
    for piece in ffn.reads:
        if len(piece.shape) != 2:
            continue
        width = piece.shape[1 - piece.axis]
        if site.n_units * site.unit_width != width:
            raise ValueError(
                f"merge 'paper' is undefined for {site.name!r}: heads * head width = "
                f"{site.n_units * site.unit_width}, but the FFN reads {width} dimensions; "
                "use 'none' or 'least-squares'"
            )
        dense = model.get_parameter(piece.param).detach()
        # Dense columns are added, not merged ones: two attentions that share an FFN do not hand each other's on.
        if piece.param not in changed:
            changed[piece.param] = dense.clone()
        tensor = changed[piece.param]
        columns, own = (tensor, dense) if piece.axis == 0 else (tensor.t(), dense.t())
        for unit in np.flatnonzero(~keep):
            heir = int(dominator[unit])
            if heir >= 0:
                w = site.unit_width
                columns[:, heir * w : (heir + 1) * w] += own[:, unit * w : (unit + 1) * w]

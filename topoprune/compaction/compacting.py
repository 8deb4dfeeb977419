"""`compact`: cut what a plan prunes out of a model, without changing its function."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from topoprune.architectures import model_config
from topoprune.budgets import check_rounding
from topoprune.compaction.cut import Cut, Gather, make_cut
from topoprune.compaction.dead import dead_units
from topoprune.compaction.modeling_topoprune import compact_class, fit_features, patch_module
from topoprune.extraction.tensors import unit_blocks, weights_digest
from topoprune.graph import Site
from topoprune.masks import check_edges, check_finite_sites, edge_masks, fit_sites, open_handle, unwrap
from topoprune.planning import Plan

__all__ = ["compact", "dress", "prepare"]

# `generate` leaves them on a model: a compiled call that runs the model it was made for, also from a copy, and (before
# transformers 5.17) a static cache of that model's shapes.
_OF_THE_DENSE_MODEL = ("_compiled_call", "_cache")


def compact(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    rounding: int | None = None,
    gather: Gather = "auto",
    duplicate_kv: bool = False,
    inplace: bool = False,
    allow_changed_weights: bool = False,
) -> nn.Module:
    """Remove what a plan prunes; the result computes what the masked model computes.

    Heads, whole KV groups and FFN neurons go from the weights and biases; every layer has a shape of its
    own, down to zero heads or neurons. The function is that of ``apply(model, plan)`` and never another
    one: merging and repair are `apply`'s business (``merge=``), whose result can be compacted while the
    handle is open. Weights stay bit for bit what they were.

    Args:
        model: masked (by `apply`, or after training with a `Pruner`) or dense; compacted ones too, with a
            plan made for them.
        plan: what stays; None for all units that have no effect in the model as it is: zeros on the way in
            or out, or a constant output, which is folded into the bias behind it.
        rounding: keep the number of features of every site a multiple of this (8, 16, 32, ...): as many
            pruned units as it takes stay, as zeros. Better asked for in `solve`, where the budget counts it.
        gather: input dimensions the plan zeroes. ``"auto"``: an index-gather before a smaller projection
            where that was measured to be faster here, else they stay as zeros (with a warning that says so).
            ``"always"``, ``"never"``.
        duplicate_kv: where query heads per KV group are unequal, give key/value heads copies. Groups that lose
            all of their query heads leave whole, and need none.
        inplace: change this model instead of returning a new one, not under an open `MaskHandle`. Needs no second
            copy; optimizers made before lose its parameters (see `Pruner` for training).
        allow_changed_weights: accept a plan made from other weight values of the same architecture,
            although what it removes is not zero here.

    Returns:
        A model of class ``Compact<class>``, whose ``config.topoprune`` says its shapes; or `model`.

    Raises:
        ValueError: a plan of another model or of other weights, one that was carried out already, quantised,
            sharded, tied or non-finite weights, unequal query heads in a KV group, heads of a family that is
            not described. Nothing is changed.

    Complexity: O(parameters); memory of the smaller model (in place: of its cut matrices).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from topoprune import extract, solve
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        ... )
        >>> model = BertModel(config).eval()
        >>> smaller = compact(model, solve(extract(model, include=("neurons",)), budget=5, problem="neurons"))
        >>> type(smaller).__name__, smaller.encoder.layer[0].intermediate.dense
        ('CompactBertModel', Linear(in_features=8, out_features=5, bias=True))
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"compact needs a model, found {type(model).__name__}")
    model = unwrap(model)
    if inplace and open_handle(model) is not None:
        raise ValueError(
            "inplace=True under an open MaskHandle, which could not restore the model: close(restore=False) it first"
        )
    cut = prepare(
        model,
        plan,
        rounding=rounding,
        gather=gather,
        duplicate_kv=duplicate_kv,
        allow_changed_weights=allow_changed_weights,
    )
    with torch.no_grad():
        params = dict(model.named_parameters())
        fresh = {
            name: nn.Parameter(cut.tensor(name, params[name].detach()), requires_grad=params[name].requires_grad)
            for name in sorted(cut.touched)
        }
    target = model if inplace else _copied(model, {id(params[name]): new for name, new in fresh.items()})
    if inplace:
        for name, new in fresh.items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, new)
    dress(target, cut, cut.layout(model))
    return target


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Return a deep copy in which the objects in `memo` (id -> object) take the place of the model's own.

    Parameters in the memo are taken as they are, so the dense ones are never copied. Hooks by which a `Pruner`
    watches the model in training stay behind, with the data they have collected.
    """
    watched = [
        (name, table, key)
        for name, module in model.named_modules()
        for table in ("_forward_hooks", "_forward_pre_hooks")
        for key, hook in getattr(module, table).items()
        if (getattr(hook, "__module__", None) or "").startswith("topoprune.")
    ]
    for name, table, key in watched:
        owner = getattr(getattr(model.get_submodule(name), table)[key], "__self__", None)
        if owner is not None:
            memo[id(owner)] = owner
    copied = copy.deepcopy(model, memo)
    for name, table, key in watched:
        module = copied.get_submodule(name)
        for hooks in (table, f"{table}_with_kwargs", "_forward_hooks_always_called"):
            getattr(module, hooks).pop(key, None)
    return copied


def prepare(
    model: nn.Module,
    plan: Plan | None,
    *,
    rounding: int | None = None,
    gather: Gather = "auto",
    duplicate_kv: bool = False,
    allow_changed_weights: bool = False,
) -> Cut:
    """Check everything and return the cut; the model is not touched. Arguments and errors of `compact`."""
    if plan is not None and not isinstance(plan, Plan):
        raise ValueError(f"plan is a {type(plan).__name__}; expected a Plan (from solve, or Plan.load), or None")
    check_rounding(rounding)
    if gather not in ("auto", "always", "never"):
        raise ValueError(f"unknown gather {gather!r}; choose from auto, always, never")
    _check_whole(model)
    values: dict[str, torch.Tensor] = {}
    if plan is None:
        plan, values = dead_units(model, duplicate_kv=duplicate_kv)
        sites = plan.sites
    else:
        sites = fit_sites(model, plan.sites)
        check_edges(model, sites, plan)
        check_finite_sites(model, sites, plan)
        _check_weights(model, sites, plan, allow_changed_weights)
    cut = make_cut(
        model,
        sites,
        plan,
        edges=edge_masks(sites, plan),
        rounding=rounding,
        gather=gather,
        duplicate_kv=duplicate_kv,
    )
    cut.values.update(values)
    _check_cut(model, cut)
    if cut.left:
        warnings.warn(
            f"input dimensions of {len(cut.left)} sites ({cut.left[0]}, ...) stay as zeros in the weights: "
            + ("gather='never'" if gather == "never" else "a gather was not faster here"),
            stacklevel=3,
        )
    return cut


def _check_whole(model: nn.Module) -> None:
    """Raise ValueError if the weights are not all here, as ordinary numbers."""
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            "this model is spread over devices by accelerate's hooks; load it without device_map, compact it, "
            "save it, and load the compacted model with device_map"
        )
    config = model_config(model)
    if getattr(model, "is_quantized", False) or getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "this model is quantised: load it without quantisation, compact it, save it, and quantise the smaller model"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"parameter {name!r} has no data (meta device); load the weights first")
        if type(parameter.data) is not torch.Tensor:
            raise ValueError(
                f"parameter {name!r} is a {type(parameter.data).__name__}, expected an ordinary tensor: compact the "
                "model before it is sharded or quantised"
            )


def _check_weights(model: nn.Module, sites: tuple[Site, ...], plan: Plan, allowed: bool) -> None:
    """Raise ValueError if the plan was made from other weights and what it removes is not zero here."""
    if allowed or not plan.weights_digest or weights_digest(model, sites) == plan.weights_digest:
        return
    params = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    by_name = {site.name: site for site in sites}
    changed = []
    for name, solution in plan.unit_solutions().items():
        site, gone = by_name[name], np.flatnonzero(~solution.keep)
        if any(unit_blocks(params, site, piece, gone).any() for piece in site.writes or site.reads):
            changed.append(name)
    for name, keep in edge_masks(sites, plan).items():
        if params[name][torch.from_numpy(~keep).to(params[name].device)].any():
            changed.append(name)
    if changed:
        raise ValueError(
            f"the model's weights have changed since the plan was made, and what it prunes of {changed[0]!r} is not "
            "zero: the plan is of another model or revision. Extract and solve again, or pass "
            "allow_changed_weights=True"
        )


def _check_cut(model: nn.Module, cut: Cut) -> None:
    """Raise ValueError if the cut would reach beyond the modules it is meant for, or not reach them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        if len(tied) > 1 and cut.touched.intersection(tied):
            raise ValueError(f"parameters {tied[0]!r} and {tied[1]!r} are one tied tensor; untie them first")
    for name in cut.patches:
        if "forward" in vars(model.get_submodule(name)):
            raise ValueError(
                f"module {name!r} has a forward of its own, as accelerate's hooks give it, which compaction cannot "
                "replace; remove them first (accelerate.hooks.remove_hook_from_module(model, recurse=True))"
            )


def dress(model: Any, cut: Cut, layout: dict[str, Any]) -> None:
    """Make modules, attributes, config and class follow parameters that are cut already, in place."""
    for name in cut.touched:
        fit_features(model.get_submodule(name.rpartition(".")[0]))
    for name, values in cut.attributes.items():
        for attribute, value in values.items():
            setattr(model.get_submodule(name), attribute, value)
    for name, buffers in cut.buffers.items():
        module = model.get_submodule(name)
        device = next(module.parameters()).device
        for buffer, indices in buffers.items():
            module.register_buffer(buffer, torch.tensor(indices.tolist(), dtype=torch.int64, device=device))
    for name, patch in cut.patches.items():
        patch_module(model.get_submodule(name), patch)
    if isinstance(model, PreTrainedModel):
        for name in _OF_THE_DENSE_MODEL:
            vars(model).pop(name, None)
        _own_config(model).topoprune = layout
        model.__class__ = compact_class(type(model))


def _own_config(model: PreTrainedModel) -> Any:
    """Give a model a config that no other model shares, and return it."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own  # type: ignore[assignment]
    return own

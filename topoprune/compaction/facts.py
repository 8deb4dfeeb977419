"""What compaction did to a model, in figures: sizes before and after, per site and in all; base model; layers."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from topoprune.architectures import FAMILIES, Attention, FeedForward, find_sites
from topoprune.compaction.layout import layout_of
from topoprune.compaction.modeling_topoprune import KEY, stock_class

__all__ = ["base_model", "per_layer", "quiet_layers", "sizes"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def sizes(model: Any) -> dict[str, Any]:
    """Return parameters and matrices before and after, and the same for every head and neuron site.

    Args:
        model: a compacted transformers model.

    Returns:
        ``parameters`` and ``matrices`` (attention and FFN weights): ``{"before", "after"}``; ``removed``: the
        share of the matrices that is gone, in [0, 1]; ``sites``: name -> kind, kept and of (query heads, also
        where whole KV groups went; neurons), parameters before and after.

    Complexity: builds the dense model without weights (meta device).
    """
    dense = _dense_twin(model)
    before = {name: p for name, p in dense.named_parameters()}
    after = dict(model.named_parameters())
    cut = (layout_of(model) or {"sites": {}})["sites"]
    known = getattr(model.config, "model_type", None) in FAMILIES
    rows: dict[str, Any] = {}
    matrices: set[str] = set()
    for site in find_sites(dense) if known else ():
        if site.kind == "input_dim":
            continue
        own = {piece.param for piece in site.tensors}
        matrices |= {name for name in own if before[name].ndim == 2}
        entry = cut.get(site.name, {})
        units = site.n_units if site.kind == "neuron" else site.n_units * site.unit_width // site.head_width
        rows[site.name] = {
            "kind": "neuron" if site.kind == "neuron" else "head",
            "kept": entry.get("kept", units),
            "of": entry.get("of", units),
            "parameters": {"before": _count(before, own), "after": _count(after, own)},
        }
        if site.kind == "kv_group":
            rows[site.name]["kv_heads"] = entry.get("kv_heads", site.n_units)
    weights = {"before": _count(before, matrices), "after": _count(after, matrices)}
    return {
        "parameters": {"before": _count(before, set(before)), "after": _count(after, set(after))},
        "matrices": weights,
        "removed": 1 - weights["after"] / weights["before"] if weights["before"] else 0.0,
        "sites": rows,
    }


def _dense_twin(model: Any) -> nn.Module:
    """Return the model as it was before anything was cut, without weights."""
    config = copy.deepcopy(model.config)
    delattr(config, KEY)
    with torch.device("meta"):
        twin: nn.Module = stock_class(type(model))(config)
    return twin


def _count(tensors: Mapping[str, torch.Tensor], names: set[str]) -> int:
    return sum(tensors[name].numel() for name in names)


def base_model(model: Any) -> str | None:
    """Return the hub id the model came from, None if it is not known; never a path of this machine.

    What an earlier save wrote into ``config.topoprune`` goes before the name the model was loaded by.
    """
    earlier = (layout_of(model) or {}).get("base_model")
    name = earlier or getattr(model.config, "_name_or_path", None) or ""
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name) or ".." in name:
        return None
    return None if earlier is None and os.path.exists(name) else name


def per_layer(model: Any) -> dict[str, Any]:
    """Return the config entries that say a compacted model's shapes in transformers' own words, {} if they cannot.

    They can if every site that was cut is a config attribute of its layer: FFN widths, and heads where the
    family's head width and number of KV heads are attributes; if encoder and decoder do not share the
    attribute; if no layer lost all heads or neurons, which transformers' configs do not allow; and if nothing
    else changed (gathers, T5's position bias).

    Returns:
        ``per_layer_config`` (layer -> {config attribute: value}), the permission to read the dense values
        beside it, and the head width where the config leaves it to a rule that heads per layer would break;
        {} also for a transformers without the attribute.

    Complexity: O(sites).
    """
    layout = layout_of(model)
    family = FAMILIES.get(getattr(model.config, "model_type", None) or "")
    has = getattr(type(model.config), "per_layer_config", None)
    if layout is None or family is None or has is None or layout["patches"] or layout["buffers"]:
        return {}
    blocks = {(block.stack, _kind(block)): block for block in family.blocks}
    found: dict[str, dict[str, int]] = {}
    for name, entry in layout["sites"].items():
        stack, layer, kind = name.split(".", 2)
        values = _attributes(blocks.get((stack, kind)), entry)
        row = found.setdefault(layer, {})
        if values is None or any(row.get(key, value) != value for key, value in values.items()):
            return {}
        row.update(values)
    # An attribute that serves two stacks says the same layer of both.
    shared = [getattr(b, "width", None) or getattr(b, "heads", None) for b in blocks.values()]
    if any(shared.count(key) > 1 for row in found.values() for key in row):
        return {}
    entries = {"per_layer_config": found, "allow_global_per_layer_attribute_access": True}
    for block in family.blocks:
        if (
            isinstance(block, Attention)
            and block.head_width is not None
            and any(block.heads in row for row in found.values())
        ):
            width = getattr(model.config, block.head_width, None)
            heads = getattr(model.config, block.heads)
            entries[block.head_width] = width or getattr(model.config, family.hidden) // heads
    return entries if found and _accepted(model.config, entries) else {}


def _kind(block: Attention | FeedForward) -> str:
    return block.block if isinstance(block, Attention) else "ffn"


def _attributes(block: Attention | FeedForward | None, entry: Mapping[str, Any]) -> dict[str, int] | None:
    if block is None or entry["kept"] == 0:
        return None
    if isinstance(block, FeedForward):
        return {block.width: entry["kept"]}
    if block.head_width is None or block.kv_heads is None:
        return None
    return {block.heads: entry["heads"], block.kv_heads: entry["kv_heads"]}


def _accepted(config: Any, entries: Mapping[str, Any]) -> bool:
    """Whether this transformers reads a config with these entries."""
    try:
        with quiet_layers():
            read = type(config).from_dict({**config.to_dict(), **copy.deepcopy(dict(entries))})
            return all(
                getattr(read.per_layer_config[int(at)], key) == value
                for at, row in entries["per_layer_config"].items()
                for key, value in row.items()
            )
    except Exception:  # whatever its validation raises: the entries are for others, and are left out
        return False


@contextmanager
def quiet_layers() -> Iterator[None]:
    """Silence transformers' remark that a config with layers of its own was read; here that is meant."""
    logger = logging.getLogger("transformers.integrations.heterogeneity.configuration_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

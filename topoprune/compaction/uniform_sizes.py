"""Which uniform shape contains every layer of a compacted model, and which slot each head gets in it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from topoprune.architectures import Attention, Family
from topoprune.compaction.layout import kept_units
from topoprune.graph import Site

__all__ = ["Choice", "Slots", "checked_config", "choose_shape", "filled", "heads_of"]


@dataclass(frozen=True)
class Slots:
    """Which heads of a layer lie in the slots of the uniform shape; -1 is a zero head.

    Args:
        queries: (heads,) int64. keys: (key/value heads,) int64.
    """

    queries: np.ndarray
    keys: np.ndarray


@dataclass
class Choice:
    """A uniform shape.

    Args:
        dense: config attribute -> value in the dense model. changes: those that differ -> new value.
        slots: attention site -> where its heads lie.
        bias: parameter of a shared position bias -> (heads,) int64, which column lies there, -1 for zeros.
    """

    dense: dict[str, int] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    slots: dict[str, Slots] = field(default_factory=dict)
    bias: dict[str, np.ndarray] = field(default_factory=dict)

    def set(self, attribute: str, dense: int, value: int) -> None:
        """Record a value of the dense model and of the uniform one."""
        self.dense[attribute] = dense
        if value != dense:
            self.changes[attribute] = value


def choose_shape(model: Any, family: Family, config: Any, sites: Mapping[str, Site], dense: Sequence[Site]) -> Choice:
    """Return the smallest shape that contains every layer.

    Args:
        model: holds the weights. config: of the dense model.
        sites: those of the model by name, none for a layer without units. dense: those of the dense model.

    Raises:
        ValueError: a family whose config cannot say a shape that contains them all.

    Complexity: O(layers + parameters of the KV heads), and a few tens of configs at most.
    """
    choice = Choice()
    attentions: dict[str, list[tuple[Attention, list[Site]]]] = {}
    widths: dict[str, list[Site]] = {}
    for block in family.blocks:
        if isinstance(block, Attention):
            own = [s for s in dense if (s.stack, s.block) == (block.stack, block.block) and s.kind != "input_dim"]
            if own:
                attentions.setdefault(block.heads, []).append((block, own))
        elif block.when is None or bool(getattr(config, block.when[0], False)) == block.when[1]:
            widths.setdefault(block.width, []).extend(s for s in dense if s.kind == "neuron" and s.stack == block.stack)
    for attribute, members in attentions.items():
        _choose_heads(choice, model, config, sites, attribute, members)
    for attribute, own in widths.items():
        if own:
            need = max(sites[site.name].n_units if site.name in sites else 0 for site in own)
            choice.set(attribute, own[0].n_units, max(1, need))
    return choice


def heads_of(site: Site | None) -> int:
    """Return the number of query heads of an attention site; 0 for None."""
    return 0 if site is None else site.n_units * site.unit_width // site.head_width


def filled(kept: Iterable[int], size: int) -> np.ndarray:
    """Return (size,) int64: the given indices, then -1.

    >>> filled([0, 2], 3)
    array([ 0,  2, -1])
    """
    result = np.full(size, -1, dtype=np.int64)
    indices = np.fromiter(kept, dtype=np.int64)
    result[: indices.size] = indices
    return result


def checked_config(config: Any, changes: Mapping[str, int]) -> Any:
    """Return a new config with other values, as transformers would read it from a file.

    Raises:
        ValueError: transformers refuses it.
    """
    changed = copy.deepcopy(config)
    try:
        for attribute, value in changes.items():
            setattr(changed, attribute, value)
        return type(config).from_dict(changed.to_dict())
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{type(config).__name__} refuses {dict(changes)}: {error}") from error


def _choose_heads(
    choice: Choice,
    model: Any,
    config: Any,
    sites: Mapping[str, Site],
    attribute: str,
    members: list[tuple[Attention, list[Site]]],
) -> None:
    """Choose the number of heads that one config attribute says, and give every layer its slots."""
    block, first = members[0][0], members[0][1][0]
    heads, kv_heads = heads_of(first), first.n_units
    everything = [site for _, own in members for site in own]
    if block.head_width is None:
        if block.kv_heads is not None:
            raise ValueError(f"{attribute} and the head width are one thing in {type(config).__name__}, with KV groups")
        choice.dense[attribute] = heads
        for site in everything:
            choice.slots[site.name] = _dense_slots(model, site, heads_of(sites.get(site.name)))
    elif block.kv_heads is not None:
        layers = [_kv_groups(model, sites.get(site.name)) for site in everything]
        keys, group = _smallest(config, block, layers, heads, kv_heads)
        choice.set(attribute, heads, keys * group)
        choice.set(block.kv_heads, kv_heads, keys)
        for site, layer in zip(everything, layers, strict=True):
            choice.slots[site.name] = _grouped_slots(layer, keys, group)
    else:
        _free_heads(choice, model, config, sites, attribute, members)
    if attribute in choice.changes and block.head_width and getattr(config, block.head_width, None) is None:
        choice.dense[block.head_width] = choice.changes[block.head_width] = first.head_width


def _dense_slots(model: nn.Module, site: Site, heads: int) -> Slots:
    """Put heads back where they were in the dense model."""
    slots = np.full(heads_of(site), -1, dtype=np.int64)
    kept = kept_units(model).get(site.name, np.arange(slots.size))
    if kept.size != heads:
        raise ValueError(f"config.topoprune names {kept.size} heads of {site.name!r}, the weights hold {heads}")
    slots[kept] = np.arange(heads)
    return Slots(slots, slots)


# -- heads whose width is an attribute of its own --------------------------------------------------


def _free_heads(
    choice: Choice,
    model: Any,
    config: Any,
    sites: Mapping[str, Site],
    attribute: str,
    members: list[tuple[Attention, list[Site]]],
) -> None:
    """As many heads as the fullest layer has, or as read different columns of a stack's position bias."""
    rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # site -> which heads, which slots
    need = 1
    for block, own in members:
        shared = block.position_bias and block.block == "attention"
        columns = {site.name: _bias_columns(model, site, heads_of(sites.get(site.name))) for site in own}
        union = np.unique(np.concatenate(list(columns.values()))) if shared else np.zeros(0, dtype=np.int64)
        bias = _position_bias(model, own[0])
        if shared and bias is not None:
            choice.bias[bias] = union
        for site in own:
            count = heads_of(sites.get(site.name))
            where = np.searchsorted(union, columns[site.name]) if shared else np.arange(count)
            rows[site.name] = np.arange(count), where
            need = max(need, count, union.size)
    dense = heads_of(members[0][1][0])
    heads = next((h for h in range(need, dense + 1) if _accepts(config, {attribute: h})), dense)
    choice.set(attribute, dense, heads)
    for name, (which, where) in rows.items():
        slots = np.full(heads, -1, dtype=np.int64)
        slots[where] = which
        choice.slots[name] = Slots(slots, slots)
    for name, union in choice.bias.items():
        choice.bias[name] = filled(union, heads)


def _bias_columns(model: Any, site: Site, heads: int) -> np.ndarray:
    """Return (heads,) int64: which column of the position bias each head reads."""
    module = model.get_submodule(site.one("q").param.rsplit(".", 2)[0])
    kept = getattr(module, "kept_heads", None)
    return np.arange(heads) if kept is None else kept.cpu().numpy().astype(np.int64)


def _position_bias(model: nn.Module, site: Site) -> str | None:
    """Return the parameter of the position bias in a stack's first layer."""
    module = site.one("q").param.rsplit(".", 2)[0]
    name = f"{module}.relative_attention_bias.weight"
    return name if any(name == other for other, _ in model.named_parameters()) else None


# -- grouped-query attention -----------------------------------------------------------------------


def _kv_groups(model: nn.Module, site: Site | None) -> list[tuple[int, list[int]]]:
    """Return (key/value head, its query heads) of a layer; copies that `compact` made are one again."""
    if site is None:
        return []
    params = dict(model.named_parameters())
    pieces = [piece for piece in site.tensors if piece.role.removesuffix("_bias") in ("k", "v")]

    def head(unit: int) -> list[torch.Tensor]:
        return [params[p.param].detach().narrow(p.axis, p.offset + unit * p.width, p.width) for p in pieces]

    per_group = site.unit_width // site.head_width
    groups: list[tuple[int, list[int]]] = []
    for unit in range(site.n_units):
        queries = list(range(unit * per_group, (unit + 1) * per_group))
        if unit and all(torch.equal(a, b) for a, b in zip(head(unit - 1), head(unit), strict=True)):
            groups[-1][1].extend(queries)
        else:
            groups.append((unit, queries))
    return groups


def _key_slots(layer: list[tuple[int, list[int]]], group: int) -> int:
    """Return how many key/value heads a layer needs if each serves at most `group` query heads."""
    return sum(-(-len(queries) // group) for _, queries in layer)


def _smallest(
    config: Any, block: Attention, layers: list[list[tuple[int, list[int]]]], heads: int, kv_heads: int
) -> tuple[int, int]:
    """Return (key/value heads, query heads of each) with the fewest parameters that contains every layer."""
    assert block.kv_heads is not None
    longest = max((len(queries) for layer in layers for _, queries in layer), default=1)
    candidates = []
    for group in range(1, max(longest, heads // kv_heads) + 1):
        need = max(1, *(_key_slots(layer, group) for layer in layers))
        # q and o have a row or column for every query head, k and v for every key/value head.
        candidates += [(2 * keys * (group + 1), keys, group) for keys in range(need, max(need, heads // group) + 1)]
    for _, keys, group in sorted(candidates):
        if _accepts(config, {block.heads: keys * group, block.kv_heads: keys}):
            return keys, group
    raise ValueError(f"{type(config).__name__} accepts no number of heads that contains every layer of this model")


def _accepts(config: Any, changes: Mapping[str, int]) -> bool:
    """Whether transformers takes such a config (a Llama's hidden size must be a multiple of its heads)."""
    try:
        checked_config(config, changes)
    except ValueError:
        return False
    return True


def _grouped_slots(layer: list[tuple[int, list[int]]], keys: int, group: int) -> Slots:
    """Give every key/value head as many copies as its query heads take."""
    queries = np.full((keys, group), -1, dtype=np.int64)
    heads = np.full(keys, -1, dtype=np.int64)
    row = 0
    for head, served in layer:
        for start in range(0, len(served), group):
            part = served[start : start + group]
            queries[row, : len(part)] = part
            heads[row] = head
            row += 1
    return Slots(queries.reshape(-1), heads)

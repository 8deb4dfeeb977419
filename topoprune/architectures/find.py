"""From a model and its family's declaration to sites.

Every shape is compared with the config, so a model that some other tool cut is refused instead of
being read wrongly; what topoprune compacted says its own sizes in ``config.topoprune``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from topoprune.architectures.base import Attention, Family, FeedForward
from topoprune.architectures.checks import check_float
from topoprune.graph import Site, TensorSlice

__all__ = ["INCLUDES", "compacted_sites", "model_config", "sites_of_family"]

INCLUDES = ("heads", "neurons", "input_dims")


def sites_of_family(
    model: nn.Module, family: Family, include: Collection[str], gqa: str = "groups"
) -> tuple[Site, ...]:
    """Return the sites of a model in the order in which its layers run.

    Args:
        model: a model of the family, with any task head or none.
        family: the declaration.
        include: some of ``"heads"``, ``"neurons"``, ``"input_dims"``.
        gqa: ``"groups"``, ``"query-heads"`` or ``"any-query-heads"``, see `find_sites`.

    Raises:
        ValueError: a module is missing, ambiguous, quantised, or its shape is not what the
            config says.
    """
    reader = _Reader(model, family)
    config = model_config(model)
    for attribute in family.refuses:
        if getattr(config, attribute, False):
            raise ValueError(
                f"config.{attribute}={getattr(config, attribute)!r} adds blocks that the adapter for "
                f"model_type={config.model_type!r} does not describe; pass sites=[Site(...), ...] by hand"
            )
    blocks = [block for block in family.blocks if reader.applies(block)]
    sites: list[Site] = []
    for stack in dict.fromkeys(block.stack for block in blocks):
        own = [block for block in blocks if block.stack == stack]
        for layer in range(max(reader.number(block.layers) for block in own)):
            for block in own:
                if isinstance(block, Attention):
                    sites += _attention_sites(reader, block, layer, include, gqa)
                elif "neurons" in include:
                    sites += _neuron_sites(reader, block, layer)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has model_type={config.model_type!r}, but none of its modules end in "
            f"{_first_path(family.blocks[0])!r}; pass sites=[Site(...), ...] by hand"
        )
    return tuple(sites)


def model_config(model: nn.Module) -> Any:
    """Return the transformers config of a model, or None; looks through compile and DDP wrappers."""
    config = getattr(model, "config", None)
    if config is not None:
        return config
    for wrapper in ("_orig_mod", "module"):
        inner = getattr(model, wrapper, None)
        if isinstance(inner, nn.Module):
            return model_config(inner)
    return None


def compacted_sites(model: nn.Module) -> Mapping[str, Mapping[str, Any]]:
    """Return site name -> sizes of a compacted model's sites (``config.topoprune``); empty for a dense model."""
    layout = getattr(model_config(model), "topoprune", None)
    return layout["sites"] if isinstance(layout, Mapping) else {}


def _first_path(block: Attention | FeedForward) -> str:
    return (block.o if isinstance(block, Attention) else block.out).format(layer=0)


class _Reader:
    """Looks modules up by the tail of their names and compares shapes with the config."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.family = family
        self.config = model_config(model)
        self.compacted = compacted_sites(model)
        self.modules: Mapping[str, nn.Module] = dict(model.named_modules())
        # Tails of every length, so that a lookup is O(1) and an ambiguity is seen.
        self.tails: dict[str, list[str]] = {}
        for name, module in self.modules.items():
            if not hasattr(module, "weight"):
                continue
            parts = name.split(".")
            for start in range(len(parts)):
                self.tails.setdefault(".".join(parts[start:]), []).append(name)

    def applies(self, block: Attention | FeedForward) -> bool:
        """Whether the block's condition holds and its stack exists in this model at all."""
        if isinstance(block, FeedForward) and block.when is not None:
            attribute, value = block.when
            if bool(getattr(self.config, attribute, False)) != value:
                return False
        return _first_path(block) in self.tails

    def number(self, attribute: str) -> int:
        value = getattr(self.config, attribute, None)
        if not isinstance(value, int):
            raise ValueError(f"config.{attribute} is {value!r}, expected an integer")
        return value

    def optional(self, attribute: str | None, default: int) -> int:
        value = None if attribute is None else getattr(self.config, attribute, None)
        return default if value is None else int(value)

    def module_name(self, path: str, layer: int) -> str:
        tail = path.format(layer=layer)
        names = self.tails.get(tail, [])
        if len(names) != 1:
            raise ValueError(
                f"expected one module whose name ends in {tail!r}, found {len(names)}: {names[:3]}; "
                "pass sites=[Site(...), ...] by hand"
            )
        return names[0]

    def weight_shape(self, name: str, n_in: int, n_out: int) -> tuple[int, int]:
        weight: Any = self.modules[name].weight
        check_float(f"{name}.weight", weight)
        expected = (n_in, n_out) if self.family.transposed else (n_out, n_in)
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"module {name!r} has a weight of shape {tuple(weight.shape)}, the config says {expected}; the model "
                "looks already pruned: start from the dense model, or pass sites=[Site(...), ...] by hand"
            )
        return expected

    def producing(
        self, path: str, layer: int, role: str, n_in: int, n_out: int, offset: int, width: int
    ) -> list[TensorSlice]:
        """Slices of a projection that makes units: its weight on the output axis, and its bias."""
        name = self.module_name(path, layer)
        axis = 1 if self.family.transposed else 0
        shape = self.weight_shape(name, n_in, n_out)
        slices = [TensorSlice(f"{name}.weight", axis, role, shape, offset, width)]
        if getattr(self.modules[name], "bias", None) is not None:
            slices.append(TensorSlice(f"{name}.bias", 0, f"{role}_bias", (n_out,), offset, width))
        return slices

    def reading(self, path: str, layer: int, role: str, n_in: int, n_out: int, width: int) -> tuple[str, TensorSlice]:
        """Module name and the slice of its weight on the input axis."""
        name = self.module_name(path, layer)
        axis = 0 if self.family.transposed else 1
        return name, TensorSlice(f"{name}.weight", axis, role, self.weight_shape(name, n_in, n_out), 0, width)


def _attention_sites(
    reader: _Reader, block: Attention, layer: int, include: Collection[str], gqa: str
) -> Iterator[Site]:
    hidden, heads = reader.number(reader.family.hidden), reader.number(block.heads)
    kv_heads = reader.optional(block.kv_heads, heads)
    head_width = reader.optional(block.head_width, hidden // heads)
    name = f"{block.stack}.{layer}.{block.block}"
    if name in reader.compacted:
        heads, kv_heads = reader.compacted[name]["heads"], reader.compacted[name]["kv_heads"]
    if heads == 0:
        return  # nothing is left to decide on
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide over {kv_heads} key/value heads")
    # Query heads as units: each owns its rows of q and its columns of o, k and v stay with their group.
    by_query = gqa != "groups" and heads > kv_heads
    if by_query and block.fused:
        raise ValueError(f"gqa={gqa!r} needs separate q, k and v projections; {block.q!r} is fused")
    group = 1 if by_query else heads // kv_heads
    sizes = {"q": heads * head_width, "k": kv_heads * head_width, "v": kv_heads * head_width}
    widths = {"q": group * head_width, "k": head_width, "v": head_width}
    paths = {"q": block.q, "k": block.k, "v": block.v}
    total = sum(sizes.values())
    groups = _input_groups(block)
    # Input features of each projection: fewer than the model's width behind a gather.
    reads_of = {
        role: reader.compacted.get(f"{name}.{label}", {}).get("kept", hidden)
        for label, members in groups.items()
        for role in members
    }
    shared: dict[str, Any] = dict(
        stack=block.stack, layer=layer, block=block.block, head_width=head_width, rotary=block.rotary
    )
    if "heads" in include:
        reads: list[TensorSlice] = []
        offset = 0
        for role, path in paths.items():
            n_out = total if block.fused else sizes[role]
            n_in = reads_of["qkv" if block.fused else role]
            reads += reader.producing(path, layer, role, n_in, n_out, offset if block.fused else 0, widths[role])
            offset += sizes[role]
        consumer, out = reader.reading(block.o, layer, "o", heads * head_width, hidden, group * head_width)
        grouped: dict[str, Any] = {}
        if by_query:
            common = tuple(piece for piece in reads if piece.role.removesuffix("_bias") != "q")
            reads = [piece for piece in reads if piece not in common]
            grouped = {"n_groups": kv_heads, "shared": common, "unequal": gqa == "any-query-heads"}
        yield Site(
            name=name,
            kind="head" if group == 1 else "kv_group",
            n_units=heads // group,
            unit_width=group * head_width,
            reads=tuple(reads),
            writes=(out,),
            consumer=consumer,
            **grouped,
            **shared,
        )
    if "input_dims" in include:
        for label, members in groups.items():
            n_in = reads_of[members[0]]
            pieces = [
                reader.reading(
                    paths["q" if block.fused else role],
                    layer,
                    role,
                    n_in,
                    total if block.fused else sizes[role],
                    1,
                )[1]
                for role in members
            ]
            yield Site(f"{name}.{label}", "input_dim", n_in, 1, tuple(pieces), **shared)


def _input_groups(block: Attention) -> dict[str, tuple[str, ...]]:
    """Return which projections read the same input, by the label of its site."""
    if block.fused:
        return {"input": ("qkv",)}  # one slice: the row of the fused matrix is the row of [Q, K, V]
    if block.block == "cross_attention":
        return {"input": ("q",), "memory": ("k", "v")}
    return {"input": ("q", "k", "v")}


def _neuron_sites(reader: _Reader, block: FeedForward, layer: int) -> Iterator[Site]:
    hidden = reader.number(reader.family.hidden)
    name = f"{block.stack}.{layer}.ffn"
    neurons = reader.compacted.get(name, {}).get("kept", reader.optional(block.width, 4 * hidden))
    if neurons == 0:
        return
    reads: list[TensorSlice] = []
    for role, path in block.inputs:
        reads += reader.producing(path, layer, role, hidden, neurons, 0, 1)
    consumer, out = reader.reading(block.out, layer, "out", neurons, hidden, 1)
    yield Site(
        name=name,
        kind="neuron",
        n_units=neurons,
        unit_width=1,
        reads=tuple(reads),
        writes=(out,),
        consumer=consumer,
        stack=block.stack,
        layer=layer,
        block="ffn",
    )

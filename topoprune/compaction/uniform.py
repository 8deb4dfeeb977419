"""The nearest uniform shape: a compacted model padded with zero units, as stock transformers can hold it.

Heads of width zero do not exist in transformers, and most families derive the head width from the
number of heads. So what a family can say decides how near the shape is:

- FFN widths: one number per config attribute (T5: one for both stacks; BART: one a stack).
- Heads, where the head width is an attribute of its own (Llama, Mistral, Qwen, T5, ViT): as many as
  the layers need together.
- Heads elsewhere (BERT, RoBERTa, DistilBERT, OPT, GPT-2, BART, Marian): all of the dense ones, the
  missing ones as zeros in their old places.

A zero head gives softmax(0) · 0 = 0, a zero neuron writes act(0) · 0 = 0: the function stays the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from topoprune.architectures import FAMILIES, Attention, Family, find_sites
from topoprune.compaction.modeling_topoprune import KEY, fit_features, stock_class
from topoprune.compaction.uniform_sizes import Slots, checked_config, choose_shape, filled, heads_of
from topoprune.graph import Site, TensorSlice
from topoprune.masks import unwrap

__all__ = ["UniformShape", "check_one_device", "loadable_class", "uniform_model", "uniform_shape"]

_OURS = (KEY, "auto_map")


@dataclass(frozen=True)
class UniformShape:
    """The shape of a uniform export.

    Args:
        config: config attribute -> value, for every width and number of heads of the family.
        dense: the same attributes in the dense model.
        parameters: scalars in the exported model, each tied tensor once.
        padding: how many of them are zeros that no layer of the compacted model has.
    """

    config: Mapping[str, int]
    dense: Mapping[str, int]
    parameters: int
    padding: int

    @property
    def padding_share(self) -> float:
        """Share of the parameters that is padding, in [0, 1]."""
        return self.padding / self.parameters

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {self.dense[name]} -> {value}" for name, value in self.config.items())
        return f"{sizes}; {self.parameters:,} parameters, {self.padding:,} ({self.padding_share:.0%}) of them padding"


def uniform_shape(model: nn.Module) -> UniformShape:
    """Return the shape that ``export(model, path, uniform=True)`` gives a model.

    Args:
        model: compacted (`topoprune.compact`, `topoprune.load`); of a dense one nothing is removed.

    Raises:
        ValueError: a family that is not known, sites made by hand, shapes that its config cannot say.

    Complexity: O(parameters of the KV heads); no weight is copied.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        ... )
        >>> dict(uniform_shape(BertModel(config)).config)
        {'num_attention_heads': 2, 'intermediate_size': 12}
    """
    return _padding(unwrap(model)).shape


def uniform_model(model: nn.Module) -> tuple[PreTrainedModel, UniformShape]:
    """Return a model of the stock class that computes the same function, and its shape.

    Tensors that need no padding are those of `model`, not copies; the result is meant to be saved or run.

    Args, Raises: see `uniform_shape`.

    Complexity: O(padded parameters) in time and memory.
    """
    model = unwrap(model)
    padding = _padding(model)
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            filled = padding.filled(name, parameter.detach())
            memo[id(parameter)] = (
                parameter if filled is None else nn.Parameter(filled, requires_grad=parameter.requires_grad)
            )
    result: Any = copy.deepcopy(model, memo)
    result.__class__ = padding.stock
    for module in result.modules():
        if _mixed(type(module)):
            module.__class__ = type(module).__bases__[1]
            for buffer in ("kept_inputs", "kept_heads"):
                module._buffers.pop(buffer, None)
        fit_features(module)
    for path, values in padding.attributes.items():
        for attribute, value in values.items():
            setattr(result.get_submodule(path), attribute, value)
    for config in _configs(result):
        _say(config, padding.changes)
    return result, padding.shape


def loadable_class(model: nn.Module) -> type[PreTrainedModel]:
    """Return the class of transformers itself that a model is of, behind ours.

    Raises:
        ValueError: it is of none.
    """
    stock = stock_class(type(model))
    if not issubclass(stock, PreTrainedModel) or getattr(transformers, stock.__name__, None) is not stock:
        raise ValueError(
            f"{type(model).__name__} is not a class of transformers, so stock transformers cannot load it; "
            "export the transformers model inside it"
        )
    return stock


def check_one_device(model: nn.Module) -> None:
    """Raise ValueError if weights are spread over devices by hooks, or are not in memory."""
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    if spread or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "this model is spread over devices or partly off memory; load it without device_map to export it"
        )


# -- what is padded, and where ---------------------------------------------------------------------


@dataclass
class _Padding:
    """What becomes of the parameters; nothing of it is done yet.

    Args:
        stock: class of the result. target: it, on the meta device. changes: config attribute -> new value.
        sources: parameter -> {axis: (n,) int64}: which old index lies there, -1 for zeros.
        attributes: module -> {attribute: value}.
    """

    stock: type[PreTrainedModel]
    target: Any = None
    changes: dict[str, int] = field(default_factory=dict)
    sources: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    shape: Any = None

    def filled(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the padded parameter, None where nothing changes."""
        result = tensor
        for axis, source in self.sources.get(name, {}).items():
            if _same(source, result.shape[axis]):
                continue
            there = torch.from_numpy(np.flatnonzero(source >= 0)).to(tensor.device)
            picked = result.index_select(axis, torch.from_numpy(source[source >= 0]).to(tensor.device))
            size = (*result.shape[:axis], source.size, *result.shape[axis + 1 :])
            result = result.new_zeros(size).index_copy_(axis, there, picked)
        return None if result is tensor else result

    def count(self, params: Mapping[str, torch.Tensor]) -> tuple[int, int]:
        """Return (all scalars, scalars that are padding) of the result."""
        total = zeros = 0
        for name, parameter in params.items():
            size, real = list(parameter.shape), list(parameter.shape)
            for axis, source in self.sources.get(name, {}).items():
                size[axis], real[axis] = source.size, int((source >= 0).sum())
            total += int(np.prod(size))
            zeros += int(np.prod(size)) - int(np.prod(real))
        return total, zeros

    def check(self, params: Mapping[str, torch.Tensor]) -> None:
        """Raise ValueError unless every parameter gets the shape that the stock class expects."""
        expected = {name: tuple(p.shape) for name, p in self.target.named_parameters()}
        for name, parameter in params.items():
            shape = list(parameter.shape)
            for axis, source in self.sources.get(name, {}).items():
                shape[axis] = source.size
            if expected.get(name) != tuple(shape):
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(parameter.shape)}, and a uniform {self.stock.__name__} "
                    f"{'needs ' + str(expected[name]) if name in expected else 'has no such parameter'}: "
                    "this model cannot be exported with uniform=True; use topoprune.save"
                )


def _same(source: np.ndarray, size: int) -> bool:
    return source.size == size and bool((source == np.arange(size)).all())


def _padding(model: nn.Module) -> _Padding:
    """Check everything and work out the padding; the model is not touched."""
    result = _Padding(loadable_class(model))
    check_one_device(model)
    config: Any = copy.deepcopy(model.config)
    _say(config, {})
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"no adapter for model_type={config.model_type!r}: its uniform shape is not known; known: {known}"
        )
    sites = {site.name: site for site in find_sites(model)}
    dense = find_sites(_on_meta(result.stock, config))
    _check_by_hand(model, dense)
    choice = choose_shape(model, family, config, sites, dense)
    result.changes = choice.changes
    result.target = _on_meta(result.stock, checked_config(config, choice.changes))
    for target in find_sites(result.target):
        if target.kind == "input_dim":
            _place_inputs(result, model, target)
        elif target.kind == "neuron":
            _place_neurons(result, sites.get(target.name), target)
        else:
            _place_heads(result, sites.get(target.name), target, choice.slots[target.name])
            result.attributes |= _attributes(family, target)
    for name, source in choice.bias.items():
        result.sources[name] = {1: source}
    params = dict(model.named_parameters())
    result.check(params)
    parameters, padding = result.count(params)
    result.shape = UniformShape(choice.dense | choice.changes, choice.dense, parameters, padding)
    return result


def _place_neurons(result: _Padding, source: Site | None, target: Site) -> None:
    units = filled(range(source.n_units if source else 0), target.n_units)
    for piece in target.tensors:
        _place(result, piece, None if source is None else source.one(piece.role), units, 1)


def _place_heads(result: _Padding, source: Site | None, target: Site, slots: Slots) -> None:
    for piece in target.tensors:
        units = slots.keys if piece.role.removesuffix("_bias") in ("k", "v") else slots.queries
        _place(result, piece, None if source is None else source.one(piece.role), units, target.head_width)


def _place(result: _Padding, piece: TensorSlice, old: TensorSlice | None, units: np.ndarray, width: int) -> None:
    """Record where the units of one tensor come from; several pieces may share an axis (fused projections)."""
    axes = result.sources.setdefault(piece.param, {})
    whole = axes.setdefault(piece.axis, np.full(piece.shape[piece.axis], -1, dtype=np.int64))
    source = np.repeat(units, width) * width + np.tile(np.arange(width), units.size)
    offset = 0 if old is None else old.offset
    whole[piece.offset : piece.offset + source.size] = np.where(np.repeat(units, width) < 0, -1, source + offset)


def _place_inputs(result: _Padding, model: nn.Module, target: Site) -> None:
    """Scatter the columns behind a gather back."""
    for piece in target.reads:
        kept = getattr(model.get_submodule(piece.param.rpartition(".")[0]), "kept_inputs", None)
        if kept is not None:
            source = np.full(target.n_units, -1, dtype=np.int64)
            source[kept.cpu().numpy()] = np.arange(kept.numel())
            result.sources.setdefault(piece.param, {})[piece.axis] = source


def _attributes(family: Family, target: Site) -> dict[str, dict[str, int]]:
    """Return module -> attributes that say the number of heads."""
    heads = heads_of(target)
    keys = target.n_units if target.kind == "kv_group" else heads
    values = {"heads": heads, "width": heads * target.head_width, "groups": heads // keys}
    for block in family.blocks:
        if isinstance(block, Attention) and (block.stack, block.block) == (target.stack, target.block):
            names = {name: values[meaning] for name, meaning in block.attributes}
            return {target.one("q").param.rsplit(".", 2)[0]: names}
    raise AssertionError(f"no block of {family.model_types} for {target.name}")


# -- models and configs ----------------------------------------------------------------------------


def _on_meta(stock: type[PreTrainedModel], config: Any) -> Any:
    with torch.device("meta"):
        return stock(copy.deepcopy(config))


def _check_by_hand(model: Any, dense: Sequence[Site]) -> None:
    layout = getattr(model.config, KEY, None)
    strange = sorted(set(layout["sites"]) - {site.name for site in dense}) if isinstance(layout, Mapping) else []
    if strange:
        raise ValueError(
            f"site {strange[0]!r} was made by hand: which config attribute says its size is not known, so this model "
            "cannot be exported with uniform=True; use topoprune.save"
        )


def _say(config: Any, changes: Mapping[str, int]) -> None:
    """Make a config, in place, that of a stock model with some other sizes."""
    for name in _OURS:
        config.__dict__.pop(name, None)
    for attribute, value in changes.items():
        setattr(config, attribute, value)


def _configs(model: nn.Module) -> list[Any]:
    """Return every config object that a module of the model holds, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


def _mixed(cls: type) -> bool:
    """Whether this is one of the classes that compaction makes, in this module or in a folder's copy of it."""
    return any(base.__name__ in ("Compacted", "Patched") for base in cls.__mro__)

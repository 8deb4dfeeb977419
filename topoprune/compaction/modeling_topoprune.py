"""Rebuild a compacted transformers model from its config.

A copy of this file lies in every folder that `topoprune.save` writes, so that
``AutoModelFor….from_pretrained(folder, trust_remote_code=True)`` works where topoprune is not
installed. It imports torch and transformers only. ``config.topoprune`` says which parameters have
which shape, which attributes follow, and which modules run another forward:

==================  ==================================================================================
``parameters``      parameter -> shape
``attributes``      module -> {attribute: value}
``patches``         module -> one of `PATCHES`
``buffers``         module -> {buffer: length}, int64 indices that lie in the checkpoint
``sites``           site -> kept, of, and which of the dense model's units they are
==================  ==================================================================================

Names are relative to the base model, so that one config serves the bare model and every task head.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "FILE_NAME",
    "KEY",
    "LAYOUT_VERSION",
    "MANIFEST_NAME",
    "PATCHES",
    "Compacted",
    "auto_map",
    "compact_class",
    "patch_module",
    "reshape",
    "stock_class",
]

KEY = "topoprune"
LAYOUT_VERSION = 1
FILE_NAME = "modeling_topoprune.py"
MANIFEST_NAME = "topoprune.json"


# -- forwards that differ from the stock ones ------------------------------------------------------


class Patched:
    """A stock module with another forward; pickles and deep-copies by its base class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        patch, base = type(self).__bases__
        return _blank, (patch.__name__, base), self.__getstate__()  # type: ignore[attr-defined]


def _blank(patch: str, base: type) -> Any:
    cls: Any = _patched(PATCHES_BY_NAME[patch], base)
    return cls.__new__(cls)


class GatheredInputs(Patched):
    """A projection of some of its input features: ``kept_inputs`` (n,) int64 of them, in order."""

    kept_inputs: torch.Tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Project the kept features of (..., all features)."""
        return super().forward(hidden.index_select(-1, self.kept_inputs))  # type: ignore[misc]


class NoInputs(Patched):
    """A projection that reads nothing: it returns its bias, or zeros."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., out) for any input of shape (..., 0)."""
        return _constant(self, hidden)


def _constant(projection: Any, like: torch.Tensor) -> torch.Tensor:
    axis = 1 if type(projection).__name__.endswith("Conv1D") else 0
    shape = (*like.shape[:-1], projection.weight.shape[axis])
    if projection.bias is None:
        return like.new_zeros(shape)
    return projection.bias.expand(shape)


class NoHeads(Patched):
    """Attention without heads: the output projection's bias; the cache still counts the tokens."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return ((B, T, out), None)."""
        _count_tokens(self, hidden_states, kwargs)
        for name in ("o_proj", "out_proj", "out_lin", "c_proj", "o"):
            projection = getattr(self, name, None)
            if isinstance(projection, nn.Module):
                out = _constant(projection, hidden_states)
                dropout = getattr(self, "resid_dropout", None)
                return (out if dropout is None else dropout(out)), None
        return hidden_states.new_zeros((*hidden_states.shape[:-1], 0)), None  # the projection is outside (BERT)


def _count_tokens(attention: Any, hidden_states: torch.Tensor, kwargs: Mapping[str, Any]) -> None:
    """Append a number a token to the cache, whose length says how many tokens went by."""
    cache, memory = kwargs.get("past_key_values"), kwargs.get("key_value_states")
    if cache is None:
        return
    index = attention.layer_idx
    own, source = cache, hidden_states
    if hasattr(cache, "self_attention_cache"):
        own = cache.self_attention_cache
        if memory is not None:
            if cache.is_updated.get(index):
                return
            own, source = cache.cross_attention_cache, memory
            cache.is_updated[index] = True
    # Not of zero heads: a dynamic cache takes keys without entries for a cache without tokens.
    states = source.new_zeros((source.shape[0], 1, source.shape[1], 1))
    own.update(states, states, index)


class BiasOfKeptHeads(Patched):
    """T5 attention over the heads ``kept_heads`` (h,) int64 of a position bias that all layers share."""

    kept_heads: torch.Tensor
    o: nn.Module

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return (output, the whole position bias for the layers behind, attention weights)."""
        # Before it went through the attention interface, T5 added the mask to the bias when it made it.
        old = not hasattr(sys.modules[type(self).__bases__[1].__module__], "ALL_ATTENTION_FUNCTIONS")
        memory = kwargs.get("key_value_states")
        shared = kwargs.pop("position_bias", None)
        if memory is None and shared is None and self.has_relative_attention_bias:  # type: ignore[attr-defined]
            shared = self._whole_bias(hidden_states, kwargs, old)
        heads = self.kept_heads.shape[0]
        if heads:
            # Without a bias of its own (cross attention) a layer makes zeros, of its own number of heads.
            ours = None if shared is None or memory is not None else shared.index_select(1, self.kept_heads)
            out = super().forward(hidden_states, *args, position_bias=ours, **kwargs)  # type: ignore[misc]
            return (out[0], out[1] if shared is None else shared, *out[2:])
        _count_tokens(self, hidden_states, kwargs)
        out = _constant(self.o, hidden_states)
        if shared is None:
            shared = hidden_states.new_zeros((1, 1, hidden_states.shape[1], 1))
        return (out, shared) if old and not kwargs.get("output_attentions") else (out, shared, None)

    def _whole_bias(self, hidden_states: torch.Tensor, kwargs: Mapping[str, Any], with_mask: bool) -> torch.Tensor:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("mask")
        length = hidden_states.shape[1]
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)  # type: ignore[attr-defined]
        past = past.clone() if isinstance(past, torch.Tensor) else past  # a static cache counts in place
        keys = length + past if mask is None else mask.shape[-1]
        bias: torch.Tensor = self.compute_bias(length, keys, device=hidden_states.device, past_seen_tokens=past)  # type: ignore[attr-defined]
        bias = bias.contiguous()  # heads come last in memory; every layer picks its own, 20 times slower from that
        return bias + mask if with_mask and mask is not None else bias


PATCHES: dict[str, type] = {
    "gathered-inputs": GatheredInputs,
    "no-inputs": NoInputs,
    "no-heads": NoHeads,
    "bias-of-kept-heads": BiasOfKeptHeads,
}
PATCHES_BY_NAME = {cls.__name__: cls for cls in PATCHES.values()}
_CLASSES: dict[tuple[type, type], type] = {}


def _patched(patch: type, base: type) -> type:
    key = (patch, base)
    if key not in _CLASSES:
        _CLASSES[key] = type(f"{patch.__name__}{base.__name__}", key, {"__module__": __name__})
    return _CLASSES[key]


def patch_module(module: nn.Module, name: str) -> None:
    """Give a module another forward, in place; parameters and their names stay.

    Args:
        module: any module. name: one of `PATCHES`. A patch already there is replaced.
    """
    base = type(module)
    # By name: a folder's copy of this file has classes of its own.
    if any(parent.__name__ == Patched.__name__ for parent in base.__mro__):
        base = base.__bases__[1]
    module.__class__ = _patched(PATCHES[name], base)


# -- models ----------------------------------------------------------------------------------------


class _NoFilling(TorchFunctionMode):
    """Makes the functions of `torch.nn.init` return their tensor as it is, in this thread."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class Compacted:
    """A transformers model whose shapes come from ``config.topoprune``; mixed in before the stock class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        _forget_layers(config)
        # On the meta device, where loading begins, drawing random numbers takes longer than all the rest.
        with _NoFilling() if torch.get_default_device().type == "meta" else nullcontext():
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        reshape(self, getattr(config, KEY, None))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the folder also gets the code that loads it, and loses an outdated manifest."""
        config: Any = self.config  # type: ignore[attr-defined]
        config.auto_map = auto_map(config)
        folder = Path(save_directory)
        if (args[0] if args else kwargs.get("is_main_process", True)) and not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            # First, so that push_to_hub=True finds it.
            (folder / FILE_NAME).write_bytes(Path(__file__).read_bytes())
        # transformers renames weights to what older checkpoints called them, and back by the name of the stock class.
        kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; weights of layers that were cut are never made up, which it only warns about."""
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        prefix = f"{model.base_model_prefix}."
        cut = getattr(model.config, KEY)["parameters"]
        lost = sorted(name for name in info["missing_keys"] if name.removeprefix(prefix) in cut)
        if lost and not wanted:
            raise ValueError(
                f"the checkpoint has no weights for {lost[0]!r} and {len(lost) - 1} more parameters of a "
                f"{cls.__name__}: it is damaged, or was written by another version of transformers"
            )
        return (model, info) if wanted else model

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers searches the file that a class comes from for attention: that is the stock class's file.
        stock: Any = cls.__mro__[cls.__mro__.index(Compacted) + 1]
        return bool(stock._can_set_attn_implementation())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank_model, (type(self).__bases__[1],), self.__getstate__()  # type: ignore[attr-defined]


def _blank_model(base: type) -> Any:
    cls: Any = compact_class(base)
    return cls.__new__(cls)


_MODELS: dict[type, type] = {}


def _forget_layers(config: Any) -> None:
    """Drop a folder's ``per_layer_config``: the layout says more, and pruning again would make it untrue."""
    if isinstance(getattr(type(config), "per_layer_config", None), property):
        config.per_layer_config = None
    for name in ("per_layer_config", "allow_global_per_layer_attribute_access"):
        config.__dict__.pop(name, None)


def stock_class(cls: type) -> type:
    """Return the stock class behind a compacted one, be it of this file or of a folder's copy of it."""
    return cls.__bases__[1] if any(base.__name__ == Compacted.__name__ for base in cls.__bases__) else cls


def compact_class(base: type) -> type:
    """Return the compacted variant of a stock model class; the same object at every call."""
    if issubclass(base, Compacted):
        return base
    base = stock_class(base)
    if base not in _MODELS:
        _MODELS[base] = type(f"Compact{base.__name__}", (Compacted, base), {"__module__": __name__})
    return _MODELS[base]


def __getattr__(name: str) -> Any:
    # Auto classes look their class up by name: CompactBertModel is made from transformers.BertModel.
    if name.startswith("Compact"):
        stock = getattr(transformers, name.removeprefix("Compact"), None)
        if isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel):
            return compact_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def auto_map(config: Any) -> dict[str, str]:
    """Return auto class -> class in this file, for every auto class that knows the config."""
    from transformers.models.auto import modeling_auto

    found = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            model = mapping[type(config)]
            model = model[0] if isinstance(model, tuple) else model
            found[name] = f"{FILE_NAME.removesuffix('.py')}.Compact{model.__name__}"
    return found


def reshape(model: Any, layout: Mapping[str, Any] | None) -> None:
    """Give the modules of a freshly built stock model the shapes of a layout, in place.

    Args:
        model: built from the dense shapes in the config; on the meta device too.
        layout: ``config.topoprune``.

    Raises:
        ValueError: no layout, a newer version, or names and shapes that are not this model's.
    """
    if not isinstance(layout, Mapping) or "version" not in layout:
        raise ValueError(f"config.{KEY} is missing: this is not the config of a compacted model")
    if layout["version"] > LAYOUT_VERSION:
        raise ValueError(
            f"config.{KEY} has version {layout['version']}, this code reads up to {LAYOUT_VERSION}; upgrade topoprune"
        )
    std = float(getattr(model.config, "initializer_range", None) or 0.02)
    modules = dict(model.named_modules())  # one pass instead of a walk from the top for every name
    try:
        for name, shape in layout["parameters"].items():
            module, leaf = _owner(model, modules, name)
            if module is None:
                continue
            old = getattr(module, leaf)
            if not isinstance(old, nn.Parameter) or len(shape) != old.ndim:
                raise ValueError(f"{name!r} is no parameter with {len(shape)} axes in a {type(model).__name__}")
            with torch.no_grad():
                fresh = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
                new = nn.Parameter(fresh, requires_grad=old.requires_grad)
                if not new.is_meta:  # nothing to fill there, and asking takes longer than the loading of the weights
                    nn.init.normal_(new, std=std) if new.ndim > 1 else nn.init.zeros_(new)
            setattr(module, leaf, new)
            fit_features(module)
        for name, values in layout["attributes"].items():
            module, _ = _owner(model, modules, f"{name}.")
            for attribute, value in values.items():
                if module is not None:
                    setattr(module, attribute, int(value))
        for name, buffers in layout["buffers"].items():
            module, _ = _owner(model, modules, f"{name}.")
            for buffer, length in buffers.items():
                if module is not None:
                    module.register_buffer(buffer, torch.arange(int(length)))
        for name, patch in layout["patches"].items():
            module, _ = _owner(model, modules, f"{name}.")
            if module is not None:
                patch_module(module, patch)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config.{KEY} does not fit a {type(model).__name__}: {error!r}; it was altered") from error


def fit_features(module: nn.Module) -> None:
    """Make the size attributes of a Linear or Conv1D say what its weight is."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif type(module).__name__.endswith("Conv1D") and weight is not None:
        module.nx, module.nf = weight.shape  # type: ignore[assignment]


def _owner(model: Any, modules: Mapping[str, nn.Module], name: str) -> tuple[nn.Module | None, str]:
    """Return the module and the last part of a name that is relative to the base model.

    None if the model lacks that whole stack, as a decoder alone lacks the encoder's layers.
    """
    path, leaf = name.rsplit(".", 1)
    stack = path.split(".", 1)[0]
    prefixes = ("", f"{model.base_model_prefix}.")
    for prefix in prefixes:
        if prefix + path in modules:
            return modules[prefix + path], leaf
    if stack in ("encoder", "decoder") and not any(prefix + stack in modules for prefix in prefixes):
        return None, leaf
    raise ValueError(f"config.{KEY} names module {path!r}, which a {type(model).__name__} does not have")

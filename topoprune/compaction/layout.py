"""The layout of a compacted model: what ``config.topoprune`` says about its shapes and units."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from topoprune.architectures import model_config
from topoprune.compaction.modeling_topoprune import KEY, LAYOUT_VERSION

__all__ = ["bits_of", "empty_layout", "kept_units", "layout_of", "relative_name", "units_of"]


def layout_of(model: nn.Module) -> Mapping[str, Any] | None:
    """Return ``config.topoprune`` of a compacted model, None for a dense one."""
    layout = getattr(model_config(model), KEY, None)
    return layout if isinstance(layout, Mapping) else None


def empty_layout() -> dict[str, Any]:
    """Return the layout of a model from which nothing was cut."""
    return {"version": LAYOUT_VERSION, "sites": {}, "parameters": {}, "attributes": {}, "patches": {}, "buffers": {}}


def kept_units(model: nn.Module) -> dict[str, np.ndarray]:
    """Return site name -> (kept,) int64: which units of the dense model the remaining ones are.

    Query heads in attention (grouped-query attention too), neurons in feed-forward blocks, input
    dimensions behind a gather. Only sites that were cut are named; empty for a dense model.

    >>> kept_units(nn.Linear(2, 2))
    {}
    """
    layout = layout_of(model)
    if layout is None:
        return {}
    return {name: np.flatnonzero(units_of(entry)) for name, entry in layout["sites"].items()}


def bits_of(units: np.ndarray) -> str:
    """Return a (n,) bool array as text: base64 of its packed bits.

    >>> bits_of(np.array([True, False, True]))
    'oA=='
    """
    return base64.b64encode(np.packbits(units).tobytes()).decode()


def units_of(entry: Mapping[str, Any]) -> np.ndarray:
    """Return the (of,) bool array behind a site's entry: which units of the dense model stay.

    Raises:
        ValueError: a text that is not what `bits_of` writes, or does not fit the entry's counts.

    >>> units_of({"units": "oA==", "of": 3, "kept": 2})
    array([ True, False,  True])
    """
    try:
        packed = np.frombuffer(base64.b64decode(entry["units"], validate=True), dtype=np.uint8)
        units = np.unpackbits(packed, count=int(entry["of"])).astype(bool)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"config.{KEY} has a damaged entry of kept units: {error!r}") from error
    if int(units.sum()) != entry["kept"]:
        raise ValueError(f"config.{KEY} says {entry['kept']} units are kept and names {int(units.sum())}")
    return units


def relative_name(model: Any, name: str) -> str:
    """Return a module or parameter name relative to the base model: the same under every task head."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name[len(prefix) :] if prefix != "." and name.startswith(prefix) else name

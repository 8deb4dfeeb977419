"""Pruner state as a safetensors file: tensors as they are, the rest as JSON; no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from topoprune.files import atomic_path

__all__ = ["load_state", "save_state"]

_FORMAT = "topoprune.PrunerState"


def save_state(state: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a nested dict of tensors, numbers and strings; atomic."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}

    def strip(value: Any) -> Any:
        if torch.is_tensor(value):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous()
            return {"__tensor__": str(len(tensors) - 1)}
        if isinstance(value, Mapping):
            return {key: strip(item) for key, item in value.items()}
        return value

    header = {"format": _FORMAT, "state": json.dumps(strip(state))}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata=header)
    return Path(path)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a state written by `save_state`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no pruner state at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable pruner state: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds {metadata.get('format')!r}, expected {_FORMAT!r}")

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if "__tensor__" in value:
                return tensors[value["__tensor__"]]
            return {key: fill(item) for key, item in value.items()}
        return value

    state: dict[str, Any] = fill(json.loads(metadata["state"]))
    return state

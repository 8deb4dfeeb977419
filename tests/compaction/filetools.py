"""Compacted models and comparisons for the tests on saved folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.compaction.cases import structure_plan
from tests.tiny import build, inputs
from topoprune import Plan, compact

__all__ = ["content", "outputs", "same_state", "small", "state", "tampered_json"]


def small(family: str, plan: Plan | None = None, seed: int = 0) -> tuple[Any, Plan]:
    """Return a compacted tiny model and the plan it was made by (half of everything is gone by default)."""
    dense: Any = build(family, seed)
    ignored = set(getattr(dense, "_keys_to_ignore_on_save", None) or ())
    if ignored:
        # Position tables that transformers computes and never stores: the tiny models have noise there.
        fresh = type(dense)(dense.config)
        with torch.no_grad():
            for name, tensor in dense.named_parameters():
                if name in ignored:
                    tensor.copy_(fresh.get_parameter(name))
    plan = plan or structure_plan(dense, seed=seed)
    return compact(dense, plan), plan


def state(model: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every parameter and buffer: dtype, shape, raw bytes."""
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        found[name] = (str(tensor.dtype), tuple(tensor.shape), raw)
    return found


def outputs(model: Any) -> torch.Tensor:
    """Logits on the fixed batch."""
    with torch.no_grad():
        logits: torch.Tensor = model(**inputs(model)).logits
    return logits


def same_state(one: Any, other: Any) -> None:
    """Bit-equal weights and buffers, and equal logits."""
    assert state(one) == state(other)
    assert torch.equal(outputs(one), outputs(other))


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tampered_json(path: Path, *keys: str, value: Any) -> None:
    """Set one entry of a JSON file."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))

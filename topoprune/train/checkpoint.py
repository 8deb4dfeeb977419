"""Pruner state as a safetensors file: tensors as they are, the rest as JSON; no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from topoprune.files import atomic_path
from topoprune.train.decision import Draft
from topoprune_solvers import Bound, Solution, Status

__all__ = [
    "draft_of_state",
    "draft_state",
    "load_state",
    "newest_checkpoint",
    "save_state",
    "solution_of_state",
    "solution_state",
]

_FORMAT = "topoprune.PrunerState"


def newest_checkpoint(folder: str | os.PathLike[str], *, holds: Sequence[str] = ()) -> Path | None:
    """Return the newest complete ``checkpoint-<step>`` of `transformers.Trainer` in a folder, or None.

    The Trainer writes ``trainer_state.json`` last; a checkpoint whose writing was cut short lacks it, or has half
    of it. Such ones are passed over, where ``resume_from_checkpoint=True`` would fail on them.

    Args:
        folder: the run's output folder. holds: names of files that must be there too.
    """
    found: list[tuple[int, Path]] = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and all((path / name).is_file() for name in holds):
            try:
                state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(state, dict) and state.get("global_step") == int(number):
                found.append((int(number), path))
    return max(found)[1] if found else None


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


def solution_state(solution: Solution) -> dict[str, Any]:
    """Return a solution as tensors and strings."""
    s = solution
    arrays = {"keep": s.keep, "dominator": s.dominator, "distance": s.dominator_distance, "importance": s.importance}
    tensors = {name: None if array is None else torch.from_numpy(array.copy()) for name, array in arrays.items()}
    bound = None if s.bound is None else [s.bound.value, s.bound.source]
    return {**tensors, "meta": json.dumps([s.objective, s.sense, s.status.name, s.solver, s.seconds, bound])}


def solution_of_state(state: Mapping[str, Any]) -> Solution:
    """Rebuild a solution from `solution_state`."""
    objective, sense, status, solver, seconds, bound = json.loads(state["meta"])

    def array(name: str) -> np.ndarray | None:
        tensor = state.get(name)
        return None if tensor is None else tensor.cpu().numpy()

    keep = array("keep")
    assert keep is not None
    return Solution(
        keep=keep,
        objective=objective,
        sense=sense,
        status=Status[status],
        solver=solver,
        bound=None if bound is None else Bound(*bound),
        dominator=array("dominator"),
        dominator_distance=array("distance"),
        seconds=seconds,
        importance=array("importance"),
    )


def draft_state(draft: Draft) -> dict[str, Any]:
    """Return a solved draft as tensors and strings."""
    told = {
        "step": draft.step,
        "request": dict(draft.request),
        "thetas": draft.thetas,
        "seconds": draft.seconds,
        "edge_axes": {name: [axis, list(shape)] for name, (axis, shape) in draft.edge_axes.items()},
    }
    return {
        "meta": json.dumps(told, default=str),
        "solutions": {name: solution_state(solution) for name, solution in draft.solutions.items()},
        "moments": {name: moment.clone() for name, moment in draft.moments.items()},
        "units": {name: torch.from_numpy(units.copy()) for name, units in draft.units.items()},
        "energy": {name: torch.from_numpy(energy.copy()) for name, energy in draft.energy.items()},
    }


def draft_of_state(state: Mapping[str, Any]) -> Draft:
    """Rebuild a solved draft from `draft_state`."""
    told = json.loads(state["meta"])
    return Draft(
        told["step"],
        told["request"],
        told["thetas"],
        solutions={name: solution_of_state(entry) for name, entry in state["solutions"].items()},
        edge_axes={name: (axis, (shape[0], shape[1])) for name, (axis, shape) in told["edge_axes"].items()},
        moments=dict(state["moments"]),
        units={name: units.cpu().numpy() for name, units in state["units"].items()},
        energy={name: energy.cpu().numpy() for name, energy in state["energy"].items()},
        seconds=told["seconds"],
    )

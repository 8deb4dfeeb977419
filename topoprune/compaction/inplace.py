"""Shrink a model between two optimizer steps: parameters, gradients and optimizer state, in place.

The parameters stay the same objects, so optimizers, schedulers and lists of parameters that a
training loop holds go on working.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from topoprune.compaction.compacting import dress
from topoprune.compaction.cut import Cut

__all__ = ["UnknownState", "shrink"]


class UnknownState(ValueError):
    """An optimizer keeps state of which nothing says how it shrinks with its parameter."""


@torch.no_grad()
def shrink(model: nn.Module, cut: Cut, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Carry out a cut on a live model and on the optimizers that train it.

    State of a parameter's shape (momenta, second moments: SGD, Adam, AdamW and their kin, in every
    implementation) is cut like the parameter, so training goes on as if the units had stayed masked. Factored
    second moments (Adafactor) are cut and rescaled so that the product of the factors stays what it was
    on the entries that stay; their further updates differ, since a mean over fewer entries is another one.

    Args:
        model: the live model, outside of a backward pass. cut: from `topoprune.compaction.cut.make_cut`.
        optimizers: all that hold parameters of the model.

    Raises:
        UnknownState: state tensors of another shape than their parameter's. Nothing is changed.

    Complexity: O(parameters that change); memory of their smaller copies until the old ones are freed.
    """
    params = dict(model.named_parameters())
    shapes = {name: params[name].shape for name in cut.touched}
    changes: list[tuple[dict[Any, Any], Any, torch.Tensor]] = []
    for optimizer in optimizers:
        for name in sorted(cut.touched):
            state = optimizer.state.get(params[name], {})
            for key, value in _cut_state(type(optimizer).__name__, name, state, shapes[name], cut).items():
                changes.append((state, key, value))
    data = {name: cut.tensor(name, params[name].detach()) for name in cut.touched}
    grads = {n: cut.tensor(n, g, data=False) for n in cut.touched if (g := params[n].grad) is not None}
    layout = cut.layout(model)
    for name, tensor in data.items():
        _replace(params[name], tensor)
        params[name].grad = grads.get(name)
    for state, key, value in changes:
        state[key] = value
    dress(model, cut, layout)


def _replace(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Give a parameter another shape without giving up its identity."""
    parameter.grad = None
    # Autograd's accumulator remembers the old shape for as long as any earlier graph is alive (a loss that the
    # loop still holds). It is dropped when the type changes, hence an empty tensor of another type in between.
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


def _cut_state(
    optimizer: str, name: str, state: dict[Any, Any], shape: torch.Size, cut: Cut
) -> dict[Any, torch.Tensor]:
    """Return the entries of a parameter's optimizer state that change, cut."""
    result: dict[Any, torch.Tensor] = {}
    pairs: dict[str, dict[Any, torch.Tensor]] = {"row": {}, "col": {}}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or (value.numel() <= 1 and value.ndim == 0):
            continue
        if value.shape == shape:
            result[key] = cut.tensor(name, value, data=False)
        elif len(shape) == 2 and (side := _factor_side(str(key), value, shape)):
            pairs[side][key] = value
        else:
            raise UnknownState(
                f"{optimizer} keeps state {key!r} of shape {tuple(value.shape)} beside {name!r} of shape "
                f"{tuple(shape)}; how to shrink it is not known"
            )
    if pairs["row"] and pairs["col"]:
        (row_key, row), (col_key, col) = *pairs["row"].items(), *pairs["col"].items()
        rows, cols = _cut_factor(name, row, 0, shape, cut), _cut_factor(name, col, 1, shape, cut)
        # V_ij = R_i C_j / mean(R): the factors of the part that stays are its means over rows and columns.
        result[row_key] = rows * _ratio(cols, col)
        result[col_key] = cols * _ratio(rows, row)
    return result


def _factor_side(key: str, value: torch.Tensor, shape: torch.Size) -> str:
    """Say which factor of a second moment a state tensor is: means over columns (row) or over rows (col)."""
    if "row" in key and value.numel() == shape[0]:
        return "row"
    if "col" in key and value.numel() == shape[1]:
        return "col"
    return ""


def _cut_factor(name: str, value: torch.Tensor, axis: int, shape: torch.Size, cut: Cut) -> torch.Tensor:
    kept = cut.keep.get(name, {}).get(axis)
    if kept is None:
        return value.clone()
    flat = value.reshape(shape[axis])[torch.from_numpy(kept).to(value.device)]
    return flat if value.ndim == 1 else flat.reshape(-1, 1) if value.shape[-1] == 1 else flat.reshape(1, -1)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    """Return mean(part) / mean(whole); 1 where there is nothing to compare."""
    if part.numel() == 0:
        return 1.0
    value = float(part.double().mean() / whole.double().mean()) if float(whole.double().mean()) else 1.0
    return value if math.isfinite(value) else 1.0

"""Parameters that are sharded over ranks (FSDP2): whole tensors to read, local parts to write.

`fully_shard` turns parameters into DTensors. Masks, gradients and optimizer state are edited in the part a rank
holds, without communication. What a decision reads is gathered tensor by tensor, so every rank must read the same
tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["is_sharded", "local", "local_part", "sharded", "tensors_of", "weights_of", "whole", "write"]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor; imports nothing of torch.distributed."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "to_local")


def sharded(model: nn.Module) -> bool:
    """Whether any parameter of a model is sharded."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with all its entries: gathered from all ranks if it is sharded, else itself."""
    given: Any = tensor
    return given.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this rank holds, sharing its memory; itself if it is not sharded."""
    given: Any = tensor
    return given.to_local() if is_sharded(tensor) else tensor


def local_part(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the view of a whole tensor that lies where `like` has its local part.

    Args:
        full: of the shape of `like`, or 1 along some dimensions (it is broadcast there).
        like: sharded or not.
    """
    if not is_sharded(like):
        return full
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    given: Any = like
    sizes, offsets = compute_local_shape_and_global_offset(given.shape, given.device_mesh, given.placements)
    for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
        if full.shape[dim] == like.shape[dim]:
            full = full.narrow(dim, offset if size else 0, size)
    return full


@torch.no_grad()
def write(parameter: torch.Tensor, full: torch.Tensor) -> None:
    """Copy a whole tensor into a parameter, or its part into a sharded one."""
    local(parameter).copy_(local_part(full, parameter))


def weights_of(model: nn.Module, *, copy: bool = False, copies: Iterable[str] = ()) -> nn.Module:
    """Return what `get_parameter` and `named_parameters` of a model may be read from.

    The model itself; if it is sharded, a view of it that gathers every parameter as it is read.

    Args:
        model: live.
        copy: give copies instead, which training does not change, made as they are read.
        copies: names of parameters that are copied now, to be read later.
    """
    copies = tuple(copies)
    return _Weights(model, copy, copies) if copy or copies or sharded(model) else model


def tensors_of(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """Return parameter name -> detached whole tensor, tied names included; gathered as it is read."""
    lazy: Mapping[str, torch.Tensor] | None = getattr(weights_of(model), "lazy_tensors", None)
    if lazy is not None:
        return lazy
    return {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}


class _Weights(nn.Module):
    """A model's parameters, whole, one at a time."""

    lazy_tensors: Mapping[str, torch.Tensor]

    def __init__(self, model: nn.Module, copy: bool, copies: Iterable[str]) -> None:
        super().__init__()
        tensors = _Tensors(dict(model.named_parameters(remove_duplicate=False)), copy)
        tensors.copies = {name: tensors[name].clone() for name in copies}
        # Not a submodule: its parameters are to be found by the methods below only.
        object.__setattr__(self, "lazy_tensors", tensors)

    def get_parameter(self, target: str) -> Any:
        return self.lazy_tensors[target]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        yield from self.lazy_tensors.items()


class _Tensors(Mapping[str, torch.Tensor]):
    """Parameter name -> whole detached tensor, made when it is asked for."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], copy: bool) -> None:
        self._parameters, self._copy = parameters, copy
        self.copies: Mapping[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.copies:
            return self.copies[name]
        held = self._parameters[name].detach()
        full = whole(held)
        return full.clone() if self._copy and full is held else full

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

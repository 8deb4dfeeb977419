"""Unit-major views of parameters, finiteness checks and the weights digest.

Shape legend: n units, w width of a unit in a tensor, m length of the other axis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from topoprune.graph import Site, TensorSlice
from topoprune.sharding import tensors_of

__all__ = ["check_finite", "named_tensors", "unit_blocks", "unit_rows", "weights_digest"]


def named_tensors(model: nn.Module | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return parameter name -> detached tensor; a mapping is passed through (detached).

    Sharded parameters (FSDP2) are gathered one by one, as they are read, on all ranks together.
    """
    if isinstance(model, nn.Module):
        return tensors_of(model)
    return {name: tensor.detach() for name, tensor in model.items()}


def unit_blocks(
    tensors: Mapping[str, torch.Tensor], site: Site, piece: TensorSlice, units: np.ndarray | None = None
) -> torch.Tensor:
    """Return what each unit owns of one tensor, unit-major; of a shared tensor, what its run of units owns.

    Args:
        tensors: parameter name -> tensor, e.g. from `named_tensors`.
        site: the site the slice belongs to.
        piece: the slice.
        units: (n,) unit indices; all units if omitted, then the result is a view where torch can
            make one.

    Returns:
        (n, w, m) tensor for a matrix, (n, w) for a vector, in the dtype of the parameter.
    """
    tensor = tensors[piece.param].movedim(piece.axis, 0)
    if piece in site.shared:
        # Every unit of a run has the run's part.
        runs = tensor[piece.offset : piece.offset + site.n_groups * piece.width]
        runs = runs.reshape(site.n_groups, piece.width, *tensor.shape[1:])
        own = runs.repeat_interleave(site.n_units // site.n_groups, dim=0)
        return own if units is None else own[torch.from_numpy(np.asarray(units)).to(tensor.device)]
    if units is None:
        own = tensor[piece.offset : piece.offset + site.n_units * piece.width]
    else:
        own = tensor[torch.from_numpy(piece.indices(np.asarray(units))).to(tensor.device)]
    return own.reshape(-1, piece.width, *tensor.shape[1:])


def unit_rows(
    tensors: Mapping[str, torch.Tensor], site: Site, piece: TensorSlice, units: np.ndarray | None = None
) -> torch.Tensor:
    """As `unit_blocks`, one row a unit: (n, w * m), or (n, w) for a vector."""
    return unit_blocks(tensors, site, piece, units).flatten(1)


def check_finite(tensors: Mapping[str, torch.Tensor], sites: Iterable[Site]) -> None:
    """Raise ValueError naming the first tensor of the sites that holds NaN or infinity.

    Complexity: one sum over each tensor; no copy unless the sum is not finite.
    """
    for name in dict.fromkeys(piece.param for site in sites for piece in site.tensors):
        tensor = tensors[name]
        if tensor.is_meta:
            raise ValueError(f"parameter {name!r} has no data (meta device); load the weights first")
        # A finite sum proves finite entries; an infinite one may be overflow, so look closer.
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        if torch.isfinite(tensor.sum(dtype=wide)):
            continue
        bad = ~torch.isfinite(tensor)
        if bad.any():
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise ValueError(f"parameter {name!r} has {int(bad.sum())} non-finite values, the first at {where}")


def weights_digest(model: nn.Module | Mapping[str, torch.Tensor], sites: Iterable[Site]) -> str:
    """Return a hex digest of all values of the tensors that the sites touch.

    Tensors are named by site and role, so a bare encoder and the same encoder under a task head
    have the same digest. Values are hashed on the CPU, one tensor per thread at a time.
    """
    tensors = named_tensors(model)
    labels: dict[str, str] = {}
    for site in sites:
        for piece in site.tensors:
            labels.setdefault(piece.param, f"{site.name}/{piece.role}")

    def one(name: str) -> str:
        tensor = tensors[name]
        raw = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        head = f"{labels[name]} {tensor.dtype} {tuple(tensor.shape)} "
        return head + hashlib.sha256(raw.data).hexdigest()  # releases the GIL

    with ThreadPoolExecutor(2) as pool:
        rows = sorted(pool.map(one, labels))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()

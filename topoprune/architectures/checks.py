"""Do sites fit a model? Asked before anything is read or edited."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from topoprune.graph import Site

__all__ = ["check_float", "check_plain", "check_sites", "counted_matrices", "matrix_parameters"]


def check_plain(model: nn.Module) -> None:
    """Raise ValueError for wrappers whose parameters are not the model's own: PEFT adapters, FSDP1."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    adapted = [
        name for name, module in model.named_modules() if hasattr(module, "base_layer") and hasattr(module, "merge")
    ]
    if adapted or "PeftModel" in kinds:
        where = f" ({adapted[0]!r} has one)" if adapted else ""
        raise ValueError(
            f"{type(model).__name__} has PEFT adapters{where} beside the weights that would be pruned; merge them "
            "first: model = model.merge_and_unload(), and train or prune that"
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError(
            "FSDP1 flattens parameters, so their rows and columns cannot be masked; use FSDP2 "
            "(torch.distributed.fsdp.fully_shard; with Accelerate: fsdp_version: 2)"
        )


def check_float(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless a tensor holds ordinary floating-point numbers."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(
            f"{name} is {found}, expected float32, float16, bfloat16 or float64; "
            "quantised weights cannot be pruned: load the model without quantisation"
        )


def check_sites(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise ValueError unless every tensor and consumer of the sites is in the model as described.

    Checked: unique site names, parameters that exist with the recorded shape and a floating-point
    dtype, slices that lie inside their axis, consumers that exist, and no matrix that two
    names share (tied weights cannot be pruned independently).

    Complexity: O(sites + parameters).
    """
    sites = tuple(sites)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    names: set[str] = set()
    owners: dict[int, str] = {}
    for site in sites:
        if site.name in names:
            raise ValueError(f"site names must be unique, {site.name!r} occurs twice")
        names.add(site.name)
        for piece in site.tensors:
            parameter = parameters.get(piece.param)
            if parameter is None:
                raise ValueError(
                    f"site {site.name!r} needs parameter {piece.param!r}, which {_near(piece.param, parameters)}"
                )
            check_float(piece.param, parameter)
            if tuple(parameter.shape) != tuple(piece.shape):
                raise ValueError(
                    f"parameter {piece.param!r} of site {site.name!r} has shape {tuple(parameter.shape)}, expected "
                    f"{tuple(piece.shape)}; the sites are of another model, or this one was pruned physically"
                )
            owners_here = site.n_groups if piece in site.shared else site.n_units
            end = piece.offset + owners_here * piece.width
            if not 0 <= piece.axis < parameter.ndim or piece.offset < 0 or end > parameter.shape[piece.axis]:
                raise ValueError(
                    f"site {site.name!r}: {owners_here} units of width {piece.width} from {piece.offset} do not fit "
                    f"axis {piece.axis} of {piece.param!r} with shape {tuple(parameter.shape)}"
                )
            other = owners.setdefault(id(parameter), piece.param)
            if other != piece.param:
                raise ValueError(f"parameters {other!r} and {piece.param!r} are one tied tensor; untie them first")
        if site.consumer is not None and site.consumer not in modules:
            raise ValueError(
                f"site {site.name!r} names consumer {site.consumer!r}, which {_near(site.consumer, modules)}"
            )


def _near(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=1)
    return "is not in the model" + (f"; did you mean {close[0]!r}?" if close else "")


def counted_matrices(sites: Iterable[Site]) -> dict[str, tuple[int, ...]]:
    """Return parameter name -> shape of the weight matrices that sparsity is counted over.

    These are the attention and feed-forward matrices, each once, biases and embeddings apart.
    """
    return {piece.param: tuple(piece.shape) for site in sites for piece in site.tensors if len(piece.shape) == 2}


def matrix_parameters(sites: Iterable[Site]) -> int:
    """Return the number of scalars in `counted_matrices`."""
    return sum(rows * columns for rows, columns in counted_matrices(sites).values())

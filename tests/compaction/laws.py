"""What holds for every compacted model, as assertions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.masktools import logits
from topoprune import Plan, apply, find_sites
from topoprune_solvers import Solution, Status

__all__ = ["assert_same_function", "assert_sizes_fit", "masked_logits", "plan_of", "shuffled"]


def plan_of(model: nn.Module, keeps: Mapping[str, Any], gqa: str = "groups") -> Plan:
    """A plan that keeps exactly these units: site name -> (n,) bool, or how many of the first ones."""
    sites = find_sites(model, gqa=gqa)
    solutions = {}
    for site in sites:
        if site.name in keeps:
            given = keeps[site.name]
            keep = np.arange(site.n_units) < given if isinstance(given, int) else np.asarray(given, dtype=bool)
            solutions[site.name] = Solution(keep, float(keep.sum()), "min", Status.FEASIBLE, "test")
    assert set(solutions) == set(keeps), set(keeps) - set(solutions)
    return Plan(sites, solutions)


def shuffled(n: int, kept: int, seed: int = 0) -> np.ndarray:
    """(n,) bool with that many True at random places."""
    return np.random.default_rng(seed).permutation(np.arange(n) < kept)


def masked_logits(model: nn.Module, plan: Plan) -> torch.Tensor:
    with apply(model, plan, allow_changed_weights=True):
        return logits(model)


def assert_same_function(model: nn.Module, expected: torch.Tensor) -> None:
    tolerance = 1e-9 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(logits(model), expected, rtol=tolerance, atol=tolerance / 3)


def assert_sizes_fit(model: nn.Module) -> None:
    """The size attributes of projections say what their weights are, and no tensor is a view of a larger one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape), name
        elif type(module).__name__.endswith("Conv1D"):
            assert (module.nx, module.nf) == tuple(module.weight.shape), name
        else:
            continue
        if module.bias is not None:
            assert module.bias.shape == (module.nf if hasattr(module, "nf") else module.out_features,), name
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name

"""Masked and compacted models train alike: loss, gradients of what survives, gradient checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.compaction.cases import EMPTY, empty_plan, structure_plan
from tests.masktools import naive_masks
from tests.prunertools import batch_of
from tests.tiny import FAMILIES, build
from topoprune import Plan, apply, compact

every_family = pytest.mark.parametrize("family", FAMILIES)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or name == "p"):
                setattr(module, name, 0.0)
    return model.train()


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def of_survivors(model: nn.Module, plan: Plan, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries that no mask covers, in order."""
    masks = naive_masks(model, plan)
    return {name: value[masks[name]] if name in masks else value.flatten() for name, value in values.items()}


def assert_close_to_scale(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    scale = max(float(value.abs().max()) for value in ours.values() if value.numel())
    assert scale > 0
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name].flatten(), value.flatten(), rtol=0, atol=3e-5 * scale, msg=name)


@every_family
@pytest.mark.parametrize("case", ["half", "no heads in the first layer", "no neurons in the first layer"])
def test_weights_are_slices_and_their_gradients_too(family: str, case: str) -> None:
    model = without_dropout(build(family))
    plan = structure_plan(model) if case == "half" else empty_plan(model, EMPTY[case])
    batch = batch_of(model, 0)
    with apply(model, plan):
        smaller = compact(model, plan)
        assert smaller.training
        kept = of_survivors(model, plan, {name: p.detach() for name, p in model.named_parameters()})
        for name, parameter in smaller.named_parameters():
            assert torch.equal(parameter.detach().flatten(), kept[name]), name
        ours = of_survivors(model, plan, gradients(model, batch))
        assert_close_to_scale(ours, gradients(smaller, batch))


@every_family
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("case", ["half", "no heads in the first layer", "no neurons"])
def test_gradient_checkpointing_changes_nothing(family: str, case: str) -> None:
    model = without_dropout(build(family))
    plan = structure_plan(model) if case == "half" else empty_plan(model, EMPTY[case])
    smaller: Any = compact(model, plan)
    batch = batch_of(model, 0)
    plain = gradients(smaller, batch)
    smaller.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in smaller.modules())
    assert_close_to_scale(plain, gradients(smaller, batch))

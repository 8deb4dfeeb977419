"""Masked and compacted models are the same function: outputs, gradients, padding, attention maps, checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.compaction.cases import EMPTY, empty_plan, structure_plan, trained
from tests.prunertools import batch_of
from tests.tiny import FAMILIES, build, inputs
from topoprune import Plan, apply, check_equivalence, compact

every_family = pytest.mark.parametrize("family", FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
TEXT = [family for family in FAMILIES if family != "vit"]
HALF_PRECISION_CASES = ("no heads in the first layer", "nothing in the last layer", "no cross attention", "nothing")


def assert_equal(model: Any, plan: Plan, batches: Any) -> None:
    """Masked and compacted, with both implementations of attention."""
    with apply(model, plan):
        assert_same(model, compact(model, plan), batches)


def assert_same(model: Any, smaller: Any, batches: Any) -> None:
    for attention in ("eager", "sdpa"):
        for one in (model, smaller):
            one.set_attn_implementation(attention)
        found = check_equivalence(model, smaller, batches)
        assert found, f"{attention}\n{found}"


# -- outputs ---------------------------------------------------------------------------------------


@every_family
@every_dtype
def test_random_plans(family: str, dtype: torch.dtype) -> None:
    for seed, share in enumerate((0.25, 0.5, 0.75)):
        model = build(family, seed).to(dtype)
        assert_equal(model, structure_plan(model, share, seed), inputs(model, seed=seed))


@every_family
@every_dtype
def test_plans_that_empty_layers(family: str, dtype: torch.dtype) -> None:
    model: Any = build(family).to(dtype)
    full = dtype == torch.float32
    for case in EMPTY if full else HALF_PRECISION_CASES:
        if case != "no cross attention" or model.config.is_encoder_decoder:
            # Beside other layers that are cut, or that stay whole.
            assert_equal(model, empty_plan(model, EMPTY[case], share=0.25 if full else 0.0), inputs(model))


@every_family
@every_dtype
def test_trained_plans(family: str, dtype: torch.dtype) -> None:
    model, plan = trained(family)
    model = model.to(dtype)
    assert_same(model, compact(model, plan), batch_of(model, 99))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["float16", "float64"])
@every_family
def test_other_number_formats(family: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    assert_equal(model, structure_plan(model), inputs(model))


@pytest.mark.parametrize("family", TEXT)
def test_padding_on_either_side_and_none(family: str) -> None:
    model = build(family)
    right = inputs(model, batch=4)
    left = {key: value.flip(1) if key != "labels" else value for key, value in right.items()}
    bare = {key: value for key, value in right.items() if key != "attention_mask"}
    assert left["attention_mask"][1, 0] == 0 and right["attention_mask"][1, -1] == 0
    for plan in (structure_plan(model), empty_plan(model, EMPTY["no heads in the first layer"])):
        assert_equal(model, plan, [right, left, bare])


@every_family
def test_hidden_states_and_attention_maps(family: str) -> None:
    model = build(family)
    model.set_attn_implementation("eager")
    batch = inputs(model) | {"output_attentions": True, "output_hidden_states": True}
    for case, plan in {
        "half": structure_plan(model),
        "no heads": empty_plan(model, EMPTY["no heads"]),
        "neurons": empty_plan(model, EMPTY["no neurons"], share=0.0),
    }.items():
        with apply(model, plan):
            found = check_equivalence(model, compact(model, plan), batch).require()
        names = {row.output.split("[")[0] for row in found.outputs}
        assert any(name.endswith("hidden_states") for name in names)
        # Whole attention stays: its maps are compared too.
        assert any(name.endswith("attentions") for name in names) == (case == "neurons")
        assert bool(found.skipped) == (case != "neurons")

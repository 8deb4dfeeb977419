"""`check_equivalence` itself: it finds wrong models out, says how far they are apart, and refuses bad input."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.compaction.cases import STRUCTURES, structure_plan
from tests.masktools import bits
from tests.prunertools import batch_of
from tests.tiny import FAMILIES, build, inputs
from topoprune import Equivalence, Plan, apply, check_equivalence, compact
from topoprune.compaction.differences import OutputDifference, Tolerance, compare_outputs, difference, merge_rows

every_family = pytest.mark.parametrize("family", FAMILIES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


class Returns(nn.Module):
    """A model that returns what it was told to, whatever comes in."""

    def __init__(self, result: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.result = result
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, x: Any) -> Any:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def check(ours: Any, theirs: Any, **more: Any) -> Equivalence:
    return check_equivalence(Returns(ours), Returns(theirs), {"x": torch.ones(1)}, **more)


# -- wrong models are found out --------------------------------------------------------------------


@every_family
@every_dtype
def test_one_unit_too_many_is_found_out(family: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    plan = structure_plan(model)
    for kind in STRUCTURES:
        site = next((site for site in plan.sites if site.kind == kind), None)
        if site is None or (kind == "neuron" and dtype != torch.float32):
            continue  # one of 40 neurons may drown in the rounding of bfloat16
        keep = plan.keep(site.name).copy()
        keep[np.flatnonzero(keep)[0]] = False
        wrong = Plan(plan.sites, {**plan.solutions, site.name: replace_keep(plan, site.name, keep)})
        with apply(model, plan):
            found = check_equivalence(model, compact(model, wrong), inputs(model))
        assert not found and not found.equal
        with pytest.raises(ValueError, match=r"is not the same function as .* differs by"):
            found.require()


def replace_keep(plan: Plan, name: str, keep: np.ndarray) -> Any:
    return replace(plan.solutions[name], keep=keep, dominator=None, dominator_distance=None, bound=None)


@every_family
def test_a_single_changed_weight_is_found_out(family: str) -> None:
    model = build(family)
    plan = structure_plan(model)
    smaller = compact(model, plan)
    site = next(site for site in plan.sites if site.kind == "neuron" and site.layer == 1)
    weight: Any = smaller.get_submodule(str(site.consumer)).weight
    with apply(model, plan), torch.no_grad():
        assert check_equivalence(model, smaller, inputs(model))
        weight[0, 0] += 0.1
        assert not check_equivalence(model, smaller, inputs(model))


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_a_position_bias_of_other_heads_is_found_out(family: str) -> None:
    model = build(family)
    plan = structure_plan(model)
    smaller: Any = compact(model, plan)
    attention = smaller.encoder.block[1].layer[0].SelfAttention
    kept = attention.kept_heads
    others = torch.tensor([head for head in range(4) if head not in kept.tolist()])
    assert len(others) == len(kept)
    attention.kept_heads = others
    with apply(model, plan):
        assert not check_equivalence(model, smaller, inputs(model))


@every_family
def test_the_dense_model_is_not_the_compacted_one(family: str) -> None:
    model = build(family)
    assert not check_equivalence(model, compact(model, structure_plan(model)), inputs(model))


# -- what it says ----------------------------------------------------------------------------------


def test_the_report_names_outputs_and_says_what_is_allowed() -> None:
    model: Any = build("t5")
    plan = structure_plan(model)
    with apply(model, plan):
        found = check_equivalence(model, compact(model, plan), [inputs(model), inputs(model, seed=1)])
    assert found and found.equal and found.require() is found and found.batches == 2
    assert [row.output for row in found.outputs] == ["loss", "logits", "encoder_last_hidden_state"]
    assert (found.reference, found.candidate) == ("T5ForConditionalGeneration", "CompactT5ForConditionalGeneration")
    assert found.worst in found.outputs and found.worst.ratio <= 1
    text = str(found)
    assert text.startswith("equal: CompactT5ForConditionalGeneration against T5ForConditionalGeneration, 2 batches")
    assert all(row.output in text for row in found.outputs)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["equal"] is True and data["outputs"][1]["output"] == "logits"
    assert data["tolerances"] == {"dtype": "float32", "rtol": found.tolerances.rtol, "atol": 0.0}
    with pytest.raises(FrozenInstanceError):
        found.batches = 3  # type: ignore[misc]


def test_the_worst_output_is_named_and_its_batch() -> None:
    outcomes = [{"a": torch.tensor([4.0, 2.0]), "b": torch.tensor([1.0])} for _ in range(3)]
    theirs = [{key: value.clone() for key, value in outcome.items()} for outcome in outcomes]
    theirs[1]["b"][0] = 1.5
    theirs[2]["a"][1] = 2.25

    class Sequence(Returns):
        def forward(self, x: Any) -> Any:
            return self.result[int(x)]

    found = check_equivalence(Sequence(outcomes), Sequence(theirs), ({"x": torch.tensor(i)} for i in range(3)))
    rows = {row.output: row for row in found.outputs}
    assert (rows["a"].max_abs, rows["a"].max_rel, rows["a"].batch) == (0.25, 0.0625, 2)
    assert (rows["b"].max_abs, rows["b"].max_rel, rows["b"].batch) == (0.5, 0.5, 1)
    assert found.worst is rows["b"] and "NOT EQUAL" in str(found) and str(found).count("UNEQUAL") == 2
    with pytest.raises(ValueError, match=r"b differs by 0\.5, 0\.5 of its scale, in batch 1; allowed in float32"):
        found.require()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["the reference", "the candidate", "both"])
def test_non_finite_outputs_are_never_equal(value: float, where: str) -> None:
    bad, good = torch.tensor([1.0, value]), torch.ones(2)
    ours, theirs = (good if where == "the candidate" else bad), (good if where == "the reference" else bad)
    found = check({"logits": ours}, {"logits": theirs})
    assert not found and "1 non-finite values" in found.worst.note
    assert (where if where != "both" else "the reference has 1 non-finite values and the candidate") in str(found)
    with pytest.raises(ValueError, match="non-finite"):
        found.require()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["outputs"][0]["max_abs"] is None


@given(
    st.floats(1e-3, 1e3), st.floats(0, 1e-2), st.floats(0, 1e-2), st.floats(0, 1e-2), st.integers(1, 5), st.integers(0)
)
def test_the_tolerance_is_what_it_says(
    scale: float, gap: float, rtol: float, atol: float, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    ours = torch.rand(size, generator=generator, dtype=torch.float64) * scale
    theirs = ours + gap * scale * (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)
    row = difference("x", ours, theirs, Tolerance("float64", rtol, atol), 0)
    assert row.max_abs == float((ours - theirs).abs().max())
    assert row.equal == (row.max_abs <= atol + rtol * float(ours.abs().max())) == (row.ratio <= 1)


def test_a_tolerance_may_be_given() -> None:
    ours, theirs = {"logits": torch.tensor([1.0, 10.0])}, {"logits": torch.tensor([1.5, 10.0])}
    assert check(ours, theirs, rtol=0.05) and not check(ours, theirs, rtol=0.04)
    assert check(ours, theirs, rtol=0, atol=0.5) and not check(ours, theirs, rtol=0, atol=0.4)
    assert check(ours, theirs, atol=0.5).tolerances.rtol > 0
    assert check(ours, ours, rtol=0, atol=0)


def test_a_loss_is_judged_on_the_scale_of_the_logits() -> None:
    tolerance = Tolerance("float32", 1e-5, 0.0)
    ours = {"loss": torch.tensor(1e-4), "logits": torch.tensor([[20.0, -3.0]])}
    rows, _ = compare_outputs(ours, {**ours, "loss": torch.tensor(1e-4 + 1e-5)}, tolerance, 0)
    assert [row.equal for row in rows] == [True, True]
    rows, _ = compare_outputs({"loss": ours["loss"]}, {"loss": torch.tensor(1e-4 + 1e-5)}, tolerance, 0)
    assert [row.equal for row in rows] == [False]


def test_rows_of_batches_merge_into_the_worst() -> None:
    one = OutputDifference("x", 1.0, 0.5, 0.25, 0, True)
    two = OutputDifference("x", 0.5, 0.75, 2.0, 1, False, "why")
    other = OutputDifference("y", 0.0, 0.0, 0.0, 0, True)
    assert merge_rows([one, other, two]) == (OutputDifference("x", 1.0, 0.75, 2.0, 1, False, "why"), other)


def test_tolerances_grow_with_the_rounding_and_the_depth_only() -> None:
    def rtol(model: nn.Module) -> float:
        return check_equivalence(model, model, inputs(model)).tolerances.rtol

    single, double = rtol(build("bert")), rtol(build("bert").double())
    assert single / double == pytest.approx(2.0**29)
    assert 1e-6 < single < 5e-5
    assert rtol(build("bert").bfloat16()) / rtol(build("bert").half()) == pytest.approx(8)
    assert 0.005 < rtol(build("bert").bfloat16()) < 0.08
    assert rtol(build("t5")) > single
    model = build("bert")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert check_equivalence(model, model, inputs(model)).tolerances.dtype == "bfloat16"


# -- which outputs ---------------------------------------------------------------------------------


def test_outputs_of_any_form_are_compared() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    assert [row.output for row in check(one, one).outputs] == ["output"]
    assert [row.output for row in check((one, [two]), (one, [two])).outputs] == ["output[0]", "output[1][0]"]
    nested = {"a": {"b": one}, "ids": torch.ones(1, dtype=torch.long), "past_key_values": (one,), "none": None}
    assert [row.output for row in check(nested, nested).outputs] == ["a.b"]
    assert not check((one, two), (one, two + 1))


def test_tuples_of_a_real_model_are_compared() -> None:
    model = build("bart")
    plan = structure_plan(model)
    with apply(model, plan):
        found = check_equivalence(model, compact(model, plan), inputs(model) | {"return_dict": False})
    assert found and len(found.outputs) >= 3


def test_attention_maps_of_other_numbers_of_heads_are_skipped_and_said() -> None:
    maps = {"logits": torch.ones(2), "attentions": (torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2))}
    fewer = {"logits": torch.ones(2), "attentions": (torch.ones(1, 4, 2, 2), None)}
    found = check(maps, fewer)
    assert found and [row.output for row in found.outputs] == ["logits", "attentions[0]"]
    assert found.skipped == ("attentions[1]",) and "attentions[1]" in str(found)
    assert not check(maps, {**maps, "attentions": (torch.zeros(1, 4, 2, 2), torch.ones(1, 2, 2, 2))})


# -- nothing is left behind ------------------------------------------------------------------------


def test_models_are_left_as_they_were() -> None:
    model: Any = build("gpt2").train()
    model.transformer.h[0].eval()
    smaller = compact(model)
    batch = inputs(model)
    before, flags = bits(model), [module.training for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    # Dropout is on in training: only in eval mode are both the same.
    assert check_equivalence(model, smaller, batch, generate=True, max_new_tokens=2)
    assert bits(model) == before and [module.training for module in model.modules()] == flags
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert torch.equal(batch["input_ids"], inputs(model)["input_ids"])


def test_training_flags_return_after_an_error() -> None:
    good, bad = Returns(torch.ones(1)).train(), Returns(RuntimeError("broken")).train()
    with pytest.raises(RuntimeError, match="broken"):
        check_equivalence(good, bad, {"x": torch.ones(1)})
    assert good.training and bad.training


def test_wrapped_models_are_compared() -> None:
    model = build("bert")
    plan = structure_plan(model)
    with apply(model, plan):
        found = check_equivalence(nn.DataParallel(model), nn.DataParallel(compact(model, plan)), batch_of(model, 0))
    assert found and found.reference == "BertForSequenceClassification"


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_inputs", "message"),
    [
        ([], "inputs is empty"),
        ({}, "batch 0 of inputs has no tensor"),
        ({"x": torch.ones(0, 4)}, "batch 0 of inputs has no tensor with entries"),
        (torch.ones(2), "inputs is a Tensor"),
        ("text", "inputs is a str"),
        (3, "inputs is a int"),
        ([{"x": torch.ones(1)}, torch.ones(1)], "batch 1 of inputs is a Tensor"),
        ([["a"]], "batch 0 of inputs is a list"),
    ],
)
def test_bad_inputs_are_refused(given_inputs: Any, message: str) -> None:
    model = Returns(torch.ones(1))
    with pytest.raises(ValueError, match=message):
        check_equivalence(model, model, given_inputs)


def test_models_of_other_dtypes_are_refused() -> None:
    model = build("bert")
    with pytest.raises(ValueError, match=r"different dtypes: float32 .* and bfloat16"):
        check_equivalence(model, build("bert").bfloat16(), inputs(model))


def test_other_outputs_are_refused() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"different outputs: loss \(2,\) \(reference\) and no loss \(candidate\)"):
        check({"logits": one, "loss": one}, {"logits": one})
    with pytest.raises(ValueError, match=r"no start_logits \(reference\)"):
        check({"logits": one}, {"logits": one, "start_logits": one})
    with pytest.raises(ValueError, match=r"logits \(2,\) \(reference\) and logits \(3,\)"):
        check({"logits": one}, {"logits": torch.ones(3)})


@pytest.mark.parametrize("result", [{}, None, {"ids": torch.ones(2, dtype=torch.long)}, {"past_key_values": None}])
def test_nothing_to_compare_is_an_error(result: Any) -> None:
    with pytest.raises(ValueError, match="no floating tensor to compare"):
        check(result, result)


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_tolerances_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        check(torch.ones(1), torch.ones(1), **{name: value})

"""T9: what masking refuses, and that nothing happened to the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.masktools import ATTENTION, PAPER, bits, random_plan, untouched
from tests.tiny import FAMILIES, HEADS, HIDDEN, NEURONS, build, inputs
from topoprune import apply, extract, solve


def test_a_plan_of_another_family_names_the_site() -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match=r"another model.*decoder\.0\.attention"):
        apply(model, random_plan(build("opt")))


@pytest.mark.parametrize("change", ["layers", "neurons", "heads", "hidden"])
def test_a_plan_of_another_shape_names_the_site(change: str) -> None:
    sizes = {"layers": ("num_hidden_layers", 3), "neurons": ("intermediate_size", NEURONS + 1),
             "heads": ("num_attention_heads", HEADS // 2), "hidden": ("hidden_size", 2 * HIDDEN)}  # fmt: skip
    model = build("bert")
    config = model.config.to_dict()
    config[sizes[change][0]] = sizes[change][1]
    other = BertForSequenceClassification(BertConfig(**config))
    with untouched(model), pytest.raises(ValueError, match=r"another model.*'encoder\.\d\.(attention|ffn)"):
        apply(model, random_plan(other))


def test_changed_weights_are_refused_unless_allowed() -> None:
    model = build("bert")
    plan = solve(extract(model), budget=2)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.attention.self.query.weight")[0, 0] += 1e-3
    with untouched(model), pytest.raises(ValueError, match="allow_changed_weights=True"):
        apply(model, plan)
    with apply(model, plan, allow_changed_weights=True):
        pass


def test_weights_outside_the_plan_may_change() -> None:
    model = build("bert")
    plan = solve(extract(model), budget=2)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    with apply(model, plan) as handle:
        assert not handle.closed
    assert handle.closed


def test_a_masked_model_is_not_masked_again() -> None:
    model = build("bert")
    plan = random_plan(model)
    with apply(model, plan):
        inside = bits(model)
        with pytest.raises(ValueError, match="already pruned"):
            apply(model, plan)
        assert bits(model) == inside
    apply(model, plan).close()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("merge", ["none", "least-squares"])
def test_a_broken_weight_is_named(value: float, merge: Any) -> None:
    model = build("bert")
    plan = random_plan(model)
    name = "bert.encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = value
    with untouched(model), pytest.raises(ValueError, match=name.replace(".", r"\.")):
        apply(model, plan, merge=merge, calibration=[inputs(model)])


@pytest.mark.parametrize("merge", ["scale", "least-squares"])
@pytest.mark.parametrize(
    ("calibration", "message"),
    [(None, "needs calibration"), ([], "empty"), (iter(()), "empty"), ([3], "expected a dict"), (7, "iterable"),
     ([{"input_ids": [[1, 2]]}], "expected a tensor")],
)  # fmt: skip
def test_bad_calibration_is_refused(merge: Any, calibration: Any, message: str) -> None:
    model = build("bert").train()
    with untouched(model), pytest.raises(ValueError, match=message):
        apply(model, random_plan(model), merge=merge, calibration=calibration)


@pytest.mark.parametrize("merge", ["scale", "least-squares"])
def test_activations_that_are_not_finite_are_named(merge: Any) -> None:
    model = build("bert")
    plan = random_plan(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[5:] = torch.inf  # no tensor of the plan
    with untouched(model), pytest.raises(ValueError, match=r"activations at 'bert\.encoder\.layer\.0.*not finite"):
        apply(model, plan, merge=merge, calibration=[inputs(model)])


def test_an_unknown_merge_lists_the_known_ones() -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match="unknown merge 'best'; available: none, scale"):
        apply(model, random_plan(model), merge="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PAPER)))
def test_the_papers_merge_is_refused_where_it_is_undefined(family: str) -> None:
    model = build(family)
    with untouched(model), pytest.raises(ValueError, match=r"undefined.*heads \* head width = 32.*24.*least-squares"):
        apply(model, random_plan(model), merge="paper")


@pytest.mark.parametrize("merge", ["scale", "paper"])
def test_merges_that_need_dominators_say_so(merge: Any) -> None:
    model = build("bert")
    plan = random_plan(model, kinds=ATTENTION)
    bare = {name: replace(s, dominator=None, dominator_distance=None) for name, s in plan.solutions.items()}
    with untouched(model), pytest.raises(ValueError, match="needs dominators"):
        apply(model, replace(plan, solutions=bare), merge=merge, calibration=[inputs(model)])


def test_attach_refuses_foreign_and_repeated_optimizers() -> None:
    model = build("bert")
    with apply(model, random_plan(model)) as handle:
        with pytest.raises(ValueError, match="none of this model"):
            handle.attach(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle.attach(optimizer)
        with pytest.raises(ValueError, match="attached to the handle already"):
            handle.attach(optimizer)

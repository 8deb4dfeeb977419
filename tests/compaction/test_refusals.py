"""What `compact` refuses, before anything is edited."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tests.compaction.cases import structure_plan
from tests.compaction.laws import assert_same_function, masked_logits, plan_of
from tests.masktools import bits, logits, random_plan, untouched
from tests.tiny import FAMILIES, HEADS, HIDDEN, NEURONS, build
from topoprune import Plan, Site, apply, compact, extract, find_sites, solve
from topoprune.architectures import FAMILIES as DECLARED
from topoprune_solvers import Solution, Status

INPLACE = pytest.mark.parametrize("inplace", [False, True])


# -- plans that do not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_of_another_family_names_the_site(family: str) -> None:
    model, other = build(family), build("gpt2" if family != "gpt2" else "bert")
    with untouched(model), pytest.raises(ValueError, match=r"plan is of another model: .*'(en|de)coder\.0\.\w+'"):
        compact(model, random_plan(other), inplace=True)


@INPLACE
@pytest.mark.parametrize("change", ["layers", "neurons", "heads", "hidden"])
def test_a_plan_of_another_shape_names_the_site(change: str, inplace: bool) -> None:
    sizes = {"layers": ("num_hidden_layers", 3), "neurons": ("intermediate_size", NEURONS + 1),
             "heads": ("num_attention_heads", HEADS // 2), "hidden": ("hidden_size", 2 * HIDDEN)}  # fmt: skip
    model = build("bert")
    config = model.config.to_dict() | {sizes[change][0]: sizes[change][1]}
    other = BertForSequenceClassification(BertConfig(**config))
    with untouched(model), pytest.raises(ValueError, match=r"another model.*'encoder\.\d\.(attention|ffn)"):
        compact(model, random_plan(other), inplace=inplace)


@pytest.mark.parametrize("kinds", [("head", "kv_group"), ("neuron",), ("input_dim",)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_of_another_revision_is_refused_unless_what_it_prunes_is_zero(
    family: str, kinds: tuple[str, ...]
) -> None:
    old, model = build(family, seed=1), build(family)
    plan = replace(random_plan(old, kinds=kinds), weights_digest=extract(old).weights_digest)
    with untouched(model), pytest.raises(ValueError, match="is not zero: the plan is of another model or revision"):
        compact(model, plan, gather="always", inplace=True)
    expected = masked_logits(model, plan)
    assert_same_function(compact(model, plan, gather="always", allow_changed_weights=True), expected)
    apply(model, plan, allow_changed_weights=True).close(restore=False)
    assert_same_function(compact(model, plan, gather="always"), expected)
    # One entry of one unit is enough to be refused again.
    site = next(site for site in plan.sites if site.kind in kinds)
    piece = (site.writes or site.reads)[0]
    with torch.no_grad():
        part = model.get_parameter(piece.param).movedim(piece.axis, 0)
        part[piece.indices(np.flatnonzero(~plan.keep(site.name)))[-1], -1] = 1e-6
    with untouched(model), pytest.raises(ValueError, match=re.escape(f"what it prunes of {site.name!r}")):
        compact(model, plan, gather="always")


def test_a_plan_of_the_same_weights_needs_no_zeros() -> None:
    model = build("bert")
    plan = solve(extract(model), budget=2)
    assert plan.weights_digest
    assert_same_function(compact(model, plan), masked_logits(model, plan))


def test_weight_edges_of_another_revision_are_refused_too() -> None:
    old, model = build("bert", seed=1), build("bert")
    plan = solve(extract(old, include=("edges",)), budget=0.5, problem="edges")
    with untouched(model), pytest.raises(ValueError, match=r"prunes of 'bert\.encoder.*weight' is not zero"):
        compact(model, plan)
    with apply(model, plan, allow_changed_weights=True):
        expected = logits(model)
        assert_same_function(compact(model, plan), expected)
    assert_same_function(compact(model, plan, allow_changed_weights=True), expected)


def test_a_plan_on_a_bare_graph_is_refused() -> None:
    site = Site("graph", "node", 3, 1, ())
    plan = Plan((site,), {"graph": Solution(np.arange(3) > 0, 2.0, "min", Status.FEASIBLE, "test")})
    for model in (build("bert"), nn.Sequential(nn.Linear(3, 3))):
        before = bits(model)
        with pytest.raises(ValueError, match=r"nodes of a bare graph .'graph'.*not on units of a model"):
            compact(model, plan, inplace=True)
        assert bits(model) == before


@pytest.mark.parametrize("plan", ["plan.npz", {"encoder.0.attention": [True]}, 3])
def test_what_is_no_plan_is_refused(plan: Any) -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match=f"plan is a {type(plan).__name__}; expected a Plan"):
        compact(model, plan)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a model, found dict"):
        compact({"weight": torch.zeros(2, 2)})  # type: ignore[arg-type]


# -- options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [0, -8, 1.5, True, "8"])
@pytest.mark.parametrize("plan", [None, structure_plan])
def test_bad_rounding_is_refused(rounding: Any, plan: Callable[[nn.Module], Plan] | None) -> None:
    model = build("bert")
    given_ = None if plan is None else plan(model)
    with untouched(model), pytest.raises(ValueError, match=f"rounding is {rounding!r}; expected a number of features"):
        compact(model, given_, rounding=rounding, inplace=True)


@pytest.mark.parametrize("gather", ["sometimes", True, None])
def test_bad_gather_is_refused(gather: Any) -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match=f"unknown gather {gather!r}; choose from auto, always"):
        compact(model, random_plan(model), gather=gather, inplace=True)


def test_inplace_under_an_open_handle_is_refused() -> None:
    model = build("bert")
    plan = structure_plan(model)
    before = bits(model)
    with apply(model, plan):
        masked = bits(model)
        with pytest.raises(ValueError, match=r"open MaskHandle.*close\(restore=False\) it first"):
            compact(model, plan, inplace=True)
        assert bits(model) == masked
    assert bits(model) == before
    apply(model, plan).close(restore=False)
    expected = logits(model)
    assert_same_function(compact(model, plan, inplace=True), expected)


# -- models that cannot be cut --------------------------------------------------------------------------


@pytest.mark.parametrize("given_plan", [True, False])
def test_integer_weights_are_refused(given_plan: bool) -> None:
    model = build("bert")
    plan = structure_plan(model) if given_plan else None
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter((10 * dense.weight).to(torch.int8), requires_grad=False)
    before = bits(model)
    with pytest.raises(ValueError, match=r"int8.*quantised weights cannot be pruned"):
        compact(model, plan, inplace=True)
    assert bits(model) == before


@pytest.mark.parametrize("mark", [{"is_quantized": True}, {"config": {"quant_method": "bitsandbytes"}}])
def test_quantised_models_are_refused(mark: dict[str, Any]) -> None:
    model = build("bert")
    plan = structure_plan(model)
    if "config" in mark:
        model.config.quantization_config = mark["config"]
    else:
        model.is_quantized = True
    with untouched(model), pytest.raises(ValueError, match="quantised: load it without quantisation"):
        compact(model, plan, inplace=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("given_plan", [True, False])
@pytest.mark.parametrize("name", ["layer.1.output.dense.weight", "layer.0.attention.self.value.bias"])
def test_non_finite_weights_are_named(name: str, given_plan: bool, value: float) -> None:
    model = build("bert")
    plan = structure_plan(model) if given_plan else None
    with torch.no_grad():
        model.get_parameter(f"bert.encoder.{name}").view(-1)[3] = value
    with untouched(model), pytest.raises(ValueError, match=rf"{re.escape(name)}.* non-finite"):
        compact(model, plan, inplace=True)


def test_models_spread_over_devices_are_refused() -> None:
    model = build("bert")
    plan = structure_plan(model)
    model.hf_device_map = {"bert.embeddings": 0, "bert.encoder": 1, "classifier": "cpu"}
    with untouched(model), pytest.raises(ValueError, match=r"spread over devices.*load it without device_map"):
        compact(model, plan, inplace=True)
    model.hf_device_map = {"": "cpu"}
    assert_same_function(compact(model, plan), masked_logits(model, plan))


class _Sharded(torch.Tensor):
    """Looks like a float tensor and is none, as DTensor and torchao's quantised tensors do."""


def test_tensors_that_only_look_ordinary_are_refused() -> None:
    model = build("bert")
    plan = structure_plan(model)
    dense = model.bert.encoder.layer[0].output.dense
    dense.weight = nn.Parameter(dense.weight.detach().as_subclass(_Sharded))
    assert dense.weight.is_floating_point()
    with pytest.raises(ValueError, match=r"0\.output\.dense\.weight' is a _Sharded, expected an ordinary tensor"):
        compact(model, plan, inplace=True)
    assert type(model) is BertForSequenceClassification
    assert dense.out_features == HIDDEN


def test_models_without_data_are_refused() -> None:
    model = build("bert")
    plan = structure_plan(model)
    for given_ in (plan, None):
        with pytest.raises(ValueError, match=r"'bert\.embeddings.*no data .meta device.; load the weights first"):
            compact(build("bert").to("meta"), given_)


def test_modules_whose_forward_was_replaced_are_refused_where_another_is_needed() -> None:
    model = build("bert")
    attention = model.bert.encoder.layer[0].attention.self
    attention.forward = MethodType(type(attention).forward, attention)
    emptied = plan_of(model, {"encoder.0.attention": 0})
    with untouched(model), pytest.raises(ValueError, match=r"0.attention.self' has a forward of its own.*remove_hook"):
        compact(model, emptied, inplace=True)
    plan = structure_plan(model)
    assert_same_function(compact(model, plan), masked_logits(model, plan))


@INPLACE
def test_tied_matrices_are_refused(inplace: bool) -> None:
    model = build("bert")
    plan = structure_plan(model)
    model.register_module("probe", nn.Linear(HIDDEN, NEURONS))
    model.probe.weight = model.bert.encoder.layer[0].intermediate.dense.weight
    before = bits(model)
    for given_ in (plan, plan_of(model, {"encoder.0.ffn": 3})):
        with pytest.raises(ValueError, match=r"'bert.*intermediate.dense.weight' and 'probe.weight' are one tied"):
            compact(model, given_, inplace=inplace)
    assert bits(model) == before
    assert model.probe.weight is model.bert.encoder.layer[0].intermediate.dense.weight
    # Layers that are not cut may share what they like.
    other = plan_of(model, {"encoder.1.ffn": 3})
    assert_same_function(compact(model, other, inplace=inplace), masked_logits(build("bert"), other))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_nobody_described_keeps_its_heads(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    sites = find_sites(model)
    monkeypatch.delitem(DECLARED, model.config.model_type)
    head = next(site for site in sites if site.kind in ("head", "kv_group"))
    ffn = next(site for site in sites if site.kind == "neuron")

    def decide(site: Site) -> Plan:
        keep = np.arange(site.n_units) > 0
        return Plan(sites, {site.name: Solution(keep, 1.0, "min", Status.FEASIBLE, "test")})

    with pytest.raises(ValueError, match=r"no rules for the attention of '.*attention'.*Neurons can be removed"):
        compact(model, decide(head))
    assert_same_function(compact(model, decide(ffn)), masked_logits(model, decide(ffn)))

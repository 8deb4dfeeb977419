"""Input dimensions: gathered before a smaller projection, or left as zeros and said so; never another function."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests.compaction.cases import empty_plan
from tests.compaction.laws import assert_same_function, assert_sizes_fit, masked_logits, plan_of, shuffled
from tests.masktools import bits, logits, random_plan
from tests.tiny import FAMILIES, HIDDEN, build
from topoprune import Plan, Site, TensorSlice, apply, compact, find_sites, kept_units, measure_sparsity
from topoprune.compaction import cut as cutting
from topoprune_solvers import Solution, Status

INPUTS = ("input_dim",)


def _inputs_of(model: nn.Module) -> list[Site]:
    return [site for site in find_sites(model, include=("input_dims",)) if site.kind == "input_dim"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_inputs_alone_and_with_heads_and_neurons(family: str) -> None:
    model = build(family)
    for kinds in (INPUTS, ("head", "kv_group", "neuron", "input_dim")):
        plan = random_plan(model, 0.4, kinds=kinds)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            smaller = compact(model, plan, gather="always")
        assert_same_function(smaller, masked_logits(model, plan))
        assert_sizes_fit(smaller)
        kept = kept_units(smaller)
        for site in _inputs_of(smaller):
            assert site.n_units == HIDDEN - round(0.4 * HIDDEN)
            assert np.array_equal(kept[site.name], np.flatnonzero(plan.keep(site.name)))
            for piece in site.reads:
                owner = smaller.get_submodule(piece.param.rsplit(".", 1)[0])
                assert owner.kept_inputs.tolist() == kept[site.name].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_that_stay_are_said_and_not_counted_as_removable(family: str) -> None:
    model = build(family)
    plan = random_plan(model, 0.4, kinds=INPUTS)
    count = len(plan.solutions)
    with pytest.warns(UserWarning, match=f"input dimensions of {count} sites .*stay as zeros.*gather='never'") as seen:
        smaller = compact(model, plan, gather="never")
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert_same_function(smaller, masked_logits(model, plan))
    assert sum(p.numel() for p in smaller.parameters()) == sum(p.numel() for p in model.parameters())
    figures = measure_sparsity(smaller, find_sites(smaller))
    assert figures.removable == 0
    assert figures.gatherable > 0
    assert figures.zeros >= figures.gatherable
    # Nothing without an effect is left to find, either.
    again = compact(smaller)
    assert kept_units(again) == {}
    assert bits(again) == bits(smaller)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "qwen2"])
@pytest.mark.parametrize("pays", [True, False])
def test_auto_follows_the_measurement(family: str, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    plan = random_plan(model, 0.4)
    monkeypatch.setattr(cutting, "_gather_pays", lambda *_: pays)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        smaller = compact(model, plan)
    said = [str(w.message) for w in seen if "stay as zeros" in str(w.message)]
    assert len(said) == (0 if pays else 1)
    assert pays or "a gather was not faster here" in said[0]
    asked = "always" if pays else "never"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert bits(smaller) == bits(compact(model, plan, gather=asked))  # type: ignore[arg-type]
    assert_same_function(smaller, masked_logits(model, plan))


@pytest.mark.filterwarnings("ignore:input dimensions of")
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_measures_and_keeps_the_function(family: str) -> None:
    model = build(family)
    plan = random_plan(model, 0.8, kinds=INPUTS)
    assert_same_function(compact(model, plan), masked_logits(model, plan))


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5", "llama"])
def test_a_gathered_model_is_pruned_again(family: str) -> None:
    model = build(family)
    first = random_plan(model, 0.3)
    once = compact(model, first, gather="always")
    second = random_plan(once, 0.3, seed=1)
    with apply(once, second):
        expected = logits(once)
    twice = compact(once, second, gather="always")
    assert_same_function(twice, expected)
    assert_sizes_fit(twice)
    kept, earlier = kept_units(twice), kept_units(once)
    for site in _inputs_of(once):
        assert np.array_equal(kept[site.name], earlier[site.name][second.keep(site.name)])
    # Read back from the config alone, buffers included.
    fresh = type(twice)(copy.deepcopy(twice.config)).eval()
    fresh.load_state_dict(twice.state_dict())
    assert torch.equal(logits(fresh), logits(twice))


def test_cross_attention_gathers_queries_and_memory_apart() -> None:
    model = build("bart")
    name = "decoder.1.cross_attention"
    keeps = {f"{name}.input": shuffled(HIDDEN, 9), f"{name}.memory": shuffled(HIDDEN, 14, seed=1)}
    plan = plan_of(model, keeps)
    smaller = compact(model, plan, gather="always")
    attention = smaller.model.decoder.layers[1].encoder_attn
    sizes = [getattr(attention, f"{part}_proj").in_features for part in "qkv"]
    assert sizes == [9, 14, 14]
    assert_same_function(smaller, masked_logits(model, plan))
    ids = torch.tensor([[5, 6, 7, 2]])
    with apply(model, plan):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(smaller.generate(ids, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "qwen2"])
def test_a_projection_keeps_one_input_where_all_are_zero(family: str) -> None:
    model = build(family)
    plan = plan_of(model, {site.name: 0 for site in _inputs_of(model)})
    smaller = compact(model, plan, gather="always")
    assert_same_function(smaller, masked_logits(model, plan))
    for site in _inputs_of(smaller):
        assert site.n_units == 1
        assert not any(smaller.get_parameter(piece.param).any() for piece in site.reads)


@pytest.mark.parametrize("gather", ["always", "never"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "llama"])
def test_attention_without_heads_has_no_inputs_to_gather(family: str, gather: str) -> None:
    model = build(family)
    heads = empty_plan(model, lambda site: site.kind != "neuron", share=0)
    keeps = {name: s.keep for name, s in heads.solutions.items()}
    plan = plan_of(model, keeps | {site.name: 5 for site in _inputs_of(model)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smaller = compact(model, plan, gather=gather)  # type: ignore[arg-type]
    assert_same_function(smaller, masked_logits(model, plan))
    assert _inputs_of(smaller) == []
    assert set(kept_units(smaller)) == set(keeps)


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_rounding_counts_gathered_inputs_too(family: str) -> None:
    model = build(family)
    plan = random_plan(model, 0.7, kinds=INPUTS)  # 7 of 24 stay
    smaller = compact(model, plan, gather="always", rounding=8)
    assert {site.n_units for site in _inputs_of(smaller)} == {8}
    assert_same_function(smaller, masked_logits(model, plan))
    whole = compact(model, plan, gather="always", rounding=HIDDEN)
    assert kept_units(whole) == {}
    assert_same_function(whole, masked_logits(model, plan))


class _Fused(nn.Module):
    """Reads its inputs with a bare parameter: no gather can be put before it."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.in_proj_weight)


def test_inputs_of_other_modules_stay_zeros_or_are_refused() -> None:
    model = nn.Sequential(_Fused())
    site = Site("0.input", "input_dim", 4, 1, (TensorSlice("0.in_proj_weight", 1, "qkv", (6, 4)),))
    plan = Plan((site,), {site.name: Solution(np.arange(4) < 2, 2.0, "min", Status.FEASIBLE, "test")})
    before, x = bits(model), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"needs nn\.Linear or Conv1D, '0' is a _Fused; use gather='never'"):
        compact(model, plan, gather="always", inplace=True)
    assert bits(model) == before
    with pytest.warns(UserWarning, match="stay as zeros"):
        smaller = compact(model, plan)
    with apply(model, plan):
        assert torch.equal(smaller(x), model(x))

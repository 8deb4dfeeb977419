"""`compact(model)` without a plan: what has no effect goes, constants are folded, nothing else happens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from tests.compaction.cases import structure_plan, trained
from tests.compaction.laws import assert_same_function, assert_sizes_fit
from tests.masktools import bits, logits, untouched
from tests.prunertools import prune
from tests.tiny import FAMILIES, build
from topoprune import Recipe, Site, apply, compact, find_sites, kept_units, measure_sparsity
from topoprune.architectures import FAMILIES as DECLARED
from topoprune.compaction.cut import Cut
from topoprune.compaction.dead import dead_units

STRUCTURES = ("heads", "neurons")
# Families whose projections have biases before and behind the units; Qwen2 has them only before.
BIASED = ["bert", "roberta", "distilbert", "opt", "gpt2", "vit", "bart", "marian"]


def _units(model: nn.Module) -> Iterator[Site]:
    yield from find_sites(model, include=STRUCTURES)


@torch.no_grad()
def _zero(model: nn.Module, site: Site, units: list[int], roles: tuple[str, ...]) -> None:
    for piece in site.slices:
        if piece.role in roles:
            index = torch.from_numpy(piece.indices(np.array(units, dtype=np.int64)))
            model.get_parameter(piece.param).index_fill_(piece.axis, index, 0.0)


def _left(model: nn.Module, site: Site) -> int:
    """Units of a dense site that a compacted model still has."""
    kept = kept_units(model)
    per_unit = site.unit_width // site.head_width if site.kind == "kv_group" else 1
    return len(kept[site.name]) // per_unit if site.name in kept else site.n_units


# -- zeros from training, masks and by hand ------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_units_masked_for_good_leave(family: str) -> None:
    model = build(family)
    plan = structure_plan(model)
    apply(model, plan).close(restore=False)
    smaller = compact(model)
    assert bits(smaller) == bits(compact(model, plan))
    assert smaller.config.to_dict() == compact(model, plan).config.to_dict()
    assert_same_function(smaller, logits(model))
    assert measure_sparsity(smaller, find_sites(smaller)).removable == 0
    assert bits(compact(smaller)) == bits(smaller)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_a_budget_in_training_removed_leave(family: str) -> None:
    model, plan = trained(family)
    expected = logits(model)
    smaller = compact(model)
    assert_same_function(smaller, expected)
    for site in _units(model):
        assert _left(smaller, site) <= int(plan.keep(site.name).sum())


@pytest.mark.parametrize("family", ["bert", "opt", "bart", "gpt2"])
def test_units_that_penalties_drove_to_zero_leave(family: str) -> None:
    recipe = Recipe.neuroprune(alpha=2e2, beta=2e2, theta="auto:0.9", prox_scale="absolute")
    model, pruner, _ = prune(family, recipe, steps=8)
    pruner.close()
    model.eval()
    expected, figures = logits(model), measure_sparsity(model, find_sites(model))
    assert figures.removable > 0
    smaller = compact(model)
    assert_same_function(smaller, expected)
    for name, (kept, _) in figures.kept.items():
        site = next(s for s in _units(model) if s.name == name)
        assert _left(smaller, site) <= kept


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_loses_nothing(family: str) -> None:
    model = build(family)
    smaller = compact(model)
    assert kept_units(smaller) == {}
    assert bits(smaller) == bits(model)
    assert type(smaller).__name__ == f"Compact{type(model).__name__}"


@pytest.mark.parametrize("side", ["writes", "reads"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_on_one_side_are_enough(family: str, side: str) -> None:
    model = build(family)
    roles = ("o", "out") if side == "writes" else ("v", "v_bias", "in", "in_bias", "up", "up_bias")
    for site in _units(model):
        _zero(model, site, [0], roles)
    expected, dense = logits(model), list(_units(model))
    smaller = compact(model)
    assert_same_function(smaller, expected)
    assert [_left(smaller, site) for site in dense] == [site.n_units - 1 for site in dense]
    assert measure_sparsity(model, find_sites(model)).kept == {s.name: (s.n_units - 1, s.n_units) for s in dense}


@pytest.mark.parametrize("family", ["t5-gated", "llama", "qwen3"])
def test_a_closed_gate_is_enough(family: str) -> None:
    model = build(family)
    for site in _units(model):
        _zero(model, site, [1, 2, 5], ("gate", "gate_bias"))
    dense = [site for site in _units(model) if site.kind == "neuron"]
    smaller = compact(model)
    assert_same_function(smaller, logits(model))
    assert [_left(smaller, site) for site in dense] == [site.n_units - 3 for site in dense]


# -- constants -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("family", BIASED)
def test_constant_units_join_the_bias_behind(family: str, inplace: bool) -> None:
    model = build(family)
    for site in _units(model):
        _zero(model, site, [0, 2], ("v", "in"))
    expected, dense, before = logits(model), list(_units(model)), bits(model)
    biases = {site.consumer: model.get_parameter(f"{site.consumer}.bias").clone() for site in dense}
    smaller = compact(model, inplace=inplace)
    assert_same_function(smaller, expected)
    assert [_left(smaller, site) for site in dense] == [site.n_units - 2 for site in dense]
    for name, bias in biases.items():
        assert not torch.equal(smaller.get_parameter(f"{name}.bias"), bias)
    assert inplace or bits(model) == before
    assert_sizes_fit(smaller)


@pytest.mark.parametrize("family", BIASED)
def test_a_block_of_constants_becomes_its_bias(family: str) -> None:
    model = build(family)
    dense = list(_units(model))
    for site in dense:
        _zero(model, site, list(range(site.n_units)), ("v", "in"))
    expected = logits(model)
    smaller = compact(model)
    assert_same_function(smaller, expected)
    assert [_left(smaller, site) for site in dense] == [0] * len(dense)
    assert list(_units(smaller)) == []


def test_constants_without_a_bias_behind_stay() -> None:
    model = build("qwen2")  # value biases, but an output projection without one
    for site in _units(model):
        _zero(model, site, [1], ("v",))
    dense = [site for site in _units(model) if site.kind != "neuron"]
    smaller = compact(model)
    assert kept_units(smaller) == {}
    assert bits(smaller) == bits(model)
    assert measure_sparsity(model, find_sites(model)).removable == 0
    # Without the value bias they are zeros, and go.
    for site in dense:
        _zero(model, site, [1], ("v_bias",))
    assert [_left(compact(model), site) for site in dense] == [site.n_units - 1 for site in dense]
    assert_same_function(compact(model), logits(model))


@pytest.mark.parametrize("act", ["gelu", "relu", "sigmoid", "mish"])
def test_constants_are_what_the_activation_makes_of_them(act: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, hidden_act=act
    )
    model = BertModel(config).eval()
    site = next(s for s in _units(model) if s.kind == "neuron")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    _zero(model, site, [0, 1, 4], ("in",))
    _zero(model, site, [1], ("in_bias",))  # sigmoid makes 0.5 of it: zeros in are not zeros out
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        smaller = compact(model)
        torch.testing.assert_close(smaller(ids).last_hidden_state, expected)
    assert _left(smaller, site) == 3


def test_an_activation_nobody_knows_only_lets_silent_neurons_go() -> None:
    model = build("bert")
    model.config.hidden_act = "a home-made one"
    site = next(s for s in _units(model) if s.kind == "neuron")
    _zero(model, site, [0, 1], ("in", "in_bias"))
    _zero(model, site, [5], ("out",))
    plan, values = dead_units(model)
    assert np.flatnonzero(~plan.keep(site.name)).tolist() == [5]
    assert values == {}


def test_folded_values_are_written_to_parameters_only() -> None:
    model = build("bert")
    for site in _units(model):
        _zero(model, site, [0], ("v", "in"))
    _, values = dead_units(model)
    assert set(values) == {f"{site.consumer}.bias" for site in _units(model)}
    name, bias = next(iter(values.items()))
    cut = Cut(values=values)
    assert torch.equal(cut.tensor(name, model.get_parameter(name).detach()), bias)
    assert not cut.tensor(name, torch.zeros_like(bias), data=False).any()


@pytest.mark.parametrize("rounding", [4, 16])
@pytest.mark.parametrize("family", BIASED)
def test_rounding_keeps_dead_units_as_zeros(family: str, rounding: int) -> None:
    model = build(family)
    for site in _units(model):
        _zero(model, site, [0, 2], ("v", "in"))
        _zero(model, site, [3], ("o", "out"))
    expected = logits(model)
    smaller = compact(model, rounding=rounding)
    assert_same_function(smaller, expected)
    for site in _units(smaller):
        assert site.n_units * site.unit_width % rounding == 0 or site.name not in kept_units(smaller)


def test_half_precision_folds_within_its_own_rounding() -> None:
    model = build("bert").to(torch.bfloat16)
    for site in _units(model):
        _zero(model, site, [0, 2], ("v", "in"))
    smaller = compact(model)
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(smaller), logits(model), rtol=0.05, atol=0.05)


# -- any pattern of zeros --------------------------------------------------------------------------------

ROLES = ("q", "k", "v", "v_bias", "o", "in", "in_bias", "gate", "up", "up_bias", "out", "o_bias")


@cache
def _dense(family: str) -> nn.Module:
    return build(family)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_zeros_keep_the_function_and_leave_nothing_removable(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(list(FAMILIES)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    share, biases = data.draw(st.sampled_from([0.1, 0.5, 0.9, 1.0])), data.draw(st.booleans())
    model = compact(_dense(family), structure_plan(_dense(family), 0.25)) if data.draw(st.booleans()) else build(family)
    for site in _units(model):
        for role in {piece.role for piece in site.slices}:
            if rng.random() < 0.5 and (biases or not role.endswith("bias")):
                _zero(model, site, np.flatnonzero(rng.random(site.n_units) < share).tolist(), (role,))
    expected, figures = logits(model), measure_sparsity(model, find_sites(model))
    smaller = compact(model, duplicate_kv=data.draw(st.booleans()))
    assert_same_function(smaller, expected)
    assert_sizes_fit(smaller)
    after = measure_sparsity(smaller, find_sites(smaller))
    assert after.removable == 0
    assert after.parameters <= round(figures.parameters * (1 - figures.removable))
    assert set(after.kept) <= set(figures.kept)
    for name, (kept, _) in figures.kept.items():
        assert after.kept.get(name, (0, 0))[1] <= kept, name


# -- bad input -------------------------------------------------------------------------------------------


def test_non_finite_weights_are_refused() -> None:
    model = build("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = torch.inf
    with untouched(model), pytest.raises(ValueError, match=r"layer.1.output.dense.weight.* non-finite"):
        compact(model, inplace=True)


def test_models_of_no_known_family_need_a_plan() -> None:
    with pytest.raises(ValueError, match="no adapter for model_type"):
        compact(nn.Sequential(nn.Linear(2, 2)))


def test_every_family_says_its_activation() -> None:
    for family in FAMILIES:
        model = build(family)
        for block in DECLARED[model.config.model_type].blocks:
            if hasattr(block, "activation") and (
                block.when is None or getattr(model.config, block.when[0]) == block.when[1]
            ):
                assert isinstance(getattr(model.config, block.activation), str), family

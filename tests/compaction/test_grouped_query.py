"""Grouped-query attention: whole groups, equal query heads, and unequal ones with copies of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.compaction.laws import assert_same_function, assert_sizes_fit, masked_logits, plan_of
from tests.masktools import bits, logits, untouched
from tests.tiny import HEADS, inputs
from topoprune import ModelGraph, Plan, Site, TensorSlice, apply, compact, extract, find_sites, kept_units, solve
from topoprune.budgets import budget_count
from topoprune.graph import structure_digest
from topoprune_solvers import Solution, Status

GQA = ("llama", "qwen2", "qwen3")
KV = 3  # two query heads each would hide mistakes: 6 query heads in 3 groups here
ANY = "any-query-heads"


def _model(family: str, kv_heads: int = KV, heads: int = 6) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    cls = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}[family]
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    torch.manual_seed(0)
    model = cls(
        config(
            vocab_size=64,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=20,
            head_dim=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _assert_generates_like(smaller: nn.Module, model: nn.Module, plan: Plan) -> None:
    batch = inputs(model)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with apply(model, plan):
        expected = model.generate(**batch, **options, use_cache=True)
    assert torch.equal(smaller.generate(**batch, **options, use_cache=True), expected)
    assert torch.equal(smaller.generate(**batch, **options, use_cache=False), expected)


def _shapes(model: nn.Module, layer: int) -> tuple[int, int, int, int]:
    """Query heads, key heads, value heads, query heads per key head as the module believes."""
    attention = model.model.layers[layer].self_attn
    sizes = [getattr(attention, f"{part}_proj").out_features // 4 for part in "qkv"]
    assert attention.o_proj.in_features == 4 * sizes[0]
    return sizes[0], sizes[1], sizes[2], attention.num_key_value_groups


# -- whole groups and equal counts -------------------------------------------------------------------


@pytest.mark.parametrize("family", GQA)
def test_whole_groups_leave(family: str) -> None:
    model = _model(family)
    plan = plan_of(model, {"decoder.0.attention": [True, False, True], "decoder.1.attention": [False, False, True]})
    smaller = compact(model, plan)
    assert _shapes(smaller, 0) == (4, 2, 2, 2)
    assert _shapes(smaller, 1) == (2, 1, 1, 2)
    assert_same_function(smaller, masked_logits(model, plan))
    _assert_generates_like(smaller, model, plan)
    assert kept_units(smaller)["decoder.0.attention"].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("family", GQA)
def test_equal_query_heads_leave(family: str) -> None:
    model = _model(family, kv_heads=2)
    keeps = {"decoder.0.attention": [1, 0, 1, 0, 1, 1], "decoder.1.attention": [0, 0, 1, 1, 0, 0]}
    plan = plan_of(model, keeps, gqa="query-heads")
    smaller = compact(model, plan)
    assert _shapes(smaller, 0) == (4, 2, 2, 2)
    assert _shapes(smaller, 1) == (2, 2, 2, 1)
    for piece in find_sites(model, gqa="query-heads")[0].shared:  # keys and values are the dense ones
        assert torch.equal(smaller.get_parameter(piece.param), model.get_parameter(piece.param))
    assert_same_function(smaller, masked_logits(model, plan))
    _assert_generates_like(smaller, model, plan)
    # Once keys and queries pair off, the units are plain heads, and the model can be pruned further.
    assert [s.kind for s in find_sites(smaller, ("heads",))] == ["kv_group", "head"]
    again = plan_of(smaller, {"decoder.0.attention": [0, 1, 1, 0], "decoder.1.attention": [1, 0]}, gqa="query-heads")
    assert_same_function(compact(smaller, again), masked_logits(smaller, again))


# -- unequal counts ----------------------------------------------------------------------------------

UNEQUAL = {
    "one and two": ([1, 0, 1, 1, 0, 1], (4, 4, 1)),
    "all of one, one of another": ([1, 1, 0, 1, 0, 0], (3, 3, 1)),
    "first group empty": ([0, 0, 1, 1, 0, 1], (3, 3, 1)),
}
EQUAL_AFTER_ALL = {
    "one group left": ([0, 0, 1, 1, 0, 0], (2, 1, 2)),
    "one query head left": ([0, 0, 0, 1, 0, 0], (1, 1, 1)),
    "two whole groups": ([1, 1, 0, 0, 1, 1], (4, 2, 2)),
    "one of two in two groups": ([1, 0, 0, 0, 0, 1], (2, 2, 1)),
    "nothing": ([0, 0, 0, 0, 0, 0], (0, 0, 1)),
}


@pytest.mark.parametrize("case", UNEQUAL)
@pytest.mark.parametrize("family", GQA)
def test_unequal_counts_need_copies_and_are_exact_with_them(family: str, case: str) -> None:
    model = _model(family)
    keep, (heads, kv_heads, groups) = UNEQUAL[case]
    plan = plan_of(model, {"decoder.0.attention": keep}, gqa=ANY)
    with (
        untouched(model),
        pytest.raises(ValueError, match=r"keeps \[.*\] query heads in its KV groups.*Pass duplicate_kv=True.*'groups'"),
    ):
        compact(model, plan, inplace=True)
    smaller = compact(model, plan, duplicate_kv=True)
    assert _shapes(smaller, 0) == (heads, kv_heads, kv_heads, groups)
    assert _shapes(smaller, 1) == (6, KV, KV, 2)
    assert kept_units(smaller)["decoder.0.attention"].tolist() == np.flatnonzero(keep).tolist()
    assert_sizes_fit(smaller)
    assert_same_function(smaller, masked_logits(model, plan))
    _assert_generates_like(smaller, model, plan)


@pytest.mark.parametrize("case", EQUAL_AFTER_ALL)
@pytest.mark.parametrize("duplicate", [False, True])
def test_groups_that_lose_all_query_heads_leave_without_copies(case: str, duplicate: bool) -> None:
    model = _model("qwen2")
    keep, (heads, kv_heads, groups) = EQUAL_AFTER_ALL[case]
    plan = plan_of(model, {"decoder.1.attention": keep}, gqa=ANY)
    smaller = compact(model, plan, duplicate_kv=duplicate)
    assert _shapes(smaller, 1) == (heads, kv_heads, kv_heads, groups)
    assert_same_function(smaller, masked_logits(model, plan))
    _assert_generates_like(smaller, model, plan)


def test_copies_are_as_few_as_the_counts_allow() -> None:
    model = _model("llama", kv_heads=2, heads=12)  # six query heads a group
    plan = plan_of(model, {"decoder.0.attention": [1] * 6 + [1, 1, 1, 1, 0, 0]}, gqa=ANY)
    smaller = compact(model, plan, duplicate_kv=True)  # 6 and 4: three and two copies that serve two each
    assert _shapes(smaller, 0) == (10, 5, 5, 2)
    dense, copied = (m.model.layers[0].self_attn.k_proj.weight.reshape(-1, 4, 24) for m in (model, smaller))
    assert torch.equal(copied, dense[[0, 0, 0, 1, 1]])
    assert_same_function(smaller, masked_logits(model, plan))
    # Copies are heads of their own from now on: another plan may part them.
    again = plan_of(smaller, {"decoder.0.attention": [0, 1, 1, 0, 0]})
    twice = compact(smaller, again)
    assert_same_function(twice, masked_logits(smaller, again))
    assert kept_units(twice)["decoder.0.attention"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("rounding", [8, 16])
@pytest.mark.parametrize("keep", [UNEQUAL["one and two"][0], EQUAL_AFTER_ALL["one of two in two groups"][0]])
def test_rounding_keeps_the_function_of_query_heads(keep: list[int], rounding: int) -> None:
    model = _model("qwen2")
    plan = plan_of(model, {"decoder.0.attention": keep}, gqa=ANY)
    smaller = compact(model, plan, rounding=rounding, duplicate_kv=True)
    assert_same_function(smaller, masked_logits(model, plan))
    assert smaller.model.layers[0].self_attn.q_proj.out_features in {rounding, 16, 24}
    equal = plan_of(model, {"decoder.0.attention": [1, 0, 1, 0, 0, 1]}, gqa="query-heads")
    rounded = compact(model, equal, rounding=rounding)
    assert _shapes(rounded, 0) == (6, 3, 3, 2)  # 12 features in three equal groups: next comes the whole
    assert_same_function(rounded, masked_logits(model, equal))


# -- without a plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GQA)
@pytest.mark.parametrize("case", [*UNEQUAL, *EQUAL_AFTER_ALL])
def test_dead_query_heads_leave_as_far_as_the_groups_allow(family: str, case: str) -> None:
    model = _model(family)
    keep, sizes = {**UNEQUAL, **EQUAL_AFTER_ALL}[case]
    apply(model, plan_of(model, {"decoder.0.attention": keep}, gqa=ANY)).close(restore=False)
    expected = logits(model)
    smaller, copied = compact(model), compact(model, duplicate_kv=True)
    assert_same_function(smaller, expected)
    assert_same_function(copied, expected)
    assert _shapes(copied, 0) == (sizes[0], sizes[1], sizes[1], sizes[2])
    counts = np.reshape(keep, (KV, -1)).sum(axis=1)
    live = int((counts > 0).sum())
    assert _shapes(smaller, 0)[:2] == (live * int(counts.max()), live)


# -- the field `unequal`, from site to file ------------------------------------------------------------


def _site(unequal: bool, groups: int = 2) -> Site:
    shared = (TensorSlice("k", 0, "k", (4, 3), width=2),) if groups else ()
    return Site("a", "head", 4, 2, (TensorSlice("q", 0, "q", (8, 3), width=2),), n_groups=groups, shared=shared,
                unequal=unequal)  # fmt: skip


def test_unequal_lifts_the_rule_and_nothing_else() -> None:
    tied, free = _site(False), _site(True)
    assert (tied.equal_groups, free.equal_groups) == (2, 0)
    assert tied.groups is not None
    assert free.groups is None
    assert tied.tensors == free.tensors
    assert structure_digest([tied]) != structure_digest([free])
    assert Site.from_dict(free.to_dict()) == free
    assert "unequal" not in tied.to_dict()
    solution = Solution(np.array([1, 1, 1, 0], dtype=bool), 3.0, "min", Status.FEASIBLE, "test")
    assert Plan((free,), {"a": solution}).keep("a").sum() == 3
    with pytest.raises(ValueError, match=r"keeps \[2, 1\] query heads"):
        Plan((tied,), {"a": solution})
    assert budget_count(3, free) == 3
    with pytest.raises(ValueError, match="must keep equally many"):
        budget_count(3, tied)


@pytest.mark.parametrize("family", GQA)
def test_graphs_and_plans_of_any_query_heads_survive_their_files(family: str, tmp_path: Path) -> None:
    model = _model(family)
    graph = extract(model, gqa=ANY, include=("heads",))
    assert {(s.n_units, s.n_groups, s.unequal) for s in graph.sites} == {(6, KV, True)}
    read = ModelGraph.load(graph.save(tmp_path / "graph.npz"))
    assert read.sites == graph.sites
    plan = solve(read, budget=5)
    assert {s.n_kept for s in plan.solutions.values()} == {5}
    again = Plan.load(plan.save(tmp_path / "plan.npz"))
    assert again.sites == plan.sites
    assert again.structure_digest == plan.structure_digest
    smaller = compact(model, again, duplicate_kv=True)
    assert_same_function(smaller, masked_logits(model, plan))


WISHES: dict[str, Callable[[ModelGraph], Plan]] = {
    "theta": lambda graph: solve(graph, theta="auto:0.4"),
    "count": lambda graph: solve(graph, budget=4),
    "share": lambda graph: solve(graph, budget=0.5),
    "model": lambda graph: solve(graph, budget=5, scope="model"),
    "soft": lambda graph: solve(graph, budget=5, objective="soft"),
}


@pytest.mark.parametrize("wish", WISHES)
def test_every_wish_can_be_solved_applied_and_compacted(wish: str) -> None:
    model = _model("llama")
    before = bits(model)
    plan = WISHES[wish](extract(model, gqa=ANY))
    with apply(model, plan):
        smaller = compact(model, plan, duplicate_kv=True)
        assert_same_function(smaller, logits(model))
    assert bits(model) == before
    kept = [int(plan.keep(s.name).sum()) for s in plan.sites if s.kind == "head"]
    assert [_shapes(smaller, layer)[0] for layer in (0, 1)] == kept
    assert all(kept) and sum(kept) < 12


def test_theta_and_model_budgets_stay_refused_where_counts_must_be_equal() -> None:
    graph = extract(_model("llama"), gqa="query-heads")
    for wish in ({"theta": 0.1}, {"budget": 5, "scope": "model"}):
        with pytest.raises(ValueError, match="query heads"):
            solve(graph, **wish)  # type: ignore[arg-type]


def test_models_without_grouped_queries_have_plain_heads() -> None:
    model = _model("llama", kv_heads=6)
    assert find_sites(model, gqa=ANY) == find_sites(model)
    assert find_sites(_model("llama", kv_heads=HEADS, heads=HEADS), gqa=ANY)[0].n_units == HEADS

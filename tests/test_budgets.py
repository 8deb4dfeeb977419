"""Budgets over the whole model, and query heads of grouped-query attention: equal counts or nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import build, inputs
from topoprune import ModelGraph, Plan, Site, TensorSlice, apply, extract, find_sites, measure_sparsity, solve
from topoprune.budgets import budget_count, model_problem
from topoprune.extraction import named_tensors, unit_blocks
from topoprune.files import read_npz, write_npz
from topoprune.graph import Graph
from topoprune.sites import structure_digest
from topoprune_solvers import Status
from topoprune_solvers import solve as solve_one

GQA_FAMILIES = ["llama", "qwen2", "qwen3"]
gqa_family = pytest.mark.parametrize("family", GQA_FAMILIES)


@lru_cache
def graph_of(family: str, measure: str = "circuit-cosine", gqa: str = "groups") -> ModelGraph:
    model = build(family)
    calibration = [inputs(model)] if measure == "output-gram" else None
    return extract(model, measure=measure, calibration=calibration, include=("heads", "neurons"), gqa=gqa)


def made_up(sizes: tuple[int, ...], n_groups: int = 0, seed: int = 0) -> ModelGraph:
    """Return a graph of head sites without a model, with random normalised distances."""
    rng = np.random.default_rng(seed)
    sites, redundancy, importance = [], {}, {}
    for layer, n in enumerate(sizes):
        shared = (TensorSlice(f"{layer}.v", 0, "v", (n_groups, 3)),) if n_groups else ()
        site = Site(f"decoder.{layer}.attention", "head", n, 1, (), n_groups=n_groups, shared=shared)
        distance = rng.random((n, n))
        redundancy[site.name] = Graph.from_dense((distance + distance.T) / 2, normalised=True)
        importance[site.name] = rng.exponential(size=n) * 10.0**layer
        sites.append(site)
    return ModelGraph(tuple(sites), redundancy, importance=importance)


def per_group(plan: Plan, site: Site) -> list[int]:
    return plan.keep(site.name).reshape(site.n_groups, -1).sum(axis=1).tolist()


# Query heads as units


@gqa_family
def test_query_head_sites_own_query_rows_and_output_columns_only(family: str) -> None:
    model = build(family)
    whole = {site.name: site for site in find_sites(model)}
    for site in find_sites(model, gqa="query-heads"):
        if site.block != "attention" or site.kind == "input_dim":
            assert site == whole[site.name]
            continue
        assert (site.kind, site.n_units, site.n_groups) == ("head", 4, 2)
        assert site.groups is not None and site.groups.tolist() == [0, 0, 1, 1]
        assert {piece.role.removesuffix("_bias") for piece in site.reads} == {"q"}
        assert [piece.role for piece in site.writes] == ["o"]
        assert {piece.role.removesuffix("_bias") for piece in site.shared} == {"k", "v"}
        assert {piece.param for piece in site.tensors} == {piece.param for piece in whole[site.name].slices}
        assert structure_digest([site]) != structure_digest([whole[site.name]])


def test_models_without_groups_and_their_files_do_not_change() -> None:
    model = build("bert")
    assert find_sites(model, gqa="query-heads") == find_sites(model)
    site = find_sites(model)[0]
    assert "n_groups" not in site.to_dict() and "shared" not in site.to_dict()
    assert Site.from_dict(site.to_dict()) == site == Site.from_dict(asdict(site))
    # the digest that files written before the field existed carry
    assert structure_digest([site]) == structure_digest([replace(site, n_groups=0)])
    with pytest.raises(ValueError, match=r"unknown gqa 'heads'; choose from groups, query-heads"):
        find_sites(model, gqa="heads")
    with pytest.raises(ValueError, match="4 units do not divide into 3 groups"):
        replace(site, n_groups=3)
    with pytest.raises(ValueError, match="has shared tensors, but n_groups is 0"):
        replace(site, shared=site.reads[:1])


@gqa_family
@pytest.mark.parametrize("measure", ["circuit-cosine", "output-gram", "weights-linf"])
def test_every_measure_compares_query_heads(family: str, measure: str, tmp_path: Path) -> None:
    graph = graph_of(family, measure, "query-heads")
    for site in graph.of_kind("head"):
        assert graph.redundancy[site.name].n_edges == 6
        assert graph.importance[site.name].shape == graph.cost[site.name].shape == (4,)
    again = ModelGraph.load(graph.save(tmp_path / "graph"))
    assert again.sites == graph.sites and again.structure_digest == graph.structure_digest


def test_query_heads_are_compared_with_the_values_and_keys_of_their_group() -> None:
    model = build("llama")
    tensors = named_tensors(model)
    site = next(s for s in find_sites(model, gqa="query-heads") if s.n_groups)
    q, k, v, o = (unit_blocks(tensors, site, site.one(role)).double() for role in "qkvo")
    assert torch.equal(v[0], v[1]) and torch.equal(k[2], k[3]) and not torch.equal(v[1], v[2])
    assert torch.equal(unit_blocks(tensors, site, site.one("v"), np.array([1, 3])).double(), v[[1, 3]])
    circuit = torch.einsum("nwd,nwe->nde", v, o).flatten(1)
    cosine = nn.functional.cosine_similarity(circuit[:, None], circuit[None], dim=2)
    expected = (1 - cosine).clamp(0, 1).numpy()
    found = graph_of("llama", "circuit-cosine", "query-heads").redundancy[site.name].to_dense()
    assert np.allclose(found, expected, atol=1e-5)
    rows = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)
    expected = torch.cdist(rows, rows, p=torch.inf).numpy()
    found = graph_of("llama", "weights-linf", "query-heads").redundancy[site.name].to_dense()
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("solver", [None, "greedy", "random", "magnitude", "brute"])
@pytest.mark.parametrize("objective", ["soft", "k-centre"])
def test_every_group_keeps_equally_many(solver: str | None, objective: Any) -> None:
    graph = made_up((8, 12), n_groups=4)
    for budget, expected in ((4, [1, 1]), (8, [2, 2]), (0.5, [1, 2]), (0.01, [1, 1]), (1.0, [2, 3])):
        plan = solve(graph, budget=budget, objective=objective, solver=solver)
        for site, each in zip(graph.sites, expected, strict=True):
            assert per_group(plan, site) == [each] * 4
            if solver in (None, "brute"):
                assert plan.solutions[site.name].status is Status.OPTIMAL
    exact, brute = (solve(graph, budget=4, objective=objective, solver=name) for name in ("exact", "brute"))
    for name in exact.solutions:
        assert math.isclose(exact.solutions[name].objective, brute.solutions[name].objective, rel_tol=1e-9)


def test_budgets_that_groups_cannot_share_say_what_to_ask_for() -> None:
    graph = made_up((8,), n_groups=4)
    with pytest.raises(ValueError, match=r"keep 5 of the 8 query heads .* 4 KV groups .* ask for 4 or 8"):
        solve(graph, budget=5)
    with pytest.raises(ValueError, match="ask for 4, or use gqa='groups'"):
        budget_count(3, graph.sites[0])
    with pytest.raises(ValueError, match=r"which has 8; expected 1\.\.8"):
        solve(graph, budget=12)
    with pytest.raises(ValueError, match="theta does not say how many query heads each KV group"):
        solve(graph, theta=0.1)
    with pytest.raises(ValueError, match="scope='model' cannot keep equally many query heads"):
        solve(graph, budget=4, scope="model")


def test_a_plan_with_unequal_groups_cannot_be_made() -> None:
    graph = graph_of("llama", gqa="query-heads")
    plan = solve(graph, budget=2)
    name, solution = next(iter(plan.solutions.items()))
    uneven = replace(solution, keep=np.array([True, True, False, False]))
    with pytest.raises(ValueError, match=r"keeps \[2, 0\] query heads in its KV groups, expected equally many"):
        replace(plan, solutions={**plan.solutions, name: uneven})
    model = build("llama")
    with apply(model, plan) as handle:
        state = handle.state_dict() | {name: torch.tensor([False, False, True, True])}
        with pytest.raises(ValueError, match="expected equally many"):
            handle.load_state_dict(state)


@gqa_family
@torch.no_grad()
def test_masks_zero_query_rows_and_output_columns_and_nothing_else(family: str) -> None:
    model = build(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plan = solve(graph_of(family, "output-gram", "query-heads"), budget=2, objective="soft")
    masked = {}
    with apply(model, plan):
        for site in plan.sites:
            if site.name not in plan.solutions:
                continue
            gone = np.flatnonzero(~plan.keep(site.name))
            for piece in site.slices:
                keep = torch.ones(piece.shape[piece.axis], dtype=torch.bool)
                keep[piece.indices(gone)] = False
                shape = [-1 if axis == piece.axis else 1 for axis in range(len(piece.shape))]
                masked[piece.param] = before[piece.param] * keep.view(shape)
        assert not any("k_proj" in name or "v_proj" in name for name in masked)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, masked.get(name, before[name])), name
        assert measure_sparsity(model, plan.sites).kept["decoder.0.attention"] == (2, 4)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@torch.no_grad()
def test_a_model_cut_to_the_kept_query_heads_computes_what_the_masked_one_does() -> None:
    model = build("llama")
    plan = solve(graph_of("llama", gqa="query-heads"), budget=2)
    fields = {**model.config.to_dict(), "num_attention_heads": 2, "head_dim": 6}  # type: ignore[union-attr]
    small = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for site in plan.sites:
        if site.n_groups:
            kept = np.flatnonzero(plan.keep(site.name))
            for piece in site.slices:
                weights[piece.param] = weights[piece.param].index_select(
                    piece.axis, torch.from_numpy(piece.indices(kept))
                )
    small.load_state_dict(weights)
    batch = inputs(model)
    with apply(model, plan):
        assert torch.allclose(model(**batch).logits, small(**batch).logits, atol=1e-5)


# One budget over the model


@pytest.mark.parametrize("objective", ["soft", "k-centre"])
@pytest.mark.parametrize("solver", [None, "greedy", "random"])
def test_a_budget_over_the_model_is_met_exactly(objective: Any, solver: str | None) -> None:
    graph = made_up((6, 4, 5))
    for budget, floor in ((3, 1), (7, 1), (9, 2), (15, 9), (0.4, 1), (0.01, 2)):
        plan = solve(graph, budget=budget, scope="model", floor=floor, objective=objective, solver=solver)
        kept = [plan.keep(site.name).sum() for site in graph.sites]
        least = [min(floor, site.n_units) for site in graph.sites]
        assert sum(kept) == (budget if isinstance(budget, int) else max(sum(least), round(budget * 15)))
        assert all(count >= low for count, low in zip(kept, least, strict=True))
        for solution in plan.solutions.values():
            assert solution.bound is None and solution.status is Status.FEASIBLE
        (joint,) = plan.joint
        assert joint.sites == tuple(plan.solutions) and plan.request["scope"] == "model"
        assert plan.gap == joint.gap or math.isnan(joint.gap)
        assert plan.seconds == joint.seconds > 0


@pytest.mark.parametrize("objective", ["soft", "k-centre"])
def test_the_joint_certificate_is_that_of_the_whole(objective: Any) -> None:
    graph = made_up((5, 4, 4), seed=3)
    plan = solve(graph, budget=6, scope="model", objective=objective)
    whole = model_problem(graph, graph.sites, 6, objective)
    best = solve_one(whole, "brute")
    (joint,) = plan.joint
    assert joint.status is Status.OPTIMAL and plan.gap == pytest.approx(0, abs=1e-9)
    assert joint.objective == pytest.approx(best.objective)
    keep = np.concatenate([plan.keep(site.name) for site in graph.sites])
    assert whole.objective(keep) == pytest.approx(joint.objective)
    if objective == "soft":
        # every layer counts the same: the sum of the explained shares
        shares = [s.objective / graph.importance[name].sum() for name, s in plan.solutions.items()]
        assert joint.objective == pytest.approx(sum(shares))
    else:
        assert joint.objective == max(s.objective for s in plan.solutions.values())


def test_layers_count_the_same_whatever_their_scale() -> None:
    graph = made_up((6, 6))
    name = graph.sites[1].name
    louder = replace(graph, importance={**graph.importance, name: 1e6 * graph.importance[name]})
    first, second = (solve(g, budget=5, scope="model", objective="soft") for g in (graph, louder))
    assert all(np.array_equal(first.keep(s.name), second.keep(s.name)) for s in graph.sites)
    # distances that are no similarity are measured in the median of their layer
    raw = graph_of("bert", "weights-linf")
    heads = [site.name for site in raw.of_kind("head")]
    wide = {n: Graph(g.indptr, g.indices, g.weight * (64 if n == heads[1] else 1)) for n, g in raw.redundancy.items()}
    first, second = (solve(g, budget=4, scope="model") for g in (raw, replace(raw, redundancy=wide)))
    assert all(np.array_equal(first.keep(n), second.keep(n)) for n in heads)
    assert first.joint[0].objective == pytest.approx(second.joint[0].objective)


def test_joint_plans_are_saved_combined_and_shown(tmp_path: Path) -> None:
    graph = graph_of("bert", "output-gram")
    heads = solve(graph, budget=5, scope="model", objective="soft")
    neurons = solve(graph, budget=0.5, scope="model", objective="soft", problem="neurons")
    plan = heads | neurons
    assert plan.joint == heads.joint + neurons.joint
    assert plan.gap == max(heads.gap, neurons.gap) > 0
    again = Plan.load(plan.save(tmp_path / "plan"))
    assert again.joint == plan.joint and again.gap == plan.gap and again.seconds == plan.seconds
    assert "2 sites under one budget: objective" in again.summary() and "submodularity" in again.summary()
    header, arrays = read_npz(tmp_path / "plan.npz", "topoprune.Plan", 1)
    del header["joint"]  # as written before the field existed
    old = Plan.load(write_npz(tmp_path / "old", header, arrays))
    assert old.joint == () and math.isnan(old.gap)
    with pytest.raises(ValueError, match="a joint certificate names"):
        replace(plan, solutions=dict(heads.solutions))


def test_a_joint_certificate_ends_with_the_decision_it_is_about() -> None:
    model = build("bert")
    plan = solve(extract(model, include=("heads",)), budget=5, scope="model")
    with apply(model, plan) as handle:
        handle.load_state_dict(handle.state_dict())
        assert handle.plan.joint == plan.joint
        name = next(iter(plan.solutions))
        handle.load_state_dict(handle.state_dict() | {name: torch.tensor([False, False, False, True])})
        assert handle.plan.joint == () and math.isnan(handle.plan.gap)


def test_whole_kv_groups_share_a_budget_over_the_model() -> None:
    plan = solve(graph_of("llama"), budget=3, scope="model")
    assert sum(s.n_kept for s in plan.solutions.values()) == 3 and plan.joint[0].status is Status.OPTIMAL


def test_wrong_requests_over_the_model_are_refused() -> None:
    graph = made_up((4, 3))
    for fields, message in (
        ({"budget": 1}, r"keep 1 of 7 units over 2 sites; expected 2 \(floor=1 in each\) to 7"),
        ({"budget": 8}, "keep 8 of 7 units"),
        ({"budget": 3, "floor": 2}, r"expected 4 \(floor=2"),
        ({"budget": 3, "floor": 0}, "floor is 0; expected"),
        ({"budget": 3, "floor": 1.5}, "floor is 1.5"),
        ({"budget": 0.0}, "must lie in"),
        ({"budget": True}, "budget is True"),
        ({"budget": 3, "objective": "hard"}, "unknown objective 'hard'"),
        ({"theta": 0.2}, "scope='model' shares a budget="),
    ):
        with pytest.raises(ValueError, match=message):
            solve(graph, scope="model", **fields)
    with pytest.raises(ValueError, match="unknown scope 'layer'"):
        solve(graph, budget=3, scope="layer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"objective 'soft' needs a similarity"):
        solve(graph_of("bert", "weights-linf"), budget=3, scope="model", objective="soft")

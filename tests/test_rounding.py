"""`rounding` as an option of the budget: kernel-friendly counts, and the budget still met (T8)."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.prunertools import prune
from tests.tiny import FAMILIES, HEADS, LAYERS, NEURONS, build, inputs
from topoprune import ModelGraph, Plan, Pruner, Recipe, Site, TensorSlice, extract, find_sites, measure_sparsity, solve
from topoprune.architectures import matrix_parameters
from topoprune.budgets import budget_count, rounded_counts, rounding_step
from topoprune.graph import Graph
from topoprune.train.schedule import share_out
from topoprune_solvers import Status

every_family = pytest.mark.parametrize("family", FAMILIES)


@lru_cache
def graph_of(family: str, gqa: str = "groups") -> ModelGraph:
    model = build(family)
    kinds = ("heads", "neurons")
    return extract(model, measure="output-gram", calibration=[inputs(model)], include=kinds, gqa=gqa)


def made_up(sizes: tuple[int, ...], width: int = 1, seed: int = 0) -> ModelGraph:
    """Sites of heads of one width without a model, with random normalised distances and importances."""
    rng = np.random.default_rng(seed)
    sites, redundancy, importance = [], {}, {}
    for layer, n in enumerate(sizes):
        site = Site(f"encoder.{layer}.attention", "head", n, width, ())
        distance = rng.random((n, n))
        redundancy[site.name] = Graph.from_dense((distance + distance.T) / 2, normalised=True)
        importance[site.name] = rng.exponential(size=n) * 10.0**layer
        sites.append(site)
    return ModelGraph(tuple(sites), redundancy, importance=importance)


def grouped(n: int, width: int, groups: int) -> Site:
    shared = (TensorSlice("v", 0, "v", (groups, 3)),) if groups else ()
    return Site("decoder.0.attention", "head", n, width, (), n_groups=groups, shared=shared)


# counts of one site


@given(
    per_group=st.integers(1, 40),
    groups=st.sampled_from([0, 2, 3, 4]),
    width=st.integers(1, 12),
    rounding=st.integers(1, 48),
    share=st.floats(0.001, 1.0),
)
def test_a_share_is_rounded_down_to_the_largest_multiple_within_it(
    per_group: int, groups: int, width: int, rounding: int, share: float
) -> None:
    site = grouped(per_group * max(1, groups), width, groups)
    fits = [
        k for k in range(1, site.n_units + 1) if k * width % rounding == 0 and (not groups or k % groups == 0)
    ]  # the slow twin: try them all
    if not fits:
        with pytest.raises(ValueError, match=rf"rounding={rounding} cannot be met in 'decoder.0.attention'"):
            budget_count(share, site, rounding)
        return
    assert rounding_step(site, rounding) == fits[0]
    within = [k for k in fits if k <= share * site.n_units + 1e-6]
    assert budget_count(share, site, rounding) == (within or fits)[-1 if within else 0]
    for k in (fits[0], fits[-1]):
        assert budget_count(k, site, rounding) == k


@pytest.mark.parametrize(
    ("site", "budget", "rounding", "message"),
    [
        (Site("f", "neuron", 40, 1, ()), 20, 8, r"budget asks to keep 20 units of 'f', 20 features.*ask for 16 or 24"),
        (Site("f", "neuron", 40, 1, ()), 3, 8, r"no multiple of rounding=8; ask for 8, or"),
        (Site("f", "neuron", 42, 1, ()), 41, 8, r"ask for 40, or"),
        (Site("a", "head", 12, 32, ()), 5, 64, r"5 units of 'a', 160 features.*ask for 4 or 6"),
        (grouped(8, 6, 2), 3, 4, r"3 of the 8 query heads.*ask for 2 or 4"),
        (grouped(8, 6, 2), 2, 8, r"ask for 4, or"),
        (Site("a", "head", 4, 6, ()), 0.5, 32, r"rounding=32 cannot be met in 'a': 4 units of width 6 are 24 features"),
        (Site("f", "neuron", 40, 1, ()), 0.5, 0, "rounding is 0; expected a number of features >= 1"),
        (Site("f", "neuron", 40, 1, ()), 0.5, True, "rounding is True"),
        (Site("f", "neuron", 40, 1, ()), 0.5, 8.0, "rounding is 8.0"),
    ],
)
def test_counts_that_cannot_be_are_refused_with_the_nearest(
    site: Site, budget: float, rounding: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        budget_count(budget, site, rounding)


# solve


@every_family
@pytest.mark.parametrize("problem", ["heads", "neurons"])
def test_every_site_of_a_rounded_plan_keeps_a_multiple_within_its_share(
    family: str, problem: Any, tmp_path: Path
) -> None:
    graph = graph_of(family)
    plan = solve(graph, budget=0.7, problem=problem, objective="soft", rounding=4)
    loose = solve(graph, budget=0.7, problem=problem, objective="soft")
    assert plan.solutions and set(plan.solutions) == set(loose.solutions)
    for name, solution in plan.solutions.items():
        site = plan.site(name)
        features = solution.n_kept * site.unit_width
        assert features % 4 == 0 and features > 0
        assert solution.n_kept <= max(0.7 * site.n_units, rounding_step(site, 4))
        assert solution.n_kept + rounding_step(site, 4) > 0.7 * site.n_units  # no smaller than it must be
    assert plan.request["rounding"] == 4 and "rounding" not in loose.request
    assert Plan.load(plan.save(tmp_path / "p.npz")).request["rounding"] == 4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_query_heads_stay_equally_many_in_each_group_and_a_multiple(family: str) -> None:
    graph = graph_of(family, "query-heads")
    two = 2 * graph.sites[0].unit_width
    for budget, rounding, each in ((0.75, None, 2), (0.75, two, 1), (4, two, 2)):
        for name, solution in solve(graph, budget=budget, rounding=rounding).solutions.items():
            kept = solution.keep.reshape(graph.site(name).n_groups, -1).sum(axis=1).tolist()
            assert kept == [each, each]
    whole = solve(graph_of(family), budget=0.5, rounding=two)
    assert [s.n_kept for s in whole.solutions.values()] == [1] * LAYERS


@every_family
def test_sites_whose_units_are_multiples_already_are_decided_as_without_rounding(family: str) -> None:
    graph = graph_of(family)
    width = graph.of_kind("head", "kv_group")[0].unit_width
    plain, rounded = solve(graph, budget=0.5), solve(graph, budget=0.5, rounding=width)
    for name, solution in plain.solutions.items():
        assert np.array_equal(solution.keep, rounded.solutions[name].keep)
        assert solution.objective == rounded.solutions[name].objective


# one budget over the model


@given(
    sizes=st.lists(st.integers(6, 60), min_size=1, max_size=6),
    width=st.sampled_from([1, 2, 3]),
    rounding=st.sampled_from([2, 4, 6]),
    floor=st.integers(1, 5),
    data=st.data(),
)
def test_counts_over_the_model_are_rounded_to_multiples_with_the_same_sum(
    sizes: list[int], width: int, rounding: int, floor: int, data: st.DataObject
) -> None:
    sites = [Site(f"{i}", "neuron", n, width, ()) for i, n in enumerate(sizes)]
    step = rounding // math.gcd(rounding, width)
    low = [-(-min(floor, n) // step) * step for n in sizes]
    low = [min(least, n // step * step) for least, n in zip(low, sizes, strict=True)]
    counts = [data.draw(st.integers(min(floor, n), n)) for n in sizes]
    most = sum(n // step * step for n in sizes)
    excess = max(sum(counts) - most, 0) + (sum(counts) - max(sum(counts) - most, 0)) % step
    for i, n in enumerate(sizes):  # make the sum one that multiples can have
        cut = min(excess, counts[i] - min(floor, n))
        counts[i], excess = counts[i] - cut, excess - cut
    if excess or sum(counts) < sum(low):
        return
    rounded = rounded_counts(sites, counts, floor, rounding)
    assert sum(rounded) == sum(counts)
    for new, least, n in zip(rounded, low, sizes, strict=True):
        assert new % step == 0 and least <= new <= n


@pytest.mark.parametrize("objective", ["soft", "k-centre"])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_over_the_model_is_rounded_and_its_certificate_still_holds(objective: Any, seed: int) -> None:
    graph = made_up((8, 12, 7), width=3, seed=seed)
    plan = solve(graph, budget=0.5, objective=objective, scope="model", rounding=6, solver="exact")
    free = solve(graph, budget=0.5, objective=objective, scope="model", solver="exact")
    kept = [s.n_kept for s in plan.solutions.values()]
    assert all(k * 3 % 6 == 0 and k > 0 for k in kept) and sum(kept) == 12  # 13 of 27 is no multiple of 2
    (joint,), (loose,) = plan.joint, free.joint
    better = 1 if joint.sense == "max" else -1
    assert better * joint.objective <= better * loose.objective + 1e-9
    assert joint.bound is not None and better * joint.bound.value >= better * joint.objective - 1e-9
    unrounded = all(np.array_equal(s.keep, free.solutions[n].keep) for n, s in plan.solutions.items())
    assert unrounded or joint.status is not Status.OPTIMAL or joint.gap <= 1e-9


def test_what_rounding_cannot_mean_is_refused() -> None:
    graph = made_up((8, 12))
    for arguments, message in (
        ({"theta": 0.1, "rounding": 2}, "rounding= is an option of budget= on units"),
        ({"budget": 0.5, "problem": "edges", "rounding": 2}, "rounding= is an option of budget= on units"),
        ({"budget": 7, "scope": "model", "rounding": 2}, r"7 units over 2 sites.*ask for 6 or 8"),
        ({"budget": 20, "scope": "model", "rounding": 16}, "cannot be met in 'encoder.0.attention'"),
        ({"budget": 3, "scope": "model", "rounding": 2}, r"expected 4 \(floor=1 in each\) to 20"),
        ({"budget": 0.5, "rounding": -8}, "rounding is -8"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(graph, **arguments)  # type: ignore[arg-type]
    one, other = made_up((8,), width=2), made_up((8,), width=3)
    sites = (one.sites[0], Site("decoder.0.attention", "head", 8, 3, ()))
    mixed = ModelGraph(sites, {s.name: g.redundancy["encoder.0.attention"] for s, g in zip(sites, (one, other))})  # noqa: B905
    with pytest.raises(ValueError, match="rounding=6 is 2 or 3 units, depending on the site"):
        solve(mixed, budget=0.5, scope="model", rounding=6)


# in training


@settings(max_examples=200)
@given(
    sites=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9), st.integers(1, 8)), min_size=1, max_size=6),
    share=st.floats(0.0, 0.99),
)
def test_shares_in_steps_reach_the_target_by_less_than_a_step(sites: list[tuple[int, int, int]], share: float) -> None:
    units, costs, steps = ([s[i] for s in sites] for i in range(3))
    units = [max(n, step) for n, step in zip(units, steps, strict=True)]
    target = share * sum(n * c for n, c in zip(units, costs, strict=True))
    most = sum((n - step) * c for n, c, step in zip(units, costs, steps, strict=True))
    least = sum(n % step * c for n, c, step in zip(units, costs, steps, strict=True))
    block = max(c * step for c, step in zip(costs, steps, strict=True))
    try:
        removed = share_out(target, units, costs, steps)
    except ValueError:
        assert target > most - 1e-6 or least - target > block - 1e-6
        return
    gone = sum(r * c for r, c in zip(removed, costs, strict=True))
    assert target - 1e-6 <= gone <= target + block + 1e-6
    for n, r, step in zip(units, removed, steps, strict=True):
        assert (n - r) % step == 0 and n - r >= step


@every_family
def test_a_pruner_ends_at_multiples_and_at_least_at_the_sparsity_asked(family: str) -> None:
    model, pruner, seen = prune(family, Recipe.budget(0.5, input_dims=0.3, rounding=4, solves=3), steps=6)
    sites, total = find_sites(model), matrix_parameters(find_sites(model))
    for site in sites:
        assert int(pruner.plan.keep(site.name).sum()) * site.unit_width % 4 == 0
    block = max(site.matrix_parameters_per_unit * rounding_step(site, 4) for site in sites if site.kind != "input_dim")
    removable = measure_sparsity(model, sites).removable
    assert 0.5 - 1e-9 <= removable < 0.5 + block / total
    assert pruner.plan.request["rounding"] == 4
    assert seen[-1][1].request == pruner.plan.request


def test_a_number_of_heads_is_met_in_multiples() -> None:
    model, pruner, _ = prune("bert", Recipe.budget(heads=6, rounding=12, solves=2), steps=4)
    kept = [int(pruner.plan.keep(s.name).sum()) for s in find_sites(model, ("heads",))]
    assert sum(kept) == 6 and all(k * 6 % 12 == 0 for k in kept)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda: Recipe.budget(0.5, rounding=0), "rounding is 0; expected a number of features >= 1"),
        (lambda: Recipe.budget(0.5, rounding=4, granularity="edge"), "it needs granularity='unit'"),
        (lambda: Recipe.budget(0.5, rounding=64), "rounding=64 cannot be met in 'encoder.0.attention'"),
        (lambda: Recipe.budget(heads=5, rounding=12), r"heads=5 cannot be rounded.*2 heads.*ask for heads=4 or 6"),
        (lambda: Recipe.budget(0.9, rounding=12), r"cannot be reached.*12 features left in each layer at most \d+"),
        (lambda: Recipe.budget(0.02, rounding=24), r"rounding every site already removes \d+"),
    ],
)
def test_what_a_pruner_cannot_round_is_refused_before_training(recipe: Any, message: str) -> None:
    model = build("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        Pruner(model, recipe(), total_steps=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rounding_travels_with_the_recipe() -> None:
    recipe = Recipe.budget(0.5, rounding=8)
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.to_dict()["rounding"] == 8
    assert Recipe.from_dict({"method": "budget", "sparsity": 0.5}).rounding is None  # type: ignore[union-attr]
    assert (HEADS, LAYERS, NEURONS) == (4, 2, 40)  # what the numbers above count on

"""Pruning in a plain loop: T1-T4, T7-T9, on every family and both recipes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.test_masks import bits, drive, random_plan, untouched
from tests.tiny import FAMILIES, HEADS, HIDDEN, LAYERS, build, inputs
from topoprune import Pruner, Recipe, apply, find_sites, measure_sparsity
from topoprune.architectures import counted_matrices, matrix_parameters
from topoprune.sparsity import row_view
from topoprune.train.checkpoint import load_state, save_state
from topoprune.train.penalties import attachment_weights
from topoprune.train.schedule import cubic_ramp

every_family = pytest.mark.parametrize("family", FAMILIES)
ATTENTION = ("head", "kv_group")
UNDEFINED_PAPER_MERGE = ("t5", "t5-gated", "qwen3")


def batch_of(model: nn.Module, step: int, batch: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
    """A labelled batch that depends on the step only."""
    given_ = inputs(model, batch, length, seed=1000 + step)
    if "labels" in given_:
        return given_
    if type(model).__name__.endswith("SequenceClassification"):
        return given_ | {"labels": given_["input_ids"][:, 0] % 2}
    return given_ | {"labels": given_["input_ids"].masked_fill(given_["attention_mask"] == 0, -100)}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    each: Callable[[int], None] | None = None,
    **size: int,
) -> None:
    model.train()
    for step in steps:
        optimizer.zero_grad()
        model(**batch_of(model, step, **size)).loss.backward()
        optimizer.step()
        if each is not None:
            each(step)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.01)


def prune(
    family: str, recipe: Any, steps: int = 12, optimizer: Any = adamw, **more: Any
) -> tuple[nn.Module, Pruner, list[Any]]:
    """Train a tiny model through the whole recipe; returns (step, plan, removable share) at every decision too."""
    model = build(family)
    torch.manual_seed(0)
    opt = optimizer(model)
    pruner = Pruner(model, recipe, total_steps=steps, steps_per_epoch=max(1, steps // 3), **more).attach(opt)
    seen: list[Any] = []
    pruner.on_solve = lambda event: seen.append((event, pruner.plan))
    train(model, opt, range(steps))
    return model, pruner, seen


# T8: budgets are met exactly


@every_family
@pytest.mark.parametrize("sparsity", [0.3, 0.55])
def test_a_sparsity_budget_is_met_within_one_unit_and_the_ramp_is_never_overtaken(family: str, sparsity: float) -> None:
    model, pruner, seen = prune(family, Recipe.budget(sparsity, solves=4))
    sites, total = find_sites(model), matrix_parameters(find_sites(model))
    figures = measure_sparsity(model, sites)
    finest = max(site.matrix_parameters_per_unit for site in sites if site.kind == "neuron")
    assert abs(figures.removable - sparsity) * total <= finest / 2 + 1e-6
    assert figures.zeros == pytest.approx(figures.removable)
    assert pruner.history[-1].removable == pytest.approx(figures.removable)
    assert len(seen) == 4 == len(pruner.history)
    for number, (event, plan) in enumerate(seen):
        ramp = 1.0 if number == 3 else cubic_ramp((number + 1) / 4)
        assert event.removable <= ramp * figures.removable + 1e-9
        for name, solution in plan.solutions.items():
            goal = seen[-1][1].solutions[name]
            gone, finally_gone = (s.n_units - s.n_kept for s in (solution, goal))
            assert gone == (finally_gone if number == 3 else math.floor(finally_gone * ramp))
    # every site loses the same share, up to rounding
    for site in sites:
        if site.kind == "neuron":
            gone = site.n_units - int(pruner.plan.keep(site.name).sum())
            assert all(
                abs(gone - (s.n_units - int(pruner.plan.keep(s.name).sum()))) <= 1 for s in sites if s.kind == "neuron"
            )


@every_family
def test_removal_is_monotone_and_dominators_are_kept(family: str) -> None:
    _, _, seen = prune(family, Recipe.budget(0.6, input_dims=0.25, solves=5))
    for (_, before), (_, after) in itertools.pairwise(seen):
        for name, solution in before.solutions.items():
            assert not (after.keep(name) & ~solution.keep).any(), f"a unit of {name} came back"
    for event, plan in seen:
        for solution in plan.unit_solutions().values():
            assert solution.dominator is not None and solution.dominator_distance is not None
            heirs = solution.dominator[~solution.keep]
            assert ((heirs == -1) | solution.keep[heirs]).all()
            assert (solution.dominator[solution.keep] == np.flatnonzero(solution.keep)).all()
            assert (solution.dominator_distance[solution.keep] == 0).all()
        assert event.step == plan.request["step"]
        assert sum(event.kept.values()) == sum(int(plan.keep(s.name).sum()) for s in plan.sites if s.kind in ATTENTION)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("heads", [0, 1, 3, "all but one", "all"])
def test_a_heads_budget_is_met_exactly(family: str, heads: Any) -> None:
    sites = find_sites(build(family), ("heads",))
    everything = sum(site.n_units for site in sites)
    wanted = {"all but one": everything - 1, "all": everything}.get(heads, heads)
    model, pruner, _ = prune(family, Recipe.budget(heads=wanted, solves=3), steps=8)
    figures = measure_sparsity(model, find_sites(model))
    assert sum(kept for name, (kept, _) in figures.kept.items() if name.endswith("attention")) == wanted
    assert all(kept == units for name, (kept, units) in figures.kept.items() if name.endswith("ffn"))
    per_site = [int(pruner.plan.keep(site.name).sum()) for site in sites]
    assert max(per_site) - min(per_site) <= 1  # fewer heads than sites: some layers keep none, evenly
    assert torch.isfinite(model.eval()(**inputs(model)).logits).all()


def test_heads_and_sparsity_together() -> None:
    model, pruner, _ = prune("bert", Recipe.budget(0.5, heads=5))
    sites, total = pruner.sites, matrix_parameters(pruner.sites)
    figures = measure_sparsity(model, sites)
    assert sum(kept for name, (kept, _) in figures.kept.items() if name.endswith("attention")) == 5
    assert abs(figures.removable - 0.5) * total <= 48 / 2


@every_family
def test_input_dimensions_are_zeroed_besides_and_do_not_count(family: str) -> None:
    model, pruner, _ = prune(family, Recipe.budget(0.4, input_dims=0.25, solves=3), steps=8)
    sites, total = pruner.sites, matrix_parameters(pruner.sites)
    figures = measure_sparsity(model, sites)
    finest = max(site.matrix_parameters_per_unit for site in sites if site.kind == "neuron")
    assert abs(figures.removable - 0.4) * total <= finest / 2 + 1e-6
    assert figures.gatherable > 0
    for site in sites:
        if site.kind == "input_dim":
            assert int((~pruner.plan.keep(site.name)).sum()) == round(0.25 * HIDDEN)


@every_family
@pytest.mark.parametrize("sparsity", [0.777])
def test_an_edge_budget_is_met_to_the_last_weight(family: str, sparsity: float) -> None:
    model, pruner, seen = prune(family, Recipe.budget(sparsity, granularity="edge", solves=3), steps=8)
    matrices = counted_matrices(pruner.sites)
    total = sum(math.prod(shape) for shape in matrices.values())
    wanted = round(sparsity * total)
    assert sum(s.n_units - s.n_kept for s in pruner.plan.solutions.values()) == wanted
    assert set(pruner.plan.solutions) == set(matrices)
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in matrices)
    assert zeros == wanted
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert all(not (after.keep(n) & ~s.keep).any() for n, s in before.solutions.items())
    for number, (event, _) in enumerate(seen):
        assert event.zeros * total <= (1.0 if number == 2 else cubic_ramp((number + 1) / 3)) * wanted + 1e-6


@given(
    steps=st.integers(1, 14),
    solves=st.integers(1, 5),
    ramp=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: tuple(sorted(pair))),
    batch=st.sampled_from([1, 4, 32]),
    per_unit=st.integers(1, 6),
    repair=st.sampled_from(["heads", "all", "none"]),
)
@settings(max_examples=30, deadline=None)
def test_any_schedule_meets_its_budget(
    steps: int, solves: int, ramp: Any, batch: int, per_unit: int, repair: Any
) -> None:
    """However many tokens a step brings: a decision never finds its accumulators missing."""
    model = build("bert")
    optimizer = adamw(model)
    recipe = Recipe.budget(0.5, solves=solves, ramp=ramp, tokens_per_unit=per_unit, repair=repair)
    with Pruner(model, recipe, total_steps=steps).attach(optimizer) as pruner:
        train(model, optimizer, range(steps), batch=batch)
        assert abs(pruner.sparsity().removable - 0.5) * matrix_parameters(pruner.sites) <= 24
        assert 1 <= len(pruner.history) <= solves
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_nothing_to_remove_is_plain_training() -> None:
    plain = build("bert")
    torch.manual_seed(0)
    train(plain, adamw(plain), range(6))
    pruned, pruner, _ = prune("bert", Recipe.budget(0.0), steps=6)
    assert bits(plain) == bits(pruned)
    assert pruner.sparsity().zeros == 0


# T1 and T2 inside the pruner


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.budget(0.5, solves=3),
        Recipe.budget(0.5, granularity="edge", solves=3),
        Recipe.neuroprune(1e-2, 1e-2, "auto:0.5"),
        Recipe.neuroprune(1e-2, 1e-2, "auto:0.5", penalty="loss"),
    ],
    ids=["unit", "edge", "proximal", "loss"],
)
def test_t1_and_t2_hold_at_every_step(recipe: Any, optimizer: Any) -> None:
    model = build("bert")
    opt = optimizer(model)
    pruner = Pruner(model, recipe, total_steps=10, steps_per_epoch=3).attach(opt)
    counts = {"pre": 0, "post": 0}

    def before(*_: Any) -> None:
        for name, keep in pruner.handle.masks().items():
            counts["pre"] += 1
            assert (model.get_parameter(name).grad[~keep] == 0.0).all(), name

    def after(*_: Any) -> None:
        for name, keep in pruner.handle.masks().items():
            counts["post"] += 1
            parameter = model.get_parameter(name)
            assert (parameter[~keep] == 0.0).all(), name
            for value in opt.state[parameter].values():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    assert (value[~keep] == 0.0).all(), name

    opt.register_step_pre_hook(before)
    opt.register_step_post_hook(after)
    train(model, opt, range(10))
    assert counts["pre"] and counts["post"] > counts["pre"]
    assert pruner.step == 10


def test_two_backwards_per_step_count_as_one_step() -> None:
    model = build("bert").train()
    optimizer = adamw(model)
    pruner = Pruner(model, Recipe.budget(0.5, solves=3), total_steps=8).attach(optimizer)
    for step in range(8):
        optimizer.zero_grad()
        for part in range(2):
            (model(**batch_of(model, 2 * step + part)).loss / 2).backward()
        optimizer.step()
        assert all((model.get_parameter(n)[~k] == 0).all() for n, k in pruner.handle.masks().items())
    assert pruner.step == 8
    assert abs(pruner.sparsity().removable - 0.5) * matrix_parameters(pruner.sites) <= 24


def test_evaluation_between_steps_changes_nothing() -> None:
    finals = []
    for evaluate in (False, True):
        model = build("bert")
        torch.manual_seed(0)
        optimizer = adamw(model)
        Pruner(model, Recipe.budget(0.5, solves=4), total_steps=12).attach(optimizer)

        def look(step: int, model: nn.Module = model) -> None:
            model.eval()
            with torch.no_grad():
                model(**inputs(model, batch=9, seed=step))
            model.train()

        train(model, optimizer, range(12), look if evaluate else None)
        finals.append(bits(model))
    assert finals[0] == finals[1]


# NeuroPrune: Alg. 1-3


@every_family
def test_proximal_steps_give_exact_zeros_and_heads_go_at_epoch_ends_only(family: str) -> None:
    merge = "none" if family in UNDEFINED_PAPER_MERGE else "paper"
    recipe = Recipe.neuroprune(0.3, 0.02, "auto:0.4", prox_scale="absolute", merge=merge)  # type: ignore[arg-type]
    model = build(family)
    sites = find_sites(model)
    opt = sgd(model)
    pruner = Pruner(model, recipe, steps_per_epoch=3).attach(opt)
    zeros, kept = [], []

    def look(step: int) -> None:
        zeros.append(measure_sparsity(model, sites).zeros)
        kept.append(sum(int(pruner.plan.keep(site.name).sum()) for site in sites if site.kind in ATTENTION))

    train(model, opt, range(7), look)
    assert zeros[0] > 0 and zeros[1] > zeros[0]
    everything = sum(site.n_units for site in sites if site.kind in ATTENTION)
    assert kept[0] == kept[1] == everything
    assert kept[2] < everything and kept[2] == kept[3] == kept[4] and kept[5] <= kept[4] and kept[6] == kept[5]
    assert [event.step for event in pruner.history] == [3, 6]
    for event in pruner.history:
        assert set(event.thetas) == {site.name for site in sites if site.kind in ATTENTION}
        assert all(math.isfinite(theta) and theta >= 0 for theta in event.thetas.values())
        assert event.solver == "neuroprune"
    assert dict(pruner.plan.request["thetas"]) == pruner.history[-1].thetas
    # no head returns, the dominated ones have a live dominator
    for name, solution in pruner.plan.solutions.items():
        assert solution.keep.any()
        heirs = solution.dominator[~solution.keep]  # type: ignore[index]
        assert ((heirs == -1) | solution.keep[heirs]).all(), name


def linf_distances(weights: dict[str, torch.Tensor], layer: int) -> np.ndarray:
    """Alg. 2 by hand: max |A_Hi - A_Hj| over the query, key and value rows of each pair of heads."""
    prefix = f"bert.encoder.layer.{layer}.attention.self."
    rows = [
        torch.cat([weights[f"{prefix}{role}.weight"][6 * h : 6 * h + 6] for role in ("query", "key", "value")])
        for h in range(HEADS)
    ]
    return np.array([[float((a - b).abs().max()) for b in rows] for a in rows])


def test_the_head_step_is_alg_2_and_3_with_the_papers_merge() -> None:
    """Three epochs with lr 0: who goes follows from distances by hand, and each head's columns move once."""
    model = build("bert")
    first = linf_distances({name: p.detach() for name, p in model.named_parameters()}, 0)
    theta = float(np.sort(first[np.triu_indices(HEADS, 1)])[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, Recipe.neuroprune(0.1, 0.1, theta), steps_per_epoch=1).attach(optimizer)
    gone_before = 0
    for epoch in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        earlier = {layer: pruner.plan.keep(f"encoder.{layer}.attention") for layer in range(LAYERS)}
        train(model, optimizer, range(1))
        assert set(pruner.history[epoch].thetas.values()) == {theta}
        for layer in range(LAYERS):
            solution = pruner.plan.solutions[f"encoder.{layer}.attention"]
            assert solution.dominator is not None
            live = np.flatnonzero(earlier[layer])
            near = linf_distances(before, layer)[np.ix_(live, live)] <= theta
            assert near[:, solution.keep[live]].any(axis=1).all()  # every live head has a kept one within theta
            assert solution.keep[live].all() == (near.sum() == live.size)  # and somebody goes if anybody can
            prefix = f"bert.encoder.layer.{layer}."
            for role in ("query", "key", "value"):
                name = f"{prefix}attention.self.{role}.weight"
                for h in range(HEADS):
                    now, old = (w[6 * h : 6 * h + 6] for w in (model.get_parameter(name).detach(), before[name]))
                    assert torch.equal(now, old if solution.keep[h] else torch.zeros_like(old))
            columns = before[f"{prefix}intermediate.dense.weight"].clone()
            for h in np.flatnonzero(earlier[layer] & ~solution.keep):
                j = int(solution.dominator[h])
                columns[:, 6 * j : 6 * j + 6] += columns[:, 6 * h : 6 * h + 6]
            torch.testing.assert_close(model.get_parameter(f"{prefix}intermediate.dense.weight").detach(), columns)
        gone_before += sum(int((~keep).sum()) for keep in earlier.values())
    assert gone_before  # heads gone in an earlier epoch were there not to be merged again


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5-gated", "opt"])
@pytest.mark.parametrize("eq1", ["a", "b"])
def test_penalty_in_the_loss_is_adding_it_to_the_loss(family: str, eq1: Any) -> None:
    alpha, beta, epsilon = 0.03, 0.02, 0.1
    model, twin = build(family), build(family)  # eval: no dropout
    sites = find_sites(model)
    recipe = Recipe.neuroprune(alpha, beta, 0.0, epsilon=epsilon, eq1=eq1, penalty="loss", merge="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Pruner(model, recipe, steps_per_epoch=100).attach(optimizer)
    batch = batch_of(model, 0)
    model(**batch).loss.backward()
    optimizer.step()

    loss = twin(**batch).loss
    for site in sites:
        if site.kind == "input_dim":
            named = {p.param: p.axis for p in site.reads}
            joined = torch.cat([row_view(twin.get_parameter(n), axis) for n, axis in named.items()], dim=1)
            loss = loss + alpha * joined.abs().sum(1).sqrt().sum()
        elif site.kind == "neuron":
            inward = torch.cat(
                [row_view(twin.get_parameter(p.param), p.axis) for p in site.reads if len(p.shape) == 2], dim=1
            )
            outward = row_view(twin.get_parameter(site.writes[0].param), 1 - site.writes[0].axis)
            for rows in (inward, outward):
                share = (rows.detach().abs() < epsilon).float().mean(dim=1)
                weight = share if eq1 == "a" else 1 / (1 - share + 0.01)
                loss = loss + beta * (weight * rows.abs().sum(1)).sum()
    loss.backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("penalty", ["loss", "proximal"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_no_penalty_and_theta_zero_is_plain_training(family: str, penalty: Any) -> None:
    plain, pruned = build(family), build(family)
    torch.manual_seed(0)
    train(plain, adamw(plain), range(6))
    torch.manual_seed(0)
    optimizer = adamw(pruned)
    recipe = Recipe.neuroprune(0.0, 0.0, 0.0, penalty=penalty, merge="none")
    pruner = Pruner(pruned, recipe, steps_per_epoch=2).attach(optimizer)
    train(pruned, optimizer, range(6))
    assert bits(plain) == bits(pruned)
    assert [sum(event.removed.values()) for event in pruner.history] == [0, 0, 0]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5-gated"])
@pytest.mark.parametrize("scale", ["lr", "absolute"])
def test_a_proximal_step_is_the_optimizers_step_and_then_the_prox(family: str, scale: Any) -> None:
    alpha, beta, lr = 0.2, 0.1, 0.05
    factor = lr if scale == "lr" else 1.0
    model, twin = build(family), build(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    Pruner(model, Recipe.neuroprune(alpha, beta, 0.0, prox_scale=scale, merge="none"), steps_per_epoch=9).attach(
        optimizer
    )
    batch = batch_of(model, 0)
    model(**batch).loss.backward()
    optimizer.step()
    twin(**batch).loss.backward()
    torch.optim.SGD(twin.parameters(), lr=lr).step()
    for site in find_sites(twin):
        if site.kind == "neuron":
            inward = [(p.param, p.axis) for p in site.reads if len(p.shape) == 2]
            for group in (inward, [(site.writes[0].param, 1 - site.writes[0].axis)]):
                before = [row_view(twin.get_parameter(n).detach(), axis) for n, axis in group]
                limit = factor * beta * attachment_weights(before, 1e-4, "b")
                for (name, axis), old in zip(group, before, strict=True):
                    expected = old.sign() * (old.abs() - limit).clamp_min(0)
                    now = row_view(model.get_parameter(name).detach(), axis)
                    torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-6)
                    assert torch.equal(now == 0, expected == 0)


def test_parameters_the_optimizer_does_not_train_are_not_penalised() -> None:
    model = build("bert")
    frozen = {name for name, _ in model.named_parameters() if ".layer.0." in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name not in frozen], lr=0.1)
    Pruner(model, Recipe.neuroprune(0.5, 0.5, 0.0), steps_per_epoch=9).attach(optimizer)
    train(model, optimizer, range(2))
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in frozen)
    assert (model.get_parameter("bert.encoder.layer.1.intermediate.dense.weight") == 0).any()


# T4 and T9: what is refused, before anything happens

BAD_RECIPES: dict[str, tuple[Callable[[], Any], str]] = {
    "neither": (lambda: Recipe.budget(), "give sparsity="),
    "sparsity 1": (lambda: Recipe.budget(1.0), "1.0"),
    "sparsity < 0": (lambda: Recipe.budget(-0.1), "-0.1"),
    "sparsity nan": (lambda: Recipe.budget(math.nan), "nan"),
    "heads < 0": (lambda: Recipe.budget(heads=-1), "-1"),
    "heads 2.5": (lambda: Recipe.budget(heads=2.5), "2.5"),  # type: ignore[arg-type]
    "heads True": (lambda: Recipe.budget(heads=True), "True"),
    "granularity": (lambda: Recipe.budget(0.5, granularity="row"), "'row'.*unit, edge"),  # type: ignore[arg-type]
    "edge with heads": (lambda: Recipe.budget(0.5, heads=3, granularity="edge"), "takes sparsity= alone"),
    "input_dims": (lambda: Recipe.budget(0.5, input_dims=1.0), "1.0"),
    "ramp": (lambda: Recipe.budget(0.5, ramp=(0.6, 0.1)), r"\(0\.6, 0\.1\)"),
    "solves": (lambda: Recipe.budget(0.5, solves=0), "solves"),
    "attachment": (lambda: Recipe.budget(0.5, attachment=-1.0), "attachment is -1.0"),
    "ridge": (lambda: Recipe.budget(0.5, ridge=math.inf), "ridge is inf"),
    "repair": (lambda: Recipe.budget(0.5, repair="some"), "'some'.*heads, all, none"),  # type: ignore[arg-type]
    "alpha": (lambda: Recipe.neuroprune(-1.0, 0.0, 0.1), "alpha is -1.0"),
    "beta": (lambda: Recipe.neuroprune(0.0, math.nan, 0.1), "beta is nan"),
    "theta": (lambda: Recipe.neuroprune(0.0, 0.0, -0.1), "-0.1"),
    "theta auto": (lambda: Recipe.neuroprune(0.0, 0.0, "auto:2"), "auto:2"),
    "eq1": (lambda: Recipe.neuroprune(0.0, 0.0, 0.1, eq1="c"), "'c'.*a, b"),  # type: ignore[arg-type]
    "penalty": (lambda: Recipe.neuroprune(0.0, 0.0, 0.1, penalty="l2"), "'l2'"),  # type: ignore[arg-type]
    "merge": (lambda: Recipe.neuroprune(0.0, 0.0, 0.1, merge="scale"), "'scale'"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_names_the_value(case: str) -> None:
    make, message = BAD_RECIPES[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        (Recipe.budget(0.5), {}, "BudgetRecipe needs total_steps="),
        (Recipe.budget(0.5), {"steps_per_epoch": 5}, "needs total_steps="),
        (Recipe.neuroprune(0.1, 0.1, 0.1), {"total_steps": 5}, "NeuroPruneRecipe needs steps_per_epoch="),
        (Recipe.budget(0.5), {"total_steps": 0}, "total_steps is 0"),
        (Recipe.budget(0.5), {"total_steps": 2.5}, r"total_steps is 2\.5"),
        (Recipe.budget(0.5), {"total_steps": True}, "total_steps is True"),
        (Recipe.budget(0.5), {"total_steps": 9, "steps_per_epoch": -1}, "steps_per_epoch is -1"),
        (Recipe.budget(0.995), {"total_steps": 9}, r"sparsity=99\.5% cannot be reached.*at most \d+"),
        (Recipe.budget(0.1, heads=0), {"total_steps": 9}, "keeping 0 heads already removes"),
        (Recipe.budget(0.9, heads=8), {"total_steps": 9}, "cannot be reached: with 8 heads"),
        (Recipe.budget(heads=9), {"total_steps": 9}, "heads=9 asks for more heads than exist: this model has 8"),
        ("budget", {"total_steps": 9}, r"recipe is 'budget'; use Recipe\.neuroprune"),
    ],
)
def test_what_cannot_work_is_refused_before_training(recipe: Any, more: dict[str, Any], message: str) -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match=message):
        Pruner(model, recipe, **more)


def test_an_unknown_solver_is_refused_before_training() -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match="unknown solver 'gredy'"):
        Pruner(model, Recipe.budget(0.5, solver="gredy"), total_steps=9)


@pytest.mark.parametrize("family", UNDEFINED_PAPER_MERGE)
def test_an_undefined_merge_is_refused_before_training(family: str) -> None:
    model = build(family)
    with untouched(model), pytest.raises(ValueError, match="undefined"):
        Pruner(model, Recipe.neuroprune(0.1, 0.1, 0.1), steps_per_epoch=3)


@pytest.mark.parametrize("recipe", [Recipe.budget(0.5), Recipe.neuroprune(0.1, 0.1, 0.1)])
def test_a_broken_model_is_refused_by_the_name_of_its_tensor(recipe: Any) -> None:
    model = build("bert")
    name = "bert.encoder.layer.1.attention.self.value.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.nan
    with untouched(model), pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Pruner(model, recipe, total_steps=9, steps_per_epoch=3)


def test_foreign_second_and_repeated_attachments_are_refused() -> None:
    model, other = build("bert"), build("bert", seed=1)
    pruner = Pruner(model, Recipe.budget(0.5), total_steps=9)
    with pytest.raises(ValueError, match="none of this model's parameters"):
        pruner.attach(adamw(other))
    optimizer = adamw(model)
    assert pruner.attach(optimizer) is pruner
    with pytest.raises(ValueError, match="attached to an optimizer already"):
        pruner.attach(optimizer)
    with pytest.raises(ValueError, match="already pruned"):
        Pruner(model, Recipe.budget(0.5), total_steps=9)
    with pytest.raises(ValueError, match="already pruned"):
        apply(model, random_plan(model))
    pruner.close()
    with apply(model, random_plan(model)), pytest.raises(ValueError, match="already pruned"):
        Pruner(model, Recipe.budget(0.5), total_steps=9)
    Pruner(model, Recipe.budget(0.5), total_steps=9).close()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.budget(0.5, ramp=(0.5, 1.0)),
        Recipe.budget(0.5, granularity="edge", ramp=(0.5, 1.0)),
        Recipe.neuroprune(0, 0, 0.1),
    ],
    ids=["unit", "edge", "neuroprune"],
)
def test_training_that_diverges_stops_at_the_decision_with_the_tensors_name(recipe: Any) -> None:
    model = build("bert")
    optimizer = adamw(model)
    pruner = Pruner(model, recipe, total_steps=8, steps_per_epoch=4).attach(optimizer)
    name = "bert.encoder.layer.1.output.dense.weight"

    def poison(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                model.get_parameter(name)[1, 1] = torch.nan
                for parameter in model.parameters():  # only this tensor: the others take no step
                    parameter.requires_grad_(False)
                model.classifier.weight.requires_grad_()

    with pytest.raises(ValueError, match=r"parameter 'bert\.encoder\.layer\.1\.output\.dense\.weight'.*non-finite"):
        train(model, optimizer, range(8), poison)
    assert pruner.history == []


def test_activations_that_overflow_stop_at_the_decision() -> None:
    model = build("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Pruner(model, Recipe.budget(0.5, ramp=(0.2, 1.0)), total_steps=5).attach(optimizer)
    with pytest.raises(ValueError, match=r"not finite|non-finite"):
        train(model, optimizer, range(5))


# Closing


@pytest.mark.parametrize("recipe", [Recipe.budget(0.5), Recipe.budget(0.5, granularity="edge")], ids=["unit", "edge"])
def test_closing_leaves_zeros_and_a_free_model(recipe: Any) -> None:
    model, pruner, _ = prune("bert", recipe)
    keeps = pruner.handle.masks()
    before = bits(model)
    pruner.close()
    pruner.close()
    assert bits(model) == before
    for _ in drive(model, adamw(model), steps=1):  # a unit that is zero on both sides gets no gradient of its own
        pass
    assert all((model.get_parameter(name)[~keep] != 0).all() for name, keep in keeps.items())
    assert pruner.step == 12
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    apply(model, random_plan(model)).close()


def test_closing_mid_way_takes_every_hook_along() -> None:
    model = build("bert")
    optimizer = adamw(model)
    with pytest.raises(KeyboardInterrupt), Pruner(model, Recipe.budget(0.5), total_steps=30).attach(optimizer):
        train(model, optimizer, range(2))
        raise KeyboardInterrupt
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_wrappers_are_looked_through() -> None:
    class Wrapped:
        """As accelerate's: holds the optimizer that does the work."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = build("bert")
    optimizer = adamw(model)
    pruner = Pruner(torch.compile(model), Recipe.budget(0.5), total_steps=6)  # type: ignore[arg-type]
    pruner.attach(Wrapped(optimizer))  # type: ignore[arg-type]
    train(model, optimizer, range(6))
    assert pruner.step == 6 and pruner.sparsity().removable > 0.4


def test_history_is_plain_data_with_times_and_gaps() -> None:
    _, pruner, seen = prune("bert", Recipe.budget(0.5, solves=3), steps=8)
    for event, (told, _) in zip(pruner.history, seen, strict=True):
        assert event is told
        assert set(event.seconds) == {"extract", "solve", "repair"}
        assert all(value >= 0 for value in event.seconds.values())
        assert math.isnan(event.gap) or 0 <= event.gap <= 1
        assert all(value >= 0 for value in event.removed.values())
    assert sum(sum(e.removed.values()) for e in pruner.history) == sum(
        s.n_units - s.n_kept for s in pruner.plan.solutions.values()
    )
    assert all(value >= 0 for value in pruner.seconds.values())


def test_recipes_survive_json() -> None:
    for recipe in (
        Recipe.budget(0.5, ramp=(0.2, 0.7), input_dims=0.1),
        Recipe.neuroprune(1e-3, 1e-4, "auto:0.2", eq1="a"),
    ):
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(ValueError, match="unknown method 'other'"):
        Recipe.from_dict({"method": "other"})
    assert Recipe.neuroprune(0, 0, 0.15, penalty="loss").faithful
    assert not Recipe.neuroprune(0, 0, 0.15).faithful
    assert not Recipe.neuroprune(0, 0, "auto:0.1", penalty="loss").faithful


# T7: checkpoint and resume

RESUMABLE = {
    "unit": Recipe.budget(0.5, solves=4, tokens_per_unit=2, input_dims=0.2),
    # Decisions far apart: the pace is learnt in one window and decides when the next one opens.
    "unit-far-apart": Recipe.budget(0.5, solves=2, ramp=(0.2, 1.0), tokens_per_unit=2),
    "unit-repair-all": Recipe.budget(0.5, solves=3, repair="all", tokens_per_unit=1),
    "edge": Recipe.budget(0.5, granularity="edge", solves=4),
    "proximal": Recipe.neuroprune(0.1, 0.1, "auto:0.3", merge="none"),
    "loss": Recipe.neuroprune(0.01, 0.01, "auto:0.3", penalty="loss", merge="none"),
}
STEPS = 14


def start(family: str, recipe: Any, make: Any, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    model = build(family, seed)
    return model, make(model), Pruner(model, recipe, total_steps=STEPS, steps_per_epoch=5)


def checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    save_state(pruner.state_dict(), folder / "pruner.safetensors")
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
        folder / "rest.pt",
    )


def resume(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, attach_first: bool
) -> None:
    rest = torch.load(folder / "rest.pt", weights_only=True)
    if attach_first:
        pruner.attach(optimizer)
    model.load_state_dict(rest["model"])
    optimizer.load_state_dict(rest["optimizer"])
    pruner.load_state_dict(load_state(folder / "pruner.safetensors"))
    if not attach_first:
        pruner.attach(optimizer)
    torch.set_rng_state(rest["rng"])


def same_decisions(one: Pruner, two: Pruner) -> None:
    assert [(e.step, e.removed, e.kept, e.thetas, e.zeros, e.removable) for e in one.history] == [
        (e.step, e.removed, e.kept, e.thetas, e.zeros, e.removable) for e in two.history
    ]
    assert set(one.plan.solutions) == set(two.plan.solutions)
    for name, solution in one.plan.solutions.items():
        assert np.array_equal(solution.keep, two.plan.solutions[name].keep)


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("recipe", RESUMABLE)
def test_resuming_at_any_step_is_the_uninterrupted_run_bit_for_bit(recipe: str, make: Any, tmp_path: Path) -> None:
    model, optimizer, straight = start("bert", RESUMABLE[recipe], make)
    straight.attach(optimizer)
    torch.manual_seed(3)

    def save(step: int) -> None:
        folder = tmp_path / str(step)
        folder.mkdir()
        checkpoint(folder, model, optimizer, straight)

    train(model, optimizer, range(STEPS), save)
    assert len(straight.history) >= 2
    # After the first step, inside collection windows, right after decisions, after the last one.
    for number, done in enumerate((0, 3, 5, 8, 12)):
        again, fresh, pruner = start("bert", RESUMABLE[recipe], make, seed=99)
        torch.manual_seed(77)
        resume(tmp_path / str(done), again, fresh, pruner, attach_first=bool(number % 2))
        train(again, fresh, range(done + 1, STEPS))
        assert bits(again) == bits(model), f"resumed after step {done}"
        same_decisions(pruner, straight)
        assert pruner.step == straight.step == STEPS


@pytest.mark.parametrize("family", ["gpt2", "t5-gated", "llama"])
def test_resuming_works_for_other_families(family: str, tmp_path: Path) -> None:
    model, optimizer, straight = start(family, RESUMABLE["unit"], adamw)
    straight.attach(optimizer)
    torch.manual_seed(3)
    train(
        model,
        optimizer,
        range(STEPS),
        lambda step: checkpoint(tmp_path, model, optimizer, straight) if step == 5 else None,
    )
    again, fresh, pruner = start(family, RESUMABLE["unit"], adamw, seed=99)
    resume(tmp_path, again, fresh, pruner, attach_first=False)
    train(again, fresh, range(6, STEPS))
    assert bits(again) == bits(model)
    same_decisions(pruner, straight)


def test_the_state_survives_torch_save_with_weights_only(tmp_path: Path) -> None:
    model, optimizer, straight = start("bert", RESUMABLE["unit"], adamw)
    straight.attach(optimizer)
    train(model, optimizer, range(6))
    state = straight.state_dict()
    torch.save(state, tmp_path / "state.pt")
    for back in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        load_state(save_state(state, tmp_path / "s.safetensors")),
    ):
        other, _, pruner = start("bert", RESUMABLE["unit"], adamw)
        other.load_state_dict(model.state_dict())
        pruner.load_state_dict(back)
        same_decisions(pruner, straight)
        assert pruner.step == 6 and bits(other) == bits(model)


def test_a_state_of_something_else_is_refused_and_nothing_changes() -> None:
    model, optimizer, straight = start("bert", RESUMABLE["unit"], adamw)
    straight.attach(optimizer)
    train(model, optimizer, range(8))
    state = straight.state_dict()
    others: list[tuple[Any, Any, dict[str, Any], str]] = [
        ("opt", RESUMABLE["unit"], {}, "another model"),
        ("bert", Recipe.budget(0.4), {}, "of recipe"),
        ("bert", RESUMABLE["loss"], {}, "of recipe"),
        ("bert", RESUMABLE["unit"], {"total_steps": STEPS + 1}, f"total_steps={STEPS}, this run {STEPS + 1}"),
        ("bert", RESUMABLE["unit"], {"steps_per_epoch": 4}, "steps_per_epoch=5, this run 4"),
    ]
    for family, recipe, schedule, message in others:
        other = build(family, seed=2)
        pruner = Pruner(other, recipe, **({"total_steps": STEPS, "steps_per_epoch": 5} | schedule))
        before = bits(other)
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict(state)
        assert bits(other) == before and pruner.step == 0 and pruner.history == [] and pruner.plan.solutions == {}
    with pytest.raises(ValueError, match="version 7"):
        straight.load_state_dict(state | {"version": 7})
    assert straight.step == 8


def test_damaged_state_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, pruner, _ = prune("bert", Recipe.budget(0.5), steps=6)
    path = save_state(pruner.state_dict(), tmp_path / "state.safetensors")
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"state\.safetensors is not a readable pruner state"):
            load_state(path)
    save_file({"x": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"other\.safetensors holds None"):
        load_state(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no pruner state at"):
        load_state(tmp_path / "missing.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors", "state.safetensors"]

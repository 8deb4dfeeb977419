"""Pruning in a plain loop: budgets met exactly (T8), zeros held at every step (T1, T2), closing."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.masktools import ATTENTION, bits, drive, random_plan
from tests.prunertools import adamw, batch_of, prune, sgd, train
from tests.tiny import FAMILIES, HIDDEN, build, inputs
from topoprune import Pruner, Recipe, apply, find_sites, measure_sparsity
from topoprune.architectures import counted_matrices, matrix_parameters
from topoprune.train.schedule import cubic_ramp

every_family = pytest.mark.parametrize("family", FAMILIES)


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

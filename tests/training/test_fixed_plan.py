"""A plan that is held: what it prunes is zero from the first step to the last, on its own task or on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.masktools import bits, naive_masks, random_plan, untouched
from tests.prunertools import adamw, batch_of, prune, sgd, train
from tests.tiny import FAMILIES, build
from topoprune import Plan, Pruner, Recipe, apply, compact, find_sites, kept_units, load, save
from topoprune.train.checkpoint import load_state, save_state
from topoprune.train.fixed import FixedPlanRecipe, plan_on_model, zero_units

every_family = pytest.mark.parametrize("family", FAMILIES)
UNITS = ("head", "kv_group", "neuron")


def pruned(family: str, seed: int = 0, **more: Any) -> tuple[nn.Module, Plan]:
    """A model with the zeros of a random plan, as a run leaves it."""
    model = build(family)
    plan = random_plan(model, seed=seed, **more)
    apply(model, plan).close(restore=False)
    return model, plan


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train without dropout, whose draws depend on shapes."""
    model.eval()
    for step in steps:
        optimizer.zero_grad()
        model(**batch_of(model, step)).loss.backward()
        optimizer.step()


def assert_masked(model: nn.Module, plan: Plan) -> None:
    for name, keep in naive_masks(model, plan).items():
        assert not model.get_parameter(name)[~keep].count_nonzero(), name


@every_family
def test_masks_hold_at_every_step_and_what_stays_is_trained(family: str) -> None:
    model, plan = pruned(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model)
    pruner = Pruner(model, Recipe.fixed(plan)).attach(optimizer)
    train(model, optimizer, range(4), each=lambda step: assert_masked(model, plan))
    assert pruner.history == [] and pruner.sparsity().zeros > 0.4
    for site in find_sites(model):
        assert np.array_equal(pruner.plan.keep(site.name), plan.keep(site.name))
        assert np.array_equal(zero_units(model, site), ~plan.keep(site.name)) or site.kind == "input_dim"
    pruner.close()
    assert_masked(model, plan)
    for name, keep in naive_masks(model, plan).items():
        moved = model.get_parameter(name).detach().ne(before[name])
        assert moved[keep].any() or not keep.any(), name


@every_family
def test_a_dense_model_is_zeroed_first_when_that_is_asked_for(family: str) -> None:
    model, plan = build(family), random_plan(build(family))
    with untouched(model), pytest.raises(ValueError, match="this model is not one that the plan has pruned: "):
        Pruner(model, Recipe.fixed(plan))
    optimizer = sgd(model)
    with Pruner(model, Recipe.fixed(plan, on="dense")).attach(optimizer):
        assert_masked(model, plan)
        train(model, optimizer, range(2), each=lambda step: assert_masked(model, plan))


@every_family
def test_masked_and_compacted_keep_the_same_units_in_training(family: str) -> None:
    model, plan = pruned(family, kinds=UNITS)
    smaller = compact(model, plan)
    for one, recipe in ((model, Recipe.fixed(plan)), (smaller, None)):
        optimizer = sgd(one)
        pruner = None if recipe is None else Pruner(one, recipe).attach(optimizer)
        fit(one, optimizer, range(3))
        if pruner is not None:
            pruner.close()
    # The same weights: masks and cutting out are two ways to keep what is gone gone.
    again = compact(model, plan)
    assert {name: list(units) for name, units in kept_units(again).items()} == {
        name: list(units) for name, units in kept_units(smaller).items()
    }
    for (name, ours), theirs in zip(again.named_parameters(), smaller.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), name


def test_units_are_cut_out_at_once_when_training_compacts() -> None:
    model, plan = pruned("bert", kinds=UNITS)
    optimizer = adamw(model)
    with Pruner(model, Recipe.fixed(plan), compact=True).attach(optimizer) as pruner:
        train(model, optimizer, range(3))
        assert type(model).__name__ == "CompactBertForSequenceClassification"
        assert pruner.sparsity().removable == pytest.approx(0.5, abs=0.02)
    assert {n: list(u) for n, u in kept_units(model).items()} == {
        name: list(np.flatnonzero(s.keep)) for name, s in plan.unit_solutions().items()
    }


def test_plans_of_single_weights_are_held_too() -> None:
    model, first, _ = prune("bert", Recipe.budget(0.5, granularity="edge", solves=3), steps=6)
    first.close()
    zeros = {name: model.get_parameter(name).eq(0) for name in first.plan.edge_axes}
    optimizer = adamw(model)
    recipe = Recipe.fixed(first.plan)
    with Pruner(model, recipe).attach(optimizer) as pruner:
        train(model, optimizer, range(3))
        assert pruner.sparsity().zeros == pytest.approx(0.5, abs=1e-3)
    assert all(torch.equal(model.get_parameter(name).eq(0), zero) for name, zero in zeros.items())
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with torch.no_grad():
        model.get_parameter(next(iter(zeros))).add_(1)
    with untouched(model), pytest.raises(ValueError, match=r"weights it prunes in .* are not zero here"):
        Pruner(model, recipe)
    with pytest.raises(ValueError, match="compact=True has nothing to cut out with a plan on single weights"):
        Pruner(model, Recipe.fixed(first.plan, on="dense"), compact=True)


@pytest.mark.parametrize("recipe", [Recipe.neuroprune(1e-3, 1e-3, "auto:0.5"), Recipe.budget(0.5, input_dims=0.25)])
def test_what_a_run_leaves_can_be_held(recipe: Any) -> None:
    model, first, _ = prune("bert", recipe)
    first.close()
    optimizer = adamw(model)
    with Pruner(model, Recipe.fixed(first.plan)).attach(optimizer) as pruner:
        train(model, optimizer, range(3))
    assert_masked(model, first.plan)
    assert pruner.plan.request["held"] == Recipe.fixed(first.plan).digest


def test_another_head_with_other_labels_takes_the_plan(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model, first, _ = prune("bert", Recipe.budget(0.5))
    first.close()
    model.save_pretrained(tmp_path / "run")
    path = first.plan.save(tmp_path / "run" / "plan.npz")
    other = BertForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=3, ignore_mismatched_sizes=True)
    recipe = Recipe.fixed(path)
    optimizer = adamw(other)
    with Pruner(other, recipe).attach(optimizer) as pruner:
        for step in range(3):
            batch = batch_of(other, step)
            optimizer.zero_grad()
            other(**batch | {"labels": batch["input_ids"][:, 0] % 3}).loss.backward()
            optimizer.step()
    assert_masked(other, first.plan)
    for name in first.plan.solutions:
        assert np.array_equal(pruner.plan.keep(name), first.plan.keep(name))
    smaller = load(save(other, pruner.plan, tmp_path / "small"))
    assert smaller.config.num_labels == 3
    # Bare, without a head: the parameters have other names there.
    with Pruner(other.bert, recipe) as bare:
        assert_masked(other, bare.plan)


def test_a_description_rebuilds_the_recipe(tmp_path: Path) -> None:
    _, plan = pruned("llama")
    embedded = Recipe.fixed(plan)
    described = json.loads(json.dumps(embedded.to_dict()))
    again = Recipe.from_dict(described)
    assert isinstance(again, FixedPlanRecipe) and again == embedded and hash(again) == hash(embedded)
    assert again.plan.structure_digest == plan.structure_digest
    path = plan.save(tmp_path / "plan.npz")
    by_path = Recipe.fixed(path, on="dense")
    assert by_path.to_dict()["plan"] == str(path) and Recipe.from_dict(by_path.to_dict()) == by_path != embedded
    random_plan(build("llama"), seed=1).save(path)
    with pytest.raises(ValueError, match="is not the plan that was meant"):
        Recipe.from_dict(by_path.to_dict())


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def run(stop: int | None) -> dict[str, bytes]:
        model, plan = pruned("opt")
        recipe, optimizer = Recipe.fixed(plan), sgd(model)
        pruner = Pruner(model, recipe).attach(optimizer)
        fit(model, optimizer, range(6 if stop is None else stop))
        if stop is not None:
            state = save_state(pruner.state_dict(), tmp_path / "state.safetensors")
            weights, momentum = model.state_dict(), optimizer.state_dict()
            pruner.close()
            model = build("opt", seed=5)
            model.load_state_dict(weights)
            optimizer = sgd(model)
            optimizer.load_state_dict(momentum)
            pruner = Pruner(model, recipe, resume=load_state(state)).attach(optimizer)
            fit(model, optimizer, range(stop, 6))
        assert_masked(model, plan)
        pruner.close()
        return bits(model)

    assert run(None) == run(3)


def test_models_and_plans_that_do_not_belong_together() -> None:
    model, plan = pruned("bert", kinds=UNITS)
    further = random_plan(build("bert"), 0.75, seed=3, kinds=UNITS)
    both = {name: keep & further.keep(name) for name, keep in ((n, plan.keep(n)) for n in plan.solutions)}
    with torch.no_grad():
        for site in find_sites(model):
            if site.name in both and site.kind == "neuron":
                for piece in site.slices:
                    gone = torch.from_numpy(piece.indices(np.flatnonzero(~both[site.name])))
                    model.get_parameter(piece.param).index_fill_(piece.axis, gone, 0.0)
    with untouched(model), pytest.raises(ValueError, match="this model has been pruned beyond this plan: "):
        Pruner(model, Recipe.fixed(plan))
    with pytest.raises(ValueError, match="this plan is of another model"):
        Pruner(build("opt"), Recipe.fixed(plan))
    model, plan = pruned("bert", kinds=UNITS)
    with pytest.raises(ValueError, match="this model is compacted: what its plan pruned was cut out of it"):
        Pruner(compact(model, plan), Recipe.fixed(plan))
    with pytest.raises(ValueError, match="are not among the given sites"):
        plan_on_model(model, Recipe.fixed(plan), find_sites(model, ("neurons",)))
    with pytest.raises(ValueError, match="on is 'sparse'; expected one of pruned, dense"):
        Recipe.fixed(plan, on="sparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="plan is a dict; expected a Plan"):
        Recipe.fixed({})  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        Recipe.fixed("none/plan.npz")

"""Units that return: by a gate's derivative, with the weights they went with, before `freeze_at` only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.masktools import bits, naive_masks, random_plan, untouched
from tests.prunertools import adamw, batch_of, prune, sgd, train
from tests.tiny import FAMILIES, build
from topoprune import Plan, Pruner, Recipe, find_sites, measure_sparsity
from topoprune.architectures import matrix_parameters
from topoprune.train.checkpoint import load_state, save_state
from topoprune.train.regrowth import Regrowth

every_family = pytest.mark.parametrize("family", FAMILIES)
RECIPE = Recipe.budget(0.5, regrow="gradient", regrow_share=0.5, solves=4, tokens_per_unit=1)
BLOCKS = Recipe.budget(
    0.5, regrow="gradient", regrow_share=0.5, solves=4, tokens_per_unit=1, input_dims=0.5, input_group=2, repair="all"
)


def returned(before: Plan, after: Plan) -> dict[str, np.ndarray]:
    """Site name -> units that came back, where there are any."""
    back = {name: np.flatnonzero(after.keep(name) & ~s.keep) for name, s in before.unit_solutions().items()}
    return {name: units for name, units in back.items() if units.size}


def settled(family: str, recipe: Any = RECIPE, share: float = 0.5) -> tuple[nn.Module, Regrowth, Plan, dict[str, Any]]:
    """A masked model whose gone units are watched; also its dense weights."""
    model = build(family)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = random_plan(model, share)
    regrowth = Regrowth(model, find_sites(model), recipe, freeze=100)
    assert regrowth.settle(model, plan) == {}
    with torch.no_grad():
        for name, keep in naive_masks(model, plan).items():
            model.get_parameter(name).mul_(keep)
    regrowth.watch(0, [50, 100])
    return model, regrowth, plan, dense


def loss_and_gradients(model: nn.Module) -> tuple[bytes, Mapping[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch_of(model, 3)).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach().numpy().tobytes(), gradients


def assert_same_weights(one: nn.Module, two: Mapping[str, torch.Tensor]) -> None:
    """As numbers: a masked weight may be -0.0 here and 0.0 there."""
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two[name]), name


# The score


@every_family
def test_units_that_are_gone_are_computed_without_any_effect(family: str) -> None:
    """Same loss, same gradients of live weights, zeros everywhere outside the forward pass (T1)."""
    model, regrowth, plan, _ = settled(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss, gradients = loss_and_gradients(model)
    assert_same_weights(model, before)
    with torch.no_grad():
        model(**batch_of(model, 4))
    assert_same_weights(model, before)
    regrowth.close()
    plain_loss, plain = loss_and_gradients(model)
    assert loss == plain_loss
    masks, more = naive_masks(model, plan), 0
    for name, gradient in gradients.items():
        keep = masks.get(name, torch.ones_like(gradient, dtype=torch.bool))
        assert torch.allclose(gradient[keep], plain[name][keep], rtol=1e-4, atol=1e-6), name
        more += int((gradient[~keep] != 0).sum()) - int((plain[name][~keep] != 0).sum())
    assert more > 0
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@every_family
def test_the_score_is_the_derivative_of_the_loss_by_a_gate(family: str) -> None:
    """Against autograd through a model in which gates bring back what the units write."""
    model, regrowth, plan, dense = settled(family)
    sites = [s for s in find_sites(model) if s.kind != "input_dim"]
    columns = naive_masks(model, Plan(plan.sites, {s.name: plan.solutions[s.name] for s in plan.sites if not s.writes}))
    loss_and_gradients(model)
    regrowth.before_step()
    gates = {site.name: torch.tensor(plan.keep(site.name).astype(np.float32), requires_grad=True) for site in sites}
    weights = {name: torch.where(columns[name], t, 0.0) if name in columns else t for name, t in dense.items()}
    for site in sites:
        (piece,) = site.writes
        shape = [-1 if axis == piece.axis else 1 for axis in range(2)]
        gate = gates[site.name].repeat_interleave(piece.width).view(shape)
        weights[piece.param] = dense[piece.param] * gate
    loss = functional_call(model, weights, kwargs=batch_of(model, 3), tie_weights=True).loss
    derivatives = torch.autograd.grad(loss, list(gates.values()))
    found = regrowth.state_dict()["score"]
    for site, derivative in zip(sites, derivatives, strict=True):
        scale = float(derivative.abs().max())
        assert torch.allclose(found[site.name], derivative.abs(), rtol=2e-3, atol=2e-4 * scale + 1e-7), site.name
    gone = np.concatenate([found[s.name].numpy()[~plan.keep(s.name)] for s in sites])
    assert (gone > 0).mean() > 0.5  # ReLU leaves some neurons silent


def test_input_dimensions_are_scored_by_their_own_columns() -> None:
    model, regrowth, plan, dense = settled("bert")
    _, gradients = loss_and_gradients(model)
    regrowth.before_step()
    site = next(s for s in find_sites(model) if s.kind == "input_dim")
    expected = torch.zeros(site.n_units)
    for piece in site.reads:
        # Live columns count with today's weights, in which the rows of heads that are gone are zero.
        keep = torch.from_numpy(plan.keep(site.name).copy())
        held = torch.where(keep, model.get_parameter(piece.param).detach(), dense[piece.param])
        expected += (gradients[piece.param] * held).sum(dim=0)
    assert torch.allclose(regrowth.state_dict()["score"][site.name], expected.abs(), rtol=1e-3, atol=1e-6)


def test_the_best_of_the_gone_are_held_against_the_weakest_that_stay() -> None:
    model, regrowth, _, _ = settled("bert")
    site = next(s for s in find_sites(model) if s.kind == "neuron")
    keep = np.arange(40) < 20
    regrowth.settle(model, random_plan(model))
    state = regrowth.state_dict()
    state["keep"][site.name] = torch.from_numpy(keep)
    score = torch.zeros(40)
    score[:20] = torch.arange(20) + 1.0  # 1 .. 20 stay
    score[20:26] = torch.tensor([0.5, 4.0, 9.0, 1.5, 2.0, 2.5])  # best first: 9, 4, 2.5 beat 1, 2; 3 beats 2.5
    state["score"][site.name] = score
    regrowth.load_state_dict(state)
    assert regrowth.returning(site, 50, 20).tolist() == [21, 22]
    assert regrowth.returning(site, 50, 1).tolist() == [22]
    assert regrowth.returning(site, 100, 20).size == 0  # frozen
    score[3] = float("nan")
    regrowth.load_state_dict({**state, "score": {site.name: score}})
    with pytest.raises(ValueError, match=f"gradients of '{site.name}' are not finite"):
        regrowth.returning(site, 50, 20)


# Whole runs


@every_family
def test_budgets_are_exact_and_units_return_before_the_end_only(family: str) -> None:
    recipe = BLOCKS if family in ("bert", "gpt2", "llama", "t5") else RECIPE
    model, pruner, seen = prune(family, recipe, steps=8)
    sites, total = pruner.sites, matrix_parameters(pruner.sites)
    finest = max(site.matrix_parameters_per_unit for site in sites if site.kind == "neuron")
    assert abs(measure_sparsity(model, sites).removable - 0.5) * total <= finest / 2 + 1e-6
    plans = [plan for _, plan in seen]
    back = [returned(before, after) for before, after in itertools.pairwise(plans)]
    assert any(back[:-1]) and not back[-1]
    for (event, plan), (_, before), came in zip(seen[1:], seen, back, strict=False):
        for name, solution in plan.unit_solutions().items():
            gone = int((~before.keep(name)).sum())
            assert len(came.get(name, ())) <= 0.5 * gone
            assert gone - int((~solution.keep).sum()) == -event.removed[name] <= 0
            if plan.site(name).kind == "input_dim" and recipe is BLOCKS:
                assert (solution.keep[::2] == solution.keep[1::2]).all()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())  # frozen: nothing is left
    assert not pruner._driver.state_dict()["regrowth"]["stash"]


@pytest.mark.parametrize("more", [{}, {"regrow": "gradient", "regrow_share": 0.9, "freeze_at": 0.0}])
def test_nothing_returns_unless_asked(more: dict[str, Any]) -> None:
    _, _, seen = prune("bert", Recipe.budget(0.5, solves=4, **more), steps=8)
    assert not any(returned(before, after) for (_, before), (_, after) in itertools.pairwise(seen))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_being_watched_changes_nothing(family: str) -> None:
    """A share so small that no unit may return: the run is the one without regrowth."""
    plain, _, _ = prune(family, Recipe.budget(0.5, solves=4), steps=8)
    other, _, _ = prune(family, Recipe.budget(0.5, solves=4, regrow="gradient", regrow_share=0.01), steps=8)
    assert_same_weights(other, dict(plain.named_parameters()))


def test_units_may_return_at_the_last_decision_if_training_goes_on() -> None:
    recipe = Recipe.budget(0.5, regrow="gradient", regrow_share=0.5, solves=4, tokens_per_unit=1, freeze_at=0.9)
    _, pruner, seen = prune("bert", recipe, steps=12)
    assert returned(seen[-2][1], seen[-1][1])
    assert pruner.sparsity().removable == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_t1_and_t2_hold_while_units_come_and_go(optimizer: Any) -> None:
    model = build("bert")
    opt = optimizer(model)
    pruner = Pruner(model, BLOCKS, total_steps=10).attach(opt)

    def gradients_are_masked(*_: Any) -> None:
        for name, keep in naive_masks(model, pruner.plan).items():
            assert (model.get_parameter(name).grad[~keep] == 0.0).all(), name

    def weights_are_zero(*_: Any) -> None:
        for name, keep in naive_masks(model, pruner.plan).items():
            parameter = model.get_parameter(name)
            assert (parameter[~keep] == 0.0).all(), name
            state = [v for v in opt.state[parameter].values() if torch.is_tensor(v) and v.shape == parameter.shape]
            assert all((value[~keep] == 0.0).all() for value in state), name

    opt.register_step_pre_hook(gradients_are_masked)
    opt.register_step_post_hook(weights_are_zero)
    train(model, opt, range(10), lambda _: weights_are_zero())
    assert pruner.step == 10


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_units_return_with_the_weights_they_went_with(family: str) -> None:
    """Nothing trains (rate 0) and nothing is repaired: after all coming and going, what is there is what was there."""
    model = build(family)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = Recipe.budget(0.5, regrow="gradient", regrow_share=0.6, solves=5, repair="none", input_dims=0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, recipe, total_steps=8).attach(optimizer)
    plans: list[Plan] = []
    pruner.on_solve = lambda _: plans.append(pruner.plan)
    train(model, optimizer, range(8))
    assert any(returned(before, after) for before, after in itertools.pairwise(plans))
    masks = naive_masks(model, pruner.plan)
    for name, tensor in dense.items():
        keep = masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(model.get_parameter(name), torch.where(keep, tensor, 0.0)), name


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.filterwarnings("ignore:training ended")
@pytest.mark.parametrize("stop", [3, 5, 6])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int, lag: int) -> None:
    recipe = Recipe.budget(
        0.5, regrow="gradient", regrow_share=0.5, solves=4, ramp=(0.2, 0.8), tokens_per_unit=1, solve_lag=lag
    )

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = build("bert")
        optimizer = adamw(model)
        return model, optimizer, Pruner(model, recipe, total_steps=12)

    torch.manual_seed(0)
    straight, optimizer, whole = begin()
    whole.attach(optimizer)
    train(straight, optimizer, range(12))

    torch.manual_seed(0)
    model, optimizer, pruner = begin()
    pruner.attach(optimizer)
    train(model, optimizer, range(stop))
    save_state(pruner.state_dict(), tmp_path / "pruner.safetensors")
    torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], tmp_path / "rest.pt")
    pruner.close()

    weights, state, rng = torch.load(tmp_path / "rest.pt", weights_only=True)
    model, optimizer, pruner = begin()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    pruner.load_state_dict(load_state(tmp_path / "pruner.safetensors"))
    pruner.attach(optimizer)
    torch.set_rng_state(rng)
    train(model, optimizer, range(stop, 12))
    assert bits(model) == bits(straight)
    assert [event.removed for event in pruner.history] == [event.removed for event in whole.history]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_the_same_scores(reentrant: bool) -> None:
    plans = []
    for checkpointing in (False, True):
        model = build("opt")
        if checkpointing:
            model.config.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        optimizer = sgd(model)
        pruner = Pruner(model, RECIPE, total_steps=8).attach(optimizer)
        train(model, optimizer, range(8))
        plans.append(pruner.plan)
    assert all(np.array_equal(plans[1].keep(name), s.keep) for name, s in plans[0].solutions.items())


def test_what_cannot_return_is_refused() -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match=r"compact=True cuts out what goes, so nothing can return"):
        Pruner(model, RECIPE, total_steps=9, compact=True)
    edges = Recipe.budget(0.5, granularity="edge", regrow="gradient")
    with untouched(model), pytest.raises(ValueError, match=r"brings back units; with granularity='edge' leave it out"):
        Pruner(model, edges, total_steps=9)

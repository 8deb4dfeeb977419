"""T10: units that go are cut out between two steps, and training goes on as if they had stayed masked."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.prunertools import UNDEFINED_PAPER_MERGE, adamw, batch_of, sgd
from tests.tiny import FAMILIES, build
from topoprune import Pruner, Recipe, compact, find_sites, kept_units
from topoprune.compaction.cut import make_cut
from topoprune.compaction.inplace import UnknownState, shrink
from topoprune.compaction.modeling_topoprune import Compacted
from topoprune.planning import Plan
from topoprune_solvers import Solution, Status

STEPS = 10
BUDGET = Recipe.budget(sparsity=0.6, solves=3, ramp=(0.2, 0.7))

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw-foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=2e-3, weight_decay=0.01, foreach=True),
    "adamw-loop": lambda m: torch.optim.AdamW(m.parameters(), lr=2e-3, foreach=False, amsgrad=True),
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), lr=2e-3, fused=True),
    "sgd-foreach": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, fused=True),
    "sgd-plain": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, foreach=False),
}


def without_dropout(name: str) -> nn.Module:
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model


def curve(
    family: str, recipe: Any, optimizer: Callable[[nn.Module], torch.optim.Optimizer], **more: Any
) -> tuple[list[float], Pruner, nn.Module, torch.optim.Optimizer]:
    model = without_dropout(family).train()
    trained = optimizer(model)
    pruner = Pruner(model, recipe, total_steps=STEPS, steps_per_epoch=4, **more).attach(trained)
    losses = []
    for step in range(STEPS):
        trained.zero_grad(set_to_none=bool(step % 2))
        # The loss stays bound while the next forward runs, as in most loops.
        loss = model(**batch_of(model, step)).loss
        loss.backward()
        trained.step()
        losses.append(float(loss.detach()))
    return losses, pruner, model, trained


def assert_same_training(family: str, recipe: Any, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    masked, mask_pruner, mask_model, _ = curve(family, recipe, optimizer)
    shrunk, pruner, model, trained = curve(family, recipe, optimizer, compact=True)
    np.testing.assert_allclose(shrunk, masked, rtol=2e-4)
    assert {n: s.keep.tolist() for n, s in pruner.plan.solutions.items()} == {
        n: s.keep.tolist() for n, s in mask_pruner.plan.solutions.items()
    }
    assert isinstance(model, Compacted)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in mask_model.parameters())
    after = compact(mask_model, mask_pruner.plan)
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in after.parameters()]
    with torch.no_grad():
        batch = batch_of(model, 99)
        model.eval()
        after.eval()
        torch.testing.assert_close(model(**batch).logits, after(**batch).logits, rtol=1e-3, atol=1e-3)
    for parameter, state in trained.state.items():
        assert all(value.shape in (parameter.shape, ()) for value in state.values() if torch.is_tensor(value))
    here, there = pruner.sparsity(), mask_pruner.sparsity()
    assert here.removable == pytest.approx(there.removable, abs=1e-9)
    assert here.kept == there.kept
    assert here.parameters == there.parameters


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loss_curve_is_that_of_the_masked_run(family: str) -> None:
    assert_same_training(family, BUDGET, adamw)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_loss_curve_is_that_of_the_masked_run_with_every_optimizer(name: str) -> None:
    assert_same_training("bert", BUDGET, OPTIMIZERS[name])


@pytest.mark.parametrize("family", [f for f in ("bert", "opt", "gpt2", "llama") if f not in UNDEFINED_PAPER_MERGE])
def test_neuroprune_shrinks_at_epoch_ends(family: str) -> None:
    recipe = Recipe.neuroprune(alpha=0.5, beta=0.5, theta="auto:0.6")
    assert_same_training(family, recipe, sgd)


def test_heads_alone_and_input_dimensions_that_stay_masked() -> None:
    recipe = Recipe.budget(heads=2, input_dims=0.25, solves=2)  # two of eight heads: one layer may lose all
    masked, *_ = curve("bert", recipe, adamw)
    shrunk, pruner, model, _ = curve("bert", recipe, adamw, compact=True)
    np.testing.assert_allclose(shrunk, masked, rtol=2e-4)
    assert sum(kept for name, (kept, _) in pruner.sparsity().kept.items() if name.endswith("attention")) == 2
    for site in find_sites(model, include=("input_dims",)):
        gone = ~pruner.plan.keep(site.name)
        assert gone.sum() == 6
        for piece in site.reads:
            rows = model.get_parameter(piece.param).movedim(piece.axis, 0)
            assert not rows[torch.from_numpy(gone)].any()


def test_parameters_stay_the_same_objects_and_an_old_graph_may_be_alive() -> None:
    model = without_dropout("bert").train()
    before = {id(p): tuple(p.shape) for p in model.parameters()}
    _, pruner, model, optimizer = curve("bert", BUDGET, adamw, compact=True)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert len(before) == len(held)
    assert kept_units(model).keys() == {n for n, s in pruner.plan.solutions.items() if not s.keep.all()}


def test_kept_units_are_those_of_the_plan() -> None:
    _, pruner, model, _ = curve("llama", BUDGET, adamw, compact=True)
    units = kept_units(model)
    for name, solution in pruner.plan.solutions.items():
        per_unit = 2 if pruner.plan.site(name).kind == "kv_group" else 1
        assert units[name].tolist() == np.flatnonzero(np.repeat(solution.keep, per_unit)).tolist()


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_checkpoint_resumes_into_the_smaller_shape(optimizer: str) -> None:
    make = OPTIMIZERS["adamw-loop" if optimizer == "AdamW" else "sgd-foreach"]

    def begin(model: nn.Module, **more: Any) -> tuple[Pruner, torch.optim.Optimizer]:
        trained = make(model)
        pruner = Pruner(model, BUDGET, total_steps=STEPS, steps_per_epoch=4, compact=True, **more)
        return pruner, trained

    def run(model: nn.Module, trained: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            trained.zero_grad()
            loss = model.train()(**batch_of(model, step)).loss
            loss.backward()
            trained.step()
            losses.append(float(loss.detach()))
        return losses

    model = without_dropout("bert")
    pruner, trained = begin(model)
    pruner.attach(trained)
    run(model, trained, range(5))
    saved = copy.deepcopy((model.state_dict(), trained.state_dict(), pruner.state_dict()))
    small = copy.deepcopy(model)
    expected = run(model, trained, range(5, STEPS))
    assert any(len(units) < 4 for name, units in saved[2]["live"].items() if name.endswith("attention"))

    for start in ("dense", "small"):
        if start == "dense":
            model = without_dropout("bert")
            pruner, trained = begin(model)
            pruner.load_state_dict(saved[2])
        else:
            model = copy.deepcopy(small)
            pruner, trained = begin(model, resume=saved[2])
        model.load_state_dict(saved[0])
        trained.load_state_dict(copy.deepcopy(saved[1]))  # it keeps the tensors it is given
        pruner.attach(trained)
        assert run(model, trained, range(5, STEPS)) == expected, start


def test_a_state_of_other_shapes_is_refused() -> None:
    _, pruner, *_ = curve("bert", BUDGET, adamw, compact=True)
    state = pruner.state_dict()
    half = compact(build("bert"), _first_unit_gone(build("bert")))
    with pytest.raises(ValueError, match="the saved run began with"):
        Pruner(half, BUDGET, total_steps=STEPS, steps_per_epoch=4, compact=True, resume=state)


def _first_unit_gone(model: nn.Module) -> Plan:
    sites = find_sites(model, include=("heads", "neurons"))
    keeps = {site.name: np.arange(site.n_units) > 0 for site in sites}
    return Plan(sites, {n: Solution(k, 0.0, "min", Status.FEASIBLE, "test") for n, k in keeps.items()})


def test_adafactor_goes_on_with_sliced_and_rescaled_factors() -> None:
    from transformers.optimization import Adafactor

    model = without_dropout("t5").train()
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    model(**batch_of(model, 0)).loss.backward()
    optimizer.step()
    plan = _first_unit_gone(model)
    names = {id(p): name for name, p in model.named_parameters()}
    second = {
        names[id(p)]: torch.outer(s["exp_avg_sq_row"], s["exp_avg_sq_col"]) / s["exp_avg_sq_row"].mean()
        for p, s in optimizer.state.items()
        if "exp_avg_sq_row" in s
    }
    cut = make_cut(model, plan.sites, plan)
    shrink(model, cut, [optimizer])
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq_row" in state:
            assert (state["exp_avg_sq_row"].numel(), state["exp_avg_sq_col"].numel()) == tuple(parameter.shape)
            here = torch.outer(state["exp_avg_sq_row"], state["exp_avg_sq_col"]) / state["exp_avg_sq_row"].mean()
            torch.testing.assert_close(here, cut.tensor(name, second[name], data=False), rtol=1e-3, atol=1e-12)
    for step in range(1, 4):
        optimizer.zero_grad()
        loss = model(**batch_of(model, step)).loss
        loss.backward()
        optimizer.step()
        assert torch.isfinite(loss)


def test_torch_adafactor_goes_on() -> None:
    losses, pruner, model, _ = curve(
        "t5", BUDGET, lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-3), compact=True
    )
    assert np.isfinite(losses).all()
    assert pruner.compact and isinstance(model, Compacted)


class Strange(torch.optim.SGD):
    """Keeps state of a shape that says nothing about the parameter's axes."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sketch"] = torch.zeros(7, 3)


def test_unknown_optimizer_state_is_left_alone_and_training_goes_on_masked() -> None:
    model = without_dropout("bert").train()
    optimizer = Strange(model.parameters(), lr=1e-2)
    model(**batch_of(model, 0)).loss.backward()
    optimizer.step()
    plan = _first_unit_gone(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UnknownState, match="Strange keeps state 'sketch' of shape"):
        shrink(model, make_cut(model, plan.sites, plan), [optimizer])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with pytest.warns(UserWarning, match="training goes on with masks"):
        _, pruner, model, _ = curve("bert", BUDGET, lambda m: Strange(m.parameters(), lr=1e-2), compact=True)
    assert not pruner.compact and not isinstance(model, Compacted)
    assert pruner.sparsity().removable == pytest.approx(0.6, abs=0.02)


def test_what_cannot_be_cut_out_is_refused_before_training() -> None:
    model = build("bert")
    with pytest.raises(ValueError, match="nothing to cut out with single weights"):
        Pruner(model, Recipe.budget(0.5, granularity="edge"), total_steps=4, compact=True)
    stranger = build("bert")
    sites = find_sites(stranger)
    stranger.config.model_type = "stranger"
    with pytest.raises(ValueError, match="no rules for the attention"):
        Pruner(stranger, BUDGET, total_steps=4, compact=True, sites=sites)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(model, BUDGET, total_steps=4, compact=True).close()


def test_autocast_and_accumulation_go_on_across_a_cut() -> None:
    model = without_dropout("bert").train()
    optimizer = adamw(model)
    pruner = Pruner(model, BUDGET, total_steps=STEPS, steps_per_epoch=4, compact=True).attach(optimizer)
    everything = list(model.parameters())  # held by the loop, as for clipping
    for step in range(STEPS):
        for half in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch_of(model, 2 * step + half)).loss
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(norm)
    assert pruner.sparsity().removable == pytest.approx(0.6, abs=0.02)

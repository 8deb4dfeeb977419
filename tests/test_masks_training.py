"""T1 and T2: masked weights stay zero through training, and the optimizer knows nothing of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.masktools import OPTIMIZERS, bits, drive, random_plan
from tests.tiny import FAMILIES, build, inputs
from topoprune import apply, extract, solve

every_family = pytest.mark.parametrize("family", FAMILIES)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@every_optimizer
@every_family
def test_t1_masked_weights_are_exactly_zero_after_every_step(family: str, optimizer: str) -> None:
    model = build(family)
    with apply(model, random_plan(model)) as handle:
        opt = OPTIMIZERS[optimizer](model)
        seen: list[bool] = []
        handle.attach(opt)
        keeps = handle.masks()
        # A hook of the user's, registered later, sees zeros as well.
        opt.register_step_post_hook(
            lambda *_: seen.append(all(bool((model.get_parameter(n)[~k] == 0.0).all()) for n, k in keeps.items()))
        )
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        for _ in drive(model, opt):
            for name, keep in keeps.items():
                assert (model.get_parameter(name)[~keep] == 0.0).all(), name
        assert seen == [True] * 4
        # ... and everything else trains.
        for name, parameter in model.named_parameters():
            keep = keeps.get(name, torch.ones_like(parameter, dtype=torch.bool))
            assert (parameter != start[name])[keep].all(), name


@every_optimizer
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_t2_the_optimizer_sees_zero_gradients_and_keeps_no_state_of_masked_weights(family: str, optimizer: str) -> None:
    model = build(family)
    opt = OPTIMIZERS[optimizer](model)
    plan = random_plan(model)
    for _ in drive(model, opt, steps=2):
        pass  # state everywhere, before anything is masked
    with apply(model, plan, allow_changed_weights=True) as handle:
        handle.attach(opt)
        keeps = handle.masks()
        assert_no_state(opt, model, keeps)
        checked = []

        def look(*_: Any) -> None:
            for name, keep in keeps.items():
                gradient = model.get_parameter(name).grad
                assert (gradient[~keep] == 0.0).all(), name
                assert (gradient[keep] != 0.0).all(), name
            checked.append(True)

        opt.register_step_pre_hook(look)
        for _ in drive(model, opt, seed=1):
            assert_no_state(opt, model, keeps)
        assert len(checked) == 4

        # Other units go: what the optimizer knew of them goes too, the rest stays as it is.
        known = {p: {k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for p, s in opt.state.items()}
        handle.refresh(random_plan(model, share=0.3, seed=9))
        keeps.clear()
        keeps.update(handle.masks())
        assert_no_state(opt, model, keeps)
        for name, parameter in model.named_parameters():
            keep = keeps.get(name, torch.ones_like(parameter, dtype=torch.bool))
            for key, value in opt.state[parameter].items():
                if torch.is_tensor(value):
                    live = keep if value.shape == keep.shape else torch.ones_like(value, dtype=torch.bool)
                    assert torch.equal(value[live], known[parameter][key][live])
        for _ in drive(model, opt, steps=2, seed=2):
            assert_no_state(opt, model, keeps)


def assert_no_state(optimizer: torch.optim.Optimizer, model: nn.Module, keeps: dict[str, torch.Tensor]) -> None:
    for name, keep in keeps.items():
        for key, value in optimizer.state[model.get_parameter(name)].items():
            if torch.is_tensor(value) and value.shape == keep.shape:
                assert (value[~keep] == 0).all(), (name, key)


def test_real_gradients_train_the_survivors_only() -> None:
    model = build("bert")  # eval: no dropout, so the loss must fall
    batch = inputs(model) | {"labels": torch.tensor([0, 1, 0])}
    with apply(model, random_plan(model)) as handle:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle.attach(optimizer)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, keep in handle.masks().items():
            assert (model.get_parameter(name)[~keep] == 0.0).all()


def test_after_closing_the_optimizer_is_free_again() -> None:
    model = build("bert")
    optimizer = OPTIMIZERS["adamw"](model)
    handle = apply(model, random_plan(model)).attach(optimizer)
    keeps = handle.masks()
    handle.close(restore=False)
    for _ in drive(model, optimizer, steps=1):
        pass
    assert all((model.get_parameter(name)[~keep] != 0).all() for name, keep in keeps.items())


def test_parameters_without_gradient_are_no_obstacle() -> None:
    model = build("bert")
    optimizer = OPTIMIZERS["sgd"](model)
    with apply(model, random_plan(model)) as handle:
        handle.attach(optimizer)
        inside = bits(model)
        optimizer.step()
        assert bits(model) == inside


def test_refresh_in_training_keeps_what_survivors_learned() -> None:
    model = build("bert")
    graph = extract(model, include=("heads", "neurons"))
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = solve(graph, budget=2, seed=0), solve(graph, budget=3, solver="random", seed=1)
    handle = apply(model, first)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = handle.masks()
    handle.refresh(second)
    after = handle.masks()
    for name, parameter in model.named_parameters():
        was, now = before.get(name), after.get(name)
        kept_was = torch.ones_like(parameter, dtype=torch.bool) if was is None else was
        kept_now = torch.ones_like(parameter, dtype=torch.bool) if now is None else now
        assert bool((parameter[~kept_now] == 0).all())
        assert torch.equal(parameter[kept_was & kept_now], trained[name][kept_was & kept_now])
        assert torch.equal(parameter[~kept_was & kept_now], dense[name][~kept_was & kept_now])
    handle.close(restore=False)

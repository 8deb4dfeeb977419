"""Mixed precision, GradScaler, accumulation, clipping and torch.compile under the Pruner."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from tests.masktools import bits
from tests.prunertools import adamw, batch_of, train
from tests.tiny import build
from topoprune import Pruner, Recipe

STEPS = 8
RECIPES = {
    "budget": Recipe.budget(0.5, solves=2, ramp=(0.3, 0.8), tokens_per_unit=2),
    "edge": Recipe.budget(0.5, granularity="edge", solves=2, ramp=(0.3, 0.8)),
    "proximal": Recipe.neuroprune(0.05, 0.05, "auto:0.4", merge="none"),
    "loss": Recipe.neuroprune(0.01, 0.01, "auto:0.4", penalty="loss", merge="none"),
}


@pytest.fixture(autouse=True)
def collected() -> Any:
    """Pruners that were not closed let go of torch.compile when they are forgotten."""
    yield
    gc.collect()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def start(family: str, recipe: Any, make: Any = adamw, **more: Any) -> tuple[nn.Module, Any, Pruner]:
    model = build(family).train()
    optimizer = make(model)
    settings = {"total_steps": STEPS, "steps_per_epoch": 4} | more
    return model, optimizer, Pruner(model, recipe, **settings).attach(optimizer)


def assert_masked(pruner: Pruner) -> None:
    masks = pruner.handle.masks()
    assert masks
    for name, keep in masks.items():
        assert (pruner.model.get_parameter(name)[~keep] == 0).all(), name


def assert_budget(pruner: Pruner, recipe: str) -> None:
    if recipe == "budget":
        assert pruner.sparsity().removable == pytest.approx(0.5, abs=0.01)
    elif recipe == "edge":
        assert pruner.sparsity().zeros >= 0.5


@pytest.mark.parametrize(
    ("family", "recipe"), [*(("bert", recipe) for recipe in RECIPES), ("t5", "budget"), ("llama", "edge")]
)
def test_bf16_autocast_with_accumulation_and_clipping(family: str, recipe: str) -> None:
    model, optimizer, pruner = start(family, RECIPES[recipe])
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch_of(model, 2 * step + part)).loss / 2
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert torch.isfinite(norm)
        optimizer.step()
        if pruner.plan.solutions:
            assert_masked(pruner)
    assert pruner.step == STEPS  # optimizer steps, not micro-batches
    assert_budget(pruner, recipe)


@pytest.mark.parametrize("recipe", ["budget", "edge", "proximal"])
def test_models_in_bf16_throughout(recipe: str) -> None:
    model = build("bert").to(torch.bfloat16).train()
    optimizer = adamw(model)
    pruner = Pruner(model, RECIPES[recipe], total_steps=STEPS, steps_per_epoch=4).attach(optimizer)
    train(model, optimizer, range(STEPS))
    assert_masked(pruner)
    assert_budget(pruner, recipe)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)


def scaled_run(make: Any, recipe: Any, infinite: Callable[[int], bool], total: int) -> tuple[nn.Module, Pruner, int]:
    """Train with a GradScaler; at `infinite` steps a gradient overflows. Returns the steps the optimizer took."""
    model, optimizer, pruner = start("bert", recipe, make, total_steps=total)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    torch.manual_seed(3)
    taken = 0
    for step in range(total):
        optimizer.zero_grad()
        scaler.scale(model(**batch_of(model, step)).loss).backward()
        if infinite(step):
            next(model.parameters()).grad.view(-1)[0] = torch.inf
        else:
            taken += 1
        scaler.step(optimizer)
        scaler.update()
    return model, pruner, taken


@pytest.mark.parametrize("make", [adamw, fused], ids=["adamw", "fused"])
@pytest.mark.parametrize("recipe", ["budget", "proximal"])
def test_steps_that_the_scaler_skips_do_not_count(make: Any, recipe: str) -> None:
    """Fused optimizers are called for a skipped step too; the others are not."""
    _, pruner, taken = scaled_run(make, RECIPES[recipe], lambda step: step in (0, 2, 5), STEPS + 3)
    assert pruner.step == taken == STEPS
    for _, parameter in pruner.model.named_parameters():
        assert torch.isfinite(parameter).all()
    assert_masked(pruner)


def test_a_skipped_step_moves_no_weight() -> None:
    """Not even by the proximal step: the optimizer has not stepped."""
    model, optimizer, pruner = start("bert", RECIPES["proximal"], fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = bits(model)
    scaler.scale(model(**batch_of(model, 0)).loss).backward()
    next(model.parameters()).grad.view(-1)[0] = torch.inf
    scaler.step(optimizer)
    assert bits(model) == before and pruner.step == 0


@pytest.mark.parametrize("make", [adamw, fused], ids=["adamw", "fused"])
def test_loss_penalties_are_on_the_scale_of_the_gradients(make: Any) -> None:
    """A power of two as scale changes no bit of the fused step, in which gradients are still scaled."""
    scaled, _, _ = scaled_run(make, RECIPES["loss"], lambda step: False, STEPS)
    model, optimizer, _ = start("bert", RECIPES["loss"], make)
    torch.manual_seed(3)
    train(model, optimizer, range(STEPS))
    for (name, one), two in zip(scaled.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3, msg=name)


def test_training_that_skips_past_its_last_decision_says_so() -> None:
    recipe = Recipe.budget(0.5, solves=2, ramp=(0.3, 1.0), tokens_per_unit=2)
    _, pruner, _ = scaled_run(adamw, recipe, lambda step: step == 0, STEPS)
    with pytest.warns(UserWarning, match="ended after step 7 of total_steps=8: the last decision.*GradScaler skips"):
        pruner.close()


@pytest.mark.parametrize(
    ("recipe", "given"),
    [("budget", "compiled"), ("budget", "inner"), ("budget", "in-place"), ("edge", "compiled"), ("proximal", "inner")],
)
def test_compiled_models_train_the_same_and_are_not_compiled_again(recipe: str, given: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(3)
    plain, optimizer, other = start("bert", RECIPES[recipe])
    _without_dropout(plain)
    train(plain, optimizer, range(STEPS))
    model = build("bert").train()
    _without_dropout(model)
    model.config.problem_type = "single_label_classification"  # the first forward sets it, then all is compiled twice
    counter = torch._dynamo.testing.CompileCounter()
    if given == "in-place":
        model.compile(backend=counter)
        compiled: Any = model
    else:
        compiled = torch.compile(model, backend=counter)
    optimizer = adamw(model)
    pruner = Pruner(compiled if given == "compiled" else model, RECIPES[recipe], total_steps=STEPS, steps_per_epoch=4)
    pruner.attach(optimizer)
    graphs = []
    for step in range(STEPS):
        optimizer.zero_grad()
        compiled(**batch_of(model, step)).loss.backward()
        optimizer.step()
        graphs.append(counter.frame_count)
    assert [e.kept for e in pruner.history] == [e.kept for e in other.history]
    assert_masked(pruner)
    assert graphs[-1] > 0  # it did run compiled ...
    first = next(count for count in graphs if count)
    assert graphs[-1] == first  # ... and no decision had it compiled again
    for (name, one), two in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-2, msg=name)
    pruner.close()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

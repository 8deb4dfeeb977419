"""T5: a plan solved beside training is applied exactly `solve_lag` steps later, whatever the solver's pace."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import topoprune.train.budget as budget
import topoprune.train.neuroprune as neuroprune
from tests.masktools import bits
from tests.prunertools import UNDEFINED_PAPER_MERGE, adamw, batch_of, train
from tests.tiny import build
from topoprune import Pruner, Recipe
from topoprune.train.checkpoint import load_state, save_state

STEPS, EPOCH = 14, 5
RECIPES = {
    "budget": Recipe.budget(0.5, solves=3, ramp=(0.2, 0.8), tokens_per_unit=2, input_dims=0.2, solve_lag=2),
    "repair-all": Recipe.budget(0.4, solves=2, ramp=(0.3, 0.7), tokens_per_unit=1, repair="all", solve_lag=3),
    "edge": Recipe.budget(0.5, granularity="edge", solves=3, ramp=(0.2, 0.8), solve_lag=2),
    "neuroprune": Recipe.neuroprune(0.1, 0.1, "auto:0.3", solve_lag=3),
}


def start(recipe: Any, family: str = "bert", seed: int = 0, **more: Any) -> tuple[nn.Module, Any, Pruner]:
    model = build(family, seed)
    optimizer = adamw(model)
    pruner = Pruner(model, recipe, total_steps=STEPS, steps_per_epoch=EPOCH, **more).attach(optimizer)
    return model, optimizer, pruner


def run(recipe: Any, family: str = "bert", **more: Any) -> tuple[nn.Module, Pruner]:
    model, optimizer, pruner = start(recipe, family, **more)
    torch.manual_seed(3)
    train(model, optimizer, range(STEPS))
    return model, pruner


def decisions(pruner: Pruner) -> list[Any]:
    return [(e.decided, e.step, dict(e.removed), dict(e.kept), e.zeros) for e in pruner.history]


@pytest.fixture
def slow_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every solve takes so long that the step it is due at has to wait."""
    for module, name in ((budget, "choose"), (neuroprune, "solve_problem")):
        fast = getattr(module, name)

        def slow(*args: Any, _fast: Any = fast, **kwargs: Any) -> Any:
            assert threading.current_thread() is not threading.main_thread()
            time.sleep(0.02)
            return _fast(*args, **kwargs)

        monkeypatch.setattr(module, name, slow)


@pytest.mark.parametrize("recipe", RECIPES)
def test_plans_apply_exactly_so_many_steps_later(recipe: str) -> None:
    asked = RECIPES[recipe]
    _, pruner = run(asked)
    for event in pruner.history:
        late = 0 if recipe == "neuroprune" and event.decided + asked.solve_lag > STEPS else asked.solve_lag
        assert event.step == event.decided + late
    plain = [e.step for e in run(_without_lag(asked))[1].history]
    assert [event.decided for event in pruner.history] == plain


def _without_lag(recipe: Any) -> Any:
    return Recipe.from_dict({**recipe.to_dict(), "solve_lag": 0})


@pytest.mark.parametrize("recipe", ["budget", "repair-all", "neuroprune"])
def test_a_late_solver_changes_nothing(recipe: str, request: pytest.FixtureRequest) -> None:
    early, first = run(RECIPES[recipe])
    request.getfixturevalue("slow_solver")
    late, second = run(RECIPES[recipe])
    assert bits(early) == bits(late)
    assert decisions(first) == decisions(second)


@pytest.mark.parametrize("recipe", RECIPES)
def test_between_the_two_steps_the_old_plan_is_in_force(recipe: str) -> None:
    """The lagged decision is the unlagged one of the same step: until it is applied, training is the same."""
    lagged, plain = start(RECIPES[recipe]), start(_without_lag(RECIPES[recipe]))
    first = plain[2]._driver.steps[0] if hasattr(plain[2]._driver, "steps") else EPOCH
    for model, optimizer, _ in (lagged, plain):
        torch.manual_seed(3)
        train(model, optimizer, range(first + RECIPES[recipe].solve_lag))
    (model, _, pruner), (_, _, other) = lagged, plain
    event, twin = pruner.history[0], other.history[0]
    assert (event.decided, event.step, twin.step) == (first, first + RECIPES[recipe].solve_lag, first)
    assert event.removed == twin.removed
    for name, solution in pruner.plan.solutions.items():
        assert np.array_equal(solution.keep, other.plan.solutions[name].keep)
    for name, keep in pruner.handle.masks().items():
        assert (model.get_parameter(name)[~keep] == 0).all()


@pytest.mark.parametrize("family", ["t5-gated", "llama", "vit", "gpt2"])
def test_every_family_meets_its_budget_with_a_lag(family: str) -> None:
    recipe = RECIPES["budget"]
    _, pruner = run(recipe, family)
    _, plain = run(_without_lag(recipe), family)
    assert [e.kept for e in pruner.history][-1] == [e.kept for e in plain.history][-1]
    assert pruner.sparsity().removable == pytest.approx(plain.sparsity().removable, abs=1e-6)


@pytest.mark.parametrize("family", [f for f in ("opt", "gpt2", "t5") if f not in UNDEFINED_PAPER_MERGE])
def test_the_papers_merge_takes_the_weights_of_the_step_it_is_applied_at(family: str) -> None:
    model, optimizer, pruner = start(RECIPES["neuroprune"], family)
    torch.manual_seed(3)
    train(model, optimizer, range(EPOCH + 2))
    assert pruner._pending is not None and not pruner.history
    untouched = bits(model)
    pruner._pending.result()  # solving edits nothing
    assert bits(model) == untouched
    train(model, optimizer, range(EPOCH + 2, EPOCH + 3))
    assert [(e.decided, e.step) for e in pruner.history] == [(EPOCH, EPOCH + 3)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_checkpoint_between_the_two_resumes_to_the_same_result(recipe: str, tmp_path: Path) -> None:
    model, optimizer, pruner = start(RECIPES[recipe])
    torch.manual_seed(3)
    waiting = []

    def save(step: int) -> None:
        if pruner._pending is not None:
            waiting.append(step)
            save_state(pruner.state_dict(), tmp_path / f"{step}.safetensors")
            rest = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
            torch.save(rest, tmp_path / f"{step}.pt")

    train(model, optimizer, range(STEPS), save)
    assert waiting
    for step in (waiting[0], waiting[-1]):
        again, fresh, resumed = start(RECIPES[recipe], seed=9)
        rest = torch.load(tmp_path / f"{step}.pt", weights_only=True)
        again.load_state_dict(rest["model"])
        fresh.load_state_dict(rest["optimizer"])
        resumed.load_state_dict(load_state(tmp_path / f"{step}.safetensors"))
        torch.set_rng_state(rest["rng"])
        assert resumed._pending is not None
        train(again, fresh, range(step + 1, STEPS))
        assert bits(again) == bits(model)
        assert decisions(resumed) == decisions(pruner)


def test_asking_for_the_state_changes_nothing() -> None:
    plain, _ = run(RECIPES["budget"])
    model, optimizer, pruner = start(RECIPES["budget"])
    torch.manual_seed(3)
    train(model, optimizer, range(STEPS), lambda step: pruner.state_dict() and None)
    assert bits(model) == bits(plain)


def test_compaction_happens_when_the_plan_is_applied() -> None:
    recipe = Recipe.budget(0.5, solves=2, ramp=(0.3, 0.7), tokens_per_unit=2, solve_lag=2)
    model, optimizer, pruner = start(recipe, compact=True)
    masked, fresh, other = start(recipe)
    for module in (*model.modules(), *masked.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # draws depend on shapes
    sizes: list[int] = []
    train(model, optimizer, range(STEPS), lambda step: sizes.append(sum(p.numel() for p in model.parameters())))
    shrunk = [step + 1 for step in range(1, STEPS) if sizes[step] < sizes[step - 1]]
    assert shrunk == [event.step for event in pruner.history]
    train(masked, fresh, range(STEPS))
    assert [e.kept for e in pruner.history] == [e.kept for e in other.history]
    batch = batch_of(masked, 99)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, masked.eval()(**batch).logits, atol=2e-3, rtol=2e-3)


def _no_luck(*args: Any, **kwargs: Any) -> Any:
    raise ArithmeticError("no luck")


def test_a_failing_solver_surfaces_at_the_step_it_is_due_with_its_site(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, pruner = start(RECIPES["budget"])
    monkeypatch.setattr(budget, "choose", _no_luck)
    first = pruner._driver.steps[0]
    train(model, optimizer, range(first + 1))
    weights = bits(model)
    what = rf"solving 'encoder\.0\.attention' beside .*step {first}, .*: no luck"
    with pytest.raises(RuntimeError, match=what) as caught:
        train(model, optimizer, range(first + 1, first + 2))
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert not pruner.history and bits(model) != weights  # the step itself was taken; nothing was pruned
    assert pruner.sparsity().removable == 0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe.budget(0.5, solves=2, ramp=(0.1, 1.0), solve_lag=1), r"after step 14, would be applied after step 15"),
        (Recipe.budget(0.5, solves=6, solve_lag=3), r"solve_lag=3 reaches past the next decision: .*\[1, 2, 4"),
        (Recipe.neuroprune(1, 1, 0.1, solve_lag=6), "reaches past the next decision, steps_per_epoch=5 later"),
    ],
    ids=["past-the-end", "past-the-next", "past-the-epoch"],
)
def test_a_lag_that_does_not_fit_is_refused_before_training(recipe: Any, message: str) -> None:
    model = build("bert")
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        Pruner(model, recipe, total_steps=STEPS, steps_per_epoch=EPOCH)
    assert bits(model) == before


def test_a_lag_needs_the_length_of_training_and_is_not_negative() -> None:
    with pytest.raises(ValueError, match="solve_lag=2 needs total_steps="):
        Pruner(build("bert"), Recipe.neuroprune(1, 1, 0.1, solve_lag=2), steps_per_epoch=EPOCH)
    with pytest.raises(ValueError, match="solve_lag is -1; expected optimizer steps >= 0"):
        Recipe.neuroprune(1, 1, 0.1, solve_lag=-1)


def test_epochs_longer_than_training_are_refused_and_too_many_solves_warn() -> None:
    with pytest.raises(ValueError, match=r"steps_per_epoch=20 is more than total_steps=14: .* none would end"):
        Pruner(build("bert"), Recipe.neuroprune(1, 1, 0.1), total_steps=STEPS, steps_per_epoch=20)
    with pytest.warns(UserWarning, match=r"only 2 of solves=6 decisions fit into the steps 1 to 2"):
        Pruner(build("bert"), Recipe.budget(0.5), total_steps=3)


@pytest.mark.parametrize(
    ("steps", "message"),
    [(2, r"ended after step 2 of total_steps=14: the last decision, after step 11, was not taken"),
     (4, r"ended after step 4 .*: the decision of step 3, due after step 5, was not applied")],
)  # fmt: skip
def test_training_that_ends_early_says_what_was_not_reached(steps: int, message: str) -> None:
    model, optimizer, pruner = start(RECIPES["budget"])
    train(model, optimizer, range(steps))
    with pytest.warns(UserWarning, match=message):
        pruner.close()
    pruner.close()  # once

"""T7: a run resumed from a checkpoint at any step is the uninterrupted one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.masktools import bits
from tests.prunertools import adamw, prune, sgd, train
from tests.tiny import build
from topoprune import Pruner, Recipe
from topoprune.train.checkpoint import load_state, save_state

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


@pytest.mark.parametrize("family", ["gpt2", "t5-gated", "llama", "vit", "bart"])
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

"""A training that is killed (SIGKILL) at any moment goes on from its newest complete checkpoint to the same end."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.masktools import bits
from tests.test_trainer import trainer
from tests.tiny import build
from topoprune import Recipe, TopoPruneCallback
from topoprune.train.callback import STATE_FILE
from topoprune.train.checkpoint import load_state, newest_checkpoint

RECIPES = {
    "budget": Recipe.budget(0.5, solves=4, tokens_per_unit=2),
    "lag": Recipe.budget(0.5, solves=3, ramp=(0.2, 0.7), tokens_per_unit=2, solve_lag=2),
    "neuroprune": Recipe.neuroprune(0.1, 0.1, "auto:0.4"),
}
STEPS = 12

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks, so that a run starts at once")


def run(folder: Path, recipe: str, seed: int) -> Any:
    """Train, from the newest complete checkpoint if there is one."""
    torch.set_num_threads(1)
    found = newest_checkpoint(folder, holds=(STATE_FILE,))
    model = build("bert", 0 if found is None else seed)  # on resume all that matters comes from the checkpoint
    run = trainer(model, folder, TopoPruneCallback(RECIPES[recipe]), save_steps=2, save_total_limit=1)
    run.train(resume_from_checkpoint=None if found is None else str(found))
    torch.save(model.state_dict(), folder / "final.pt")
    return model


def _child(folder: Path, recipe: str, seed: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    run(folder, recipe, seed)


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # the run deletes old ones
        return None


def killed(folder: Path, recipe: str, attempt: int, draw: random.Random) -> bool:
    """Run in a child and kill it at a random moment; True if it was done before."""
    found = newest_checkpoint(folder, holds=(STATE_FILE,))
    done = 0 if found is None else int(found.name.rpartition("-")[2])
    target = min(done + draw.randint(1, 4), STEPS - 2)  # so that steps are left when the kill comes
    delay = draw.uniform(0, 0.03)
    left = {p: p.stat().st_mtime_ns for p in folder.glob("checkpoint-*")}  # by the one killed before
    process = multiprocessing.get_context("fork").Process(target=_child, args=(folder, recipe, attempt))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        # A folder is there as soon as the first byte of a checkpoint is about to be written.
        new = [p.name for p in folder.glob("checkpoint-*") if left.get(p) != _touched(p)]
        if any(int(name.rpartition("-")[2]) >= target for name in new):
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@needs_fork
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_at_random_moments_it_ends_with_the_same_weights(recipe: str, tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", recipe, 0)
    folder = tmp_path / "killed"
    folder.mkdir()
    draw = random.Random(f"moments of {recipe}")
    kills = 0
    for attempt in range(3):
        if killed(folder, recipe, attempt, draw):
            break
        kills += 1
    assert kills >= 2
    found = newest_checkpoint(folder, holds=(STATE_FILE,))
    final = run(folder, recipe, 7)
    assert bits(final) == bits(straight), f"{kills} kills, resumed from {found}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (3, 6, 12):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        (path / STATE_FILE).write_bytes(b"x")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-best").mkdir()
    return tmp_path


def test_the_newest_complete_checkpoint_is_taken(folder: Path) -> None:
    assert newest_checkpoint(folder) == folder / "checkpoint-12"
    whole = (folder / "checkpoint-12" / "trainer_state.json").read_text()
    (folder / "checkpoint-12" / "trainer_state.json").write_text(whole[: len(whole) // 2])  # half-written
    assert newest_checkpoint(folder) == folder / "checkpoint-6"
    (folder / "checkpoint-6" / STATE_FILE).unlink()
    assert newest_checkpoint(folder, holds=(STATE_FILE,)) == folder / "checkpoint-3"
    assert newest_checkpoint(folder) == folder / "checkpoint-6"
    shutil.rmtree(folder / "checkpoint-3")
    assert newest_checkpoint(folder, holds=(STATE_FILE,)) is None
    assert newest_checkpoint(folder / "missing") is None


def test_the_state_is_written_before_the_trainers_own_last_file(tmp_path: Path) -> None:
    """Otherwise a kill between the two leaves a complete-looking checkpoint that cannot be resumed."""
    run(tmp_path, "budget", 0)
    path = newest_checkpoint(tmp_path)
    assert path is not None and load_state(path / STATE_FILE)["step"] == STEPS
    assert (path / STATE_FILE).stat().st_mtime_ns < (path / "trainer_state.json").stat().st_mtime_ns


def test_a_recipe_that_differs_is_refused_by_its_first_differing_field(tmp_path: Path) -> None:
    run(tmp_path, "budget", 0)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    model = build("bert", 3)
    other = TopoPruneCallback(Recipe.budget(0.5, solves=4, tokens_per_unit=2, attachment=0.3))
    path = newest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"of recipe with attachment=0\.1, this run has attachment=0\.3; resume with"):
        trainer(model, tmp_path, other).train(resume_from_checkpoint=str(path))
    assert other.pruner is None or other.pruner.handle.closed
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before

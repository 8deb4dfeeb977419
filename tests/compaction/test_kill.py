"""A save that is killed leaves the old folder or the new one: at random moments, and at every step it takes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests.compaction.filetools import content, small, state
from topoprune import load, save
from topoprune.compaction import folders, loading
from topoprune.compaction.folders import atomic_folder, check_target, existing_folder

KILLS = 12


@pytest.fixture(scope="module")
def processes() -> Any:
    """Children start from a server that has everything imported and runs nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.compaction.filetools", "tests.compaction.test_kill"])
    return context


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old and the new model, saved."""
    root = tmp_path_factory.mktemp("kill")
    for seed, name in enumerate(("old", "new")):
        model, plan = small("bert", seed=seed)
        save(model, plan, root / name)
    return root


def _save_for_ever(target: str, ready: Connection) -> None:
    pairs = [small("bert", seed=seed) for seed in (0, 1)]
    ready.send(True)
    while True:
        for model, plan in pairs:
            save(model, plan, target)


def test_random_kills(both: Path, tmp_path: Path, processes: Any, seed: int) -> None:
    rng = random.Random(seed)
    expected = [state(load(both / name)) for name in ("old", "new")]
    target = tmp_path / "model"
    save(*small("bert"), target)
    for _ in range(KILLS):
        ours, theirs = processes.Pipe()
        child = processes.Process(target=_save_for_ever, args=(str(target), theirs), daemon=True)
        child.start()
        assert ours.poll(120), "the child did not start"
        time.sleep(rng.uniform(0, 0.5))
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, "the child failed by itself"
        assert state(load(target)) in expected
    save(*small("bert"), target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "remains of killed saves were not removed"


_STEPS = ("open", "os.", "shutil.", "ctypes.dlopen", "tempfile.")


def _crash_everywhere(root: str, exchange: bool, result: Connection) -> None:
    """Save the new model over the old one again and again, dying one step later each time."""
    import shutil

    base = Path(root)
    model, plan = small("bert", seed=1)
    old, new = content(base / "old"), content(base / "new")
    target = base / "target" / "model"
    if not exchange:
        folders._exchange = lambda *_: False
    outcomes: list[str] = []
    for step in range(10_000):
        shutil.rmtree(target.parent, ignore_errors=True)
        shutil.copytree(base / "old", target)
        child = os.fork()
        if child == 0:
            try:
                _die_at(step, str(target.parent))
                save(model, plan, target)
                os._exit(0)
            except BaseException:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = content(existing_folder(target))
        outcomes.append("old" if found == old else "new" if found == new else f"step {step}: a mixture")
        if code != 9:
            outcomes.append(f"ended with {code}")
            break
        if step % 12 == 0:
            load(target)
            # The next save clears up.
            save(model, plan, target)
            outcomes += [f"left {p.name}" for p in target.parent.iterdir() if p != target]
    result.send(outcomes)


def _die_at(step: int, below: str) -> None:
    left = [step]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_STEPS) and any(below in str(argument) for argument in arguments):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)

    sys.addaudithook(hook)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_crash_at_every_step(exchange: bool, both: Path, processes: Any) -> None:
    """Python reports each access to the file system; the save dies at the first, the second, ... of them."""
    ours, theirs = processes.Pipe()
    child = processes.Process(target=_crash_everywhere, args=(str(both), exchange, theirs), daemon=True)
    child.start()
    assert ours.poll(300), "the child gave no answer"
    outcomes = ours.recv()
    child.join(60)
    assert outcomes[-1] == "ended with 0", outcomes
    assert len(outcomes) > 20
    assert set(outcomes[:-1]) == {"old", "new"}, outcomes
    # One moment at which the old becomes the new.
    assert outcomes[:-1] == sorted(outcomes[:-1], reverse=True)


def test_remains_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    target = check_target(tmp_path / "model[1]", "mark")
    dead = tmp_path / ".model[1].new-dead"
    dead.mkdir()
    (dead / "half").write_text("")
    with atomic_folder(target, lambda _: False) as living:
        assert not dead.exists()
        with atomic_folder(target, lambda _: False) as other:
            assert living.is_dir() and other != living
            (other / "mark").write_text("other")
        assert living.is_dir()
        (living / "mark").write_text("living")
    assert (target / "mark").read_text() == "living"
    assert [path.name for path in tmp_path.iterdir()] == ["model[1]"]


def test_a_save_that_died_between_two_renames_is_found(both: Path, tmp_path: Path) -> None:
    left = tmp_path / ".model.old-0123"
    os.rename(_copy(both / "old", tmp_path / "made"), left)
    expected = state(load(both / "old"))
    with pytest.warns(UserWarning, match="what a save that was killed left"):
        assert state(load(tmp_path / "model")) == expected
    save(*small("bert", seed=1), tmp_path / "model")
    assert not left.exists() and state(load(tmp_path / "model")) == state(load(both / "new"))


def _copy(source: Path, goal: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, goal))


@pytest.mark.parametrize("verify", [True, False])
def test_a_folder_replaced_while_it_is_read(
    verify: bool, both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read is one of the two, never a mixture; a folder that never rests is an error."""
    target = tmp_path / "model"
    save(*small("bert"), target)
    build, times = loading._build, [1]

    def replaced(*given: Any) -> Any:
        if times[0]:
            times[0] -= 1
            save(*small("bert", seed=1), target)  # after the config and the small files were checked
        return build(*given)

    monkeypatch.setattr(loading, "_build", replaced)
    assert state(load(target, verify=verify)) == state(load(both / "new"))
    times[0] = 1000
    with pytest.raises(OSError, match="replaced again and again"):
        load(target, verify=verify)

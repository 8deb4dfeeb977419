"""docs/training.md: its Python runs and prints what it shows; its commands are ones that the program reads."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import typer

from topoprune.cli import app
from topoprune.cli.train_data import task_kind
from topoprune.cli.train_options import given_options
from topoprune.cli.train_recipe import make_recipe

GUIDE = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", GUIDE, flags=re.DOTALL)
LINES = re.findall(r"`(topoprune [^`]+)`", GUIDE) + re.findall(r"^    (topoprune .+)$", GUIDE, flags=re.MULTILINE)
COMMANDS = [line for line in LINES if " --" in line and not line.endswith(" --help")]


@pytest.fixture(scope="module", autouse=True)
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert len(BLOCKS) >= 8 and len(COMMANDS) >= 20


def test_python_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "guide"}
    for index, (code, shown) in enumerate(BLOCKS):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"docs/training.md block {index}", "exec"), names)
        if shown:
            assert printed.getvalue().split() == shown.split(), (index, printed.getvalue())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_read(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, command, *words = shlex.split(line)
    group = typer.main.get_command(app)
    found = group.commands[command]  # type: ignore[attr-defined]
    with found.make_context(command, list(words)) as context:  # an unknown flag or a value of another type is an error
        given = {name: value for name, value in context.params.items() if value is not None}
    if command == "train" and not given.get("keep_masks"):
        asked = given_options(given)
        assert task_kind(asked)
        assert (make_recipe(asked) is None) == ("dense" in words)

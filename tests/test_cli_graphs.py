"""The command line on graph files: solve, compare, pictures, JSON, wrong input, Ctrl-C."""

from __future__ import annotations

import io
import json
import lzma
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from transformers import LlamaConfig, LlamaModel
from typer.testing import CliRunner, Result

from tests.clitools import interrupted
from topoprune import Graph, ModelGraph, Plan, Site, write_graph
from topoprune.cli import app
from topoprune.cli.output import progress_bar

runner = CliRunner()


def call(*words: object) -> Result:
    return runner.invoke(app, [str(word) for word in words])


def refused(*words: object) -> str:
    """Run a command that must fail as wrong input; return what it says, one line without a traceback."""
    result = call(*words)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output and result.stdout == ""
    said = result.stderr.split("error: ", 1)[1].strip()
    assert "\n" not in said
    return said


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    graph = Graph.from_edges(12, np.array([[i, (i + 1) % 12] for i in range(12)]), 1.0 + np.arange(12))
    for name in ("ring.gr", "ring.gr.xz", "ring.csv", "ring.graphml"):
        write_graph(graph, folder / name)
    sites = (Site("layer.0", "head", 12, 1, reads=()),)
    ModelGraph(sites, {"layer.0": graph}).save(folder / "model.npz")
    return folder


@pytest.mark.parametrize("name", ["ring.gr", "ring.gr.xz", "ring.csv", "ring.graphml"])
def test_solve_takes_every_format(ring: Path, tmp_path: Path, name: str) -> None:
    result = call("solve", ring / name, "--out", tmp_path / "plan.npz", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert name in result.stdout and "4/12" in result.stdout and "exact" in result.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["gap"] == 0 and written["rows"][0]["site"] == name and not written["interrupted"]
    assert Plan.load(tmp_path / "plan.npz").keep(name).sum() == 4


def test_theta_and_budget_on_a_bare_graph(ring: Path) -> None:
    def kept(*words: object) -> int:
        return json.loads(call("solve", ring / "ring.csv", "--json", "-", *words).stdout)["rows"][0]["kept"]

    assert kept("--theta", 0.5) == 12 and kept("--theta", 12) == 4 and kept("--problem", "graph") == 4
    assert kept("--budget", 7) == 7 and kept("--budget", "0.5") == 6 and kept("--solver", "neuroprune") == 12


def test_compare_prints_writes_and_draws(ring: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "table.json", tmp_path / "table.png"
    words = ["compare", ring / "ring.gr", "--solvers", "greedy, exact,neuroprune"]
    result = call(*words, "--json", out, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "neuroprune" in result.stdout and "66.67%" in result.stdout and str(out) in result.stdout.replace("\n", "")
    table = json.loads(out.read_text())
    assert [row["kept"] for row in table["rows"]] == [4, 4, 12] and table["best"] == "greedy"
    assert table["request"]["problem"] == "graph" and len(table["sites"]) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = call(*words, "--json", "-")
    assert [row["kept"] for row in json.loads(printed.stdout)["rows"]] == [4, 4, 12]


def test_compare_on_a_model_graph_shares_a_budget_if_asked(ring: Path) -> None:
    words = ["compare", ring / "model.npz", "--solvers", "exact,random", "--budget", 4, "--json", "-"]
    rows = json.loads(call(*words).stdout)["rows"]
    assert [row["kept"] for row in rows] == [4, 4] and rows[0]["status"] == "OPTIMAL"
    whole = json.loads(call(*words, "--scope", "model").stdout)
    assert [row["kept"] for row in whole["rows"]] == [4, 4] and whole["request"]["scope"] == "model"
    by_default = json.loads(call("compare", ring / "model.npz", "--solvers", "exact", "--json", "-").stdout)
    assert by_default["request"]["theta"] == "auto:0.1" and by_default["request"]["problem"] == "heads"


def test_query_heads_of_a_model_stay_in_equal_numbers(tmp_path: Path) -> None:
    model = LlamaModel(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
                                   num_attention_heads=8, num_key_value_heads=2))  # fmt: skip
    model.save_pretrained(tmp_path / "llama")
    result = call("solve", tmp_path / "llama", "--gqa", "query-heads", "--budget", 4, "--out", tmp_path / "plan.npz")
    assert result.exit_code == 0, result.output
    plan = Plan.load(tmp_path / "plan.npz")
    for site in plan.sites:
        assert plan.keep(site.name).reshape(2, 4).sum(axis=1).tolist() == [2, 2]
    assert "unknown gqa 'heads'" in refused("solve", tmp_path / "llama", "--gqa", "heads", "--budget", 4)
    assert "3 " in refused("solve", tmp_path / "llama", "--gqa", "query-heads", "--budget", 3)


def test_a_floor_goes_with_a_common_budget(ring: Path) -> None:
    result = call("solve", ring / "model.npz", "--budget", 5, "--scope", "model", "--floor", 4, "--json", "-")
    assert json.loads(result.stdout)["request"]["floor"] == 4
    assert "--floor 2 goes with --scope model" in refused("solve", ring / "model.npz", "--budget", 5, "--floor", 2)
    assert "--gqa are for models" in refused("solve", ring / "model.npz", "--budget", 5, "--gqa", "query-heads")


@pytest.mark.parametrize("command", ["solve", "compare"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--theta", -1], "theta is -1"),
        (["--theta", "nan"], "theta is nan"),
        (["--budget", 13], "budget asks to keep 13 units of 'ring.gr', which has 12; expected 1..12"),
        (["--budget", 0], "budget asks to keep 0 units"),
        (["--budget", "-0.5"], "budget is -0.5"),
        (["--budget", "nan"], "--budget is 'nan'"),
        (["--budget", "9" * 30], "budget asks to keep"),
        (["--budget", 2, "--theta", 1], "give exactly one of theta"),
        (["--budget", 2, "--objective", "soft"], "needs a similarity in [0, 1]"),
        (["--budget", 2, "--objective", "hard"], "unknown objective 'hard'"),
        (["--budget", 2, "--scope", "layer"], "unknown scope 'layer'"),
        (["--scope", "model"], "scope='model' shares a budget"),
        (["--time-limit", -1], "--time-limit is -1.0; expected seconds >= 0"),
        (["--time-limit", "nan"], "--time-limit is nan"),
        (["--seed", -1], "--seed is -1"),
        (["--problem", "heads"], "this is a bare graph, without 'heads'"),
        (["--problem", "layers"], "unknown problem 'layers'; available: heads, neurons, edges"),
        (["--measure", "cka"], "are for models"),
        (["--json", "--seed"], "--json is '--seed'; expected a file name, or - for stdout"),
    ],
)
def test_wrong_requests(ring: Path, command: str, words: list[object], message: str) -> None:
    assert message in refused(command, ring / "ring.gr", *words)


def test_wrong_solvers_and_places_are_refused_before_anything_is_solved(
    ring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("solved")

    monkeypatch.setattr("topoprune_solvers.registry.solve", never)
    monkeypatch.setattr("topoprune.planning.solve_many", never)
    monkeypatch.setattr("topoprune.comparison.solve_many", never)
    graph, nowhere = ring / "ring.gr", tmp_path / "no" / "such"
    for words, message in (
        (("solve", graph, "--solver", "gredy"), "unknown solver 'gredy' for DominatingSet; available: "),
        (("solve", graph, "--out", nowhere / "p.npz"), "create it first"),
        (("solve", graph, "--json", nowhere / "p.json"), "create it first"),
        (("solve", graph, "--json", tmp_path), "it is a folder"),
        (("compare", graph, "--plot", tmp_path / "p.bmp"), "expected a name that ends in .png, .svg, .pdf"),
        (("compare", graph, "--plot", nowhere / "p.png"), "create it first"),
        (("compare", graph, "--json", nowhere / "p.json"), "create it first"),
    ):
        assert message in refused(*words)
    monkeypatch.undo()
    assert "unknown solver 'gredy' for DominatingSet" in refused("compare", graph, "--solvers", "greedy,gredy")
    assert "no solver named" in refused("compare", graph, "--solvers", ",")
    assert "--problem graph is for bare graphs" in refused("solve", tmp_path, "--problem", "graph", "--theta", 1)


def test_files_that_are_no_graphs(ring: Path, tmp_path: Path) -> None:
    assert "no file" in refused("solve", tmp_path / "none.gr")
    (tmp_path / "bad.gr").write_text("p ds 3 2\n1 2\n3 x\n")
    assert "bad.gr:3: expected two node numbers in 1..3, found '3 x'" in refused("compare", tmp_path / "bad.gr")
    (tmp_path / "cut.gr.xz").write_bytes(lzma.compress(b"p ds 3 0\n")[:-9])
    assert "cut.gr.xz: the .xz data ends too early; the file is truncated" in refused("solve", tmp_path / "cut.gr.xz")
    (tmp_path / "graph.doc").write_text("0 1\n")
    assert "graph.doc: unknown kind of graph file; known: .npz, .gr" in refused("solve", tmp_path / "graph.doc")
    (tmp_path / "graph.npz").write_bytes((ring / "ring.gr").read_bytes())
    assert "is not a readable topoprune.ModelGraph file" in refused("compare", tmp_path / "graph.npz")


def test_a_comparison_in_which_all_refuse_is_an_error(tmp_path: Path) -> None:
    write_graph(Graph.from_edges(30, np.array([[0, 1]])), tmp_path / "g.el")
    said = refused("compare", tmp_path / "g.el", "--solvers", "brute")
    assert "no solver took the problem: brute refused: solver 'brute' takes at most 20 units" in said


def test_the_progress_bar_shows_after_a_while_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=80)
        monkeypatch.setattr("topoprune.cli.output.stderr_console", lambda console=console: console)
        with progress_bar(delay=60.0) as show:
            show("greedy", 1, 6)
        assert screen.getvalue().strip() in ("", "\x1b[?25h")
        with progress_bar(delay=0.0) as show:
            show("exact", 3, 6)
            time.sleep(0.5)
        assert ("exact" in screen.getvalue() and "3/6" in screen.getvalue()) == terminal


# -- Ctrl-C, with a real signal to a real process ------------------------------------------------

LOUD = """
import sys, time
from dataclasses import dataclass
from topoprune_solvers import Capabilities, DominatingSet, get_solver, register

@dataclass(frozen=True)
class Loud:
    name: str
    capabilities: Capabilities = Capabilities(DominatingSet, False, "none", "O(n)")

    def solve(self, problem, *, warm_start=None, time_limit=None, seed=0):
        print("running", file=sys.stderr, flush=True)
        while self.name == "stubborn":
            time.sleep(0.01)
        return get_solver("local-search", DominatingSet).solve(problem, time_limit=120.0, seed=seed)

get_solver("greedy", DominatingSet)
register(Loud("loud")), register(Loud("stubborn"))
import topoprune.cli
topoprune.cli.main()
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    graph = Graph.from_edges(1500, rng.integers(0, 1500, size=(4000, 2)))
    return write_graph(graph, tmp_path_factory.mktemp("large") / "large.gr")


def test_ctrl_c_prints_the_table_so_far(large: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "t.json", tmp_path / "t.png"
    words = ["compare", large, "--solvers", "greedy,loud,exact", "--json", out, "--plot", picture]
    code, shown, said = interrupted(LOUD, "running", *words)
    assert code == 130, said
    assert "Traceback" not in said and "stopped by Ctrl-C: the best found so far" in said
    assert "INTERRUPTED" in shown and "not run after Ctrl-C: exact" in shown
    table = json.loads(out.read_text())
    greedy, loud = table["rows"]
    assert table["interrupted"] and loud["status"] == "INTERRUPTED" and loud["kept"] <= greedy["kept"]
    assert picture.exists()


def test_ctrl_c_keeps_the_plan_of_solve(large: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.npz"
    code, shown, said = interrupted(LOUD, "running", "solve", large, "--solver", "loud", "--out", plan, "--json", "-")
    assert code == 130 and "stopped by Ctrl-C" in said, said
    row = json.loads(shown)["rows"][0]
    assert row["status"] == "INTERRUPTED" and Plan.load(plan).keep("large.gr").sum() == row["kept"]


def test_a_second_ctrl_c_stops_at_once(large: Path, tmp_path: Path) -> None:
    code, shown, said = interrupted(LOUD, "running", "compare", large, "--solvers", "stubborn,greedy", signals=2)
    assert code == 130 and shown == "", (shown, said)
    assert "Traceback" not in said and "stopped at once" in said and "checkpoint" not in said

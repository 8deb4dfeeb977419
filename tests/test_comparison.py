"""Comparisons: one bound for all, bare graphs, what is left out, refused or interrupted, and every way out."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.tiny import build
from topoprune import Graph, ModelGraph, Plan, apply, compare, extract, solve
from topoprune_solvers import Capabilities, DominatingSet, Solution, get_solver, register
from topoprune_solvers import solve as solve_problem
from topoprune_solvers.base import SOLVERS
from topoprune_solvers.result import Deadline, unit_solution


def ring(n: int) -> Graph:
    return Graph.from_edges(n, np.array([[i, (i + 1) % n] for i in range(n)]), 1.0 + np.arange(n))


def chain(sizes: list[int]) -> ModelGraph:
    """Return several rings as the attention layers of a model."""
    from topoprune.graph import Site

    sites = tuple(Site(f"layer.{i}", "head", n, 1, reads=()) for i, n in enumerate(sizes))
    return ModelGraph(sites, {site.name: ring(site.n_units) for site in sites})


@pytest.fixture
def registered() -> Any:
    """Register solvers for one test."""
    added = []

    def add(solver: Any) -> Any:
        added.append(solver)
        return register(solver)

    yield add
    for solver in added:
        SOLVERS[DominatingSet].pop(solver.name, None)


@dataclass(frozen=True)
class Modest:
    """Keeps every unit, and proves nothing."""

    name: str = "modest"
    capabilities: Capabilities = Capabilities(DominatingSet, False, "none", "O(n)")  # noqa: RUF009

    def solve(self, problem: Any, *, warm_start: Any = None, time_limit: Any = None, seed: int = 0) -> Solution:
        return unit_solution(problem, np.ones(problem.n, dtype=bool), self.name)


# -- the numbers -------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(3, 9), min_size=1, max_size=4))
@settings(deadline=None)
def test_rows_are_sums_and_worst_gaps_of_the_sites(sizes: list[int]) -> None:
    table = compare(chain(sizes), ["exact", "greedy", "neuroprune", "random"], theta=100.0)
    assert [row["solver"] for row in table.rows] == ["exact", "greedy", "neuroprune", "random"]
    best = sum(math.ceil(n / 3) for n in sizes)  # a ring of n needs n / 3 units
    sites = table.per_site()
    assert len(sites) == 4 * len(sizes)
    for row in table.rows:
        own = [site for site in sites if site["solver"] == row["solver"]]
        assert row["kept"] == sum(site["kept"] for site in own) and row["units"] == sum(sizes)
        assert row["objective"] == pytest.approx(sum(site["objective"] for site in own)) and row["bound"] == best
        assert row["gap"] == max(site["gap"] for site in own)
        assert row["ratio"] == pytest.approx(row["objective"] / best) and row["ratio"] >= 1
        assert set(row["status"].split(", ")) == {site["status"] for site in own}
    assert table.rows[0]["status"] == "OPTIMAL" and table.best in ("exact", "greedy", "neuroprune", "random")
    assert {row["objective"] for row in table.rows if row["solver"] == table.best} == {best}


def test_plans_are_those_of_solve_and_ready_to_use() -> None:
    graph = chain([5, 7])
    table = compare(graph, ["exact", "greedy"], theta=3.0)
    for name, plan in table.plans.items():
        alone = solve(graph, theta=3.0, solver=name)
        assert isinstance(plan, Plan) and plan.request == alone.request
        for site in alone.solutions:
            assert np.array_equal(plan.keep(site), alone.keep(site))


def test_a_solver_without_bound_is_measured_by_the_bounds_of_others(registered: Any) -> None:
    registered(Modest())
    alone, beside = compare(ring(9), ["modest"]), compare(ring(9), ["modest", Modest(name="twin"), "exact"])
    assert alone.rows[0]["bound"] is None and math.isnan(alone.rows[0]["gap"]) and "-" in str(alone)
    assert alone.to_dict()["rows"][0]["gap"] is None
    assert beside.rows[0]["bound"] == 3 and beside.rows[0]["gap"] == pytest.approx(2 / 3)
    assert [row["solver"] for row in beside.rows] == ["modest", "twin", "exact"] and beside.best == "exact"
    own = {site["solver"]: site["own_bound"] for site in beside.per_site()}
    assert own == {"modest": None, "twin": None, "exact": 3}


def test_a_budget_over_the_model_has_one_certificate() -> None:
    table = compare(chain([6, 6]), ["exact", "magnitude"], budget=6, scope="model")
    assert {row["kept"] for row in table.rows} == {6} and table.best == "exact"
    assert all(row["bound"] is not None and row["bound"] <= row["objective"] + 1e-9 for row in table.rows)
    assert [site["site"] for site in table.per_site()] == ["2 sites together"] * 2


# -- bare graphs -------------------------------------------------------------------------------


def test_a_bare_graph_is_dominated_over_all_its_edges() -> None:
    table = compare(ring(12), ["exact", "neuroprune"])
    assert [row["objective"] for row in table.rows] == [4, 12]  # the known weak spot of the paper's rule
    assert table.plans["exact"].keep("graph").sum() == 4
    short = compare(ring(12), ["exact"], theta=0.5)
    assert short.rows[0]["kept"] == 12  # no edge is that short
    exactly = compare(ring(12), ["exact"], budget=5)
    assert exactly.rows[0]["kept"] == 5
    named = compare(ModelGraph.from_graph(ring(12), "ring.gr"), ["exact"])
    assert named.per_site()[0]["site"] == "ring.gr" and named.rows[0]["objective"] == 4


@pytest.mark.parametrize("n", [0, 1])
def test_graphs_without_edges(n: int) -> None:
    table = compare(Graph.from_edges(n, np.empty((0, 2), dtype=int)), ["greedy", "neuroprune", "exact"])
    assert {row["objective"] for row in table.rows} == {n} and {row["gap"] for row in table.rows} == {0.0}


def test_a_plan_of_a_bare_graph_is_saved_and_read_but_not_applied(tmp_path: Path) -> None:
    plan = compare(ring(4), ["exact"]).plans["exact"]
    again = Plan.load(plan.save(tmp_path / "plan"))
    assert np.array_equal(again.keep("graph"), plan.keep("graph"))
    for model in (build("bert"), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"decides on the nodes of a bare graph \('graph'\), not on units"):
            apply(model, plan)


def test_problems_of_models_are_refused_for_bare_graphs_and_the_other_way_round() -> None:
    with pytest.raises(ValueError, match="bare graph, without 'heads'; leave the problem out"):
        compare(ring(4), ["exact"], problem="heads")
    with pytest.raises(ValueError, match="'graph' is for bare graphs"):
        compare(extract(build("bert"), include=("heads",)), ["exact"], theta=0.1, problem="graph")


# -- who takes part ----------------------------------------------------------------------------


def test_solvers_too_small_for_the_graph_are_left_out_unless_they_are_named() -> None:
    table = compare(ring(30), time_limit=1.0)
    assert "brute" not in table.plans and "left out: brute (takes at most 20)" in table.notes
    assert "left out: brute" in str(table)
    named = compare(ring(30), ["brute", "greedy"])
    assert named.rows[0]["error"].startswith("refused: solver 'brute' takes at most 20") and named.best == "greedy"
    assert named.notes == () and list(named.plans) == ["greedy"]
    assert compare(ring(30), ["brute"]).best is None


def test_solvers_that_are_not_installed_say_how_to_get_them(registered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Capabilities(DominatingSet, False, "none", "O(n)", requires=("no_such_module",))
    registered(Modest(name="absent", capabilities=missing))
    table = compare(ring(6), time_limit=1.0)
    assert "absent" not in table.plans and "not installed: absent (pip install no_such_module)" in table.notes
    with pytest.raises(ValueError, match=r"'absent' needs the package no_such_module.*pip install no_such_module"):
        compare(ring(6), ["absent"])
    monkeypatch.setattr("topoprune_solvers.registry.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package pysat.*pip install \"topoprune\[sat\]\""):
        get_solver("max-sat", DominatingSet)


def test_wrong_requests_fail_before_any_solver_runs(registered: Any) -> None:
    @dataclass(frozen=True)
    class Never(Modest):
        name: str = "never"

        def solve(self, *_: Any, **__: Any) -> Solution:
            raise AssertionError("ran")

    registered(Never())
    for request, message in (
        ({"theta": -1.0}, "theta is -1"),
        ({"budget": 13}, r"asks to keep 13 units of 'graph', which has 12"),
        ({"budget": 2, "objective": "softer"}, "unknown objective 'softer'"),
        ({"theta": 1.0, "budget": 2}, "exactly one of theta"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(ring(12), ["never"], **request)
    with pytest.raises(ValueError, match="unknown solver 'gredy'"):
        compare(ring(12), ["never", "gredy"])
    with pytest.raises(ValueError, match="no solver named; available: "):
        compare(ring(12), [])


def test_progress_reports_every_site_and_ends_at_the_total() -> None:
    seen: list[tuple[str, int, int]] = []
    compare(chain([4, 5, 6]), ["greedy", "exact"], theta=9.0, progress=lambda *step: seen.append(step))
    assert {step[0] for step in seen} == {"greedy", "exact"} and {step[2] for step in seen} == {6}
    done = [step[1] for step in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 6


def test_ctrl_c_keeps_the_incumbent_and_leaves_out_the_rest(registered: Any) -> None:
    import signal

    @dataclass(frozen=True)
    class Endless(Modest):
        name: str = "endless"

        def solve(self, problem: Any, *, warm_start: Any = None, time_limit: Any = None, seed: int = 0) -> Solution:
            deadline = Deadline.after(60 if problem.n == 100 else 0)  # not while it warms up
            if problem.n == 100:
                signal.raise_signal(signal.SIGINT)
            while not deadline.passed():
                pass
            return unit_solution(problem, np.ones(problem.n, dtype=bool), self.name, timed_out=True)

    registered(Endless())
    table = compare(ring(100), ["greedy", "endless", "exact"])
    assert table.interrupted and list(table.plans) == ["greedy", "endless"]
    assert table.rows[1]["status"] == "INTERRUPTED" and table.notes == ("not run after Ctrl-C: exact",)
    assert not Deadline.after(60).passed()  # over once it is over
    assert not compare(ring(5), ["greedy"]).interrupted


# -- ways out ----------------------------------------------------------------------------------


def test_ways_out(tmp_path: Path) -> None:
    table = compare(ring(30), ["brute", "exact", "neuroprune"])
    frame = table.to_pandas()
    assert list(frame.index) == ["brute", "exact", "neuroprune"] and frame.loc["exact", "objective"] == 10
    parsed = json.loads(table.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed["best"] == "exact" and len(parsed["rows"]) == 3 and len(parsed["sites"]) == 2
    assert parsed["rows"][1].keys() == parsed["rows"][0].keys()
    assert json.loads(table.save(tmp_path / "t.json").read_text()) == parsed
    lines = list(csv.DictReader(io.StringIO(table.save(tmp_path / "t.csv").read_text())))
    assert [line["objective"] for line in lines] == ["", "10.0", "30.0"]
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(table)
    shown = console.export_text()
    assert "refused: solver 'brute'" in shown and "66.67%" in shown and "OPTIMAL" in str(table)
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        assert table.plot(tmp_path / f"t{suffix}", title="a ring").read_bytes().startswith(start)
    with pytest.raises(ValueError, match=r"expected \.json or \.csv"):
        table.save(tmp_path / "t.xlsx")
    with pytest.raises(ValueError, match=r"expected a name that ends in \.png, \.svg, \.pdf"):
        table.plot(tmp_path / "t.bmp")
    with pytest.raises(FileNotFoundError, match="create it first"):
        table.plot(tmp_path / "no" / "t.png")


def test_the_picture_stands_endless_and_unknown_numbers(tmp_path: Path, registered: Any) -> None:
    registered(Modest())
    two = Graph.from_edges(4, np.array([[0, 1], [2, 3]]))
    endless = compare(two, ["exact", "magnitude"], budget=1)  # one unit reaches no other part: infinite distance
    assert {row["objective"] for row in endless.rows} == {math.inf}
    assert endless.to_dict()["rows"][0]["objective"] is None
    for table in (endless, compare(two, ["modest"]), compare(ring(30), ["brute"])):
        assert table.plot(tmp_path / "t.png").stat().st_size > 1000


def test_the_solver_alone_gives_the_same_as_in_a_comparison() -> None:
    graph = ring(9)
    problem = DominatingSet(graph.indptr, graph.indices, graph.weight)
    table = compare(graph, ["greedy", "random"], seed=3)
    for name, plan in table.plans.items():
        assert np.array_equal(solve_problem(problem, name, seed=3).keep, plan.keep("graph"))

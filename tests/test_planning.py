"""From a graph and a wish to a plan: exact counts, true certificates, refusals that name the value."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plantools import graph_of
from tests.tiny import FAMILIES, build
from topoprune import ModelGraph, Plan, compare, extract, solve
from topoprune.graph import Graph
from topoprune.planning import resolve_theta
from topoprune_solvers import (
    BudgetedDomination,
    Capabilities,
    DominatingSet,
    EdgeSelection,
    InvalidSolution,
    SoftDomination,
    Solution,
    Status,
    available_solvers,
    get_solver,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
HEADS = ("head", "kv_group")


def decided(plan: Plan, graph: ModelGraph) -> list[tuple[np.ndarray, np.ndarray, Solution]]:
    """(distance matrix, keep, solution) of every site on whose units the plan decides."""
    return [(graph.redundancy[name].to_dense(), s.keep, s) for name, s in plan.unit_solutions().items()]


# Domination by a threshold


@every_family
@pytest.mark.parametrize("problem", ["heads", "neurons"])
def test_with_theta_every_pruned_unit_has_a_kept_one_within_reach(family: str, problem: Any) -> None:
    graph = graph_of(family)
    plan = solve(graph, theta="auto:0.4", problem=problem)
    kinds = HEADS if problem == "heads" else ("neuron",)
    assert set(plan.solutions) == {site.name for site in graph.of_kind(*kinds)}
    for name, solution in plan.solutions.items():
        theta = plan.request["thresholds"][name]
        assert theta == pytest.approx(np.quantile(graph.redundancy[name].edge_list()[1], 0.4))
        distance = graph.redundancy[name].to_dense()
        assert solution.objective == solution.n_kept
        for unit in np.flatnonzero(~solution.keep):
            heir = solution.dominator[unit]
            assert solution.keep[heir]
            assert distance[unit, heir] == solution.dominator_distance[unit] <= theta
        assert (solution.dominator[solution.keep] == np.flatnonzero(solution.keep)).all()


def test_the_default_for_heads_is_the_smallest_dominating_set_with_a_proof() -> None:
    graph = graph_of("bert")
    plan = solve(graph, theta="auto:0.5")
    for name, solution in plan.solutions.items():
        near = graph.redundancy[name].to_dense() <= plan.request["thresholds"][name]
        n = len(near)
        smallest = next(
            size
            for size in range(1, n + 1)
            if any(near[list(chosen)].any(axis=0).all() for chosen in itertools.combinations(range(n), size))
        )
        assert solution.n_kept == smallest
        assert solution.status is Status.OPTIMAL and solution.gap == 0 and solution.bound is not None
    assert plan.gap == 0


def test_a_numeric_theta_is_used_as_it_is_and_a_larger_one_never_keeps_more() -> None:
    graph = graph_of("bert", "weights-linf")
    distances = np.sort(np.concatenate([g.edge_list()[1] for g in graph.redundancy.values() if g.n_nodes == 4]))
    kept = []
    for theta in (0.0, float(distances[0]), float(np.median(distances)), float(distances[-1])):
        plan = solve(graph, theta=theta)
        assert set(plan.request["thresholds"].values()) == {theta}
        kept.append(sum(s.n_kept for s in plan.solutions.values()))
    assert kept[0] == 8 and kept[1] == 7  # the bound is inclusive, as in the paper
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 2


@given(q=st.floats(0, 1), seed=st.integers(0, 2**16), n=st.integers(2, 9))
@settings(max_examples=50, deadline=None)
def test_auto_theta_is_the_quantile_of_the_distances(q: float, seed: int, n: int) -> None:
    distance = np.random.default_rng(seed).random((n, n))
    graph = Graph.from_dense(distance + distance.T)
    theta = resolve_theta(f"auto:{q}", graph)
    assert theta == np.quantile((distance + distance.T)[np.triu_indices(n, 1)], q)
    assert resolve_theta(theta, graph) == theta


def test_auto_theta_of_a_graph_without_edges_is_zero() -> None:
    assert resolve_theta("auto:0.5", Graph.from_edges(3, np.zeros((0, 2)))) == 0.0


# Budgets


@every_family
@pytest.mark.parametrize("problem", ["heads", "neurons"])
@pytest.mark.parametrize("budget", [1, 2, 0.5, 0.3, 1.0, 1e-9])
def test_a_budget_is_met_exactly_at_every_site(family: str, problem: Any, budget: float) -> None:
    graph = graph_of(family)
    plan = solve(graph, budget=budget, problem=problem, solver="greedy")
    for name, solution in plan.solutions.items():
        n = graph.site(name).n_units
        expected = budget if isinstance(budget, int) else max(1, round(budget * n))
        assert solution.n_kept == expected


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_k_centre_is_the_best_covering_radius_of_all_subsets(k: int) -> None:
    graph = graph_of("bert")
    for distance, keep, solution in decided(solve(graph, budget=k), graph):
        n = len(keep)
        radius = [distance[list(c)].min(axis=0).max() for c in itertools.combinations(range(n), k)]
        assert solution.objective == pytest.approx(min(radius))
        assert solution.objective == pytest.approx(distance[keep].min(axis=0).max())
        assert solution.status is Status.OPTIMAL


@pytest.mark.parametrize("k", [1, 2, 3])
def test_soft_domination_explains_the_most_importance_of_all_subsets(k: int) -> None:
    graph = graph_of("bert", "output-gram")
    plan = solve(graph, budget=k, objective="soft")
    for name, solution in plan.solutions.items():
        similarity = np.clip(1 - graph.redundancy[name].to_dense(), 0, 1)
        worth = graph.importance[name]
        best = max(worth @ similarity[list(c)].max(axis=0) for c in itertools.combinations(range(len(worth)), k))
        assert solution.objective == pytest.approx(best)
        assert solution.sense == "max" and solution.bound is not None
        assert solution.bound.value >= solution.objective * (1 - 1e-9)


@pytest.mark.parametrize("objective", ["k-centre", "soft"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5-gated"])
def test_more_budget_is_never_worse_when_solved_exactly(family: str, objective: Any) -> None:
    graph = graph_of(family, "output-gram")
    n = min(site.n_units for site in graph.of_kind(*HEADS))
    values = [
        [s.objective for s in solve(graph, budget=k, objective=objective).solutions.values()] for k in range(1, n + 1)
    ]
    steps = np.diff(np.array(values), axis=0)
    assert (steps <= 1e-9).all() if objective == "k-centre" else (steps >= -1e-9).all()


@every_family
@pytest.mark.parametrize("budget", [0.5, 0.2, 1.0])
def test_an_edge_budget_keeps_that_share_of_the_strongest_edges(family: str, budget: float) -> None:
    graph = graph_of(family)
    plan = solve(graph, budget=budget, problem="edges")
    assert set(plan.solutions) == set(graph.connectivity) == set(plan.edge_axes)
    assert plan.unit_solutions() == {}
    for name, solution in plan.solutions.items():
        weight = graph.connectivity[name].weight.reshape(-1)
        assert solution.n_kept == round(budget * weight.size)
        assert weight[solution.keep].min(initial=np.inf) >= weight[~solution.keep].max(initial=-np.inf)
        assert plan.edge_axes[name] == (graph.connectivity[name].row_axis, graph.connectivity[name].shape)


@pytest.mark.parametrize("reading", ["a", "b"])
def test_attachment_never_lowers_the_degree_spread_at_equal_budget(reading: Any) -> None:
    graph = graph_of("bert")
    plain = solve(graph, budget=0.5, problem="edges")
    attached = solve(graph, budget=0.5, problem="edges", attachment=1.0, reading=reading)
    wider = 0
    for name, (_, shape) in plain.edge_axes.items():
        before, after = (p.solutions[name].keep.reshape(shape).sum(axis=1) for p in (plain, attached))
        assert before.sum() == after.sum()
        assert after.std() >= before.std() - 1e-12
        wider += after.std() > before.std()
    assert wider  # the knob does something


# What the plan says about itself


LIES = Capabilities(DominatingSet, False, "none", "O(1)")


@dataclass(frozen=True)
class Liar:
    """Claims that keeping nothing covers everything."""

    name: str = "liar"
    capabilities: Capabilities = LIES

    def solve(
        self, problem: Any, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        return Solution(np.zeros(problem.n, dtype=bool), 0.0, "min", Status.FEASIBLE, "liar")


def test_a_wrong_solution_never_becomes_a_plan() -> None:
    with pytest.raises(InvalidSolution, match="not covered"):
        solve(graph_of("bert"), theta=0.5, solver=Liar())


def test_a_solver_object_works_as_its_name_does() -> None:
    graph = graph_of("bert")
    by_name = solve(graph, theta="auto:0.5", solver="greedy")
    by_object = solve(graph, theta="auto:0.5", solver=get_solver("greedy", DominatingSet))
    assert dict(by_name.request) == dict(by_object.request)
    for name, solution in by_name.solutions.items():
        assert np.array_equal(solution.keep, by_object.keep(name))


def test_the_same_seed_gives_the_same_plan_and_ties_do_not_wander() -> None:
    graph = graph_of("bert")
    for solver in available_solvers(BudgetedDomination):
        one, two = (solve(graph, budget=2, solver=solver, seed=7) for _ in range(2))
        assert all(np.array_equal(s.keep, two.keep(n)) for n, s in one.solutions.items()), solver


def test_summary_and_table_name_every_site_its_gap_and_the_source_of_its_bound() -> None:
    plan = solve(graph_of("bert"), theta="auto:0.5")
    for row in plan.table():
        assert row["site"] in plan.summary() and row["bound_source"] in plan.summary()
        assert row["kept"] == int(plan.keep(row["site"]).sum())
    assert json.loads(json.dumps(plan.table()))
    assert plan.seconds == pytest.approx(sum(row["seconds"] for row in plan.table()))
    assert "keep" in repr(plan)


def test_what_was_not_decided_stays() -> None:
    graph = graph_of("bert")
    plan = solve(graph, budget=1)
    neurons = graph.of_kind("neuron")[0]
    assert plan.keep(neurons.name).all() and plan.keep(neurons.name).size == neurons.n_units


def test_a_plan_without_a_bound_has_no_gap() -> None:
    plan = solve(graph_of("bert"), theta="auto:0.5", solver="random")
    solutions = {name: replace(s, bound=None, status=Status.FEASIBLE) for name, s in plan.solutions.items()}
    assert math.isnan(replace(plan, solutions=solutions).gap)


def test_plans_are_read_only() -> None:
    plan = solve(graph_of("bert"), budget=2)
    name = next(iter(plan.solutions))
    with pytest.raises(TypeError):
        plan.solutions[name] = plan.solutions[name]  # type: ignore[index]
    with pytest.raises(ValueError, match="read-only"):
        plan.keep(name)[0] = False


# Bad requests


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "exactly one of theta"),
        ({"theta": 0.1, "budget": 2}, "exactly one of theta"),
        ({"theta": -0.1}, "-0.1"),
        ({"theta": math.nan}, "nan"),
        ({"theta": math.inf}, "inf"),
        ({"theta": "auto:x"}, "auto:x"),
        ({"theta": "auto:1.5"}, "auto:1.5"),
        ({"theta": "auto:nan"}, "auto:nan"),
        ({"theta": "0.5"}, "0.5"),
        ({"theta": True}, "True"),
        ({"theta": [0.1]}, "expected a number"),
        ({"budget": 0}, "asks to keep 0"),
        ({"budget": -1}, "asks to keep -1"),
        ({"budget": 5}, "asks to keep 5 units of 'encoder.0.attention', which has 4"),
        ({"budget": 0.0}, "0.0"),
        ({"budget": 1.5}, "1.5"),
        ({"budget": math.nan}, "nan"),
        ({"budget": True}, "True"),
        ({"budget": "half"}, "half"),
        ({"budget": 2, "problem": "layers"}, "unknown problem 'layers'; available: edges, heads, neurons"),
        ({"budget": 2, "solver": "gredy"}, "unknown solver 'gredy'.*available: .*greedy"),
        ({"theta": 0.1, "solver": "dp"}, "unknown solver 'dp'"),
        ({"budget": 2, "objective": "sharp"}, "unknown objective 'sharp'; available: k-centre, soft"),
        ({"theta": 0.1, "problem": "edges"}, "needs budget="),
        ({"budget": 3, "problem": "edges"}, "share of edges"),
        ({"budget": 1.2, "problem": "edges"}, "1.2"),
        ({"budget": 0.5, "problem": "edges", "attachment": -1.0}, "attachment"),
        ({"budget": 0.5, "problem": "edges", "reading": "c"}, "'c'"),
    ],
)
def test_a_bad_request_names_the_value(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(graph_of("bert"), **request_)


def test_soft_domination_needs_a_similarity() -> None:
    with pytest.raises(ValueError, match=r"weights-linf.*output-gram"):
        solve(graph_of("bert", "weights-linf"), budget=2, objective="soft")


@pytest.mark.parametrize(
    ("include", "problem", "request_"),
    [
        (("neurons",), "heads", {"theta": 0.1}),
        (("heads",), "neurons", {"theta": 0.1}),
        (("input_dims",), "heads", {"budget": 1}),
        (("heads",), "edges", {"budget": 0.5}),
    ],
)
def test_a_graph_without_what_the_problem_needs_says_what_to_extract(include: Any, problem: Any, request_: Any) -> None:
    graph = extract(build("bert"), include=include)
    with pytest.raises(ValueError, match=problem):
        solve(graph, problem=problem, **request_)


def test_a_plan_of_unknown_or_wrongly_sized_sites_is_refused() -> None:
    plan = solve(graph_of("bert"), budget=2)
    name, solution = next(iter(plan.solutions.items()))
    with pytest.raises(ValueError, match="unknown site 'nowhere'"):
        Plan(plan.sites, {"nowhere": solution})
    with pytest.raises(ValueError, match=r"\(3,\)"):
        Plan(plan.sites, {name: replace(solution, keep=solution.keep[:3])})


@pytest.mark.parametrize("query", ["keep", "site"])
def test_asking_for_an_unknown_site_is_a_key_error(query: str) -> None:
    with pytest.raises(KeyError, match="nowhere"):
        getattr(solve(graph_of("bert"), budget=2), query)("nowhere")


# Combining


def test_plans_for_heads_neurons_and_edges_combine() -> None:
    graph = graph_of("bert")
    heads, neurons = solve(graph, budget=2), solve(graph, budget=0.5, problem="neurons")
    edges = solve(graph, budget=0.5, problem="edges")
    both = heads | neurons | edges
    assert set(both.solutions) == set(heads.solutions) | set(neurons.solutions) | set(edges.solutions)
    for part in (heads, neurons, edges):
        assert all(np.array_equal(both.solutions[name].keep, s.keep) for name, s in part.solutions.items())
    assert both.weights_digest == graph.weights_digest
    assert both.structure_digest == heads.structure_digest
    with pytest.raises(ValueError, match=r"both plans decide on .*encoder\.0\.attention"):
        heads | solve(graph, theta=0.1)


def test_plans_of_different_models_do_not_combine() -> None:
    with pytest.raises(ValueError, match="different models"):
        solve(graph_of("bert"), budget=2) | solve(graph_of("opt"), budget=0.5, problem="neurons")
    other = solve(graph_of("bert", seed=1), budget=0.5, problem="neurons")
    assert (solve(graph_of("bert"), budget=2) | other).weights_digest == ""  # same shapes, other values


# Comparing solvers

COMPARISONS: dict[str, tuple[type, dict[str, Any]]] = {
    "domination": (DominatingSet, {"theta": "auto:0.5"}),
    "k-centre": (BudgetedDomination, {"budget": 2}),
    "soft": (SoftDomination, {"budget": 2, "objective": "soft"}),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_compare_has_a_row_for_every_solver_and_the_exact_ones_win(name: str) -> None:
    problem_type, request_ = COMPARISONS[name]
    table = compare(graph_of("bert", "output-gram"), **request_)
    rows = {row["solver"]: row for row in table.rows}
    assert list(rows) == available_solvers(problem_type)
    assert not any(row["error"] for row in rows.values())
    sign = -1 if name == "soft" else 1
    best = min(sign * row["objective"] for row in rows.values())
    for solver, row in rows.items():
        assert row["units"] == 8 and row["seconds"] >= 0 and row["status"]
        if row["bound"] is not None:
            assert sign * row["bound"] <= best + 1e-6
        if get_solver(solver, problem_type).capabilities.exact:
            assert sign * row["objective"] == pytest.approx(best)
        assert solver in str(table)
    assert json.loads(json.dumps(table.to_dict()))


def test_a_solver_that_refuses_gets_a_row_and_the_others_still_run() -> None:
    table = compare(graph_of("bert"), ["brute", "greedy", "random"], theta="auto:0.05", problem="neurons")
    refused, greedy, random = table.rows
    assert "brute" in refused["error"] and "at most 20 units" in refused["error"]
    assert greedy["error"] == random["error"] == ""
    assert greedy["kept"] <= random["kept"] <= greedy["units"] == 80
    assert "refused" in str(table) and "greedy" in str(table)
    assert json.loads(json.dumps(table.to_dict()))


def test_compare_on_edges() -> None:
    table = compare(graph_of("bert"), ["greedy", "magnitude", "random"], budget=0.5, problem="edges")
    greedy, magnitude, random = (row["objective"] for row in table.rows)
    assert greedy == pytest.approx(magnitude)  # without attachment the strongest edges are the best
    assert random < greedy
    edges = available_solvers(EdgeSelection)
    assert {row["solver"] for row in table.rows} <= set(edges)


def test_compare_refuses_what_no_solver_could_take() -> None:
    graph = graph_of("bert")
    with pytest.raises(ValueError, match="unknown solver 'gredy'"):
        compare(graph, ["gredy"], theta=0.1)
    with pytest.raises(ValueError, match="asks to keep 9"):
        compare(graph, budget=9)
    with pytest.raises(ValueError, match="exactly one of theta"):
        compare(graph)

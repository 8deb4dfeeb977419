"""The exact solver on small graphs: compiled and plain execution, batches, demands, cutoffs, budgets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from graph_strategies import NAMED, named_graph, random_graph, relabel, unit_problems
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import DominatingSet, Solution, Status, solve, solve_many
from topoprune_solvers.compiled import VARIABLE, enabled
from topoprune_solvers.domination import bitset_search
from topoprune_solvers.domination.bitset_reductions import cost_step
from topoprune_solvers.domination.bitset_search import search_small
from topoprune_solvers.domination.covering import SetCover, cover_of, open_part
from topoprune_solvers.domination.exact import ExactDominatingSet, minimum_cover
from topoprune_solvers.result import Deadline

MODES = ["1", "0"] if enabled() else ["0"]
problems_with_demand = unit_problems(DominatingSet, max_n=12, demand=True)


@contextmanager
def execution(mode: str) -> Iterator[None]:
    """Run compiled ("1") or plain ("0")."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, mode)
        yield


def naive_optimum(problem: DominatingSet) -> float:
    """Return the least cost over all subsets; the demand-aware twin."""
    assert problem.cost is not None
    n = problem.n
    subsets = (np.arange(1 << n)[:, None] >> np.arange(n)) & 1
    closed = np.eye(n, dtype=np.int64)
    closed[np.repeat(np.arange(n), np.diff(problem.indptr)), problem.indices] = 1
    fine = np.all(subsets @ closed >= problem.demand, axis=1)
    fine &= np.all(subsets >= problem.forced, axis=1) & ~np.any(subsets & problem.forbidden, axis=1)
    # rows with the same units kept sum alike; inf * 0 does not occur, costs are finite
    return float((subsets[fine] * problem.cost).sum(axis=1).min())


def same(left: Solution, right: Solution) -> bool:
    """Return whether two solutions agree in every number, timing apart."""
    return (
        np.array_equal(left.keep, right.keep)
        and left.objective == right.objective
        and left.bound == right.bound
        and left.status is right.status
        and left.stats == right.stats
        and np.array_equal(left.dominator, right.dominator)  # type: ignore[arg-type]
        and np.array_equal(left.dominator_distance, right.dominator_distance)  # type: ignore[arg-type]
    )


def close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=150, deadline=None)
@given(problem=problems_with_demand)
def test_the_optimum_is_found_and_proven(mode: str, problem: DominatingSet) -> None:
    with execution(mode):
        solution = solve(problem, "exact")
    assert close(solution.objective, naive_optimum(problem))
    assert solution.status is Status.OPTIMAL and solution.gap == 0


@pytest.mark.skipif(len(MODES) == 1, reason="numba is not installed")
@settings(max_examples=150, deadline=None)
@given(problems=st.lists(problems_with_demand, max_size=4))
def test_compiled_and_plain_execution_give_the_same_answers(problems: list[DominatingSet]) -> None:
    answers = []
    for mode in MODES:
        with execution(mode):
            answers.append(solve_many(problems, "exact"))
    assert all(same(left, right) for left, right in zip(*answers, strict=True))


@pytest.mark.skipif(len(MODES) == 1, reason="numba is not installed")
@pytest.mark.parametrize("cost", ["unit", "equal", "integers", "floats", "ties", "wide"])
def test_compiled_and_plain_execution_agree_on_40_units(cost: str) -> None:
    rng = np.random.default_rng(7)
    costs = {
        "unit": None,
        "equal": np.full(40, 0.3),
        "integers": 7.0 * rng.integers(1, 9, 40),
        "floats": rng.random(40),
        "ties": rng.choice([0.1, 0.2, 0.3], 40),
        "wide": 10.0 ** rng.integers(-6, 7, 40),
    }
    for demand in (None, rng.integers(0, 4, 40)):
        graph = random_graph(40, 0.25, seed=3)
        problem = DominatingSet(*graph, cost=costs[cost], demand=demand)
        answers = []
        for mode in MODES:
            with execution(mode):
                answers.append(solve(problem, "exact"))
        assert same(*answers) and answers[0].status is Status.OPTIMAL
        if demand is None:
            assert close(answers[0].objective, solve(problem, "milp").objective)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_gives_the_answers_of_single_calls(mode: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [0, 1, 5, 12, 64, 70, 12, 0]
    problems = [
        DominatingSet(*random_graph(n, 0.15, seed=n), cost=rng.random(n) + 0.1, forced=np.arange(n) == 3) for n in sizes
    ]
    with execution(mode):
        together = solve_many(problems, "exact")
        assert all(same(left, solve(problem, "exact")) for left, problem in zip(together, problems, strict=True))
        assert solve_many([], "exact") == []
    assert [solution.keep.size for solution in together] == sizes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("graph", NAMED)
def test_named_graphs_with_demands(mode: str, graph: str) -> None:
    n, edges, optimum = named_graph(graph)
    plain = DominatingSet.from_edges(n, edges)
    degree = np.diff(plain.indptr)
    with execution(mode):
        assert solve(plain, "exact").objective == optimum
        assert solve(DominatingSet.from_edges(n, edges, demand=0), "exact").n_kept == 0
        everything = solve(DominatingSet.from_edges(n, edges, demand=degree + 1), "exact")
        assert everything.keep.all() and everything.status is Status.OPTIMAL
        twice = solve(DominatingSet.from_edges(n, edges, demand=np.minimum(2, degree + 1)), "exact")
    # a cycle of 12 needs 8 units for two in every three consecutive ones, a clique of 7 needs 2
    assert twice.objective == {"cycle": 8, "complete": 2}.get(graph, twice.objective) >= optimum


@settings(max_examples=60, deadline=None)
@given(problem=problems_with_demand, data=st.data())
def test_relabelling_does_not_change_the_optimum(problem: DominatingSet, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(problem.n))), dtype=np.int64)
    first, second = solve_many([problem, relabel(problem, order)], "exact")
    assert close(first.objective, second.objective)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=80, deadline=None)
@given(problem=problems_with_demand, offset=st.sampled_from([-1.0, -0.01, 0.0, 0.01, 1.0, 3.0]))
def test_a_cutoff_is_decided(mode: str, problem: DominatingSet, offset: float) -> None:
    optimum = naive_optimum(problem)
    cutoff = optimum + offset
    with execution(mode):
        outcome = minimum_cover(cover_of(problem), cutoff=cutoff)
    assert outcome.complete
    edge = abs(cutoff - optimum) <= 1e-9 * max(1.0, optimum)  # rounding may decide either way
    if outcome.keep is not None:
        assert problem.covered(outcome.keep).all() and (optimum <= cutoff or edge)
        assert problem.objective(outcome.keep) <= cutoff * (1 + 1e-12)
        assert outcome.bound <= optimum * (1 + 1e-9)
    else:
        assert (optimum > cutoff or edge) and outcome.bound > cutoff


@pytest.mark.parametrize("mode", MODES)
def test_time_limits_and_node_budgets_leave_a_cover_and_a_valid_bound(mode: str) -> None:
    problems = [DominatingSet(*random_graph(60, 0.12, seed), demand=1 + seed % 2) for seed in range(4)]
    optima = [solution.objective for solution in solve_many(problems, "exact")]
    with execution(mode):
        for limit in (0.0, 1e-7):
            for solution, optimum in zip(solve_many(problems, "exact", time_limit=limit), optima, strict=True):
                assert solution.bound is not None and solution.bound.value <= optimum <= solution.objective
                assert solution.status in (Status.OPTIMAL, Status.TIME_LIMIT)
                assert solution.bound.value >= 0.6 * optimum
        stopped = {solution.status for solution in solve_many(problems, "exact", time_limit=0.0)}
        assert Status.TIME_LIMIT in stopped


@pytest.mark.parametrize("mode", MODES)
def test_a_problem_beyond_the_budget_of_the_batch_is_searched_alone(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [DominatingSet(*random_graph(40, 0.15, seed)) for seed in range(3)]
    expected = solve_many(problems, "exact")
    assert any(solution.stats["nodes"] > 5 for solution in expected)
    for name in ("COMPILED", "PYTHON"):
        monkeypatch.setattr(bitset_search, name, replace(getattr(bitset_search, name), batch=1, call=1, chunk=3))
    with execution(mode):
        found = solve_many(problems, "exact")
        assert all(same(left, right) for left, right in zip(found, expected, strict=True))
        start = np.ones(40, dtype=bool)
        part = open_part(cover_of(problems[0])).instance
        stopped = search_small(part, deadline=Deadline.after(0.0))
    assert stopped.keep is not None and part.is_cover(stopped.keep) and stopped.bound <= expected[0].objective
    late = ExactDominatingSet().solve_many(problems, warm_starts=[start] * 3, time_limit=0.0)
    assert all(left.objective >= right.objective for left, right in zip(late, expected, strict=True))


def test_a_hard_problem_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ortools")
    problem = DominatingSet(*random_graph(50, 0.12, seed=1))
    expected = solve(problem, "exact").objective
    for name in ("COMPILED", "PYTHON"):
        monkeypatch.setattr(
            bitset_search, name, replace(getattr(bitset_search, name), batch=1, call=1, chunk=2, handover=4)
        )
    solution = solve(problem, "exact")
    assert solution.objective == expected and solution.status is Status.OPTIMAL
    assert solution.bound is not None and solution.bound.source not in ("reductions", "branch and bound")


def test_many_forced_and_forbidden_units_leave_a_small_problem() -> None:
    n = 200
    rng = np.random.default_rng(5)
    order = rng.permutation(n)
    forced, forbidden = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    forced[order[:60]] = True
    forbidden[order[60:150]] = True
    problem = DominatingSet(*random_graph(n, 0.04, seed=6), forced=forced, forbidden=forbidden)
    part = open_part(cover_of(problem))
    assert part.units.size == 50 and 0 < part.elements.size <= 64
    solution = solve(problem, "exact")
    assert solution.status is Status.OPTIMAL and solution.objective == solve(problem, "milp").objective


def test_a_set_cover_with_candidates_and_elements_of_its_own() -> None:
    # elements 0 {0, 1}, 1 {1, 2}, 2 {0, 2}, twice element 3 {0, 1, 2}
    instance = SetCover.from_rows(
        np.array([0, 2, 4, 6, 9]),
        np.array([0, 1, 1, 2, 0, 2, 0, 1, 2]),
        np.array([3.0, 1.0, 2.0]),
        np.array([1, 1, 1, 2]),
    )
    outcome = search_small(instance)
    assert outcome.keep is not None and outcome.keep.tolist() == [False, True, True]
    assert outcome.complete and outcome.bound == 3.0


def test_the_step_between_costs() -> None:
    bit = [1 << i for i in range(4)]
    assert cost_step([6.0, 4.0, 10.0, 1.5], bit, 0b0111) == 2.0
    assert cost_step([0.3, 0.3, 0.3, 1.0], bit, 0b0111) == 0.3
    assert cost_step([0.3, 0.6, 1e30, 1.0], bit, 0b1111) == 0.0
    assert cost_step([1e15, 1e16, 3.0, 1.0], bit, 0b0011) == 0.0  # sums beyond 2^53 are not exact

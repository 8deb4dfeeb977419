"""Laws of the two budgeted problems; every registered solver is tested by being registered."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from graph_strategies import grouped_problems, random_graph, relabel, unit_problems
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import (
    BudgetedDomination,
    Infeasible,
    SoftDomination,
    Status,
    adjacency_from_edges,
    available_solvers,
    get_solver,
    solve,
)

TYPES = [BudgetedDomination, SoftDomination]
ALL = [(kind, name) for kind in TYPES for name in available_solvers(kind)]
EXACT = [(kind, name) for kind, name in ALL if get_solver(name, kind).capabilities.exact]
UNLIMITED = [(kind, name) for kind, name in ALL if get_solver(name, kind).capabilities.max_units is None]
FORMS = {"plain": unit_problems, "grouped": grouped_problems}
few = settings(max_examples=25, deadline=None)
both_forms = pytest.mark.parametrize("form", FORMS)


def close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-6)


def no_better(problem: Any, value: float, optimum: float) -> bool:
    """Return True if a value does not beat the optimum."""
    return close(value, optimum) or (value > optimum if problem.sense == "min" else value < optimum)


@both_forms
@pytest.mark.parametrize(("kind", "name"), ALL)
@few
@given(data=st.data())
def test_bound_optimum_objective_are_in_order(kind: type, name: str, form: str, data: st.DataObject) -> None:
    problem = data.draw(FORMS[form](kind, max_n=8))
    optimum = solve(problem, "brute").objective
    solution = solve(problem, name)  # verified inside
    assert no_better(problem, solution.objective, optimum)
    if solution.bound is not None:
        assert no_better(problem, optimum, solution.bound.value)
    if (kind, name) in EXACT:
        assert solution.status is Status.OPTIMAL
    if solution.status is Status.OPTIMAL:
        assert close(solution.objective, optimum)


@both_forms
@pytest.mark.parametrize(("kind", "name"), EXACT)
@few
@given(data=st.data())
def test_relabelling_does_not_change_an_exact_objective(kind: type, name: str, form: str, data: st.DataObject) -> None:
    problem = data.draw(FORMS[form](kind, max_n=7))
    order = np.array(data.draw(st.permutations(range(problem.n))), dtype=np.int64)
    assert close(solve(problem, name).objective, solve(relabel(problem, order), name).objective)


@both_forms
@pytest.mark.parametrize(("kind", "name"), ALL)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_warm_start_time_limit_and_repetition(kind: type, name: str, form: str, data: st.DataObject) -> None:
    problem = data.draw(FORMS[form](kind, max_n=8))
    start = np.array(data.draw(st.lists(st.booleans(), min_size=problem.n, max_size=problem.n)), dtype=bool)
    solve(problem, name, time_limit=1e-7)
    first, second = (solve(problem, name, warm_start=start, seed=3) for _ in range(2))
    assert np.array_equal(first.keep, second.keep)


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_degenerate_sizes(kind: type, name: str) -> None:
    nothing = solve(kind(np.zeros(1, np.int32), np.zeros(0, np.int32), k=0), name)
    assert nothing.n_units == 0 and nothing.objective == 0
    one = solve(kind(np.zeros(2, np.int32), np.zeros(0, np.int32), k=1), name)
    assert one.keep.tolist() == [True]
    everything = solve(kind(*random_graph(6, 0.5, 0), k=6), name)
    assert everything.keep.all()


@pytest.mark.parametrize("name", available_solvers(BudgetedDomination))
def test_k_centre_without_enough_edges_has_an_infinite_radius(name: str) -> None:
    # Three separate pairs cannot be covered by two units; any two from different pairs cover four.
    arrays = adjacency_from_edges(6, np.array([(0, 1), (2, 3), (4, 5)]), np.array([0.1, 0.2, 0.3]))
    problem = BudgetedDomination(*arrays, k=2)
    solution = solve(problem, name)
    assert math.isinf(solution.objective) and solution.n_kept == 2
    if get_solver(name, BudgetedDomination).capabilities.exact:
        assert solution.status is Status.OPTIMAL
        assert solution.bound is not None and math.isinf(solution.bound.value)
    if name in ("greedy", "exact", "cp-sat"):
        assert solution.dominator is not None and int((solution.dominator >= 0).sum()) == 4
    assert solve(BudgetedDomination(*arrays, k=3), "exact").objective == 0.3


def test_k_centre_fills_up_by_importance_and_respects_forbidden_units() -> None:
    arrays = adjacency_from_edges(5, np.array([(0, i) for i in range(1, 5)]), np.full(4, 0.5))
    importance = np.array([0.0, 1.0, 3.0, 2.0, 3.0])
    problem = BudgetedDomination(*arrays, forbidden=np.arange(5) == 2, k=3, importance=importance)
    for name in ("greedy", "exact", "cp-sat"):
        solution = solve(problem, name)
        assert solution.keep.tolist() == [True, False, False, True, True]
        assert solution.objective == 0.5 and solution.status is Status.OPTIMAL


@pytest.mark.parametrize("seed", range(3))
def test_k_centre_on_larger_graphs(seed: int) -> None:
    for n, k in ((24, 5), (40, 10), (90, 20)):
        problem = BudgetedDomination(*random_graph(n, 0.3, seed), k=k)
        greedy, exact, cp_sat = (solve(problem, name) for name in ("greedy", "exact", "cp-sat"))
        assert exact.status is Status.OPTIMAL and cp_sat.objective == exact.objective
        assert greedy.bound is not None and greedy.bound.value <= exact.objective <= greedy.objective


@pytest.mark.parametrize("seed", range(3))
def test_soft_domination_on_larger_graphs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for n, k in ((12, 6), (24, 8), (40, 10)):
        problem = SoftDomination(*random_graph(n, 0.4, seed), k=k, importance=rng.random(n))
        greedy, exact, milp = (solve(problem, name) for name in ("greedy", "exact", "milp"))
        assert exact.status is Status.OPTIMAL and close(milp.objective, exact.objective)
        assert greedy.bound is not None and greedy.bound.value >= exact.objective * (1 - 1e-9)
        assert exact.objective >= greedy.objective >= (1 - 1 / math.e) * exact.objective


@pytest.mark.parametrize(("kind", "name"), UNLIMITED)
def test_large_graph_within_a_time_limit(kind: type, name: str) -> None:
    rng = np.random.default_rng(0)
    problem = kind(*random_graph(400, 0.02, 1), k=120, importance=rng.random(400))
    solution = solve(problem, name, time_limit=0.2)
    assert solution.seconds < 5
    if not get_solver(name, kind).capabilities.exact:
        assert np.array_equal(solve(problem, name, seed=1).keep, solve(problem, name, seed=1).keep)


@pytest.mark.parametrize("kind", TYPES)
def test_baselines_keep_what_they_say(kind: type) -> None:
    importance = np.array([1.0, 5.0, 3.0, 5.0, 0.0])
    problem = kind(*random_graph(5, 0.5, 0), forced=np.arange(5) == 4, k=3, importance=importance)
    assert solve(problem, "magnitude").keep.tolist() == [False, True, False, True, True]
    drawn = {tuple(solve(problem, "random", seed=seed).keep.tolist()) for seed in range(20)}
    assert len(drawn) > 1 and all(keep[4] and sum(keep) == 3 for keep in drawn)


@pytest.mark.parametrize("kind", TYPES)
def test_infeasible_budgets_say_why(kind: type) -> None:
    arrays = random_graph(4, 0.5, 0)
    two = np.array([True, True, False, False])
    for fields, message in (
        ({"k": 5}, "cannot keep exactly 5 of 4"),
        ({"k": 0}, "cannot keep exactly 0 of 4"),
        ({"k": 1, "forced": two}, "2 units are forced"),
        ({"k": 3, "forbidden": two}, "only 2 units are allowed"),
    ):
        with pytest.raises(Infeasible, match=message):
            kind(*arrays, **fields)
    with pytest.raises(ValueError, match="k must be an integer"):
        kind(*arrays, k=1.5)


def test_soft_domination_refuses_distances_without_similarity() -> None:
    arrays = adjacency_from_edges(2, np.array([(0, 1)]), np.array([1.5]))
    with pytest.raises(ValueError, match=r"needs distances in \[0, 1\], found 1.5"):
        SoftDomination(*arrays, k=1)
    with pytest.raises(ValueError, match="importance must be >= 0"):
        SoftDomination(*random_graph(2, 1.0, 0), k=1, importance=np.array([1.0, -1.0]))

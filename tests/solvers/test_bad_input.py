"""Wrong problems are refused when they are made, by a sentence that says what was found and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from graph_strategies import named_graph

from topoprune_solvers import (
    BlockMask,
    BudgetedDomination,
    DominatingSet,
    EdgeSelection,
    Infeasible,
    MultipleChoiceKnapsack,
    QuadraticSubset,
    RepairedSubset,
    SoftDomination,
    Status,
    available_solvers,
    get_solver,
    solve,
)
from topoprune_solvers.scaling import integer_costs


def path(**fields: Any) -> DominatingSet:
    return DominatingSet.from_edges(*named_graph("path")[:2], **fields)


def one_way() -> DominatingSet:
    return DominatingSet(np.array([0, 1, 1], np.int32), np.array([1], np.int32))


def budget(**fields: Any) -> BudgetedDomination:
    graph = path()
    return BudgetedDomination(graph.indptr, graph.indices, graph.weight, **fields)


def at(n: int, *units: int) -> np.ndarray:
    return np.isin(np.arange(n), units)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: path(cost=np.array([1.0, 1, 1, -2, 1, 1, 1])), ValueError, "costs must be >= 0, found -2 at unit 3"),
        (lambda: path(cost=np.array([1.0, 1, np.nan, 1, 1, 1, 1])), ValueError, "cost must be finite; entry 2 is not"),
        (lambda: path(cost=np.full(7, 1e308)), ValueError, "add up to more than a float64 holds"),
        (lambda: path(cost=np.ones(6)), ValueError, r"cost has shape \(6,\), expected \(7,\)"),
        (one_way, ValueError, "adjacency is not symmetric: some edge i-j has no j-i"),
        (lambda: path(demand=3), Infeasible, "unit 0 demands 3 kept units, but its closed neighbourhood has 2"),
        (lambda: path(demand=-1), ValueError, "demand must be >= 0, found -1 at unit 0"),
        (lambda: path(demand=1.5), ValueError, r"demand must be integers >= 0, found \[1.5\]"),
        (lambda: path(demand=np.ones(3)), ValueError, r"demand has shape \(3,\), expected \(7,\) or one integer"),
        (lambda: path(demand=2, forbidden=at(7, 1)), Infeasible, "too many of its 2 closed neighbours are forbidden"),
        (lambda: path(forbidden=at(7, 0, 1)), Infeasible, r"units \[0\] and all their neighbours are forbidden"),
        (lambda: path(forced=at(7, 2), forbidden=at(7, 2)), Infeasible, r"units \[2\] are both forced and forbidden"),
        (lambda: budget(k=8), Infeasible, "cannot keep exactly 8 of 7 units; expected 1 <= k <= 7"),
        (lambda: budget(k=2, forced=at(7, 0, 3, 6)), Infeasible, "3 units are forced, but only k=2 may stay"),
        (lambda: budget(k=2, importance=np.full(7, np.inf)), ValueError, "importance must be finite; entry 0 is not"),
        (lambda: QuadraticSubset(np.diag([1.0, -1.0]), k=1), ValueError, "positive semidefinite|PSD"),
        (lambda: QuadraticSubset(np.array([[1.0, np.nan], [np.nan, 1.0]]), k=1), ValueError, "finite"),
        (lambda: QuadraticSubset(np.array([[1.0, 3.0], [3.0, 1.0]]), k=1), ValueError, "positive semidefinite|PSD"),
        (lambda: QuadraticSubset(np.eye(2), k=3), Infeasible, "3 of 2"),
        (lambda: RepairedSubset(np.diag([1.0, -1.0]), np.ones((1, 2)), 1, k=1), ValueError, "semidefinite|PSD|>= 0"),
        (lambda: EdgeSelection(np.array([[1.0, np.nan]]), 1), ValueError, "score must be finite"),
        (lambda: EdgeSelection(np.ones((2, 2)), 5), Infeasible, "cannot keep exactly 5 of 4 edges"),
        (lambda: BlockMask(np.ones((2, 6)), 2, 4), ValueError, "6"),
        (lambda: MultipleChoiceKnapsack.from_curves([[1.0, 0.0]], [[5.0, 9.0]], [4.0]), Infeasible, "4"),
        (lambda: MultipleChoiceKnapsack.from_curves([[1.0]], [[-1.0]], [4.0]), ValueError, "-1"),
    ],
)
def test_a_wrong_problem_says_what_is_wrong(make: Callable[[], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("kind", [DominatingSet, BudgetedDomination, SoftDomination])
def test_an_empty_graph_is_solved_by_every_solver(kind: type) -> None:
    nothing = kind(np.zeros(1, np.int32), np.zeros(0, np.int32))
    for name in available_solvers(kind):
        solution = solve(nothing, name)
        assert solution.n_units == 0 and solution.objective == 0


@pytest.mark.parametrize("largest", [1e300, 1e18, 2.0**60, 1 / 3])
def test_scaled_costs_fit_an_integer_and_stay_below_the_floats(largest: float) -> None:
    cost = largest * np.random.default_rng(0).random(5000)
    scaled = integer_costs(cost)
    assert sum(scaled.values.tolist()) < 2**62 and scaled.values.min() >= 0
    assert np.all(scaled.values * scaled.unit <= cost)


@pytest.mark.parametrize("name", [n for n in available_solvers(DominatingSet) if get_solver(n, DominatingSet)
                                  .capabilities.exact])  # fmt: skip
def test_huge_costs_are_solved_exactly(name: str) -> None:
    solution = solve(path(cost=np.array([1e300, 1e299, 1e300, 1e300, 1e299, 1e300, 1e299])), name)
    assert solution.status is Status.OPTIMAL and solution.objective == pytest.approx(3e299)

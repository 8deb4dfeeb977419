"""Laws of quadratic subsets (problem C), over every available solver."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import Infeasible, QuadraticSubset, available_solvers, get_solver, solve
from topoprune_solvers.quadratic.budgets import OpenPart
from topoprune_solvers.quadratic.common import Search, resolution
from topoprune_solvers.quadratic.convex import diagonal_forms, row_bound, tangent_bounds
from topoprune_solvers.quadratic.enumeration import enumerate_subsets
from topoprune_solvers.quadratic.exact import branch
from topoprune_solvers.quadratic.greedy import eliminate, grow, improve
from topoprune_solvers.quadratic.relaxation import relax
from topoprune_solvers.quadratic.semidefinite import semidefinite_form
from topoprune_solvers.solution import Status

SOLVERS = available_solvers(QuadraticSubset)
LAW = settings(max_examples=12, deadline=None)


def random_gram(rng: np.random.Generator, n: int, rank: int) -> np.ndarray:
    """A Gram with shared directions, spread scales and exact ties now and then."""
    features = rng.standard_normal((rank, n)) + rng.uniform(-1, 1) * rng.standard_normal((rank, 1))
    features *= np.exp(0.5 * rng.standard_normal(n))
    if rng.random() < 0.3:
        features = np.rint(features)
    return features.T @ features


@st.composite
def problems(draw: st.DrawFn, largest: int = 9, smallest: int = 1) -> QuadraticSubset:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(smallest, largest))
    gram = random_gram(rng, n, draw(st.integers(1, n + 2)))
    if draw(st.booleans()) and draw(st.booleans()):
        gram = gram * draw(st.sampled_from([0.0, 1e-12, 1e12]))
    kept = rng.random(n) < rng.random()
    forced = kept & (rng.random(n) < 0.2)
    forbidden = ~kept & (rng.random(n) < 0.2)
    if draw(st.booleans()):
        return QuadraticSubset(gram, k=int(kept.sum()), forced=forced, forbidden=forbidden)
    cost = rng.integers(0, 4, n).astype(float) if draw(st.booleans()) else rng.random(n)
    return QuadraticSubset(gram, cost=cost, budget=float(cost[kept].sum()), forced=forced, forbidden=forbidden)


def scale_of(problem: QuadraticSubset) -> float:
    return float(problem.gram.trace()) * problem.n


def test_the_issues_solvers_are_registered() -> None:
    assert {"brute", "exact", "greedy", "local-search", "magnitude", "random", "relaxation"} <= set(SOLVERS)
    assert all(get_solver(name, QuadraticSubset).capabilities.when for name in SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
@LAW
@given(problem=problems())
def test_bound_optimum_objective(name: str, problem: QuadraticSubset) -> None:
    optimum = solve(problem, "brute").objective
    solution = solve(problem, name)
    slack = 1e-13 * scale_of(problem)
    assert solution.objective >= optimum - slack
    if solution.bound is not None:
        assert 0 <= solution.bound.value <= optimum * (1 + 1e-8) + slack
    if get_solver(name, QuadraticSubset).capabilities.exact:
        assert solution.status is Status.OPTIMAL
        assert solution.objective <= optimum * (1 + 1e-8) + slack


@LAW
@given(problem=problems(largest=10, smallest=2))
def test_every_source_of_bounds_is_below_the_optimum(problem: QuadraticSubset) -> None:
    optimum = solve(problem, "brute").objective
    slack = 1e-12 * scale_of(problem)
    part = OpenPart.of(problem)
    if part.f == 0:
        return
    zero, one = np.zeros((1, part.f)), np.ones((1, part.f))
    assert row_bound(part) <= optimum + slack
    forms = diagonal_forms(part)
    value, form = semidefinite_form(part, iterations=40)
    assert value <= optimum + slack
    assert form is not None
    for each in [*forms, form]:
        # A tangent anywhere is a bound, at the vertices and far from the minimum too.
        for x in (zero, one, np.full((1, part.f), 0.3)):
            for steps in (0, 20):
                bound, _, _ = tangent_bounds(each, part, zero, one, x, steps=steps, lipschitz=2 * scale_of(problem))
                assert bound[0] <= optimum + slack, each.source


@LAW
@given(problem=problems(largest=10, smallest=2), data=st.data())
def test_a_convex_form_is_the_objective_on_feasible_sets(problem: QuadraticSubset, data: st.DataObject) -> None:
    part = OpenPart.of(problem)
    if part.f == 0:
        return
    _, form = semidefinite_form(part, iterations=20)
    assert form is not None and form.coupling is not None
    assert form.coupling.min() >= 0
    keep = solve(problem, "random", seed=data.draw(st.integers(0, 99))).keep
    x = (~keep)[part.units].astype(float)
    value = x @ form.quadratic @ x + form.linear @ x + x @ form.coupling @ x + form.constant
    assert value == pytest.approx(problem.objective(keep), rel=1e-7, abs=1e-15 + 1e-9 * scale_of(problem))
    eigenvalues = np.linalg.eigvalsh(form.quadratic)
    assert eigenvalues[0] >= -1e-12 * max(1.0, eigenvalues[-1], scale_of(problem))


@LAW
@given(problem=problems())
def test_branch_and_bound_agrees_with_enumeration(problem: QuadraticSubset) -> None:
    """Above 24 units the search runs; here it is forced onto small problems."""
    optimum = solve(problem, "brute").objective
    slack = 1e-12 * scale_of(problem) + 1e-9 * optimum
    best, bounds, part, form = relax(Search.at(problem, ~solve(problem, "random").keep))
    if part.f == 0 or len(bounds) == 1:
        assert best.value <= optimum + slack
        return
    from topoprune_solvers.result import NEVER

    best, bound, _ = branch(part, form, best, NEVER)
    assert best.value <= optimum + slack
    assert bound <= optimum + slack
    assert bound >= optimum - slack - 2 * resolution(problem, best.pruned)


@LAW
@given(problem=problems(largest=12))
def test_enumeration_finds_the_brute_optimum(problem: QuadraticSubset) -> None:
    pruned, complete, _ = enumerate_subsets(problem)
    assert complete and pruned is not None and problem.violation(~pruned) is None
    optimum = solve(problem, "brute").objective
    assert problem.objective(~pruned) <= optimum + 1e-13 * scale_of(problem)


@LAW
@given(problem=problems(largest=30))
def test_no_exchange_improves_what_the_exchanges_return(problem: QuadraticSubset) -> None:
    """Slow twin of the update formulas: all exchanges, by the objective."""
    assert problem.forced is not None and problem.forbidden is not None
    for start in (eliminate(problem), grow(problem)):
        before = problem.objective(~start.pruned)
        search = improve(start)
        keep = ~search.pruned
        value = problem.objective(keep)
        slack = 1e-8 * value + 1e-12 * scale_of(problem)
        assert problem.violation(keep) is None and value <= before + slack
        assert search.value == pytest.approx(value, rel=1e-9, abs=slack)
        for i in np.flatnonzero(~keep & ~problem.forbidden):
            for j in np.flatnonzero(keep & ~problem.forced):
                other = keep.copy()
                other[i], other[j] = True, False
                if problem.violation(other) is None:
                    assert problem.objective(other) >= value - slack


@LAW
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 12))
def test_greedy_elimination_is_what_it_says(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    problem = QuadraticSubset(random_gram(rng, n, n + 1), k=n // 2)
    keep = np.ones(n, dtype=bool)
    for _ in range(n - n // 2):
        options = []
        for unit in np.flatnonzero(keep):
            without = keep.copy()
            without[unit] = False
            options.append((problem.objective(without), unit))
        keep[min(options)[1]] = False
    assert problem.objective(~eliminate(problem).pruned) == pytest.approx(problem.objective(keep), rel=1e-9)


@pytest.mark.parametrize("name", [n for n in SOLVERS if get_solver(n, QuadraticSubset).capabilities.exact])
@LAW
@given(problem=problems(), seed=st.integers(0, 1000))
def test_relabelling_leaves_an_exact_objective_unchanged(name: str, problem: QuadraticSubset, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(problem.n)
    assert problem.forced is not None and problem.forbidden is not None
    moved = QuadraticSubset(
        problem.gram[np.ix_(order, order)],
        k=problem.k,
        cost=None if problem.cost is None else problem.cost[order],
        budget=problem.budget,
        forced=problem.forced[order],
        forbidden=problem.forbidden[order],
    )
    # A budget on the edge may round the other way; costs of whole numbers and counts cannot.
    if problem.cost is None or np.all(problem.cost == np.rint(problem.cost)):
        assert solve(moved, name).objective == pytest.approx(
            solve(problem, name).objective, rel=1e-8, abs=1e-12 * scale_of(problem)
        )


@pytest.mark.parametrize("name", SOLVERS)
def test_degenerate_sizes(name: str) -> None:
    assert solve(QuadraticSubset(np.zeros((0, 0)), k=0), name).n_kept == 0
    gram = np.eye(3)
    assert solve(QuadraticSubset(gram, k=3), name).objective == 0
    assert solve(QuadraticSubset(gram, k=0), name).objective == 3
    assert solve(QuadraticSubset(gram, cost=np.ones(3), budget=5.0), name).objective == 0
    assert solve(QuadraticSubset(gram, cost=np.ones(3), budget=0.0), name).objective == 3
    forced = np.array([True, True, False])
    assert solve(QuadraticSubset(gram, k=2, forced=forced, forbidden=~forced), name).keep.tolist() == forced.tolist()
    assert solve(QuadraticSubset(np.zeros((4, 4)), k=2), name).objective == 0
    if name != "random":
        kept = solve(QuadraticSubset(np.eye(4), k=2), name).keep
        assert kept.sum() == 2


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("knapsack", [False, True])
def test_the_same_call_gives_the_same_mask(name: str, knapsack: bool) -> None:
    rng = np.random.default_rng(0)
    gram = random_gram(rng, 12, 8)
    problem = QuadraticSubset(gram, cost=rng.random(12), budget=3.0) if knapsack else QuadraticSubset(gram, k=6)
    first, second = (solve(problem, name, seed=3) for _ in range(2))
    assert np.array_equal(first.keep, second.keep) and first.bound == second.bound


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "brute"])
@pytest.mark.parametrize("knapsack", [False, True])
def test_a_time_limit_is_kept_and_leaves_a_valid_set(name: str, knapsack: bool) -> None:
    rng = np.random.default_rng(1)
    gram = random_gram(rng, 400, 300)
    budget = {"cost": rng.random(400), "budget": 80.0} if knapsack else {"k": 200}
    problem = QuadraticSubset(gram, **budget)  # type: ignore[arg-type]
    solve(problem, name, time_limit=0.0)
    started = time.perf_counter()
    solution = solve(problem, name, time_limit=0.5)  # `solve` verifies
    # One iteration of the relaxation, on a machine that does other work too, on top of the 10 % + 0.2 s.
    assert time.perf_counter() - started < 5.0
    if solution.bound is not None:
        assert 0 <= solution.bound.value <= solution.objective


@pytest.mark.parametrize("name", ["greedy", "local-search", "relaxation", "exact"])
def test_a_warm_start_is_never_lost(name: str) -> None:
    problem = QuadraticSubset(random_gram(np.random.default_rng(2), 30, 20), k=15)
    best = solve(problem, "local-search", seed=5)
    for limit in (0.0, 1.0):
        again = solve(problem, name, warm_start=best.keep, time_limit=limit)
        assert again.objective <= best.objective * (1 + 1e-9)
    with pytest.raises(ValueError, match=r"warm_start has shape \(3,\)"):
        solve(problem, name, warm_start=np.ones(3, bool))
    solve(problem, name, warm_start=np.ones(30, bool), time_limit=0.1)  # does not fit k: ignored


def test_the_relaxation_proves_the_optimum_where_it_is_tight() -> None:
    # Orthogonal units: the damage is additive, and the relaxation has no gap.
    problem = QuadraticSubset(np.diag(np.arange(1.0, 41.0)), k=20)
    solution = solve(problem, "relaxation")
    assert solution.status is Status.OPTIMAL and solution.objective == pytest.approx(210.0)
    assert solve(problem, "exact").status is Status.OPTIMAL


def test_exact_above_24_units_meets_enumeration_of_a_split_problem() -> None:
    """Two independent halves of 13 units: the optimum over the split of k is known from the halves."""
    rng = np.random.default_rng(4)
    halves = [random_gram(rng, 13, 20) for _ in range(2)]
    gram = np.zeros((26, 26))
    gram[:13, :13], gram[13:, 13:] = halves
    best = min(
        solve(QuadraticSubset(halves[0], k=k), "exact").objective
        + solve(QuadraticSubset(halves[1], k=18 - k), "exact").objective
        for k in range(5, 14)
    )
    solution = solve(QuadraticSubset(gram, k=18), "exact")
    assert solution.status is Status.OPTIMAL and solution.objective == pytest.approx(best, rel=1e-8)


def test_negative_correlations_make_a_knapsack_prune_beyond_its_need() -> None:
    # Units 0 and 1 cancel each other: dropping both costs nothing, dropping one costs 1.
    gram = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
    problem = QuadraticSubset(gram, cost=np.ones(3), budget=2.0)
    for name in ("exact", "brute", "local-search"):
        assert solve(problem, name).objective == 0.0


@pytest.mark.parametrize(
    ("gram", "fields", "message"),
    [
        (np.ones((2, 3)), {"k": 1}, r"gram must be square, found shape \(2, 3\)"),
        (np.ones(3), {"k": 1}, "gram must be square"),
        ([[1.0, 2.0], [0.0, 1.0]], {"k": 1}, r"symmetric; entries \(0, 1\) and \(1, 0\) differ by 2"),
        ([[1.0, np.nan], [np.nan, 1.0]], {"k": 1}, r"finite; entry \(0, 1\) is nan"),
        ([[np.inf, 0.0], [0.0, 1.0]], {"k": 1}, r"finite; entry \(0, 0\) is inf"),
        ([[-1.0, 0.0], [0.0, 1.0]], {"k": 1}, "-1 on the diagonal at unit 0"),
        ([[1.0, 2.0], [2.0, 1.0]], {"k": 1}, r"not positive semidefinite: entry \(0, 1\)"),
        (1.1 * np.eye(3) - 0.9 * np.ones((3, 3)) + 0.8 * np.eye(3), {"k": 1}, "smallest eigenvalue -0.8"),
        (np.eye(2), {}, "either k"),
        (np.eye(2), {"k": 1, "cost": np.ones(2), "budget": 1.0}, "either k"),
        (np.eye(2), {"k": 1, "cost": np.ones(2)}, "belong together"),
        (np.eye(2), {"budget": 1.0}, "belong together"),
        (np.eye(2), {"cost": np.array([1.0, -1.0]), "budget": 1.0}, "cost must be >= 0, found -1 at unit 1"),
        (np.eye(2), {"cost": np.ones(3), "budget": 1.0}, r"cost has shape \(3,\)"),
        (np.eye(2), {"cost": np.ones(2), "budget": np.nan}, "budget must be a finite number"),
        (np.eye(2), {"k": 0.5}, "whole number"),
    ],
)
def test_bad_input_is_refused(gram: object, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuadraticSubset(np.asarray(gram), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 4}, "exactly 4 of 3"),
        ({"k": -1}, "exactly -1 of 3"),
        ({"k": 1, "forced": [1, 1, 0]}, "2 are forced to stay"),
        ({"k": 3, "forbidden": [1, 0, 0]}, "1 are forbidden"),
        ({"k": 1, "forced": [1, 0, 0], "forbidden": [1, 0, 0]}, r"units \[0\] are both"),
        ({"cost": np.ones(3), "budget": 1.5, "forced": [1, 1, 0]}, "cost 2, more than the budget of 1.5"),
        ({"cost": np.ones(3), "budget": -1.0}, "cost 0, more than the budget of -1"),
    ],
)
def test_infeasible_budgets_say_so(fields: dict, message: str) -> None:
    with pytest.raises(Infeasible, match=message):
        QuadraticSubset(np.eye(3), **fields)


def test_float32_grams_are_accepted_and_made_symmetric() -> None:
    features = np.random.default_rng(3).standard_normal((5, 40)).astype(np.float32)
    gram = features.T @ features  # singular: tiny negative eigenvalues
    gram[0, 1] *= 1 + 1e-6
    problem = QuadraticSubset(gram, k=20)
    assert np.array_equal(problem.gram, problem.gram.T) and problem.gram.dtype == np.float64
    assert solve(problem, "relaxation", time_limit=1.0).objective >= 0
    with pytest.raises(ValueError, match="read-only"):
        problem.gram[0, 0] = 1.0


def test_a_read_only_gram_is_not_copied() -> None:
    gram = np.eye(4)
    gram.setflags(write=False)
    assert QuadraticSubset(gram, k=2).gram is gram

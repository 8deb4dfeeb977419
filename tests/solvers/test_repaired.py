"""Laws of repaired subsets (problem C after least squares), over every available solver."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import (
    Infeasible,
    QuadraticSubset,
    RepairedSubset,
    available_solvers,
    get_solver,
    repaired_weight,
    solve,
)
from topoprune_solvers.quadratic.elimination import BlockElimination, eliminate_repaired
from topoprune_solvers.quadratic.exchange import exchange, exchange_changes
from topoprune_solvers.quadratic.moments import inverse_moment, reduced_weight
from topoprune_solvers.quadratic.repaired_bounds import repaired_bounds, spread
from topoprune_solvers.result import Deadline
from topoprune_solvers.solution import Status

SOLVERS = available_solvers(RepairedSubset)
LAW = settings(max_examples=20, deadline=None)


def moment_and_weight(rng: np.random.Generator, d: int) -> tuple[np.ndarray, np.ndarray]:
    """A moment that is singular half of the time, and a weight with fewer or more rows than columns."""
    x = rng.standard_normal((int(rng.integers(1, 2 * d + 1)), d)) * np.exp(0.5 * rng.standard_normal(d))
    if d > 1 and rng.random() < 0.3:
        x[:, -1] = x[:, 0]  # an exact twin
    return x.T @ x / x.shape[0], rng.standard_normal((int(rng.integers(1, 2 * d + 1)), d))


@st.composite
def problems(draw: st.DrawFn, units: int = 7) -> RepairedSubset:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, units))
    kind = draw(st.sampled_from(["single", "uniform", "offsets"]))
    width = {"single": np.ones(n, int), "uniform": np.full(n, 3), "offsets": rng.integers(1, 4, n)}[kind]
    moment, weight = moment_and_weight(rng, int(width.sum()))
    kept = rng.random(n) < rng.random()
    blocks = np.concatenate([[0], np.cumsum(width)]) if kind == "offsets" else int(width[0])
    return RepairedSubset(
        moment,
        weight,
        blocks,
        int(kept.sum()),
        forced=kept & (rng.random(n) < 0.2),
        forbidden=~kept & (rng.random(n) < 0.2),
        ridge=draw(st.sampled_from([1e-6, 1e-4, 1e-2])),
    )


def regular(problem: RepairedSubset) -> np.ndarray:
    return problem.moment + problem.ridge_value * np.eye(problem.moment.shape[0])


def slack_of(problem: RepairedSubset) -> float:
    """Rounding of sums of the size of the whole output energy."""
    return 1e-9 * float(((problem.weight @ regular(problem)) * problem.weight).sum())


def with_k(problem: RepairedSubset, k: int) -> RepairedSubset:
    return RepairedSubset(problem.moment, problem.weight, problem.offsets, k, ridge=problem.ridge)


def test_the_issues_solvers_are_registered() -> None:
    assert {"brute", "exact", "greedy", "magnitude", "random", "relaxation"} <= set(SOLVERS)
    assert all(get_solver(name, RepairedSubset).capabilities.when for name in SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
@LAW
@given(problem=problems())
def test_bound_optimum_objective(name: str, problem: RepairedSubset) -> None:
    optimum = solve(problem, "brute").objective
    solution = solve(problem, name)
    slack = 1e-7 * optimum + slack_of(problem)
    assert solution.objective >= optimum - slack
    if solution.bound is not None:
        assert 0 <= solution.bound.value <= optimum + slack
    if get_solver(name, RepairedSubset).capabilities.exact:
        assert solution.objective <= optimum + slack
        assert solution.status is Status.OPTIMAL


@LAW
@given(problem=problems())
def test_every_source_of_bounds_is_below_the_optimum(problem: RepairedSubset) -> None:
    optimum = solve(problem, "brute").objective
    for bound in repaired_bounds(problem):
        assert bound.value <= optimum * (1 + 1e-9) + slack_of(problem), bound.source


@LAW
@given(problem=problems(), seed=st.integers(0, 99))
def test_the_objective_is_both_of_its_formulas_and_the_least_squares_minimum(
    problem: RepairedSubset, seed: int
) -> None:
    keep = solve(problem, "random", seed=seed).keep
    value, slack = problem.objective(keep), slack_of(problem)
    p = problem.columns(~keep)
    if p.size:
        inverse = np.linalg.inv(regular(problem))
        middle = np.linalg.inv(inverse[np.ix_(p, p)])
        assert value == pytest.approx(np.trace(problem.weight[:, p] @ middle @ problem.weight[:, p].T), abs=slack)
    refitted = repaired_weight(problem, keep)
    assert not refitted[:, p].any()
    change = problem.weight - refitted
    assert value == pytest.approx(np.trace(change @ regular(problem) @ change.T), abs=slack)
    # Any other weight on the kept columns is worse.
    other = refitted.copy()
    s = problem.columns(keep)
    other[:, s] += 0.1 * np.random.default_rng(seed).standard_normal((other.shape[0], s.size))
    change = problem.weight - other
    assert np.trace(change @ regular(problem) @ change.T) >= value - slack


@LAW
@given(problem=problems(), seed=st.integers(0, 99))
def test_damage_is_monotone_zero_when_nothing_goes_and_at_most_the_unrepaired(
    problem: RepairedSubset, seed: int
) -> None:
    slack = slack_of(problem)
    order = np.random.default_rng(seed).permutation(problem.n)
    columns = (problem.weight.T @ problem.weight) * regular(problem)
    starts = problem.offsets[:-1]
    gram = np.add.reduceat(np.add.reduceat(columns, starts, axis=0), starts, axis=1)
    keep = np.ones(problem.n, dtype=bool)
    before = problem.objective(keep)
    assert before == 0
    for unit in order:
        keep[unit] = False
        value = problem.objective(keep)
        assert value >= before - slack
        unrepaired = QuadraticSubset(gram, k=int(keep.sum())).objective(keep)
        assert value <= unrepaired + slack
        before = value
    whole = np.trace(problem.weight @ regular(problem) @ problem.weight.T)
    assert before == pytest.approx(whole, rel=1e-9)


@LAW
@given(problem=problems())
def test_greedy_is_optimal_where_one_unit_goes(problem: RepairedSubset) -> None:
    one = with_k(problem, problem.n - 1)
    best = solve(one, "brute").objective
    assert one.objective(~eliminate_repaired(one)) <= best * (1 + 1e-7) + slack_of(problem)


@LAW
@given(problem=problems())
def test_elimination_is_greedy_by_the_objective(problem: RepairedSubset) -> None:
    """Slow twin: at each step every unit is tried, by the objective."""
    free = with_k(problem, problem.n // 2)
    keep = np.ones(free.n, dtype=bool)
    pruned = eliminate_repaired(free)
    steps = [np.ones(free.n, dtype=bool)]
    for k in range(free.n - 1, free.n // 2 - 1, -1):
        steps.append(~eliminate_repaired(with_k(problem, k)))
    for keep, following in pairwise(steps):
        options = []
        for unit in np.flatnonzero(keep):
            without = keep.copy()
            without[unit] = False
            options.append(free.objective(without))
        assert not np.any(following & ~keep)  # nested
        assert free.objective(following) <= min(options) * (1 + 1e-6) + slack_of(problem)
    assert np.array_equal(~pruned, steps[-1])


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_batches_prune_the_right_number_and_keep_the_law_of_the_update(batch: int) -> None:
    rng = np.random.default_rng(8)
    moment, weight = moment_and_weight(rng, 60)
    forced, forbidden = np.arange(60) < 5, np.arange(60) >= 52
    problem = RepairedSubset(moment, weight, 1, 25, forced=forced, forbidden=forbidden)
    solution = solve(problem, BlockElimination(batch=batch))
    assert solution.n_kept == 25  # `solve` verifies the rest
    assert solution.objective <= solve(problem, "magnitude").objective


def test_a_batch_over_all_candidates_is_plain_greedy() -> None:
    rng = np.random.default_rng(9)
    moment, weight = moment_and_weight(rng, 24)
    problem = RepairedSubset(moment + np.eye(24), weight, 1, 12)
    assert np.array_equal(eliminate_repaired(problem, batch=12), eliminate_repaired(problem, batch=1))


@LAW
@given(problem=problems())
def test_exchange_changes_are_differences_of_the_objective(problem: RepairedSubset) -> None:
    pruned = ~solve(problem, "random").keep
    leaving, entering = np.flatnonzero(pruned), np.flatnonzero(~pruned)
    if not leaving.size or not entering.size:
        return
    value, change = exchange_changes(problem, reduced_weight(problem).T, pruned, leaving, entering)
    slack = 100 * slack_of(problem)
    assert value == pytest.approx(problem.objective(~pruned), abs=slack)
    for row, i in enumerate(leaving):
        for col, j in enumerate(entering):
            other = pruned.copy()
            other[i], other[j] = False, True
            assert change[row, col] == pytest.approx(problem.objective(~other) - value, rel=1e-5, abs=slack)
    after = exchange(problem, pruned)
    assert problem.violation(~after) is None
    assert problem.objective(~after) <= problem.objective(~pruned) + slack


@LAW
@given(problem=problems(units=9))
def test_the_spread_bounds_the_normalised_eigenvalue(problem: RepairedSubset) -> None:
    inverse = inverse_moment(problem, full=True)
    blocks = np.zeros_like(inverse)
    for a, b in zip(problem.offsets[:-1], problem.offsets[1:], strict=True):
        blocks[a:b, a:b] = inverse[a:b, a:b]
    value = spread(inverse, problem.offsets)
    # value * blocks - inverse is positive semidefinite.
    assert np.linalg.eigvalsh(value * blocks - inverse)[0] >= -1e-7 * np.linalg.norm(inverse)


@pytest.mark.parametrize("name", [n for n in SOLVERS if get_solver(n, RepairedSubset).capabilities.exact])
@LAW
@given(problem=problems(units=6), seed=st.integers(0, 1000))
def test_relabelling_leaves_an_exact_objective_unchanged(name: str, problem: RepairedSubset, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(problem.n)
    columns = problem.columns(order)
    assert problem.forced is not None and problem.forbidden is not None
    moved = RepairedSubset(
        problem.moment[np.ix_(columns, columns)],
        problem.weight[:, columns],
        np.concatenate([[0], np.cumsum(problem.width[order])]),
        problem.k,
        forced=problem.forced[order],
        forbidden=problem.forbidden[order],
        ridge=problem.ridge,
    )
    assert solve(moved, name).objective == pytest.approx(
        solve(problem, name).objective, rel=1e-7, abs=slack_of(problem)
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_degenerate_sizes(name: str) -> None:
    assert solve(RepairedSubset(np.zeros((0, 0)), np.zeros((2, 0)), 1, 0), name).n_kept == 0
    assert solve(RepairedSubset(np.zeros((0, 0)), np.zeros((2, 0)), np.array([0]), 0), name).n_kept == 0
    moment, weight = np.eye(4), np.ones((3, 4))
    assert solve(RepairedSubset(moment, weight, 2, 2), name).objective == 0
    assert solve(RepairedSubset(moment, weight, 2, 0), name).objective == pytest.approx(12 * (1 + 1e-4))
    assert solve(RepairedSubset(np.zeros((4, 4)), weight, 1, 2), name).n_kept == 2
    assert solve(RepairedSubset(moment, np.zeros((3, 4)), 1, 2), name).objective == 0
    assert solve(RepairedSubset(moment, np.zeros((0, 4)), 1, 2), name).objective == 0
    forced = np.array([True, False])
    solution = solve(RepairedSubset(moment, weight, 2, 1, forced=forced, forbidden=~forced), name)
    assert solution.keep.tolist() == [True, False]


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_call_gives_the_same_mask(name: str) -> None:
    problem = RepairedSubset(*moment_and_weight(np.random.default_rng(0), 20), 2, 5)
    first, second = (solve(problem, name, seed=3) for _ in range(2))
    assert np.array_equal(first.keep, second.keep) and first.bound == second.bound


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "brute"])
def test_a_time_limit_leaves_a_valid_set(name: str) -> None:
    rng = np.random.default_rng(1)
    problem = RepairedSubset(*moment_and_weight(rng, 160), 1, 80)
    solve(problem, name, time_limit=0.0)
    started = time.perf_counter()
    solution = solve(problem, name, time_limit=0.3)  # `solve` verifies
    assert time.perf_counter() - started < 5.0
    if solution.bound is not None:
        assert 0 <= solution.bound.value <= solution.objective


def test_elimination_past_its_deadline_still_meets_the_budget() -> None:
    rng = np.random.default_rng(3)
    moment, weight = moment_and_weight(rng, 60)
    forced, forbidden = np.arange(20) < 3, np.arange(20) > 15
    for blocks, n in ((3, 20), (1, 60)):
        grown = [np.repeat(mask, n // 20) for mask in (forced, forbidden)]
        problem = RepairedSubset(moment, weight, blocks, n // 2, forced=grown[0], forbidden=grown[1])
        assert problem.violation(~eliminate_repaired(problem, Deadline.after(0.0))) is None


@pytest.mark.parametrize("name", ["greedy", "relaxation", "exact"])
def test_a_warm_start_is_never_lost(name: str) -> None:
    problem = RepairedSubset(*moment_and_weight(np.random.default_rng(2), 24), 2, 6)
    best = solve(problem, "exact")
    for limit in (0.0, 1.0):
        again = solve(problem, name, warm_start=best.keep, time_limit=limit)
        assert again.objective <= best.objective * (1 + 1e-7)
    with pytest.raises(ValueError, match=r"warm_start has shape \(3,\)"):
        solve(problem, name, warm_start=np.ones(3, bool))


def test_a_twin_input_goes_for_nothing() -> None:
    """Two equal inputs: without repair either costs its energy, with repair one of them is free up to the ridge."""
    x = np.random.default_rng(6).standard_normal((50, 4))
    x[:, 3] = x[:, 1]
    problem = RepairedSubset(x.T @ x / 50, np.ones((2, 4)), 1, 3)
    for name in ("greedy", "exact"):
        solution = solve(problem, name)
        assert {1, 3} - set(np.flatnonzero(solution.keep).tolist())
        assert solution.objective < 1e-3
    refitted = repaired_weight(problem, solution.keep)
    assert refitted[:, [1, 3]].sum(axis=1) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moment": np.ones((2, 3))}, "moment must be square"),
        ({"moment": np.diag([1.0, 1.0, 1.0, -1.0])}, "-1 on the diagonal at unit 3"),
        ({"moment": np.full((4, 4), np.nan)}, "moment must be finite"),
        ({"weight": np.ones((2, 3))}, r"weight has shape \(2, 3\), expected \(o, 4\)"),
        ({"weight": np.full((2, 4), np.inf)}, "weight must be finite"),
        ({"blocks": 3}, "width 3 do not divide the 4 columns"),
        ({"blocks": 0}, "width 0"),
        ({"blocks": np.array([0, 2, 2, 4])}, "must rise from 0 to 4"),
        ({"blocks": np.array([0, 2])}, "must rise from 0 to 4"),
        ({"blocks": np.array([0.0, 4.0])}, "int offsets"),
        ({"ridge": 0.0}, "ridge must be > 0"),
        ({"ridge": np.nan}, "ridge must be > 0"),
        ({"k": None}, "whole number"),
        ({"k": 1.5}, "whole number"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    fields: dict = {"moment": np.eye(4), "weight": np.ones((2, 4)), "blocks": 1, "k": 2}
    with pytest.raises(ValueError, match=message):
        RepairedSubset(**(fields | change))
    if "moment" in change:
        return
    with pytest.raises(Infeasible, match="exactly 5 of 4"):
        RepairedSubset(**(fields | {"k": 5}))


def test_a_moment_that_its_ridge_cannot_save_says_what_to_do() -> None:
    # Within the tolerance of the check, yet not definite: the negative eigenvalue exceeds a tiny ridge.
    moment = np.ones((6, 6)) + np.diag([0.0] * 5 + [-2e-6])
    with pytest.raises(ValueError, match="raise ridge"):
        RepairedSubset(moment, np.ones((1, 6)), 1, 3, ridge=1e-9)
    assert solve(RepairedSubset(moment, np.ones((1, 6)), 1, 3), "greedy").n_kept == 3


def test_a_refit_needs_a_mask_of_the_problem() -> None:
    problem = RepairedSubset(np.eye(4), np.ones((2, 4)), 2, 1)
    with pytest.raises(ValueError, match=r"keep has shape \(4,\), expected \(2,\)"):
        repaired_weight(problem, np.ones(4, bool))

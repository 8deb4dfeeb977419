"""Soft domination at scale: compiled and plain kernels agree, swaps and prices keep their promises."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
from graph_strategies import grouped_problems, random_graph, unit_problems
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import SoftDomination, Status, adjacency_from_edges, solve
from topoprune_solvers.budgeted.facility_fixing import fix_units
from topoprune_solvers.budgeted.facility_lagrangian import LagrangianFacilityLocation, relax
from topoprune_solvers.budgeted.facility_location import GreedyFacilityLocation, Prepared, greedy_with_bound
from topoprune_solvers.budgeted.facility_swaps import swap_while_better
from topoprune_solvers.budgeted.service import GreedyRun
from topoprune_solvers.compiled import VARIABLE
from topoprune_solvers.result import NEVER

any_form = st.one_of(unit_problems(SoftDomination, max_n=8), grouped_problems(SoftDomination, max_n=8))
few = settings(max_examples=60, deadline=None)


def nearest(n: int, degree: int = 12, seed: int = 0, **fields: Any) -> SoftDomination:
    """Return a k-nearest-neighbour problem of points on a sphere; distance is 1 - squared cosine."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 6))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    alike = (points @ points.T) ** 2
    np.fill_diagonal(alike, -1.0)
    near = np.argpartition(-alike, degree, axis=1)[:, :degree]
    edges = np.stack([np.repeat(np.arange(n), degree), near.ravel()], axis=1)
    distance = np.clip(1 - np.take_along_axis(alike, near, axis=1).ravel(), 0, 1)
    fields = {"k": n // 4, "importance": rng.exponential(size=n), **fields}
    return SoftDomination(*adjacency_from_edges(n, edges, distance), **fields)


def naive_greedy(problem: SoftDomination) -> np.ndarray:
    """Take the fitting unit of largest gain, all gains computed anew each time."""
    case = Prepared.of(problem)
    keep = problem.forced.copy()  # type: ignore[union-attr]
    while keep.sum() < problem.k:
        gains = case.service.priced(case.service.reached(keep))
        gains[~case.groups.fits(keep) | problem.forbidden] = -1.0  # type: ignore[operator]
        keep[int(gains.argmax())] = True
    return keep


@few
@given(problem=any_form)
def test_lazy_greedy_is_greedy(problem: SoftDomination) -> None:
    case = Prepared.of(problem)
    run = GreedyRun(case.service, case.groups, problem.forced, ~problem.forbidden)  # type: ignore[arg-type, operator]
    run.take(problem.n)
    assert problem.violation(run.keep) is None
    # ties within rounding may go either way
    assert math.isclose(problem.objective(run.keep), problem.objective(naive_greedy(problem)), rel_tol=1e-9)
    assert np.allclose(run.reached, case.service.reached(run.keep))


@pytest.mark.parametrize("groups", [0, 7])
def test_compiled_and_plain_kernels_give_the_same_answers(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="needs numba to compare with")
    fields: dict[str, Any] = {}
    if groups:
        fields = {"group": np.arange(280) % groups, "group_min": 3, "group_max": 14}
    problem = nearest(280, **fields)
    answers = []
    for flag in ("1", "0"):
        monkeypatch.setenv(VARIABLE, flag)
        case = Prepared.of(problem)
        keep, bound = greedy_with_bound(case, swaps=False)
        swapped = swap_while_better(problem, case.service, case.groups, keep, NEVER)
        relaxed = relax(case, swapped, iterations=60)
        answers.append((keep, bound.value, swapped, relaxed.keep, relaxed.bound.value, relaxed.price))
    for compiled, plain in zip(*answers, strict=True):
        assert np.array_equal(compiled, plain)


@few
@given(problem=any_form)
def test_after_the_swaps_no_single_swap_gains(problem: SoftDomination) -> None:
    case = Prepared.of(problem)
    start = case.groups.fill(problem, problem.forced)  # type: ignore[arg-type]
    keep = swap_while_better(problem, case.service, case.groups, start, NEVER)
    value = problem.objective(keep)
    assert value >= problem.objective(start) * (1 - 1e-12)
    for out in np.flatnonzero(keep):
        for new in np.flatnonzero(~keep):
            other = keep.copy()
            other[out], other[new] = False, True
            if problem.violation(other) is None:
                assert problem.objective(other) <= value * (1 + 1e-8)


@few
@given(problem=any_form, seed=st.integers(0, 9))
def test_every_price_gives_a_bound_and_fixing_loses_nothing_better(problem: SoftDomination, seed: int) -> None:
    case = Prepared.of(problem)
    optimum = solve(problem, "brute")
    relaxed = relax(case, case.groups.fill(problem, problem.forced), iterations=seed * 5)  # type: ignore[arg-type]
    assert relaxed.iterations == 0 or relaxed.bound.value >= optimum.objective * (1 - 1e-12)
    prices = np.random.default_rng(seed).random(problem.n) * problem.importance
    for price in (prices, relaxed.price):
        # any value below the optimum: the optimum is better, so it must survive the fixing
        value = optimum.objective * (1 - 1e-6) - 1e-6
        forced, forbidden = fix_units(case, price, value)
        best = [optimum.keep]
        if optimum.objective > 0:
            assert all(not (forced & ~keep).any() and not (forbidden & keep).any() for keep in best)


@pytest.mark.parametrize("seed", range(3))
def test_prices_prove_most_of_what_greedy_leaves_open(seed: int) -> None:
    problem = nearest(400, seed=seed)
    greedy, lagrangian = solve(problem, "greedy"), solve(problem, "lagrangian")
    assert lagrangian.objective >= greedy.objective
    assert lagrangian.gap <= 0.01 < greedy.gap
    assert lagrangian.bound is not None and lagrangian.bound.source == "Lagrangian relaxation"
    closer = solve(problem, LagrangianFacilityLocation(iterations=1000, gap=0.0))
    assert closer.gap <= lagrangian.gap
    exact = solve(problem, "exact", time_limit=20)
    assert exact.gap <= lagrangian.gap + 1e-9 and exact.stats["fixed"] > 200


def test_exact_takes_any_size_and_says_what_it_knows() -> None:
    problem = nearest(1500, importance=np.ones(1500))
    solution = solve(problem, "exact", time_limit=0.3)
    assert solution.seconds < 2
    assert solution.status in (Status.TIME_LIMIT, Status.OPTIMAL) and solution.gap < 0.05


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["greedy", "lagrangian", "exact"])
def test_time_limits_are_kept(name: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setenv(VARIABLE, "0")
    problem = nearest(3000, degree=16)
    solve(nearest(40), name)  # compiled before the clock starts
    for limit in (0.0, 0.05):
        started = time.process_time()
        solution = solve(problem, name, time_limit=limit)
        assert time.process_time() - started < 1.1 * limit + 1.0
        # greedy may be through with its swaps in 50 ms
        allowed = {Status.TIME_LIMIT, Status.OPTIMAL} | ({Status.FEASIBLE} if name == "greedy" and limit else set())
        assert solution.n_kept == problem.k and solution.status in allowed
        assert solution.bound is not None and solution.bound.value >= solution.objective * (1 - 1e-9)


def test_swaps_can_be_left_out_and_do_not_end_at_64_units() -> None:
    problem = nearest(300)
    bare, swapped = solve(problem, GreedyFacilityLocation(swaps=False)), solve(problem, "greedy")
    assert swapped.objective > bare.objective
    start = np.random.default_rng(0).permutation(300) < 75
    assert solve(problem, "greedy", warm_start=start).objective >= swapped.objective


def test_nothing_to_explain() -> None:
    problem = SoftDomination(*random_graph(30, 0.3, 0), k=5, importance=np.zeros(30))
    for name in ("greedy", "lagrangian", "exact"):
        solution = solve(problem, name)
        assert solution.objective == 0 and solution.status is Status.OPTIMAL


def test_the_guarantee_is_about_what_is_explained() -> None:
    from topoprune_solvers import get_solver

    text = get_solver("greedy", SoftDomination).capabilities.guarantee
    assert "1 - 1/e of the largest explained importance" in text and "nothing about the residual" in text
    assert "with groups: 1/2" in text


@pytest.mark.parametrize(("state", "status"), [("crashed", Status.FAILED), ("killed", Status.FEASIBLE)])
def test_a_program_that_dies_costs_the_proof_and_nothing_else(
    state: Any, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    from topoprune_solvers.budgeted import facility_program
    from topoprune_solvers.native import NativeOutcome

    monkeypatch.setattr(facility_program, "IN_PROCESS", 0)
    problem = SoftDomination(*random_graph(60, 0.5, 1), k=20, importance=np.random.default_rng(1).random(60))
    alive = solve(problem, "milp")
    assert alive.status is Status.OPTIMAL
    died = NativeOutcome(state, message="killed by signal 9")
    monkeypatch.setattr(facility_program, "run_killable", lambda *arguments, **options: died)
    solution = solve(problem, "milp")
    assert solution.status is status and solution.objective <= alive.objective
    assert solution.bound is not None and solution.bound.value >= alive.objective

"""Laws of layer budgets (problem E), over every available solver."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from topoprune_solvers import Infeasible, MultipleChoiceKnapsack, available_solvers, get_solver, solve
from topoprune_solvers.knapsack.core import NoChoiceFound, core_of
from topoprune_solvers.knapsack.dual import best_prices, lagrangian_bound, reduced_damage
from topoprune_solvers.knapsack.exact import close_gap, tightened
from topoprune_solvers.knapsack.greedy import hull_steps
from topoprune_solvers.knapsack.halves import best_pair, partial_picks, split_sites
from topoprune_solvers.knapsack.layers import price_fan, sweep
from topoprune_solvers.knapsack.local_search import best_repaired
from topoprune_solvers.solution import Status

SOLVERS = available_solvers(MultipleChoiceKnapsack)
EXACT = [name for name in SOLVERS if get_solver(name, MultipleChoiceKnapsack).capabilities.exact]
HEURISTIC = [name for name in SOLVERS if name not in EXACT]
LAW = settings(max_examples=400, deadline=None)
Problem = MultipleChoiceKnapsack


def accepts(name: str, problem: Problem) -> bool:
    try:
        return name != "dp" or core_of(problem).resource.size < 2
    except Infeasible:
        return True  # `dp` says so too


@st.composite
def problems(draw: st.DrawFn, resources: int | None = None, feasible: bool = True, most: int = 10) -> Problem:
    """Small problems; budgets lie around what a random pick spends, so that they often bind and sometimes conflict."""
    r = resources or draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda s: sum(s) <= most))
    # Few distinct values make ties common; floats make them rare; zeros and large numbers are the edges.
    pool = st.sampled_from(
        [st.integers(0, 3).map(float), st.floats(0, 2, width=32), st.just(0.0), st.sampled_from([1e-9, 1.0, 1e9])]
    )
    damage_of, cost_of = draw(pool), draw(pool)
    sign = draw(st.sampled_from([1.0, 1.0, -1.0]))
    n = sum(sizes)
    damage = sign * np.array(draw(st.lists(damage_of, min_size=n, max_size=n)))
    cost = np.array(draw(st.lists(cost_of, min_size=n * r, max_size=n * r))).reshape(n, r)
    start = np.concatenate([[0], np.cumsum(sizes)])
    pick = np.array([draw(st.integers(a, b - 1)) for a, b in pairwise(start)])
    budget = cost[pick].sum(axis=0) * draw(st.sampled_from([1.0, 1.0, 1.2]))
    if not feasible:
        budget = budget * np.array([draw(st.sampled_from([0.7, 1.0])) for _ in range(r)])
    try:
        return Problem(damage, cost, budget, start)
    except Infeasible:
        reject()


def larger(seed: int, resources: int = 2, sites: int = 12, choices: int = 8, share: float = 0.5) -> Problem:
    rng = np.random.default_rng(seed)
    damages, costs = [], []
    for _ in range(sites):
        damages.append(np.sort(rng.exponential(size=choices))[::-1] * rng.lognormal())
        costs.append(np.sort(rng.random((choices, resources)), axis=0) * rng.lognormal())
    low, high = (np.sum([curve[end] for curve in costs], axis=0) for end in (0, -1))
    return Problem.from_curves(damages, costs, low + share * (high - low))


def test_the_issues_solvers_are_registered() -> None:
    assert {"brute", "cp-sat", "dp", "exact", "greedy", "lagrangian", "random", "uniform"} <= set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
@LAW
@given(problem=problems())
def test_bound_optimum_objective(name: str, problem: Problem) -> None:
    """Bound <= optimum <= objective; `solve` verifies feasibility and the numbers themselves."""
    assume(accepts(name, problem))
    optimum = solve(problem, "brute").objective
    try:
        solution = solve(problem, name)
    except NoChoiceFound:
        assert name in HEURISTIC
        return
    slack = 1e-9 * max(abs(optimum), float(np.abs(problem.damage).max()))
    assert solution.objective >= optimum
    if solution.bound is not None:
        assert solution.bound.value <= optimum + slack
    if name in EXACT:
        assert solution.objective <= optimum + slack
        assert solution.bound is not None
        assert solution.status is Status.OPTIMAL or solution.objective - solution.bound.value <= slack


@pytest.mark.parametrize("name", SOLVERS)
@LAW
@given(problem=problems(feasible=False))
def test_infeasible_is_claimed_only_when_true_and_always_by_exact_solvers(name: str, problem: Problem) -> None:
    try:
        assume(accepts(name, problem))
        solve(problem, "brute")
        exists = True
    except Infeasible:
        exists = False
    try:
        solve(problem, name)
    except NoChoiceFound as error:
        assert name in HEURISTIC and "does not prove" in str(error)
    except Infeasible:
        assert not exists
    else:
        assert exists


def test_budgets_in_conflict() -> None:
    """Each budget alone can be met, both together cannot."""
    problem = Problem([0.0, 0.0], [[0.0, 2.0], [2.0, 0.0]], [1.0, 1.0], [0, 2])
    for name in EXACT:
        if accepts(name, problem):
            with pytest.raises(Infeasible, match="budgets"):
                solve(problem, name)
    # No price proves this conflict, for half of each choice would fit.
    harder = Problem(np.zeros(4), [[0.0, 2.0], [2.0, 0.0]] * 2, [3.0, 1.0], [0, 2, 4])
    for name in EXACT:
        if accepts(name, harder):
            with pytest.raises(Infeasible):
                solve(harder, name)
    for name in HEURISTIC:
        with pytest.raises((Infeasible, NoChoiceFound)):
            solve(harder, name)


@pytest.mark.parametrize("name", EXACT)
@LAW
@given(problem=problems(), seed=st.integers(0, 1000))
def test_relabelling_leaves_an_exact_objective_unchanged(name: str, problem: Problem, seed: int) -> None:
    assume(accepts(name, problem))
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.arange(a, b)) for a, b in pairwise(problem.start)]
    sites = rng.permutation(problem.sites)
    resources = rng.permutation(problem.budget.size)
    relabelled = Problem.from_curves(
        [problem.damage[order[s]] for s in sites],
        [problem.cost[order[s]][:, resources] for s in sites],
        problem.budget[resources],
    )
    scale = max(float(np.abs(problem.damage).max()), 1e-300)
    assert solve(relabelled, name).objective == pytest.approx(
        solve(problem, name).objective, rel=1e-9, abs=1e-9 * scale
    )


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_exact_solvers_agree_beyond_brute_size(resources: int, share: float) -> None:
    problem = larger(7, resources, share=share)
    exact = solve(problem, "exact")
    assert exact.status is Status.OPTIMAL
    assert solve(problem, "cp-sat").objective == pytest.approx(exact.objective, rel=1e-9)
    if resources == 1:
        assert solve(problem, "dp").objective == pytest.approx(exact.objective, rel=1e-9)
    for name in HEURISTIC:
        solution = solve(problem, name)
        assert solution.objective >= exact.objective * (1 - 1e-9)
        assert solution.bound is None or solution.bound.value <= exact.objective * (1 + 1e-12)
    assert solve(problem, "lagrangian").objective <= 1.1 * exact.objective


@LAW
@given(problem=problems(), price=st.lists(st.floats(0, 1e3), min_size=3, max_size=3))
def test_no_price_beats_the_best_ones(problem: Problem, price: list[float]) -> None:
    """Every price gives a valid bound, and `best_prices` the highest up to its convergence."""
    core = core_of(problem)
    dual = best_prices(core)
    value, _ = lagrangian_bound(core, np.array(price[: core.resource.size]))
    optimum = solve(problem, "brute").objective
    scale = float(np.abs(problem.damage).sum()) + float(core.outer.sum()) * 1e-3 + 1e-300
    assert value <= optimum and dual.value <= optimum
    assert dual.value >= value - 1e-5 * scale


@pytest.mark.parametrize("resources", [1, 2, 3])
def test_the_dual_equals_the_lp_relaxation(resources: int) -> None:
    from scipy.optimize import linprog

    problem = larger(3, resources)
    dual = best_prices(core_of(problem))
    member = (np.repeat(np.arange(problem.sites), np.diff(problem.start)) == np.arange(problem.sites)[:, None]) * 1.0
    relaxed = linprog(problem.damage, problem.cost.T, problem.budget, member, np.ones(problem.sites))
    assert dual.value == pytest.approx(relaxed.fun, rel=1e-6)
    assert dual.value <= relaxed.fun * (1 + 1e-9)


@LAW
@given(problem=problems(resources=1))
def test_greedy_with_one_budget_proves_the_lp_bound(problem: Problem) -> None:
    core = core_of(problem)
    greedy, best = solve(problem, "greedy"), best_prices(core)
    assert greedy.bound is not None
    assert greedy.bound.value == pytest.approx(best.value, rel=1e-6, abs=1e-6 * float(np.abs(problem.damage).sum()))


@LAW
@given(problem=problems(resources=1))
def test_hull_steps_are_convex_and_end_at_the_least_damage(problem: Problem) -> None:
    core = core_of(problem)
    if core.resource.size == 0:
        return  # the budget cannot bind
    first, steps, ratio = hull_steps(core, np.ones(1))
    assert np.all(np.diff(ratio) <= 0) and np.all(ratio > 0)
    last = first.copy()
    for step in steps.tolist():
        assert core.damage[step] < core.damage[last[core.site[step]]]
        assert core.cost[step, 0] >= core.cost[last[core.site[step]], 0]
        last[core.site[step]] = step
    assert np.array_equal(core.damage[last], core.site_min(core.damage))


@pytest.mark.parametrize("resources", [1, 2, 3])
@LAW
@given(data=st.data())
def test_meet_in_the_middle_finds_the_optimum_within_reach(resources: int, data: st.DataObject) -> None:
    problem = data.draw(problems(resources=resources))
    core = core_of(problem)
    dual = best_prices(core)
    optimum = solve(problem, "brute").objective
    rise = reduced_damage(core, dual.price)
    reach = data.draw(st.sampled_from([1.01, 2.0])) * (optimum - dual.value) + 1e-6 * float(np.abs(core.damage).sum())
    if not reach > 0:
        return  # no damage anywhere
    halves = [partial_picks(core, sites, rise, reach, most=10**6) for sites in split_sites(core, rise)]
    assert halves[0] is not None and halves[1] is not None
    found = best_pair(core, halves[0], halves[1], dual.price, reach)
    assert found.finished and found.pick is not None
    scale = float(np.abs(problem.damage).sum())
    assert core.objective(found.pick) == pytest.approx(optimum, rel=1e-9, abs=1e-9 * scale)
    assert dual.value + found.excess == pytest.approx(optimum, rel=1e-9, abs=1e-9 * scale)


@pytest.mark.parametrize("seed", range(3))
def test_numba_changes_no_answer(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = larger(seed, resources=1 + seed, sites=20, choices=10)
    answers = []
    for setting in ("1", "0"):
        monkeypatch.setenv("TOPOPRUNE_NUMBA", setting)
        answers.append(solve(problem, "exact"))
    assert np.array_equal(answers[0].keep, answers[1].keep)
    assert answers[0].bound == answers[1].bound


@pytest.mark.parametrize("width", [1, 3, 1000])
@LAW
@given(problem=problems())
def test_a_narrow_sweep_knows_what_it_dropped(width: int, problem: Problem) -> None:
    core = core_of(problem)
    optimum = solve(problem, "brute").objective
    result = sweep(core, price_fan(best_prices(core).price), math.inf, width=width)
    scale = float(np.abs(problem.damage).sum())
    assert result.bound <= optimum + 1e-9 * scale
    if result.dropped == 0:
        assert result.pick is not None
        assert core.objective(result.pick) == pytest.approx(optimum, rel=1e-9, abs=1e-9 * scale)


@pytest.mark.parametrize("seed", range(4))
def test_tightening_keeps_every_pick_below_the_cut(seed: int) -> None:
    problem = larger(seed)
    core = core_of(problem)
    dual = best_prices(core)
    exact = solve(problem, "exact")
    above = tightened(core, dual, exact.objective * (1 + 1e-7))
    assert above is not None
    assert above[0].pick_of(exact.keep) is not None
    assert dual.value <= above[1].value <= exact.objective * (1 + 1e-7)
    assert above[0].damage.size < core.damage.size
    start = best_repaired(core, dual.picks, dual.price)
    closing = close_gap(core, dual, start)
    assert closing.proven and core.objective(closing.pick) == pytest.approx(exact.objective, rel=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_seed_repeats_exactly(name: str) -> None:
    problem = larger(1, resources=1, sites=4, choices=5)
    first, second = (solve(problem, name, seed=3) for _ in range(2))
    assert np.array_equal(first.keep, second.keep) and first.bound == second.bound


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("brute", "random", "uniform")])
def test_a_warm_start_is_never_lost(name: str) -> None:
    problem = larger(2, resources=1, sites=8)
    optimum = solve(problem, "exact")
    warm = solve(problem, name, warm_start=optimum.keep)
    assert warm.objective == pytest.approx(optimum.objective, rel=1e-9)
    with pytest.raises(ValueError, match="warm_start has shape"):
        solve(problem, name, warm_start=optimum.keep[:-1])


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("brute", "dp")])
@pytest.mark.parametrize("limit", [0.0, 0.3])
def test_time_limit_is_kept(name: str, limit: float) -> None:
    problem = larger(0, resources=3, sites=120, choices=40)
    solve(larger(0), name)  # imports
    started = time.perf_counter()
    solution = solve(problem, name, time_limit=limit)
    assert time.perf_counter() - started <= 1.1 * limit + 1.0  # a second: shared cores
    assert solution.bound is None or solution.bound.value <= solution.objective


def test_dp_refuses_two_budgets_that_bind_but_not_one_that_cannot() -> None:
    problem = larger(0)
    with pytest.raises(ValueError, match="'dp' takes one budget, 2 of this problem can bind; use 'exact'"):
        solve(problem, "dp")
    loose = Problem(problem.damage, problem.cost, [problem.budget[0], problem.cost[:, 1].sum()], problem.start)
    assert solve(loose, "dp").objective == pytest.approx(solve(loose, "exact").objective, rel=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_degenerate_sizes(name: str) -> None:
    empty = Problem.from_curves([], [], [1.0, 2.0])
    assert solve(empty, name).objective == 0.0 and empty.n == 0
    single = Problem([-2.0], [3.0], 3.0, [0, 1])
    assert solve(single, name).keep.tolist() == [True]
    forced = Problem([5.0, 1.0, 7.0], [[1.0], [1.0], [1.0]], [3.0], [0, 1, 2, 3])
    assert solve(forced, name).objective == 13.0
    free = Problem([5.0, 1.0], [0.0, 0.0], 0.0, [0, 2])
    assert solve(free, name).objective == (1.0 if name not in ("random", "uniform") else solve(free, name).objective)
    zero = Problem([5.0, 1.0], [0.0, 1e-300], 0.0, [0, 2])
    assert solve(zero, name).objective == 5.0


@pytest.mark.parametrize("name", EXACT)
def test_equal_layers_with_many_ties(name: str) -> None:
    """Forty equal sites: astronomically many optimal picks, one optimum."""
    if name == "brute":
        return
    sites, resources = 40, 1 if name == "dp" else 2
    damage, cost = np.array([9.0, 4.0, 1.0, 0.0]), np.array([1.0, 2.0, 3.0, 4.0])
    problem = Problem.from_curves([damage] * sites, [np.column_stack([cost] * resources)] * sites, [101.0] * resources)
    solution = solve(problem, name, time_limit=20)
    assert solution.status is Status.OPTIMAL
    # 101 = 80 + 21: every site at 2, then 21 of them at 3.
    assert solution.objective == 19 * 4.0 + 21 * 1.0


def test_a_budget_summed_in_another_order_still_holds_and_a_whole_unit_more_does_not() -> None:
    cost = np.array([0.1] * 10 + [0.7])
    problem = Problem(np.zeros(11), cost, float(np.sum(cost[::-1])) - 1e-16, np.arange(12))
    assert problem.violation(np.ones(11, dtype=bool)) is None
    with pytest.raises(Infeasible):
        Problem(np.zeros(2), [5e8, 5e8 + 1], 1e9, [0, 1, 2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (([math.nan], [1.0], 1.0, [0, 1]), "damage must be finite, found nan at index 0"),
        (([1.0], [math.inf], 1.0, [0, 1]), "cost must be finite"),
        (([1.0], [1.0], math.nan, [0, 1]), "budget must be finite"),
        (([1.0], [-1.0], 1.0, [0, 1]), "cost must be >= 0, found -1 at choice 0"),
        (([1.0], [1.0], -1.0, [0, 1]), "budget must be >= 0"),
        (([1.0], [[1.0, 2.0]], 1.0, [0, 1]), r"cost has shape \(1, 2\), expected \(1, 1\)"),
        (([[1.0]], [1.0], 1.0, [0, 1]), r"damage must be \(n,\)"),
        (([1.0], [1.0], [], [0, 1]), r"budget must be \(r,\)"),
        (([1.0], [1.0], 1.0, [0, 0, 1]), "site 0 has no choices"),
        (([1.0], [1.0], 1.0, [0, 2, 1]), "start must not decrease"),
        (([1.0], [1.0], 1.0, [0]), "start must run from 0 to the number of choices 1"),
        (([1.0], [1.0], 1.0, [0, 0.5, 1]), "whole offsets"),
        (([1e308, 1e308], [1.0, 1.0], 1.0, [0, 2]), "damage is too large to add up"),
    ],
)
def test_bad_input_is_named(fields: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem(*fields)


def test_bad_curves_are_named() -> None:
    with pytest.raises(ValueError, match="2 damage curves, but 1 cost curves"):
        Problem.from_curves([[1.0], [2.0]], [[1.0]], 1.0)
    with pytest.raises(ValueError, match=r"site 1: damage has shape \(2,\) and cost \(1, 1\)"):
        Problem.from_curves([[1.0], [2.0, 3.0]], [[1.0], [1.0]], 1.0)
    with pytest.raises(Infeasible, match="resource 1: the cheapest choice of each site costs 3"):
        Problem.from_curves([[1.0], [2.0]], [[[0.0, 1.0]], [[0.0, 2.0]]], [1.0, 2.5])


def test_the_checker_names_what_is_wrong() -> None:
    problem = Problem.from_curves([[5.0, 1.0], [3.0, 0.0]], [[1.0, 4.0], [2.0, 4.0]], 6.0)
    assert problem.violation(problem.mask([0, 0])) is None
    assert "site 0 has 2 choices" in str(problem.violation(np.ones(4, dtype=bool)))
    assert "site 1 has 0 choices" in str(problem.violation(np.array([True, False, False, False])))
    assert "resource 0: the choices cost 8.0, the budget is 6.0" in str(problem.violation(problem.mask([1, 1])))
    assert "keep has shape" in str(problem.violation(np.ones(3, dtype=bool)))
    assert problem.chosen(problem.mask([1, 0])).tolist() == [1, 0]
    with pytest.raises(ValueError, match="expected exactly one"):
        problem.chosen(np.zeros(4, dtype=bool))
    with pytest.raises(ValueError, match="expected 2 indices"):
        problem.mask([2, 0])

"""Laws of the exact path for large instances and of the native solvers it races."""

from __future__ import annotations

import importlib
import math
import time
from typing import Any

import numpy as np
import pytest
from graph_strategies import random_graph, unit_problems
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import DominatingSet, Status, get_solver, solve
from topoprune_solvers.compiled import enabled
from topoprune_solvers.domination import exact_large as large
from topoprune_solvers.domination import tally as tallies
from topoprune_solvers.domination.covering import SetCover, cover_of, open_part
from topoprune_solvers.domination.exact_large import exact_large
from topoprune_solvers.domination.few_picks import cover_of_at_most
from topoprune_solvers.domination.greedy import greedy_choice
from topoprune_solvers.domination.linear_relaxation import linear_relaxation, price_bound
from topoprune_solvers.domination.lp_rounding import round_relaxation
from topoprune_solvers.domination.tally import Tally, race_covers, run_cover
from topoprune_solvers.native import NativeTask
from topoprune_solvers.result import Deadline

NATIVE = [
    name
    for name in ("cp-sat", "milp", "max-sat", "lp-rounding", "set-cover")
    if all(importlib.util.find_spec(module) for module in get_solver(name, DominatingSet).capabilities.requires)
]
EXACT = [name for name in NATIVE if get_solver(name, DominatingSet).capabilities.exact]


def problem_of(n: int, density: float, seed: int, *, demands: bool = False, masks: bool = False) -> DominatingSet:
    """A random graph with random integral or float costs, demands and masks that leave it solvable."""
    rng = np.random.default_rng(seed)
    graph = random_graph(n, density, seed=seed)
    degree = np.diff(graph[0])
    cost = np.ones(n) if seed % 3 == 0 else rng.integers(1, 9, n) * (1.0 if seed % 3 == 1 else 0.37)
    demand = np.minimum(rng.integers(0, 4, n), degree + 1) if demands else np.ones(n, dtype=np.int64)
    forced = rng.random(n) < (0.05 if masks else 0.0)
    forbidden = (rng.random(n) < (0.1 if masks else 0.0)) & ~forced
    plain = DominatingSet(*graph)
    short = plain.counts(~forbidden) < demand
    # Whoever would be left short gets its neighbourhood back.
    forbidden &= plain.counts(short) == 0
    return DominatingSet(*graph, cost=cost, demand=demand, forced=forced, forbidden=forbidden)


def instance_of(problem: DominatingSet) -> SetCover:
    return open_part(cover_of(problem)).instance


CASES = [
    (n, density, seed, demands, masks)
    for seed, (n, density) in enumerate([(20, 0.2), (40, 0.1), (70, 0.06), (120, 0.03), (90, 0.05), (60, 0.15)])
    for demands, masks in [(False, False), (True, True)]
]


@pytest.mark.parametrize(("n", "density", "seed", "demands", "masks"), CASES)
def test_native_solvers_agree_with_exact(n: int, density: float, seed: int, demands: bool, masks: bool) -> None:
    problem = problem_of(n, density, seed, demands=demands, masks=masks)
    optimum = None
    for name in [*EXACT, *(name for name in NATIVE if name not in EXACT)]:
        if demands and "demand" in get_solver(name, DominatingSet).capabilities.lacks:
            with pytest.raises(ValueError, match="demand"):
                get_solver(name, DominatingSet).solve(problem)
            continue
        solution = solve(problem, name, time_limit=1.0 if name == "set-cover" else None)  # verified inside
        if name in EXACT:
            assert solution.status is Status.OPTIMAL
            optimum = solution.objective if optimum is None else optimum
            assert math.isclose(solution.objective, optimum, rel_tol=1e-6)
        assert optimum is not None
        assert solution.objective >= optimum * (1 - 1e-6)
        if solution.bound is not None:
            assert solution.bound.value <= optimum * (1 + 1e-6)


@pytest.mark.parametrize(("n", "density", "seed", "demands", "masks"), CASES)
def test_exact_large_is_exact(n: int, density: float, seed: int, demands: bool, masks: bool) -> None:
    problem = problem_of(n, density, seed, demands=demands, masks=masks)
    instance = instance_of(problem)
    outcome = exact_large(instance)
    assert outcome.chosen is not None and instance.is_cover(outcome.chosen)
    assert outcome.complete and outcome.failed is None
    fixed = open_part(cover_of(problem)).fixed
    value = instance.value(outcome.chosen)
    assert math.isclose(outcome.bound, value, rel_tol=1e-9)
    assert math.isclose(value + fixed, solve(problem, "cp-sat").objective, rel_tol=1e-6)


@settings(max_examples=40, deadline=None)
@given(problem=unit_problems(DominatingSet))
def test_exact_large_on_tiny_instances(problem: DominatingSet) -> None:
    part = open_part(cover_of(problem))
    outcome = exact_large(part.instance)
    assert outcome.complete and outcome.chosen is not None and part.instance.is_cover(outcome.chosen)
    assert math.isclose(
        part.fixed + part.instance.value(outcome.chosen), solve(problem, "brute").objective, rel_tol=1e-6
    )


@pytest.mark.parametrize("without", [(), ("pysat",), ("ortools",), ("ortools", "pysat")])
def test_the_race_needs_no_single_solver(without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    available = large._has
    monkeypatch.setattr(large, "_has", lambda module: module not in without and available(module))
    monkeypatch.setattr(large, "SMALL", 0)
    monkeypatch.setattr(large, "MEDIUM_ENTRIES", 0)
    instance = instance_of(problem_of(110, 0.04, 3))
    outcome = exact_large(instance)
    assert outcome.complete and outcome.chosen is not None
    assert math.isclose(instance.value(outcome.chosen), exact_large(instance).bound, rel_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 14), density=st.floats(0.05, 0.9), compiled=st.booleans())
def test_few_picks_decide_as_brute_force_does(seed: int, n: int, density: float, compiled: bool) -> None:
    problem = DominatingSet(*random_graph(n, density, seed=seed))
    instance = instance_of(problem)
    optimum = int(solve(problem, "brute").objective)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOPOPRUNE_NUMBA", "1" if compiled else "0")
        for picks in range(optimum + 2):
            chosen, complete, _ = cover_of_at_most(instance, picks)
            assert complete and (chosen is None) == (picks < optimum)
            if chosen is not None:
                assert instance.is_cover(chosen) and chosen.sum() <= picks


def test_few_picks_compiled_and_in_python_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # 150 candidates: several words, the last one partly filled.
    instance = instance_of(DominatingSet(*random_graph(150, 0.15, seed=4)))
    fast = [cover_of_at_most(instance, picks) for picks in range(3, 10)]
    monkeypatch.setenv("TOPOPRUNE_NUMBA", "0")
    for picks, (chosen, complete, nodes) in zip(range(3, 10), fast, strict=True):
        if nodes < 2000:
            again = cover_of_at_most(instance, picks)
            assert again[1:] == (complete, nodes)
            assert (chosen is None) == (again[0] is None)
            assert chosen is None or np.array_equal(chosen, again[0])


@pytest.mark.skipif(not enabled(), reason="minutes without numba")
def test_few_picks_prove_what_the_relaxation_cannot() -> None:
    instance = instance_of(DominatingSet(*random_graph(130, 0.3, seed=0)))
    outcome = exact_large(instance)
    assert outcome.complete and outcome.source == "search over few picks"
    relaxation = linear_relaxation(instance)
    assert relaxation is not None and relaxation.bound < outcome.bound


def test_a_cutoff_asks_for_less_than_the_optimum() -> None:
    instance = instance_of(problem_of(120, 0.03, 3))
    optimum = exact_large(instance).bound
    below = exact_large(instance, cutoff=optimum - 1)
    assert below.complete and below.bound > optimum - 1
    above = exact_large(instance, cutoff=optimum + 3)
    assert above.complete and above.chosen is not None and instance.value(above.chosen) <= optimum + 3
    assert above.bound <= optimum


def test_a_start_is_never_made_worse() -> None:
    instance = instance_of(problem_of(400, 0.3, 0))
    best = exact_large(instance, deadline=Deadline.after(2.0))
    assert best.chosen is not None
    again = exact_large(instance, start=best.chosen, deadline=Deadline.after(0.0))
    assert again.chosen is not None and instance.value(again.chosen) <= instance.value(best.chosen)


@pytest.mark.parametrize("n", [0, 1])
def test_degenerate_instances(n: int) -> None:
    problem = DominatingSet.from_edges(n, [])
    for name in NATIVE:
        assert solve(problem, name).objective == n
        assert solve(problem, name, time_limit=0.0).objective == n
    outcome = exact_large(instance_of(problem))
    assert outcome.complete and outcome.bound == n
    forced = DominatingSet.from_edges(3, [(0, 1)], forced=np.ones(3, dtype=bool))
    assert exact_large(instance_of(forced)).bound == 0


def grid(side: int) -> DominatingSet:
    number = np.arange(side * side).reshape(side, side)
    right = np.stack([number[:, :-1].ravel(), number[:, 1:].ravel()], axis=1)
    down = np.stack([number[:-1].ravel(), number[1:].ravel()], axis=1)
    return DominatingSet.from_edges(side * side, np.concatenate([right, down]))


@pytest.mark.parametrize("name", NATIVE)
def test_time_limits_are_kept(name: str) -> None:
    # Noisy machines: the promise is 10 % + 0.2 s.
    for problem in (DominatingSet(*random_graph(400, 0.3, seed=1)), grid(100)):
        solve(problem, "greedy")  # imports and compiles
        started = time.perf_counter()
        solution = solve(problem, name, time_limit=1.0)
        assert time.perf_counter() - started < 1.0 * 1.1 + 1.5
        assert solution.status is not Status.FAILED


def test_exact_large_keeps_its_time_limit() -> None:
    for problem in (DominatingSet(*random_graph(400, 0.3, seed=1)), grid(100)):
        instance = instance_of(problem)
        started = time.perf_counter()
        outcome = exact_large(instance, deadline=Deadline.after(1.0))
        assert time.perf_counter() - started < 1.0 * 1.1 + 1.5
        assert outcome.chosen is not None and instance.is_cover(outcome.chosen)
        assert outcome.bound <= instance.value(outcome.chosen)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), demands=st.booleans(), noise=st.floats(0, 2))
def test_any_prices_bound_from_below(seed: int, demands: bool, noise: float) -> None:
    problem = problem_of(14, 0.3, seed, demands=demands, masks=True)
    part = open_part(cover_of(problem))
    optimum = solve(problem, "brute").objective - part.fixed
    relaxation = linear_relaxation(part.instance)
    assert relaxation is not None
    assert relaxation.bound <= optimum * (1 + 1e-12)
    rng = np.random.default_rng(seed)
    prices = relaxation.prices + noise * rng.normal(size=relaxation.prices.size)
    assert price_bound(part.instance, prices) <= optimum * (1 + 1e-12)
    wild = np.where(rng.random(prices.size) < 0.2, np.nan, prices)
    assert price_bound(part.instance, wild) <= optimum * (1 + 1e-12)
    # The certificate loses next to nothing against what HiGHS claims.
    claimed = float(part.instance.cost @ relaxation.x)
    assert relaxation.bound >= claimed - 1e-6 * max(1.0, claimed)
    for chosen in round_relaxation(part.instance, relaxation.x, trials=3, seed=seed):
        assert part.instance.is_cover(chosen)


def test_a_relaxation_out_of_time_is_none() -> None:
    assert linear_relaxation(instance_of(grid(60)), Deadline.after(0.0)) is None
    started = time.perf_counter()
    linear_relaxation(instance_of(grid(200)), Deadline.after(0.5))
    assert time.perf_counter() - started < 3.0


@pytest.mark.parametrize(
    ("name", "crime"),
    [
        *(("cp-sat", crime) for crime in ("segfault", "killed", "leave", "fail", "fill_memory", "write_garbage")),
        ("milp", "killed"),
        ("max-sat", "segfault"),
    ],
)
def test_a_crash_is_a_status_and_the_incumbent_stays(name: str, crime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in NATIVE:
        pytest.skip(f"{name} is not installed")
    module = importlib.import_module(f"topoprune_solvers.domination.{name.replace('-', '_')}")

    def broken(*arguments: Any, **settings: Any) -> NativeTask:
        return NativeTask(f"native_tasks:{crime}")

    monkeypatch.setattr(module, f"{name.replace('-', '_')}_task", broken)
    monkeypatch.setattr(tallies, "LOCAL_ENTRIES", 0)
    problem = problem_of(120, 0.05, 0)
    solution = solve(problem, name)
    assert solution.status is Status.FAILED
    assert solution.objective == solve(problem, "greedy").objective
    assert solution.bound is not None and solution.stats["failures"]


def test_what_a_crashed_solver_sent_counts_and_nonsense_does_not() -> None:
    instance = instance_of(problem_of(60, 0.1, 0))
    start = np.ones(instance.n_candidates, dtype=bool)
    better = greedy_choice(instance)
    tally = Tally(instance, start)
    race_covers(tally, [NativeTask("native_tasks:sleep_after", (("cover", better),))], deadline=Deadline.after(2.0))
    assert tally.value == instance.value(better)
    assert not tally.offer(np.zeros(instance.n_candidates, dtype=bool), "nobody")
    assert not tally.offer(np.ones(3, dtype=bool), "nobody")
    assert not tally.raise_bound(math.nan, "nobody")
    tally.receive("nobody", "garbage")
    run_cover(tally, NativeTask("native_tasks:fail"), apart=False)
    assert tally.failures[0].startswith("nobody: sent 'garbage'")
    assert tally.failures[1:] == ["native_tasks:fail: RuntimeError: no such thing"]


def test_exact_large_survives_the_failure_of_all_provers(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **settings: Any) -> NativeTask:
        return NativeTask("native_tasks:segfault", name="broken")

    for name in ("max_sat_task", "milp_task"):
        monkeypatch.setattr(large, name, broken)
    monkeypatch.setattr(large, "_has", lambda module: module == "pysat")
    monkeypatch.setattr(large, "MEDIUM_ENTRIES", 0)
    monkeypatch.setattr(large, "SEARCH_SECONDS", 0.5)
    instance = instance_of(problem_of(150, 0.05, 0))
    outcome = exact_large(instance)
    assert outcome.chosen is not None and instance.is_cover(outcome.chosen)
    assert not outcome.complete and outcome.failed is not None and "SIGSEGV" in outcome.failed


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from topoprune_solvers import registry

    real = registry.find_spec
    monkeypatch.setattr(registry, "find_spec", lambda module: None if module == "pysat" else real(module))
    with pytest.raises(ValueError, match=r"max-sat.*(pysat|sat\])"):
        get_solver("max-sat", DominatingSet)

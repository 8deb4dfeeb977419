"""Laws of the row-weighting local search: a cover at any time, repeatable, the same with and without numba."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graph_strategies import random_graph, unit_problems
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import DominatingSet, Status, get_solver, solve
from topoprune_solvers.compiled import VARIABLE
from topoprune_solvers.domination.covering import SetCover, cover_of, open_part
from topoprune_solvers.domination.greedy import greedy_choice
from topoprune_solvers.domination.local_search import LocalSearchDominatingSet, RowWeighting, local_search
from topoprune_solvers.domination.reductions import reduce_cover
from topoprune_solvers.result import Deadline

COSTS = ["unit", "integers", "floats"]


def problem(kind: str, demand: int, n: int = 120, density: float = 0.05) -> DominatingSet:
    rng = np.random.default_rng(7)
    cost = {"unit": np.ones(n), "integers": rng.integers(1, 6, n), "floats": rng.random(n) + 0.1}[kind]
    plain = DominatingSet(*random_graph(n, density, seed=3))
    room = plain.counts(~plain.forbidden)  # type: ignore[operator]
    return DominatingSet(plain.indptr, plain.indices, cost=cost.astype(float), demand=np.minimum(demand, room))


def instance(kind: str, demand: int) -> SetCover:
    return open_part(cover_of(problem(kind, demand))).instance


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let weights be halved every 120 steps instead of every hundred thousand."""
    monkeypatch.setattr("topoprune_solvers.domination.local_search.RESOLUTION", 0.1)


@pytest.mark.parametrize("demand", [1, 2, 3])
@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.usefixtures("coarse")
def test_the_books_are_kept(kind: str, demand: int) -> None:
    """After any number of steps the state equals what a recount from its chosen candidates gives."""
    cover = instance(kind, demand)
    search = RowWeighting(cover, greedy_choice(cover), seed=1)
    for steps in (1, 1, 1, 40, 77, 400):
        before = search.value
        search.run(max_steps=steps)
        state = search.state()
        chosen = state["chosen"] == 1
        count = cover.counts(chosen)
        short = np.flatnonzero(count < cover.demand)
        owner = np.repeat(np.arange(cover.n_elements), np.diff(cover.row_start))
        helps = np.where(chosen[cover.row], (count <= cover.demand)[owner], (count < cover.demand)[owner])
        score = np.bincount(cover.row, weights=helps * state["weight"][owner], minlength=cover.n_candidates)
        assert np.array_equal(state["count"], count) and np.array_equal(state["score"], score)
        assert sorted(state["bare"]) == short.tolist()
        assert sorted(state["heap"]) == np.flatnonzero(chosen).tolist()
        assert math.isclose(state["cost"], cover.value(chosen))
        keys = [(score[j] / cover.cost[j], state["stamp"][j], j) for j in state["heap"]]
        parent = [keys[(position - 1) // 2] for position in range(1, len(keys))]
        assert all(p[0] <= k[0] * (1 + 1e-12) for p, k in zip(parent, keys[1:], strict=True))
        assert cover.is_cover(search.best) and math.isclose(cover.value(search.best), search.value)
        assert search.value <= before


@pytest.mark.parametrize("demand", [1, 2])
@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.usefixtures("coarse")
def test_numba_python_and_any_slicing_take_the_same_steps(
    kind: str, demand: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cover = instance(kind, demand)
    compiled = local_search(cover, seed=5, max_steps=1500)
    sliced = RowWeighting(cover, greedy_choice(cover), seed=5)
    for steps in (1, 499, 1000):
        sliced.run(max_steps=steps)
    monkeypatch.setenv(VARIABLE, "0")
    plain = local_search(cover, seed=5, max_steps=1500)
    assert np.array_equal(compiled, plain) and np.array_equal(compiled, sliced.best)


@pytest.mark.parametrize("kind", COSTS)
def test_without_numba_the_solver_gives_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solver = LocalSearchDominatingSet(max_steps=2000)
    compiled = solve(problem(kind, 1), solver)
    monkeypatch.setenv(VARIABLE, "0")
    plain = solve(problem(kind, 1), solver)
    assert np.array_equal(compiled.keep, plain.keep) and compiled.stats == plain.stats


@settings(max_examples=80, deadline=None)
@given(problem=unit_problems(DominatingSet, demand=True), seed=st.integers(0, 9))
def test_between_the_optimum_and_greedy(problem: DominatingSet, seed: int) -> None:
    best, greedy = solve(problem, "brute").objective, solve(problem, "greedy").objective
    solution = solve(problem, LocalSearchDominatingSet(max_steps=300), seed=seed)
    assert best - 1e-9 * abs(best) <= solution.objective <= greedy
    assert solution.bound is not None and solution.bound.value <= best * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(problem=unit_problems(DominatingSet, max_n=8, demand=True), data=st.data())
def test_a_search_of_the_unreduced_instance(problem: DominatingSet, data: st.DataObject) -> None:
    """Free candidates, forced and forbidden units, any start: the answer is a cover no dearer than the start's."""
    part = open_part(cover_of(problem))
    size = part.instance.n_candidates
    start = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=bool)
    chosen = local_search(part.instance, start, max_steps=200)
    assert part.instance.is_cover(chosen)
    assert part.instance.value(chosen) <= part.instance.value(greedy_choice(part.instance, start)) * (1 + 1e-9)
    assert problem.covered(part.keep(cover_of(problem), chosen)).all()


@pytest.mark.parametrize("kind", COSTS)
def test_beats_greedy_repeats_and_never_loses_its_warm_start(kind: str) -> None:
    graph = problem(kind, 1, n=400, density=0.02)
    solver = LocalSearchDominatingSet(max_steps=30_000)
    first, second = (solve(graph, solver, seed=4) for _ in range(2))
    assert np.array_equal(first.keep, second.keep) and first.bound == second.bound
    assert first.objective < solve(graph, "greedy").objective
    again = solve(graph, LocalSearchDominatingSet(max_steps=0), warm_start=first.keep)
    assert again.objective <= first.objective


def test_stops_at_a_target_and_when_nothing_cheaper_exists() -> None:
    cover = instance("unit", 1)
    goal = cover.value(greedy_choice(cover)) - 1
    search = RowWeighting(cover, greedy_choice(cover))
    assert search.run(target=goal, max_steps=10**6) and search.value == goal
    single = open_part(cover_of(DominatingSet.from_edges(4, [(0, 1), (0, 2), (0, 3)]))).instance
    alone = RowWeighting(single, greedy_choice(single))
    assert alone.run() and alone.exhausted and alone.value == 1


def test_small_parts_are_proven_by_their_bounds() -> None:
    """Cycles resist the reductions; each part's rounded bound proves it."""
    edges = [(9 * part + i, 9 * part + (i + 1) % 9) for part in range(20) for i in range(9)]
    solution = solve(DominatingSet.from_edges(180, edges), "local-search")
    assert solution.status is Status.OPTIMAL and solution.objective == 60 and solution.stats["components"] == 20


@pytest.mark.parametrize("limit", [0.0, 0.2])
def test_time_limits(limit: float) -> None:
    graph = DominatingSet(*random_graph(900, 0.01, seed=2))
    solve(graph, "local-search", time_limit=limit)  # compiles where that has never happened
    solution = solve(graph, "local-search", time_limit=limit)
    assert solution.seconds <= 1.1 * limit + 0.2
    assert solution.status is Status.TIME_LIMIT
    assert solution.objective <= solve(graph, "greedy").objective


def test_a_deadline_that_has_passed_returns_the_start() -> None:
    cover = instance("unit", 1)
    assert np.array_equal(local_search(cover, deadline=Deadline.after(0.0)), greedy_choice(cover))


def test_bad_step_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="max_steps must be an integer >= 0 or None, found -1"):
        LocalSearchDominatingSet(max_steps=-1)
    assert get_solver("local-search", DominatingSet).capabilities.lacks == ()


def test_nothing_to_search() -> None:
    empty = reduce_cover(open_part(cover_of(DominatingSet.from_edges(0, []))).instance).core
    assert local_search(empty, max_steps=10).size == 0
    assert solve(DominatingSet.from_edges(3, [], demand=0), "local-search").objective == 0

"""Laws of problem A; every registered solver is tested by being registered."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from graph_strategies import NAMED, graphs, named_graph, random_graph, relabel, takes, unit_problems
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import DominatingSet, Infeasible, Status, available_solvers, get_solver, solve
from topoprune_solvers.compiled import VARIABLE
from topoprune_solvers.domination import neuroprune
from topoprune_solvers.domination.covering import Cover, cover_of, open_part
from topoprune_solvers.domination.dual_ascent import dual_ascent_bound
from topoprune_solvers.domination.exact import minimum_cover
from topoprune_solvers.domination.greedy import best_greedy_cover, greedy_choice, greedy_cover, prune_redundant
from topoprune_solvers.domination.lagrangian import lagrangian_bound
from topoprune_solvers.domination.neuroprune import neuroprune_as_printed, neuroprune_set
from topoprune_solvers.scaling import integer_costs

SOLVERS = available_solvers(DominatingSet)
EXACT = [name for name in SOLVERS if get_solver(name, DominatingSet).capabilities.exact]
UNLIMITED = [name for name in SOLVERS if get_solver(name, DominatingSet).capabilities.max_units is None]
few = settings(max_examples=50, deadline=None)


def close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-6)


def at_most(left: float, right: float) -> bool:
    return left <= right or close(left, right)


def naive_greedy(cover: Cover) -> np.ndarray:
    """The slow twin: recount everything before every choice."""
    keep = cover.forced.copy()
    while np.any(bare := cover.counts(keep) < cover.demand):
        gain = cover.counts(bare)
        allowed = [unit for unit in range(cover.n) if not keep[unit] and not cover.forbidden[unit] and gain[unit]]
        price = {unit: cover.cost[unit] / gain[unit] if cover.cost[unit] else -math.inf for unit in allowed}
        keep[min(allowed, key=lambda unit: (price[unit], -gain[unit], unit))] = True
    return keep


def naive_prune(cover: Cover, keep: np.ndarray) -> np.ndarray:
    """The slow twin: recount everything before every drop."""
    keep = keep.copy()
    for unit in sorted(np.flatnonzero(keep & ~cover.forced).tolist(), key=lambda unit: (-cover.cost[unit], -unit)):
        keep[unit] = False
        keep[unit] = bool(np.any(cover.counts(keep) < cover.demand))
    return keep


def problems(name: str, max_n: int = 9) -> st.SearchStrategy[DominatingSet]:
    """Draw problems that a solver takes: with demands unless it lacks them."""
    return unit_problems(DominatingSet, max_n, demand=takes(name, DominatingSet, "demand"))


@pytest.mark.parametrize("name", SOLVERS)
@few
@given(data=st.data())
def test_bound_le_optimum_le_objective(name: str, data: st.DataObject) -> None:
    problem = data.draw(problems(name))
    optimum = solve(problem, "brute").objective
    solution = solve(problem, name)  # verified inside
    assert at_most(optimum, solution.objective)
    if solution.bound is not None:
        assert at_most(solution.bound.value, optimum)
    if name in EXACT:
        assert solution.status is Status.OPTIMAL
    if solution.status is Status.OPTIMAL:
        assert close(solution.objective, optimum)


@pytest.mark.parametrize("name", EXACT)
@few
@given(data=st.data())
def test_relabelling_does_not_change_an_exact_objective(name: str, data: st.DataObject) -> None:
    problem = data.draw(problems(name))
    order = np.array(data.draw(st.permutations(range(problem.n))), dtype=np.int64)
    assert close(solve(problem, name).objective, solve(relabel(problem, order), name).objective)


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 9), data=st.data())
def test_warm_start_time_limit_and_repetition(name: str, seed: int, data: st.DataObject) -> None:
    problem = data.draw(problems(name))
    start = np.array(data.draw(st.lists(st.booleans(), min_size=problem.n, max_size=problem.n)), dtype=bool)
    solve(problem, name, time_limit=1e-7)
    first, second = (solve(problem, name, warm_start=start, seed=seed) for _ in range(2))
    assert np.array_equal(first.keep, second.keep)


@pytest.mark.parametrize("graph", NAMED)
@pytest.mark.parametrize("name", SOLVERS)
def test_named_graphs(name: str, graph: str) -> None:
    n, edges, optimum = named_graph(graph)
    solution = solve(DominatingSet.from_edges(n, edges), name)
    assert solution.objective >= optimum
    if name in EXACT:
        assert solution.objective == optimum and solution.status is Status.OPTIMAL and solution.gap == 0


@pytest.mark.parametrize("name", EXACT)
def test_zero_and_huge_costs(name: str) -> None:
    # A path whose ends are free or ruinous: the middle units decide at a scale of 1e-6.
    edges = [(i, i + 1) for i in range(5)]
    ruinous = DominatingSet.from_edges(6, edges, cost=np.array([1e30, 1e-6, 3e-6, 3e-6, 1e-6, 1e30]))
    assert close(solve(ruinous, name).objective, 2e-6)
    free = DominatingSet.from_edges(6, edges, cost=np.array([0.0, 1e30, 1e30, 2.0, 5.0, 0.0]))
    solution = solve(free, name)
    assert solution.objective == 2.0
    nothing = DominatingSet.from_edges(6, edges, cost=np.zeros(6))
    assert solve(nothing, name).objective == 0 and solve(nothing, name).n_kept <= 3


@pytest.mark.parametrize("name", SOLVERS)
def test_forced_and_forbidden_units(name: str) -> None:
    n, edges, _ = named_graph("star")
    forced, forbidden = np.arange(n) == 3, np.arange(n) == 0
    solution = solve(DominatingSet.from_edges(n, edges, forced=forced, forbidden=forbidden), name)
    assert solution.keep.tolist() == [False] + [True] * 7
    assert solution.dominator is not None and solution.dominator[0] == 1  # ties: lower index


def test_infeasible_inputs_name_the_units() -> None:
    with pytest.raises(Infeasible, match=r"units \[0\] and all their neighbours are forbidden"):
        DominatingSet.from_edges(3, [(0, 1), (1, 2)], forbidden=np.array([True, True, False]))
    with pytest.raises(Infeasible, match="both forced and forbidden"):
        DominatingSet.from_edges(1, [], forced=np.array([True]), forbidden=np.array([True]))
    with pytest.raises(ValueError, match="costs must be >= 0"):
        DominatingSet.from_edges(1, [], cost=np.array([-1.0]))


@pytest.mark.parametrize("demand", [2, 3])
def test_demands_give_redundant_covers(demand: int) -> None:
    """With demand r a cover survives the loss of any r - 1 of its units, as far as degrees allow."""
    n, edges, _ = named_graph("complete")
    for name in SOLVERS:
        if takes(name, DominatingSet, "demand"):
            solution = solve(DominatingSet.from_edges(n, edges, demand=demand), name)
            assert solution.n_kept >= demand
            assert name not in EXACT or solution.n_kept == demand


@settings(max_examples=150, deadline=None)
@given(graph=graphs(max_n=8, distances=False))
def test_neuroprune_is_algorithm_3(graph: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    problem = DominatingSet(*graph)
    closed = [{i, *problem.neighbours(i).tolist()} for i in range(problem.n)]
    dropped = [
        any(closed[i] < closed[j] or (closed[i] == closed[j] and j > i) for j in range(problem.n))
        for i in range(problem.n)
    ]
    printed = neuroprune_as_printed(problem)
    assert np.array_equal(printed, ~np.array(dropped, dtype=bool))
    assert np.array_equal(printed, neuroprune_set(problem))
    assert np.array_equal(printed, solve(problem, "neuroprune").keep)


def test_neuroprune_on_more_units_than_a_word_and_on_the_12_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = DominatingSet(*random_graph(150, 0.02, seed=0))
    printed = neuroprune_as_printed(problem)
    assert np.array_equal(neuroprune_set(problem), printed) and not printed.all()
    monkeypatch.setattr(neuroprune, "BLOCK_BYTES", 1)  # 64 columns at a time
    assert np.array_equal(neuroprune_set(problem), printed)
    cycle = DominatingSet.from_edges(*named_graph("cycle")[:2])
    assert solve(cycle, "neuroprune").n_kept == 12
    assert solve(cycle, "exact").n_kept == 4


@pytest.mark.parametrize("numba", ["1", "0"])
@few
@given(problem=unit_problems(DominatingSet, max_n=12, demand=True))
def test_greedy_and_pruning_equal_their_naive_twins(numba: str, problem: DominatingSet) -> None:
    cover = cover_of(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, numba)
        keep = greedy_cover(cover)
        pruned = prune_redundant(cover, keep)
    assert np.array_equal(keep, naive_greedy(cover))
    assert np.array_equal(pruned, naive_prune(cover, keep))


@pytest.mark.parametrize("demand", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_greedy_is_the_same_without_numba_and_as_a_set_cover(
    weighted: bool, demand: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = np.random.default_rng(0).integers(1, 5, 500).astype(float) if weighted else None
    plain = DominatingSet(*random_graph(500, 0.02, seed=1), cost=cost)
    problem = replace(plain, demand=np.minimum(demand, np.diff(plain.indptr) + 1))
    cover = cover_of(problem)
    compiled, limited = best_greedy_cover(cover), greedy_cover(cover, limit=20)
    part = open_part(cover)
    assert np.array_equal(part.keep(cover, greedy_choice(part.instance)), compiled)
    assert limited.sum() == 20 and not problem.covered(limited).all()
    monkeypatch.setenv(VARIABLE, "0")
    assert np.array_equal(best_greedy_cover(cover), compiled)
    assert np.array_equal(greedy_cover(cover, limit=20), limited)


@settings(max_examples=80, deadline=None)
@given(problem=unit_problems(DominatingSet, demand=True))
def test_dual_bounds_stay_below_the_optimum(problem: DominatingSet) -> None:
    optimum, cover = solve(problem, "brute").objective, cover_of(problem)
    known = solve(problem, "random").objective
    assert at_most(dual_ascent_bound(cover).value, optimum)
    assert at_most(lagrangian_bound(cover, known).value, optimum)


@settings(max_examples=60, deadline=None)
@given(problem=unit_problems(DominatingSet), cutoff=st.integers(0, 5))
def test_minimum_cover_decides_a_cutoff(problem: DominatingSet, cutoff: int) -> None:
    optimum = solve(problem, "brute").objective
    outcome = minimum_cover(cover_of(problem), cutoff=float(cutoff))
    assert outcome.complete and (outcome.keep is not None) == (optimum <= cutoff)
    if outcome.keep is not None:
        assert problem.covered(outcome.keep).all() and problem.objective(outcome.keep) <= cutoff


@pytest.mark.parametrize("seed", range(4))
def test_branch_and_bound_against_brute_force_on_16_units(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = [np.ones(16), rng.integers(1, 9, 16).astype(float), rng.random(16), 10.0 ** rng.integers(-3, 4, 16)][seed]
    for density in (0.1, 0.25, 0.5):
        problem = DominatingSet(*random_graph(16, density, seed), cost=cost)
        assert close(solve(problem, "exact").objective, solve(problem, "brute").objective)


@pytest.mark.parametrize("weighted", [False, True])
def test_exact_solvers_agree_above_64_units(weighted: bool) -> None:
    cost = np.random.default_rng(1).random(90) if weighted else None
    problem = DominatingSet(*random_graph(90, 0.06, seed=2), cost=cost)
    solutions = {name: solve(problem, name) for name in EXACT if name in UNLIMITED}
    best = min(solution.objective for solution in solutions.values())
    for name, solution in solutions.items():
        assert solution.status is Status.OPTIMAL and close(solution.objective, best), name
    for name in UNLIMITED:
        solution = solve(problem, name, time_limit=1e-7)
        assert at_most(best, solution.objective)
        assert solution.bound is None or at_most(solution.bound.value, best)


@pytest.mark.parametrize("name", UNLIMITED)
def test_large_graph_within_a_time_limit(name: str) -> None:
    problem = DominatingSet(*random_graph(600, 0.01, seed=3))
    first = solve(problem, name, time_limit=0.2)
    assert first.seconds < 5
    if name in ("greedy", "magnitude", "neuroprune", "random"):  # the time limit does not matter to them
        assert np.array_equal(first.keep, solve(problem, name).keep)


def test_exact_is_at_least_as_good_as_its_warm_start_when_time_is_up() -> None:
    problem = DominatingSet(*random_graph(200, 0.03, seed=4))
    start = solve(problem, "cp-sat", time_limit=1.0)
    for name in ("exact", "cp-sat", "milp", "greedy"):
        assert solve(problem, name, warm_start=start.keep, time_limit=1e-7).objective <= start.objective


@settings(max_examples=100, deadline=None)
@given(cost=st.lists(st.floats(0, 1e30), max_size=20))
def test_integer_costs_never_exceed_the_float_costs(cost: list[float]) -> None:
    array = np.array(cost, dtype=np.float64)
    scaled = integer_costs(array)
    assert np.all(scaled.values >= 0) and sum(scaled.values.tolist()) < 2**61
    assert np.all(scaled.values * scaled.unit <= array)
    assert np.all(array - scaled.values * scaled.unit <= scaled.unit)
    assert not scaled.exact or np.all(scaled.values * scaled.unit == array)

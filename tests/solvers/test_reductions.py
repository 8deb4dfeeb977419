"""Laws of the covering reductions and of the dual bounds: the optimum stays, and every cover leads back."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from graph_strategies import random_graph, unit_problems
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import DominatingSet
from topoprune_solvers.compiled import VARIABLE
from topoprune_solvers.domination.covering import SetCover, cover_of, open_part
from topoprune_solvers.domination.dual_ascent import dual_ascent_bound
from topoprune_solvers.domination.greedy import greedy_choice
from topoprune_solvers.domination.lagrangian import cover_bound, lagrangian_bound
from topoprune_solvers.domination.reductions import RULES, Reduction, components, reduce_cover
from topoprune_solvers.result import Deadline

many = settings(max_examples=80, deadline=None)


@st.composite
def set_covers(draw: st.DrawFn, free: bool = True) -> SetCover:
    """Draw a coverable instance that need not come from a graph; demands up to 3, equal costs now and then."""
    e, c = draw(st.integers(0, 7)), draw(st.integers(1, 8))
    rows = [sorted(draw(st.sets(st.integers(0, c - 1), min_size=1, max_size=c))) for _ in range(e)]
    levels = draw(st.sampled_from([[1.0], [1.0, 2.0, 3.0], [0.1, 1 / 3, 1.7]]))
    cost = np.array([draw(st.sampled_from(levels + [0.0] * free)) for _ in range(c)])
    top = draw(st.integers(1, 3))
    demand = np.array([min(draw(st.integers(1, top)), len(row)) for row in rows], dtype=np.int64)
    start = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    flat = np.array([number for row in rows for number in row], dtype=np.int32)
    return SetCover.from_rows(start, flat, cost, demand)


def optimum(instance: SetCover) -> float:
    """The slow twin: try every choice."""
    choices = np.array(list(itertools.product([0, 1], repeat=instance.n_candidates)), dtype=np.int64)
    member = np.zeros((instance.n_candidates, instance.n_elements), dtype=np.int64)
    for element in range(instance.n_elements):
        member[instance.candidates(element), element] = 1
    feasible = np.all(choices @ member >= instance.demand, axis=1)
    return float((choices[feasible] @ instance.cost).min())


def same(left: SetCover, right: SetCover) -> bool:
    names = ("row_start", "row", "col_start", "col", "cost", "demand")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


@pytest.mark.parametrize("rules", [*((rule,) for rule in RULES), RULES])
@many
@given(instance=set_covers())
def test_a_reduction_keeps_the_optimum_and_leads_back(rules: tuple[str, ...], instance: SetCover) -> None:
    reduced = Reduction(rules).apply(instance)
    assert math.isclose(reduced.fixed + optimum(reduced.core), optimum(instance), abs_tol=1e-12)
    chosen = greedy_choice(reduced.core)
    full = reduced.invert(chosen)
    assert instance.is_cover(full)
    assert math.isclose(instance.value(full), reduced.fixed + reduced.core.value(chosen), abs_tol=1e-12)
    # a fixed point: nothing is left to find
    again = Reduction(rules).apply(reduced.core)
    assert same(again.core, reduced.core) and again.fixed == 0


@many
@given(instance=set_covers())
def test_both_directions_of_a_core_agree_and_describe_the_instance(instance: SetCover) -> None:
    reduced = reduce_cover(instance)
    core = reduced.core
    assert same(core, SetCover.from_rows(core.row_start, core.row, core.cost, core.demand))
    inside = set(reduced.candidates.tolist())
    taken = np.isin(instance.row, reduced.taken)
    for number, element in enumerate(reduced.elements.tolist()):
        wanted = [j for j in instance.candidates(element).tolist() if j in inside]
        assert reduced.candidates[core.candidates(number)].tolist() == wanted
        line = slice(instance.row_start[element], instance.row_start[element + 1])
        assert core.demand[number] == instance.demand[element] - taken[line].sum()


@many
@given(instance=set_covers())
def test_steps_compose(instance: SetCover) -> None:
    first = Reduction(("element-subset", "unit")).apply(instance)
    second = reduce_cover(first.core)
    both = first.then(second)
    chosen = greedy_choice(both.core)
    assert np.array_equal(both.invert(chosen), first.invert(second.invert(chosen)))
    assert math.isclose(both.fixed, float(instance.cost[both.taken].sum()), abs_tol=1e-12)


@many
@given(instance=set_covers())
def test_with_and_without_numba_the_same_core(instance: SetCover) -> None:
    compiled = reduce_cover(instance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "0")
        plain = reduce_cover(instance)
    assert same(compiled.core, plain.core)
    assert np.array_equal(compiled.candidates, plain.candidates) and np.array_equal(compiled.taken, plain.taken)


def test_a_street_is_solved_by_reductions_and_a_random_graph_shrinks_alike_without_numba(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    street = DominatingSet.from_edges(3000, [(i, i + 1) for i in range(2999)])
    reduced = reduce_cover(open_part(cover_of(street)).instance)
    assert reduced.core.n_elements == 0 and reduced.taken.size == 1000
    sparse = open_part(cover_of(DominatingSet(*random_graph(1500, 0.002, seed=5)))).instance
    compiled = reduce_cover(sparse)
    assert 0 < compiled.core.n_elements < sparse.n_elements / 2
    monkeypatch.setenv(VARIABLE, "0")
    assert same(reduce_cover(sparse).core, compiled.core)


def test_a_reduction_cut_short_is_still_valid() -> None:
    instance = open_part(cover_of(DominatingSet(*random_graph(300, 0.01, seed=6)))).instance
    reduced = reduce_cover(instance, Deadline.after(0.0))
    assert instance.is_cover(reduced.invert(greedy_choice(reduced.core)))


def test_unknown_rules_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown rules \['twins'\]; known: candidate-subset"):
        Reduction(("twins",))


@many
@given(instance=set_covers())
def test_components_are_a_partition(instance: SetCover) -> None:
    parts = components(instance)
    assert sorted(i for _, _, elements in parts for i in elements.tolist()) == list(range(instance.n_elements))
    numbers = [j for _, candidates, _ in parts for j in candidates.tolist()]
    assert len(numbers) == len(set(numbers))
    for part, candidates, elements in parts:
        assert np.array_equal(part.cost, instance.cost[candidates])
        assert np.array_equal(part.demand, instance.demand[elements])
        assert same(part, SetCover.from_rows(part.row_start, part.row, part.cost, part.demand))
        for number, element in enumerate(elements.tolist()):
            assert np.array_equal(candidates[part.candidates(number)], instance.candidates(element))
    whole = sum(optimum(part) for part, _, _ in parts)
    assert math.isclose(whole, optimum(instance), abs_tol=1e-12)


@many
@given(instance=set_covers())
def test_dual_bounds_of_a_set_cover_stay_below_its_optimum(instance: SetCover) -> None:
    best = optimum(instance)
    known = instance.value(greedy_choice(instance))
    for bound in (dual_ascent_bound(instance), lagrangian_bound(instance, known), cover_bound(instance, known)):
        assert bound.value <= best or math.isclose(bound.value, best, rel_tol=1e-9, abs_tol=1e-12)


@settings(max_examples=60, deadline=None)
@given(problem=unit_problems(DominatingSet, demand=True))
def test_the_dual_ascent_is_the_same_without_numba(problem: DominatingSet) -> None:
    cover = cover_of(problem)
    compiled = dual_ascent_bound(cover)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "0")
        assert dual_ascent_bound(cover) == compiled

"""Bounds on the kept units of each group: clear errors, exact fills, covers that respect them."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from graph_strategies import grouped_problems, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import BudgetedDomination, Infeasible, SoftDomination, Status, solve
from topoprune_solvers.budgeted.group_cover import (
    cover_by_group,
    cover_in_groups,
    cover_with_cp_sat,
    cover_with_highs,
    greedy_in_groups,
)
from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.domination.covering import Cover, closed_rows
from topoprune_solvers.result import NEVER

TYPES = [BudgetedDomination, SoftDomination]
few = settings(max_examples=60, deadline=None)
grouped = grouped_problems(BudgetedDomination, max_n=8)


def feasible(problem: Any) -> list[np.ndarray]:
    """Return all selections that violate nothing."""
    found = []
    for chosen in combinations(range(problem.n), problem.k):
        keep = np.zeros(problem.n, dtype=bool)
        keep[list(chosen)] = True
        if problem.violation(keep) is None:
            found.append(keep)
    return found


def cover_of(problem: BudgetedDomination) -> Cover:
    indptr, indices, _ = closed_rows(problem.indptr, problem.indices)
    return Cover(indptr, indices, np.ones(problem.n), problem.forced, problem.forbidden)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TYPES)
def test_groups_without_a_selection_are_named(kind: type) -> None:
    arrays = random_graph(6, 0.5, 0)
    label = np.array([0, 0, 0, 1, 1, 1])
    first, last = label == 0, label == 1
    for fields, error, message in (
        ({"group_min": [4, 0]}, Infeasible, "group 0 must keep at least 4 units .* at most 3"),
        ({"group_min": [0, 2], "group_max": [3, 1]}, Infeasible, "group 1 must keep at least 2"),
        ({"group_max": [1, 3], "forced": first}, Infeasible, "group 0 must keep at least 3 units"),
        ({"group_min": [1, 1], "forbidden": last}, Infeasible, "group 1 must keep at least 1 units .* at most 0"),
        ({"group_min": 2}, Infeasible, "at least 4 units together, but only k=3"),
        ({"group_max": 1}, Infeasible, "at most 2 units together, but k=3"),
        ({"group_min": [1, 1, 1]}, Infeasible, "group 2 must keep at least 1"),
        ({"group_min": [1, 1], "group_max": [1, 2, 3]}, ValueError, r"group_min has shape \(2,\), expected \(3,\)"),
        ({"group_min": [-1, 0]}, ValueError, "group_min must be >= 0, found -1"),
        ({"group_min": [0.5, 1]}, ValueError, "group_min must hold integers, found float64"),
        ({"group": label[:4]}, ValueError, r"group has shape \(4,\), expected \(6,\)"),
        ({"group": label - 1}, ValueError, r"group numbers must lie in \[0, 1\), found -1\.\.0"),
        ({"group": label * 0.5}, ValueError, "group must hold integers"),
        ({"group": None, "group_min": 1}, ValueError, "group_min and group_max need group="),
        ({"importance": np.array([1, np.nan, 1, 1, 1, 1])}, ValueError, "importance must be finite; entry 1"),
        ({"k": 7}, Infeasible, "cannot keep exactly 7 of 6"),
    ):
        with pytest.raises(error, match=message):
            kind(*arrays, **{"k": 3, "group": label, **fields})


@pytest.mark.parametrize("kind", TYPES)
def test_the_checker_counts_every_group(kind: type) -> None:
    label = np.array([0, 0, 1, 1, 1])
    problem = kind(*random_graph(5, 0.5, 0), k=2, group=label, group_min=1, group_max=1)
    assert problem.violation(np.array([True, False, True, False, False])) is None
    wrong = problem.violation(np.array([True, True, False, False, False]))
    assert wrong == "2 units kept in group 0, expected 1 to 1"
    assert "3 units kept" in (problem.violation(np.array([True, True, True, False, False])) or "")


@few
@given(problem=grouped, seed=st.integers(0, 99))
def test_filling_up_gives_the_most_valuable_selection(problem: BudgetedDomination, seed: int) -> None:
    groups, rng = Groups.of(problem), np.random.default_rng(seed)
    value = rng.integers(0, 9, problem.n) + rng.random(problem.n)
    order = np.argsort(-value)
    full = groups.extend(problem.forced, order[~problem.forbidden[order]])  # type: ignore[arg-type, operator]
    every = feasible(problem)
    assert problem.violation(full) is None
    assert math.isclose(value[full].sum(), max(value[keep].sum() for keep in every))
    one_by_one = problem.forced.copy()  # type: ignore[union-attr]
    for unit in order[~problem.forbidden[order]]:  # type: ignore[operator]
        if groups.fits(one_by_one)[unit]:
            one_by_one[unit] = True
    assert np.array_equal(full, one_by_one)
    free = np.flatnonzero(~problem.forced & ~problem.forbidden)  # type: ignore[operator]
    listed = groups.selections(problem.forced, free, limit=1000)  # type: ignore[arg-type]
    assert listed is not None and len(set(map(frozenset, listed))) == len(every)
    assert groups.selections(problem.forced, free, limit=len(every) - 1) is None  # type: ignore[arg-type]


@few
@given(problem=grouped, data=st.data())
def test_extendable_means_part_of_a_feasible_selection(problem: BudgetedDomination, data: st.DataObject) -> None:
    groups = Groups.of(problem)
    start = np.array(data.draw(st.lists(st.booleans(), min_size=problem.n, max_size=problem.n)), dtype=bool)
    start = (start | problem.forced) & ~problem.forbidden
    contained = any(not (start & ~keep).any() for keep in feasible(problem))
    assert groups.extendable(start) == contained
    cut = groups.cut(problem, start, problem.importance)  # type: ignore[arg-type]
    assert groups.extendable(cut) and not (cut & ~start).any()
    if contained:
        assert np.array_equal(cut, start)


@few
@given(problem=grouped)
def test_covers_in_groups_are_found_or_refuted(problem: BudgetedDomination) -> None:
    pytest.importorskip("ortools", reason="compares with CP-SAT")
    cover, groups = cover_of(problem), Groups.of(problem)
    exists = any((cover.counts(keep) > 0).all() for keep in feasible(problem))
    if not cover.coverable():
        assert not exists
        return
    answers = [
        cover_in_groups(cover, groups, NEVER, 0),
        cover_with_cp_sat(cover, groups, NEVER, 0),
        cover_with_highs(cover, groups, NEVER),
    ]
    if groups.separate(cover.indptr, cover.indices):
        answers.append(cover_by_group(cover, groups, NEVER, 0))
    for keep, decided in answers:
        assert decided and (keep is not None) == exists
        if keep is not None:
            assert groups.extendable(keep) and (cover.counts(keep) > 0).all()
    assert groups.extendable(greedy_in_groups(cover, groups))


@pytest.mark.parametrize("highs", [False, True])
def test_larger_groups_go_to_an_integer_solver(highs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from topoprune_solvers.budgeted import group_cover

    if highs:
        monkeypatch.setattr(group_cover, "find_spec", lambda name: None)
    arrays = random_graph(80, 0.1, 2)
    problem = BudgetedDomination(*arrays, k=16, group=np.arange(80) % 4, group_min=4, group_max=4)
    solution = solve(problem, "exact")
    assert solution.status is Status.OPTIMAL
    assert solve(problem, "cp-sat").objective == solution.objective
    free = solve(replace(problem, group=None, group_min=None, group_max=None), "exact")
    assert free.objective <= solution.objective


@pytest.mark.parametrize("kind", TYPES)
def test_disjoint_layers_share_a_budget(kind: type) -> None:
    # Three layers without edges between them, as a budget over the model has it.
    sizes, parts = (5, 4, 4), [random_graph(n, 0.8, n) for n in (5, 4, 4)]
    starts, edges, offset, number = [np.zeros(1)], [], 0, 0
    for (indptr, indices, _), n in zip(parts, sizes, strict=True):
        starts.append(indptr[1:] + number)
        edges.append(indices + offset)
        offset, number = offset + n, number + indices.size
    arrays = np.concatenate(starts), np.concatenate(edges), np.concatenate([weight for *_, weight in parts])
    label = np.repeat(np.arange(3), sizes)
    for k, floor in ((3, 1), (6, 1), (7, 2), (13, 1)):
        problem = kind(*arrays, k=k, group=label, group_min=floor, importance=np.arange(13.0))
        exact, brute = solve(problem, "exact"), solve(problem, "brute")
        assert exact.status is Status.OPTIMAL and math.isclose(exact.objective, brute.objective, rel_tol=1e-9)


def test_an_oracle_that_dies_costs_the_proof_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ortools", reason="the oracle is CP-SAT")
    from topoprune_solvers.budgeted import group_cover
    from topoprune_solvers.native import NativeOutcome

    problem = BudgetedDomination(*random_graph(80, 0.1, 2), k=16, group=np.arange(80) % 4, group_min=4, group_max=4)
    alive = solve(problem, "cp-sat")
    assert alive.status is Status.OPTIMAL
    monkeypatch.setattr(group_cover, "IN_PROCESS", 0)
    cover, groups = cover_of(problem), Groups.of(problem)
    keep, decided = group_cover.cover_natively("CP-SAT", cover, groups, NEVER, 0)  # in a process of its own
    assert decided and keep is not None and groups.extendable(keep) and (cover.counts(keep) > 0).all()
    died = NativeOutcome("crashed", message="killed by signal 9")
    monkeypatch.setattr(group_cover, "run_killable", lambda *arguments, **options: died)
    solution = solve(problem, "cp-sat")
    assert solution.status is Status.FAILED and "signal 9" in solution.stats["failure"]
    assert solution.bound is not None and solution.bound.value <= alive.objective <= solution.objective

"""Laws of N:M masks, over every available solver."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import BlockMask, Infeasible, available_solvers, get_solver, solve
from topoprune_solvers.edges import block_exact
from topoprune_solvers.edges.block_assignment import assign_blocks
from topoprune_solvers.edges.block_common import block_bound, scaled_prices
from topoprune_solvers.edges.block_exact import patterns
from topoprune_solvers.edges.block_greedy import greedy_blocks
from topoprune_solvers.solution import Status

SOLVERS = available_solvers(BlockMask)
LAW = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)


def accepts(name: str, problem: BlockMask) -> bool:
    return not (problem.transposable and "transposable" in get_solver(name, BlockMask).capabilities.lacks)


def scores(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, shape).astype(float) if rng.random() < 0.5 else np.abs(rng.standard_normal(shape))


@st.composite
def problems(draw: st.DrawFn) -> BlockMask:
    group = draw(st.integers(1, 4))
    transposable = draw(st.booleans())
    rows = group * draw(st.integers(0, 2)) if transposable else draw(st.integers(0, 3))
    cols = group * draw(st.integers(0, 2))
    if rows * cols > 18:
        rows = cols = group
    return BlockMask(scores(draw(SEEDS), (rows, cols)), draw(st.integers(0, group)), group, transposable)


def is_exact(name: str) -> bool:
    return get_solver(name, BlockMask).capabilities.exact


def test_the_solvers_are_registered() -> None:
    assert {"brute", "exact", "greedy", "random", "sorting"} <= set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
@LAW
@given(problem=problems())
def test_objective_optimum_bound(name: str, problem: BlockMask) -> None:
    """`solve` verifies that every group keeps exactly N, and the numbers themselves."""
    if not accepts(name, problem):
        with pytest.raises(ValueError, match="'exact'"):
            solve(problem, name)
        return
    optimum = solve(problem, "brute").objective
    solution = solve(problem, name)
    assert solution.objective <= optimum + 1e-9
    if solution.bound is not None:
        assert solution.bound.value >= optimum - 1e-9
    if is_exact(name):
        assert solution.objective == pytest.approx(optimum, rel=1e-9)
        assert solution.status is Status.OPTIMAL


@pytest.mark.parametrize(("kept", "group"), [(1, 2), (1, 3), (2, 4), (3, 4), (2, 5), (4, 8), (1, 8), (7, 16), (16, 32)])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_assignment_is_proven_by_its_prices(kept: int, group: int, seed: int) -> None:
    """At every size the prices of `assign_blocks` bound the optimum, and the mask meets the bound."""
    score = scores(seed, (5, group, group))
    mask, row, column = assign_blocks(score, kept)
    assert np.all(mask.sum(axis=1) == kept) and np.all(mask.sum(axis=2) == kept)
    worth = (score * mask).sum(axis=(1, 2))
    assert np.allclose(worth, block_bound(score, kept, row, column), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kept", "group"), [(1, 2), (2, 3), (1, 4), (2, 4)])
@LAW
@given(seed=SEEDS)
def test_patterns_and_assignment_agree(kept: int, group: int, seed: int) -> None:
    score = scores(seed, (4, group, group))
    table = patterns(kept, group)
    assert table is not None
    mask, *_ = assign_blocks(score, kept)
    assert np.allclose((score.reshape(4, -1) @ table.T).max(axis=1), (score * mask).sum(axis=(1, 2)))


@pytest.mark.parametrize(
    ("kept", "group", "count"), [(1, 4, 24), (2, 4, 90), (3, 4, 24), (1, 5, 120), (0, 4, 1), (4, 4, 1)]
)
def test_the_number_of_patterns(kept: int, group: int, count: int) -> None:
    """A000681 and its kin: 0/1 matrices with equal line sums."""
    table = patterns(kept, group)
    assert table is not None and len(np.unique(table, axis=0)) == len(table) == count
    square = table.reshape(-1, group, group)
    assert np.all(square.sum(axis=1) == kept) and np.all(square.sum(axis=2) == kept)


def test_too_many_patterns_are_not_listed() -> None:
    assert patterns(2, 5) is None and patterns(4, 8) is None and patterns(16, 32) is None


@LAW
@given(seed=SEEDS, group=st.integers(2, 9), data=st.data())
def test_greedy_blocks_are_complete_and_close(seed: int, group: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, group))
    score = scores(seed, (3, group, group))
    mask = greedy_blocks(score, kept)
    assert np.all(mask.sum(axis=1) == kept) and np.all(mask.sum(axis=2) == kept)
    best = (score * assign_blocks(score, kept)[0]).sum(axis=(1, 2))
    found = (score * mask).sum(axis=(1, 2))
    assert np.all(found <= best + 1e-9)
    bound = block_bound(score, kept, *scaled_prices(score, kept, 8))
    assert np.all(bound >= best - 1e-9)


@pytest.mark.parametrize("name", [name for name in SOLVERS if is_exact(name) and name != "brute"])
@LAW
@given(seed=SEEDS)
def test_moving_blocks_and_transposing_leave_an_exact_objective_unchanged(name: str, seed: int) -> None:
    score = scores(seed, (4, 4))
    problem = BlockMask(score, 2, 4, transposable=True)
    if not accepts(name, problem):
        return
    rng = np.random.default_rng(seed)
    moved = BlockMask(score[rng.permutation(4)][:, rng.permutation(4)].T, 2, 4, transposable=True)
    assert solve(moved, name).objective == pytest.approx(solve(problem, name).objective, rel=1e-9)


def test_a_transposable_mask_stays_valid_when_transposed() -> None:
    score = scores(0, (16, 24))
    keep = solve(BlockMask(score, 4, 8, transposable=True), "exact").keep.reshape(16, 24)
    assert BlockMask(score.T, 4, 8).violation(keep.T.reshape(-1)) is None
    assert BlockMask(score, 4, 8).violation(keep.reshape(-1)) is None


def test_blocks_and_back() -> None:
    score = scores(1, (6, 9))
    problem = BlockMask(score, 1, 3, transposable=True)
    blocks = problem.blocks(score)
    assert np.array_equal(blocks[1], score[:3, 3:6])
    assert np.array_equal(problem.from_blocks(blocks), score)


@pytest.mark.parametrize("name", ["exact", "sorting", "greedy"])
def test_ties_go_to_the_lower_column(name: str) -> None:
    keep = solve(BlockMask(np.ones((2, 8)), 2, 4), name).keep
    assert keep.reshape(-1, 4).tolist() == [[True, True, False, False]] * 4


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("transposable", [False, True])
def test_the_same_call_gives_the_same_mask(name: str, transposable: bool) -> None:
    problem = BlockMask(np.random.default_rng(0).integers(0, 2, (4, 4)).astype(float), 2, 4, transposable)
    if accepts(name, problem):
        first, second = (solve(problem, name, seed=5).keep for _ in range(2))
        assert np.array_equal(first, second)


def test_random_masks_depend_on_the_seed() -> None:
    for transposable in (False, True):
        problem = BlockMask(np.ones((32, 32)), 2, 4, transposable)
        masks = [solve(problem, "random", seed=seed).keep for seed in (0, 1)]
        assert not np.array_equal(*masks)


def test_a_time_limit_of_nothing_keeps_a_better_start_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_exact, "CHUNK", 1024)
    problem = BlockMask(scores(2, (64, 96)), 4, 8, transposable=True)
    best = solve(problem, "exact")
    started = time.process_time()
    rushed = solve(problem, "exact", time_limit=0.0)
    assert time.process_time() - started < 0.5
    assert rushed.status is Status.TIME_LIMIT and rushed.bound is not None
    assert rushed.objective <= best.objective <= rushed.bound.value
    assert rushed.objective > solve(problem, "random").objective
    assert solve(problem, "exact", time_limit=0.0, warm_start=best.keep).objective == pytest.approx(best.objective)


def test_greedy_takes_a_better_start_and_checks_it() -> None:
    problem = BlockMask(scores(7, (16, 16)), 2, 8, transposable=True)
    best = solve(problem, "exact")
    assert solve(problem, "greedy", warm_start=best.keep).objective == pytest.approx(best.objective)
    assert solve(problem, "greedy", warm_start=~best.keep).objective <= best.objective + 1e-9  # ignored
    with pytest.raises(ValueError, match="warm_start has 3 entries, expected 256"):
        solve(problem, "greedy", warm_start=np.ones(3, bool))


@pytest.mark.parametrize(
    ("score", "fields", "message"),
    [
        (np.ones((4, 10)), {}, "10 columns, not a multiple of group=4"),
        (np.ones((6, 8)), {"transposable": True}, "6 rows, not a multiple of group=4"),
        (np.array([[np.nan] * 4]), {}, "finite"),
        (np.array([[1.0, 2.0, np.inf, 0.0]]), {}, "finite"),
        (np.array([[1.0, -2.0, 3.0, 0.0]]), {}, "found -2"),
        (np.ones(4), {}, r"\(n_rows, n_cols\)"),
        (np.ones((4, 4)), {"group": 0}, "group must be >= 1"),
        (np.ones((4, 4)), {"kept": 1.5}, "kept must be an int"),
    ],
)
def test_bad_input_is_refused(score: np.ndarray, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMask(score, **fields)


@pytest.mark.parametrize("kept", [-1, 5])
def test_more_than_the_group_is_infeasible(kept: int) -> None:
    with pytest.raises(Infeasible, match=f"keep {kept} of every 4"):
        BlockMask(np.ones((4, 4)), kept, 4)


def test_a_broken_rule_is_named() -> None:
    problem = BlockMask(np.ones((4, 4)), 2, 4, transposable=True)
    rows_only = np.tile([True, True, False, False], 4)
    assert problem.violation(rows_only) == "column 0 keeps 4 edges in group 0, expected exactly 2"
    assert problem.violation(np.zeros(16, bool)) == "row 0 keeps 0 edges in group 0, expected exactly 2"

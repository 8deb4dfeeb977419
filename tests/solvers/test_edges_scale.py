"""Laws of the edge solvers that scale: sorting, row prefixes with a price, dual prices with a core flow."""

from __future__ import annotations

import time
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune_solvers import EdgeSelection, Infeasible, solve
from topoprune_solvers.edges import dual_flow, min_cost_flow
from topoprune_solvers.edges.common import candidate_value, column_limits, degrees_allowed, row_limits
from topoprune_solvers.edges.core_flow import CoreNetwork
from topoprune_solvers.edges.count_bound import count_bound
from topoprune_solvers.edges.degree_repair import repair_degrees, total_worth
from topoprune_solvers.edges.dual_flow import DualFlowEdges
from topoprune_solvers.edges.line_prices import PriceSearch
from topoprune_solvers.edges.row_values import budget_price, row_values
from topoprune_solvers.edges.sorting import keep_best, select_edges, sorted_lines, top_edges
from topoprune_solvers.native import NativeOutcome
from topoprune_solvers.solution import Status

LAW = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**32 - 1)
needs_ortools = pytest.mark.skipif(find_spec("ortools") is None, reason="needs OR-Tools for the optimum")


def layer(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    """|weights| whose rows and columns differ in scale, as those of a trained layer do."""
    scale = np.exp(0.5 * rng.standard_normal((rows, 1)) + 0.3 * rng.standard_normal((1, cols)))
    return np.abs(rng.standard_normal((rows, cols))) * scale


def random_problem(seed: int, largest: int = 14, sides: tuple[str, ...] = ("row", "col")) -> EdgeSelection:
    """Bounds around a random selection, scores with or without ties, some edges not allowed."""
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(1, largest, size=2)
    chosen = rng.random((rows, cols)) < rng.uniform(0.1, 0.9)
    ties = rng.random() < 0.5
    score = rng.integers(0, 4, (rows, cols)).astype(float) if ties else layer(rng, rows, cols)
    bounds = {}
    for side in sides:
        degree, slack = chosen.sum(axis=1 if side == "row" else 0), int(rng.integers(0, 3))
        bounds[f"{side}_min"], bounds[f"{side}_max"] = np.maximum(degree - slack, 0), degree + slack
    allowed = chosen | (rng.random((rows, cols)) < 0.8) if rng.random() < 0.5 else None
    return EdgeSelection(score, int(chosen.sum()), allowed=allowed, **bounds)


def banded(score: np.ndarray, k: int, slack: float) -> EdgeSelection:
    """Every degree within `slack` of the average, rounded outwards."""
    rows, cols = score.shape
    bounds = {}
    for side, lines in (("row", rows), ("col", cols)):
        bounds[f"{side}_min"] = np.full(lines, int(np.floor((1 - slack) * k / lines)))
        bounds[f"{side}_max"] = np.full(lines, int(np.ceil((1 + slack) * k / lines)))
    return EdgeSelection(score, k, **bounds)


def by_ranks(problem: EdgeSelection, axis: int) -> np.ndarray:
    """The slow twin of `select_edges`: stable ranks of every edge in its line."""
    value = candidate_value(problem, problem.score)
    low, high = row_limits(problem) if axis == 1 else column_limits(problem)
    rank = np.argsort(np.argsort(-value, axis=axis, kind="stable"), axis=axis, kind="stable")
    forced = rank < np.expand_dims(low, axis)
    eligible = ~forced & (rank < np.expand_dims(high, axis))
    return forced | top_edges(np.where(eligible, value, -np.inf), problem.k - int(forced.sum()))


@pytest.mark.parametrize("side", ["row", "col"])
@LAW
@given(seed=SEEDS)
def test_sorting_by_value_keeps_the_same_edges_as_sorting_by_rank(side: str, seed: int) -> None:
    """Ties included: they go to the lower flat index within the bounds."""
    problem = random_problem(seed, sides=(side,))
    expected = by_ranks(problem, 1 if side == "row" else 0)
    assert np.array_equal(select_edges(problem, problem.score), expected)


@pytest.mark.parametrize("axis", [0, 1])
@LAW
@given(seed=SEEDS)
def test_the_best_of_each_line(axis: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    value = rng.integers(0, 3, rng.integers(1, 9, size=2)).astype(float)
    degree = rng.integers(0, value.shape[axis] + 1, size=value.shape[1 - axis])
    rank = np.argsort(np.argsort(-value, axis=axis, kind="stable"), axis=axis, kind="stable")
    expected = rank < np.expand_dims(degree, axis)
    assert np.array_equal(keep_best(value, sorted_lines(value, axis), degree, axis), expected)


@LAW
@given(seed=SEEDS, strength=st.sampled_from([0.0, 0.1, 1.0, 10.0]), reading=st.sampled_from("ab"))
def test_repaired_degrees_meet_budget_and_row_bounds_and_stay_below_the_bound(
    seed: int, strength: float, reading: str
) -> None:
    plain = random_problem(seed, sides=("row",))
    problem = EdgeSelection(
        plain.score,
        plain.k,
        attachment=strength,
        reading=reading,  # type: ignore[arg-type]
        row_min=plain.row_min,
        row_max=plain.row_max,
        allowed=plain.allowed,
    )
    table = row_values(problem)
    price = budget_price(table, problem.k)
    degree = repair_degrees(table, problem.k, price)
    assert degree.sum() == problem.k
    assert degrees_allowed(problem, table.mask(degree))
    worth = total_worth(table.value, degree)
    assert worth <= price.bound + 1e-9 * max(1.0, abs(worth))
    best = total_worth(table.value, solve(problem, "dp").keep.reshape(problem.shape).sum(axis=1))
    assert best <= price.bound + 1e-9 * max(1.0, abs(best))


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, strength=st.sampled_from([0.1, 1.0, 10.0]), reading=st.sampled_from("ab"), share=st.floats(0, 1))
def test_the_branch_on_long_rows_bounds_the_optimum_at_any_split(
    seed: int, strength: float, reading: str, share: float
) -> None:
    plain = random_problem(seed, sides=("row",) if seed % 2 else ())
    problem = EdgeSelection(
        plain.score,
        plain.k,
        attachment=strength,
        reading=reading,  # type: ignore[arg-type]
        row_min=plain.row_min,
        row_max=plain.row_max,
        allowed=plain.allowed,
    )
    table = row_values(problem)
    price = budget_price(table, problem.k)
    bound = count_bound(table, problem.k, price, int(share * (problem.shape[1] - 1)), -np.inf)
    best = total_worth(table.value, solve(problem, "dp").keep.reshape(problem.shape).sum(axis=1))
    assert best - 1e-9 * max(1.0, abs(best)) <= bound <= price.bound


@pytest.mark.parametrize("reading", ["a", "b"])
@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_the_lagrangian_gap_is_small_on_a_layer(reading: str, strength: float) -> None:
    """The gap is the loss of one row of many, so it is small against the whole."""
    score = layer(np.random.default_rng(0), 192, 256)
    for share in (0.5, 0.1):
        problem = EdgeSelection(
            score,
            int(share * score.size),
            attachment=strength * score.mean() * 256,
            reading=reading,  # type: ignore[arg-type]
        )
        solution = solve(problem, "lagrangian")
        assert solution.gap <= 1e-3
        assert solution.objective >= solve(problem, "greedy").objective - 1e-9 * abs(solution.objective)


def test_the_lagrangian_is_exact_without_attachment() -> None:
    score = np.random.default_rng(1).integers(0, 5, (20, 30)).astype(float)
    problem = EdgeSelection(score, 200, row_min=np.full(20, 6), row_max=np.full(20, 14))
    assert solve(problem, "lagrangian").status is Status.OPTIMAL


@LAW
@given(seed=SEEDS, rounds=st.integers(1, 6))
def test_dual_prices_bound_the_optimum_and_never_rise(seed: int, rounds: int) -> None:
    problem = random_problem(seed)
    search = PriceSearch(problem)
    bounds = [search.improve(1).bound for _ in range(rounds)]
    optimum = solve(problem, "min-cost-flow").objective
    slack = 1e-9 * max(1.0, optimum)
    assert min(bounds) >= optimum - slack
    assert all(later <= earlier + slack for earlier, later in pairwise(bounds))


@needs_ortools
@pytest.mark.parametrize("native", [True, False])
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_a_narrow_core_still_gives_a_valid_answer_and_bound(native: bool, seed: int) -> None:
    """The path of large matrices, forced on small ones; without OR-Tools a maximum flow repairs alone."""
    problem = random_problem(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dual_flow, "SMALL", 0)
        if not native:
            patch.setattr(dual_flow, "find_spec", lambda name: None)
        solution = solve(problem, DualFlowEdges(core_share=0.05))
    optimum = solve(problem, "min-cost-flow").objective
    slack = 1e-9 * max(1.0, optimum)
    assert solution.objective <= optimum + slack
    assert solution.bound is not None and solution.bound.value >= optimum - slack


@needs_ortools
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("slack", [0.5, 0.1, 0.0])
def test_the_dual_flow_gap_is_small_on_a_layer(slack: float, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(dual_flow, "find_spec", lambda name: None)
    score = layer(np.random.default_rng(2), 96, 256)
    for share in (0.5, 0.1):
        k = int(share * score.size) // 768 * 768  # so that equal degrees exist
        problem = banded(score, k, slack)
        solution = solve(problem, "dual-flow")
        assert solution.gap <= (2e-4 if native else 5e-3)
        assert solve(problem, "min-cost-flow").objective <= solution.bound.value * (1 + 1e-9)  # type: ignore[union-attr]


@LAW
@given(seed=SEEDS)
def test_infeasible_iff_enumeration_finds_nothing(seed: int) -> None:
    """Bounds drawn without a selection behind them; sums that miss k are refused by the problem itself."""
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(1, 5, size=2)
    rows, cols = (rows, min(cols, 12 // rows)) if rows * cols > 12 else (rows, cols)
    bounds = {}
    for side, lines, other in (("row", rows, cols), ("col", cols, rows)):
        low = rng.integers(0, other + 1, size=lines)
        bounds[f"{side}_min"], bounds[f"{side}_max"] = low, np.minimum(low + rng.integers(0, 2, size=lines), other)
    allowed, k = rng.random((rows, cols)) < 0.85, int(rng.integers(0, rows * cols + 1))
    try:
        problem = EdgeSelection(rng.random((rows, cols)), k, allowed=allowed, **bounds)
    except Infeasible:
        return
    outcomes = []
    for name in ("brute", "dual-flow", "min-cost-flow"):
        try:
            outcomes.append(round(solve(problem, name).objective, 9))
        except Infeasible:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1] == outcomes[2]


@pytest.mark.parametrize("name", ["dual-flow", "min-cost-flow"])
def test_the_conflict_is_named(name: str) -> None:
    """Rows 0 and 1 want three edges each, but may only use columns 0..2, which take at most one each."""
    allowed = np.ones((4, 6), dtype=bool)
    allowed[:2, 3:] = False
    problem = EdgeSelection(
        np.ones((4, 6)),
        9,
        row_min=np.array([3, 3, 0, 0]),
        row_max=np.full(4, 6),
        col_max=np.array([1, 1, 1, 4, 4, 4]),
        allowed=allowed,
    )
    with pytest.raises(Infeasible, match=r"k=9.*at least 6 in 2 rows \(0, 1\).*at most 3 in 3 columns \(0, 1, 2\)"):
        solve(problem, name)


@pytest.mark.parametrize("name", ["dual-flow", "min-cost-flow", "cp-sat"])
@pytest.mark.parametrize("scale", [1e300, 1e-300, 1.0])
def test_scaled_scores_cannot_overflow(name: str, scale: float) -> None:
    rng = np.random.default_rng(3)
    score = rng.random((6, 8)) * scale
    problem = banded(score, 24, 0.4)
    plain = banded(score / scale, 24, 0.4)
    assert solve(problem, name).objective == pytest.approx(solve(plain, name).objective * scale, rel=1e-6)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (np.array([[1.0, np.nan]]), "finite"),
        (np.array([[1.0, np.inf]]), "finite"),
        (np.full((2, 2), 1e308), "sum"),
        (np.array([[1.0, -0.5]]), "found -0.5"),
        (np.ones(3), r"\(n_rows, n_cols\)"),
    ],
)
def test_bad_scores_are_refused(score: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EdgeSelection(score, 1)


@pytest.mark.parametrize("k", [-1, 7, 2.5])
def test_a_budget_out_of_range_is_infeasible(k: float) -> None:
    with pytest.raises(Infeasible, match="of 6 edges"):
        EdgeSelection(np.ones((2, 3)), k)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dual-flow", "lagrangian"])
def test_the_time_limit_is_kept_and_the_start_is_not_lost(name: str) -> None:
    score = layer(np.random.default_rng(4), 256, 512)
    problem = banded(score, score.size // 8, 0.2)
    if name == "lagrangian":
        problem = EdgeSelection(score, score.size // 8, attachment=score.mean() * 512)
    best = solve(problem, name)
    started = time.process_time()
    limited = solve(problem, name, warm_start=best.keep, time_limit=0.01)
    assert time.process_time() - started < 1.0  # processor time: the machine may be busy
    assert limited.objective >= best.objective * (1 - 1e-12)
    unlimited = solve(problem, name)
    assert np.array_equal(unlimited.keep, best.keep)


def test_a_repair_touches_the_core_only() -> None:
    problem = banded(layer(np.random.default_rng(5), 12, 16), 60, 0.2)
    mask = top_edges(problem.score, problem.k)
    core = np.flatnonzero(np.random.default_rng(6).random(problem.n) < 0.7)
    network = CoreNetwork(problem, mask, core)
    repaired = network.repaired()
    assert repaired is not None and degrees_allowed(problem, repaired)
    outside = np.ones(problem.n, dtype=bool)
    outside[core] = False
    assert np.array_equal(repaired.reshape(-1)[outside], mask.reshape(-1)[outside])
    assert CoreNetwork(problem, mask, core[:1]).repaired() is None


def test_the_flow_solver_is_stopped_at_its_limit_and_survives_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ortools")
    score = np.random.default_rng(0).random((260, 200))
    bounds = {"row_max": np.full(260, 110), "col_max": np.full(200, 140)}
    problem = EdgeSelection(score, score.size // 2, **bounds)
    best = solve(problem, "min-cost-flow")
    assert best.status is Status.OPTIMAL
    stopped = solve(problem, "min-cost-flow", time_limit=0.0)
    assert stopped.status in (Status.TIME_LIMIT, Status.OPTIMAL) and stopped.objective <= best.objective
    assert stopped.bound is not None and stopped.bound.value >= best.objective * (1 - 1e-12)
    crashed = NativeOutcome("crashed", None, "ended by SIGSEGV")
    monkeypatch.setattr(min_cost_flow, "run_killable", lambda *_, **__: crashed)
    left = solve(problem, "min-cost-flow")
    assert left.status is Status.FAILED and left.stats["failed"] == "ended by SIGSEGV"
    assert np.array_equal(left.keep, stopped.keep)

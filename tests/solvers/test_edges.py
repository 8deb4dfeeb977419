"""Laws of edge selection (problem D), over every available solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from topoprune_solvers import EdgeSelection, Infeasible, available_solvers, get_solver, solve
from topoprune_solvers.edges.common import bounded_sides
from topoprune_solvers.edges.row_values import budget_price, row_values
from topoprune_solvers.edges.sorting import select_edges, top_edges
from topoprune_solvers.solution import Status

SOLVERS = available_solvers(EdgeSelection)
BASELINES = {"random", "magnitude"}
LAW = settings(max_examples=40, deadline=None)


def lacks(name: str) -> tuple[str, ...]:
    return get_solver(name, EdgeSelection).capabilities.lacks


TAKE_ATTACHMENT = {name for name in SOLVERS if "attachment" not in lacks(name)}


def accepts(name: str, problem: EdgeSelection) -> bool:
    """What a solver refuses is declared in its capabilities; everything else it must solve."""
    rows, columns = problem.row_min is not None, problem.col_min is not None
    has = {
        "attachment": problem.attachment > 0,
        "row bounds": rows,
        "column bounds": columns,
        "two-sided bounds": rows and columns,
    }
    return not any(has[feature] for feature in lacks(name))


def is_exact(name: str) -> bool:
    return get_solver(name, EdgeSelection).capabilities.exact


SMALL_SHAPES = [(r, c) for r in range(1, 6) for c in range(1, 6) if r * c <= 12]


@st.composite
def scores(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, int]]) -> np.ndarray:
    rows, cols = draw(shapes)
    # Few distinct values make ties common; the float pool makes them rare.
    entry = draw(
        st.sampled_from(
            [st.integers(0, 3).map(float), st.floats(0, 2, allow_nan=False, width=32), st.just(0.0), st.just(1e12)]
        )
    )
    return np.array(draw(st.lists(entry, min_size=rows * cols, max_size=rows * cols))).reshape(rows, cols)


@st.composite
def problems(draw: st.DrawFn, bounds: bool = True, attachment: bool | None = None) -> EdgeSelection:
    score = draw(scores(st.sampled_from(SMALL_SHAPES)))
    rows, cols = score.shape
    k = draw(st.integers(0, score.size))
    strength = (
        draw(st.sampled_from([0.1, 1.0, 10.0])) if attachment or (attachment is None and draw(st.booleans())) else 0
    )
    fields: dict = {"reading": draw(st.sampled_from("ab")), "delta0": draw(st.sampled_from([0.01, 0.5]))}
    if bounds:
        # Bounds around a random selection of k edges: always feasible, often tight.
        chosen = np.zeros(score.size, dtype=bool)
        chosen[draw(st.permutations(range(score.size)))[:k]] = True
        for side, axis, other in (("row", 1, cols), ("col", 0, rows)):
            if draw(st.booleans()):
                degree = chosen.reshape(score.shape).sum(axis=axis)
                slack = draw(st.integers(0, 2))
                fields[f"{side}_min"] = np.maximum(degree - slack, 0)
                fields[f"{side}_max"] = np.minimum(degree + slack, other)
        if draw(st.booleans()):
            dead = draw(st.lists(st.integers(0, score.size - 1), max_size=4))
            allowed = np.ones(score.size, dtype=bool)
            allowed[dead] = False
            fields["allowed"] = (allowed | chosen).reshape(score.shape)
    return EdgeSelection(score, k, attachment=strength, **fields)


def degree_sd(problem: EdgeSelection, keep: np.ndarray) -> float:
    return float(keep.reshape(problem.shape).sum(axis=1).std())


def degree_cost(problem: EdgeSelection, keep: np.ndarray) -> float:
    return float(problem.degree_cost(keep.reshape(problem.shape).sum(axis=1)).sum())


def test_the_issues_solvers_are_registered() -> None:
    issue = {"brute", "cp-sat", "dp", "dual-flow", "greedy", "lagrangian", "magnitude", "min-cost-flow", "random"}
    assert issue <= set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
@LAW
@given(problem=problems())
def test_bound_optimum_objective(name: str, problem: EdgeSelection) -> None:
    """Objective <= optimum <= bound; `solve` verifies feasibility and the numbers themselves."""
    assume(accepts(name, problem))
    optimum = solve(problem, "brute").objective
    solution = solve(problem, name)
    slack = 1e-6 * max(1.0, abs(optimum))
    assert solution.objective <= optimum + slack
    if solution.bound is not None:
        assert solution.bound.value >= optimum - slack
    if is_exact(name):
        assert solution.objective == pytest.approx(optimum, rel=1e-6, abs=1e-6)
        # Integer solvers resolve 1e-11 of the largest coefficient per edge: an optimum far below that stays unproven.
        resolution = 1e-11 * problem.k * (problem.score.max(initial=0.0) + 10 * problem.attachment)
        assert solution.bound is not None
        assert solution.status is Status.OPTIMAL or solution.bound.value - solution.objective <= resolution


@pytest.mark.parametrize("name", [name for name in SOLVERS if lacks(name)])
@LAW
@given(problem=problems())
def test_a_solver_refuses_clearly_and_only_what_it_must(name: str, problem: EdgeSelection) -> None:
    try:
        solve(problem, name)
    except ValueError as error:
        assert not accepts(name, problem)
        assert f"solver {name!r}" in str(error) and "use '" in str(error)
    else:
        # Bounds that cannot bind and a budget that leaves no choice are no reason to refuse.
        assert accepts(name, problem) or len(bounded_sides(problem)) < 2 or problem.k in (0, problem.n)


@pytest.mark.parametrize("side", ["row", "col"])
@LAW
@given(data=st.data())
def test_greedy_is_exact_with_bounds_on_one_side(side: str, data: st.DataObject) -> None:
    problem = data.draw(problems(attachment=False))
    other = "col" if side == "row" else "row"
    problem = EdgeSelection(
        problem.score,
        problem.k,
        **{f"{side}_{end}": getattr(problem, f"{side}_{end}") for end in ("min", "max")},
        allowed=problem.allowed,
    )
    assert getattr(problem, f"{other}_min") is None
    solution = solve(problem, "greedy")
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(solve(problem, "brute").objective, rel=1e-9)


@LAW
@given(problem=problems(bounds=False, attachment=True))
def test_greedy_is_never_worse_than_the_top_k(problem: EdgeSelection) -> None:
    top = top_edges(problem.score, problem.k).reshape(-1)
    assert solve(problem, "greedy").objective >= problem.objective(top)


@pytest.mark.parametrize(
    "name", [name for name in SOLVERS if "attachment" not in lacks(name) and name not in BASELINES]
)
@LAW
@given(problem=problems(attachment=True))
def test_attachment_concentrates_degrees(name: str, problem: EdgeSelection) -> None:
    """At equal k the degree sd with attachment is >= that without.

    Any answer at least as good as the one at attachment 0 has a degree cost at most as high, for
    its score sum cannot be higher. In reading a that cost is a constant minus the sum of squared degrees, so the
    sd follows. In reading b the
    greedy filters its candidates; of exact optima the cost law is what is proven.
    """
    assume(accepts(name, problem))
    plain = EdgeSelection(
        problem.score,
        problem.k,
        reading=problem.reading,
        delta0=problem.delta0,
        row_min=problem.row_min,
        row_max=problem.row_max,
        col_min=problem.col_min,
        col_max=problem.col_max,
        allowed=problem.allowed,
    )
    with_attachment, without = solve(problem, name), solve(plain, name)
    scale = max(1.0, float(problem.score.max(initial=0.0)))
    if scale < 1e6:  # beyond, the degree cost drowns in the rounding of the score sum
        assert degree_cost(problem, with_attachment.keep) <= degree_cost(plain, without.keep) + 1e-4
    if name == "greedy" or (problem.reading == "a" and scale < 1e6):
        assert degree_sd(problem, with_attachment.keep) >= degree_sd(plain, without.keep) - 1e-9


@LAW
@given(data=st.data())
def test_sorting_with_bounds_matches_min_cost_flow_beyond_brute_size(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows, cols = int(rng.integers(2, 12)), int(rng.integers(2, 12))
    chosen = rng.random((rows, cols)) < rng.uniform(0.2, 0.8)
    score = rng.integers(0, 9, (rows, cols)).astype(float) if rng.random() < 0.5 else rng.random((rows, cols))
    degree = chosen.sum(axis=1)
    problem = EdgeSelection(score, int(chosen.sum()), row_min=np.maximum(degree - 1, 0), row_max=degree + 1)
    assert solve(problem, "greedy").objective == pytest.approx(solve(problem, "min-cost-flow").objective, rel=1e-9)


@pytest.mark.parametrize("reading", ["a", "b"])
@pytest.mark.parametrize("attachment", [0.3, 3.0, 30.0])
def test_exact_solvers_agree_and_the_lagrangian_bounds_them(reading: str, attachment: float) -> None:
    score = np.abs(np.random.default_rng(5).standard_normal((12, 16)))
    for k in (20, 96, 150):
        problem = EdgeSelection(score, k, attachment=attachment, reading=reading)  # type: ignore[arg-type]
        exact, greedy = solve(problem, "dp"), solve(problem, "greedy")
        assert solve(problem, "cp-sat").objective == pytest.approx(exact.objective, rel=1e-8)
        assert greedy.bound is not None and greedy.bound.value >= exact.objective - 1e-9 * abs(exact.objective)
        assert greedy.objective <= exact.objective + 1e-9
        assert exact.objective - greedy.objective <= 0.02 * abs(exact.objective)


@LAW
@given(problem=problems(bounds=False, attachment=True), price=st.floats(-5, 5))
def test_the_price_search_finds_the_best_price(problem: EdgeSelection, price: float) -> None:
    """No price gives a lower bound than the bisection does (slow twin: evaluate the formula)."""
    assume(problem.score.max() < 1e6)
    table = row_values(problem)
    best = budget_price(table, problem.k)
    assert best.fewer.sum() <= problem.k <= best.more.sum()
    at_price = (table.value - price * np.arange(problem.shape[1] + 1)).max(axis=1).sum() + price * problem.k
    assert best.bound <= at_price + 1e-9 * max(1.0, abs(at_price))


@pytest.mark.parametrize("name", [name for name in SOLVERS if is_exact(name)])
@LAW
@given(problem=problems(), seed=st.integers(0, 1000))
def test_relabelling_leaves_an_exact_objective_unchanged(name: str, problem: EdgeSelection, seed: int) -> None:
    assume(accepts(name, problem))
    rng = np.random.default_rng(seed)
    row, col = rng.permutation(problem.shape[0]), rng.permutation(problem.shape[1])

    def moved(bound: np.ndarray | None, order: np.ndarray) -> np.ndarray | None:
        return None if bound is None else bound[order]

    relabelled = EdgeSelection(
        problem.score[row][:, col],
        problem.k,
        attachment=problem.attachment,
        reading=problem.reading,
        delta0=problem.delta0,
        row_min=moved(problem.row_min, row),
        row_max=moved(problem.row_max, row),
        col_min=moved(problem.col_min, col),
        col_max=moved(problem.col_max, col),
        allowed=None if problem.allowed is None else problem.allowed[row][:, col],
    )
    assert solve(relabelled, name).objective == pytest.approx(solve(problem, name).objective, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (1, 1)])
@pytest.mark.parametrize("attachment", [0.0, 1.0])
def test_degenerate_shapes(name: str, shape: tuple[int, int], attachment: float) -> None:
    for k in {0, shape[0] * shape[1]}:
        problem = EdgeSelection(np.ones(shape), k, attachment=attachment)
        if accepts(name, problem):
            solution = solve(problem, name)
            assert solution.n_kept == k
            assert not math.isnan(solution.objective)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_call_gives_the_same_mask(name: str) -> None:
    rng = np.random.default_rng(0)
    problem = EdgeSelection(rng.integers(0, 3, (4, 4)).astype(float), 7)
    first, second = (solve(problem, name, seed=3).keep for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("name", ["greedy", "magnitude"])
def test_ties_go_to_the_lower_index(name: str) -> None:
    problem = EdgeSelection(np.ones((3, 4)), 5)
    assert np.flatnonzero(solve(problem, name).keep).tolist() == [0, 1, 2, 3, 4]


def test_ties_under_column_bounds_go_to_the_lower_index() -> None:
    problem = EdgeSelection(np.ones((3, 2)), 3, col_max=np.array([2, 2]))
    assert np.flatnonzero(select_edges(problem, problem.score)).tolist() == [0, 1, 2]


def test_random_depends_on_the_seed_only() -> None:
    problem = EdgeSelection(np.ones((20, 20)), 100)
    masks = [solve(problem, "random", seed=seed).keep for seed in (0, 1)]
    assert not np.array_equal(*masks)


@pytest.mark.parametrize("name", ["brute", "dual-flow", "min-cost-flow", "cp-sat"])
def test_bounds_that_fit_alone_but_not_together_are_infeasible(name: str) -> None:
    # Row 0 must keep both its edges, row 1 none, yet column 0 wants two edges: 2 of 2 rows.
    problem = EdgeSelection(
        np.ones((2, 2)), 2, row_min=np.array([2, 0]), row_max=np.array([2, 0]), col_min=np.array([2, 0])
    )
    with pytest.raises(Infeasible, match="k=2"):
        solve(problem, name)


@pytest.mark.parametrize("name", SOLVERS)
def test_only_allowed_edges_stay(name: str) -> None:
    score = np.arange(12.0).reshape(3, 4)
    allowed = score < 7
    for k in (0, 3, 7):
        assert not solve(EdgeSelection(score, k, allowed=allowed), name).keep[~allowed.reshape(-1)].any()
    with pytest.raises(Infeasible, match="only 7 edges are allowed, but k=8"):
        EdgeSelection(score, 8, allowed=allowed)


def test_bounds_whose_sums_miss_k_are_infeasible_at_once() -> None:
    with pytest.raises(Infeasible, match="k=5"):
        EdgeSelection(np.ones((2, 3)), 5, row_max=np.array([2, 2]))


def test_two_sided_bounds_name_the_solvers_that_take_them() -> None:
    problem = EdgeSelection(np.ones((3, 3)), 3, row_max=np.ones(3, int), col_max=np.ones(3, int))
    with pytest.raises(ValueError, match="'dual-flow'"):
        solve(problem, "greedy")
    assert solve(problem, "min-cost-flow").objective == 3.0


def test_min_cost_flow_names_the_solvers_for_attachment() -> None:
    with pytest.raises(ValueError, match=r"attachment 0, found 2.*'lagrangian'.*'cp-sat'"):
        solve(EdgeSelection(np.ones((2, 2)), 2, attachment=2.0), "min-cost-flow")


def test_cp_sat_takes_two_sided_bounds_with_attachment() -> None:
    rng = np.random.default_rng(1)
    problem = EdgeSelection(
        rng.random((8, 10)), 30, attachment=2.0, row_max=np.full(8, 7), col_min=np.full(10, 1), col_max=np.full(10, 4)
    )
    solution = solve(problem, "cp-sat", time_limit=20.0)
    assert solution.status is Status.OPTIMAL
    without = solve(
        EdgeSelection(problem.score, 30, row_max=problem.row_max, col_min=problem.col_min, col_max=problem.col_max),
        "cp-sat",
    )
    assert solution.objective >= problem.objective(without.keep)


def test_a_time_limit_of_nothing_returns_the_start() -> None:
    problem = EdgeSelection(np.random.default_rng(2).random((15, 20)), 120, attachment=1.0, col_max=np.full(20, 9))
    solution = solve(problem, "cp-sat", time_limit=1e-3)
    assert solution.objective >= solve(problem, "greedy").objective - 1e-12
    assert solution.bound is not None


@pytest.mark.parametrize("name", ["greedy", "lagrangian", "cp-sat"])
def test_a_warm_start_is_checked_and_used(name: str) -> None:
    problem = EdgeSelection(np.random.default_rng(3).random((5, 6)), 12, attachment=5.0)
    best = solve(problem, "dp")
    assert solve(problem, name, warm_start=best.keep).objective == pytest.approx(best.objective)
    assert solve(problem, name, warm_start=~best.keep).objective <= best.objective + 1e-9  # wrong k: ignored
    with pytest.raises(ValueError, match="warm_start has 3 entries, expected 30"):
        solve(problem, name, warm_start=np.ones(3, bool))


def test_large_instances_are_refused_by_the_small_solvers() -> None:
    problem = EdgeSelection(np.ones((40, 40)), 10)
    with pytest.raises(ValueError, match="at most 400 units"):
        solve(problem, "cp-sat")


def test_hubs_grow_on_a_layer_like_matrix() -> None:
    """The signature of preferential attachment, in both readings, on |Gaussian| scores."""
    score = np.abs(np.random.default_rng(7).standard_normal((128, 96)))
    for reading in ("a", "b"):
        spread = [
            degree_sd(
                problem := EdgeSelection(score, 6144, attachment=s, reading=reading), solve(problem, "greedy").keep
            )  # type: ignore[arg-type]
            for s in (0.0, 3.0, 30.0, 300.0)
        ]
        assert spread == sorted(spread)
        assert spread[-1] > 1.5 * spread[0]

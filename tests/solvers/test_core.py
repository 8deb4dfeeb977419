"""The contract around the solvers: checker, registry, error texts, import guards."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from graph_strategies import named_graph, random_graph

from topoprune_solvers import (
    Bound,
    BudgetedDomination,
    DominatingSet,
    InvalidSolution,
    SoftDomination,
    Solution,
    Status,
    adjacency_from_edges,
    available_solvers,
    best_bound,
    get_solver,
    relative_gap,
    solve,
    solve_many,
    solver_names,
    verify,
)
from topoprune_solvers.base import SOLVERS, Capabilities, register
from topoprune_solvers.verify import verify_many

PROBLEM = DominatingSet.from_edges(*named_graph("path")[:2], forced=np.arange(7) == 1, forbidden=np.arange(7) == 6)
GOOD = solve(PROBLEM, "exact")
UNIT_TYPES = [DominatingSet, BudgetedDomination, SoftDomination]


def flip(array: np.ndarray | None, position: int, value: float) -> np.ndarray:
    assert array is not None
    changed = array.copy()
    changed[position] = value
    return changed


CORRUPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"keep": np.ones(3, bool)}, "keep has shape"),
    ({"sense": "max"}, "sense 'max'"),
    ({"keep": flip(GOOD.keep, 1, False)}, "a forced unit was pruned"),
    ({"keep": flip(GOOD.keep, 6, True)}, "a forbidden unit was kept"),
    ({"keep": np.arange(7) == 1}, r"units \[3, 4, 5, 6\] are not covered"),
    ({"objective": GOOD.objective - 1}, "recomputed"),
    ({"objective": math.nan}, "recomputed"),
    ({"bound": Bound(GOOD.objective + 1, "wishful thinking")}, "beyond the objective"),
    ({"bound": None}, "OPTIMAL without a bound"),
    ({"bound": Bound(0.0, "nothing")}, "status OPTIMAL, but bound"),
    ({"dominator": None}, "no dominators given"),
    ({"dominator_distance": None}, "no dominator distances"),
    ({"dominator": flip(GOOD.dominator, 0, 5)}, "not the nearest kept neighbour"),
    ({"dominator_distance": flip(GOOD.dominator_distance, 0, 0.5)}, "distance is wrong"),
]


@pytest.mark.parametrize(("changes", "message"), CORRUPTIONS)
def test_verify_rejects_a_corrupted_solution(changes: dict[str, Any], message: str) -> None:
    verify(PROBLEM, GOOD)
    with pytest.raises(InvalidSolution, match=message):
        verify(PROBLEM, replace(GOOD, **changes))


@pytest.mark.parametrize(("changes", "message"), CORRUPTIONS)
def test_verify_many_finds_a_corrupted_solution_among_others(changes: dict[str, Any], message: str) -> None:
    others = [DominatingSet.from_edges(0, []), DominatingSet(*random_graph(9, 0.3, 1)), DominatingSet.from_edges(1, [])]
    problems = [*others, PROBLEM, *others]
    solutions = solve_many(problems, "exact")
    verify_many(problems, solutions)
    solutions[3] = replace(GOOD, **changes)
    with pytest.raises(InvalidSolution, match=message):
        verify_many(problems, solutions)


def outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except InvalidSolution as error:
        return str(error)
    return ""


def test_verify_many_agrees_with_verify_on_random_changes() -> None:
    rng = np.random.default_rng(0)
    problems = [
        DominatingSet(*random_graph(8, 0.3, seed), cost=rng.integers(0, 3, 8), demand=rng.integers(0, 2, 8))
        for seed in range(4)
    ]
    good = solve_many(problems, "exact")
    found = 0
    for _ in range(200):
        solutions = list(good)
        number, field = int(rng.integers(4)), str(rng.choice(["keep", "dominator", "dominator_distance"]))
        array = getattr(good[number], field).copy()
        array[rng.integers(8)] = rng.choice([0, 1, 3, 0.5] if field != "keep" else [False, True])
        solutions[number] = replace(good[number], **{field: array})
        outcomes = [
            outcome(lambda one=problems[number], other=solutions[number]: verify(one, other)),
            outcome(lambda these=solutions: verify_many(problems, these)),
        ]
        assert outcomes[0] == outcomes[1]
        found += bool(outcomes[0])
    assert 50 < found < 200
    with pytest.raises(InvalidSolution, match="3 solutions for 4 problems"):
        verify_many(problems, good[:3])


@pytest.mark.parametrize("kind", [BudgetedDomination, SoftDomination])
def test_verify_counts_the_budget_and_the_side_of_the_bound(kind: type) -> None:
    problem = kind(*random_graph(6, 0.9, 0), k=3)
    good = solve(problem, "exact")
    verify(problem, good)
    more = flip(good.keep, int(np.flatnonzero(~good.keep)[0]), True)
    with pytest.raises(InvalidSolution, match="4 units kept, expected exactly 3"):
        verify(problem, replace(good, keep=more))
    wrong = good.objective + (1 if problem.sense == "min" else -1)
    with pytest.raises(InvalidSolution, match="beyond the objective"):
        verify(problem, replace(good, bound=Bound(wrong, "wrong side"), status=Status.FEASIBLE))


def test_a_registered_solver_that_cheats_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cheat:
        name = "cheat"
        capabilities = Capabilities(DominatingSet, exact=True, guarantee="none", complexity="O(1)")

        def solve(self, problem: Any, **options: Any) -> Solution:
            return replace(GOOD, keep=np.zeros(7, bool), objective=0.0)

    with pytest.raises(InvalidSolution):
        solve(PROBLEM, Cheat())
    for kind, table in SOLVERS.items():
        monkeypatch.setitem(SOLVERS, kind, dict(table))
    register(Cheat())
    assert "cheat" in solver_names(DominatingSet)
    with pytest.raises(InvalidSolution):
        solve(PROBLEM, "cheat")


def test_errors_name_what_was_found_and_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"unknown solver 'gredy' for DominatingSet; available: .*cp-sat.*greedy"):
        solve(PROBLEM, "gredy")
    with pytest.raises(ValueError, match="takes DominatingSet, not SoftDomination"):
        get_solver(get_solver("greedy", DominatingSet), SoftDomination)
    with pytest.raises(ValueError, match="takes at most 20 units, this problem has 21"):
        solve(DominatingSet.from_edges(21, []), "brute")
    for kind in UNIT_TYPES:
        fields = {} if kind is DominatingSet else {"k": 3}
        with pytest.raises(ValueError, match=r"warm_start has shape \(2,\), expected \(6,\)"):
            solve(kind(*random_graph(6, 0.5, 0), **fields), "greedy", warm_start=[True, False])
    for limit in (-1.0, math.nan):
        with pytest.raises(ValueError, match="time_limit must be a number of seconds >= 0"):
            solve(PROBLEM, "exact", time_limit=limit)


@pytest.mark.parametrize("kind", UNIT_TYPES)
def test_the_registry_lists_every_solver_with_its_data(kind: type) -> None:
    wanted = {"greedy", "exact", "brute", "random", "magnitude"}
    wanted |= {
        DominatingSet: {"neuroprune", "cp-sat", "milp"},
        BudgetedDomination: {"cp-sat"},
        SoftDomination: {"milp"},
    }[kind]
    assert wanted <= set(solver_names(kind))
    assert set(available_solvers(kind)) <= set(solver_names(kind))
    for name in solver_names(kind):
        solver = get_solver(name, kind) if name in available_solvers(kind) else None
        if solver is not None:
            assert solver.name == name and solver.capabilities.problem is kind
            assert solver.capabilities.guarantee and solver.capabilities.complexity


def test_solve_many_pairs_problems_with_warm_starts() -> None:
    problems = [DominatingSet(*random_graph(12, 0.3, seed)) for seed in range(3)]
    solutions = solve_many(problems, "exact", warm_starts=[None, np.ones(12, bool), None])
    assert [solution.objective for solution in solutions] == [solve(problem, "brute").objective for problem in problems]
    assert all(solution.seconds > 0 and solution.solver == "exact" for solution in solutions)
    with pytest.raises(ValueError):
        solve_many(problems, "exact", warm_starts=[None])


def test_bounds_combine_and_gaps_are_relative() -> None:
    low, high = Bound(1.0, "a"), Bound(2.0, "b")
    assert best_bound("min", [low, None, high]) == high and best_bound("max", [low, high]) == low
    assert best_bound("min", [None, Bound(math.nan, "broken")]) is None
    assert relative_gap(math.inf, math.inf) == 0 and math.isinf(relative_gap(math.inf, 1.0))


def test_solutions_and_problems_are_read_only() -> None:
    for array in (GOOD.keep, GOOD.dominator, PROBLEM.cost, PROBLEM.indices):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 1, 1], [1], "not symmetric"),
        ([0, 1, 2], [0, 0], "self-loop at node 0"),
        ([0, 2, 4], [1, 1, 0, 0], "strictly increasing"),
        ([0, 1, 2], [1, 2], r"indices must lie in \[0, 2\)"),
        ([0, 1, 3], [1, 0], "indptr ends at 3"),
        ([1, 1], [], "start at 0"),
    ],
)
def test_a_broken_graph_is_refused(indptr: list[int], indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DominatingSet(np.array(indptr), np.array(indices, dtype=np.int32))


def test_edge_lists_may_repeat_and_loop() -> None:
    indptr, indices, weight = adjacency_from_edges(3, np.array([(1, 0), (0, 1), (2, 2)]), np.array([0.5, 0.25, 9.0]))
    assert indptr.tolist() == [0, 1, 2, 2] and indices.tolist() == [1, 0] and weight.tolist() == [0.25, 0.25]


BLOCKED = """
import sys
for name in ("torch", "ortools", "igraph", "networkx", "transformers", "numba", "pysat"):
    sys.modules[name] = None
import numpy as np
from topoprune_solvers import BudgetedDomination, DominatingSet, available_solvers, solve, solver_names
assert "cp-sat" in solver_names(DominatingSet) and "cp-sat" not in available_solvers(DominatingSet)
try:
    solve(DominatingSet.from_edges(2, []), "cp-sat")
except ValueError as error:
    assert "needs the package ortools" in str(error) and "greedy" in str(error), error
else:
    raise SystemExit("cp-sat ran without ortools")
rng = np.random.default_rng(0)
edges = rng.integers(0, 120, (500, 2))
large = solve(DominatingSet.from_edges(120, edges), "exact", time_limit=3)
assert large.status.name in ("OPTIMAL", "TIME_LIMIT") and 10 < large.bound.value <= large.objective < 20, large
budget = DominatingSet.from_edges(120, edges)
assert solve(BudgetedDomination(budget.indptr, budget.indices, k=60), "exact", time_limit=3).objective == 0
small = solve(DominatingSet.from_edges(12, [(i, (i + 1) % 12) for i in range(12)]), "exact")
assert small.status.name == "OPTIMAL" and small.n_kept == 4
"""

LAZY = """
import sys
import topoprune_solvers
topoprune_solvers.available_solvers(topoprune_solvers.DominatingSet)
names = ("torch", "ortools", "igraph", "networkx", "matplotlib", "numba", "pysat", "topoprune")
heavy = [name for name in names if name in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.parametrize("script", [BLOCKED, LAZY], ids=["without optional packages", "nothing heavy at import"])
def test_imports(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

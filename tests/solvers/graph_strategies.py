"""Hypothesis strategies for the unit problems, and a few named graphs with known optima."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from topoprune_solvers import (
    DominatingSet,
    Infeasible,
    adjacency_from_dense,
    adjacency_from_edges,
    get_solver,
)

COSTS = {
    "unit": [1.0],
    "integers": [0.0, 1.0, 2.0, 3.0, 7.0],
    "floats": [0.1, 0.25, 0.3, 1 / 3, 1.7],
    "huge": [0.0, 1e-6, 1.0, 1e30],
}


@st.composite
def graphs(draw: st.DrawFn, max_n: int = 9, distances: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw (indptr, indices, weight): any density, so disconnected graphs and isolated nodes are common."""
    n = draw(st.integers(0, max_n))
    pairs = [(i, j) for i in range(n) for j in range(i)]
    edges = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    levels = draw(st.sampled_from([[0.0], [0.25, 0.5, 1.0], [i / 97 for i in range(98)]]))
    weight = [draw(st.sampled_from(levels)) if distances else 0.0 for _ in edges]
    return adjacency_from_edges(n, np.array(edges, dtype=np.int64).reshape(-1, 2), np.array(weight, dtype=np.float64))


def masks(n: int) -> st.SearchStrategy[np.ndarray]:
    """Draw (n,) bool, mostly False."""
    entry = st.sampled_from([False, False, False, False, True])
    return st.lists(entry, min_size=n, max_size=n).map(lambda flags: np.array(flags, dtype=bool))


def takes(name: str, problem_type: type, feature: str) -> bool:
    """Return True unless a solver says that it lacks a feature of the problem type, e.g. ``"demand"``."""
    return feature not in get_solver(name, problem_type).capabilities.lacks


@st.composite
def unit_problems(draw: st.DrawFn, problem_type: type, max_n: int = 9, demand: bool = False) -> Any:
    """Draw a feasible problem of a type, with forced and forbidden units now and then.

    With `demand` a dominating set also asks for 0..3 kept units per neighbourhood; give
    ``takes(solver, DominatingSet, "demand")``
    so that solvers which lack demands get plain problems.
    """
    indptr, indices, weight = draw(graphs(max_n))
    n = indptr.size - 1
    forced = draw(masks(n))
    forbidden = draw(masks(n)) & ~forced
    values = draw(st.sampled_from(sorted(COSTS)))
    vector = np.array([draw(st.sampled_from(COSTS[values])) for _ in range(n)], dtype=np.float64)
    if problem_type is DominatingSet:
        try:
            problem = DominatingSet(indptr, indices, weight, forced, forbidden, cost=vector)
        except Infeasible:
            problem = DominatingSet(indptr, indices, weight, forced, cost=vector)
        if not demand or draw(st.booleans()):
            return problem
        assert problem.forbidden is not None
        levels = draw(st.sampled_from([[1, 1, 1, 0], [2], [0, 1, 2, 3], [3]]))
        wanted = np.array([draw(st.sampled_from(levels)) for _ in range(n)], dtype=np.int64)
        return replace(problem, demand=np.minimum(wanted, problem.counts(~problem.forbidden)))
    low, high = int(forced.sum()), n - int(forbidden.sum())
    k = draw(st.integers(max(low, min(1, n)), high)) if high >= max(low, min(1, n)) else n
    if high < max(low, min(1, n)):
        forbidden = np.zeros(n, dtype=bool)
    return problem_type(indptr, indices, weight, forced, forbidden, k=k, importance=vector)


@st.composite
def grouped_problems(draw: st.DrawFn, problem_type: type, max_n: int = 9) -> Any:
    """Draw a feasible budgeted problem whose units lie in groups with bounds on the kept ones.

    The bounds are drawn around the counts of one selection, which keeps the problem feasible.
    """
    plain = draw(unit_problems(problem_type, max_n))
    groups = draw(st.integers(1, 4))
    label = np.array([draw(st.integers(0, groups - 1)) for _ in range(plain.n)], dtype=np.int64)
    order = np.array(draw(st.permutations(range(plain.n))), dtype=np.int64)
    order = np.concatenate([np.flatnonzero(plain.forced), order[~plain.forced[order] & ~plain.forbidden[order]]])
    count = np.bincount(label[order[: plain.k].astype(np.int64)], minlength=groups)
    around = draw(st.sampled_from([0, 0, 1, 9]))
    low = [max(0, int(c) - draw(st.integers(0, around))) for c in count]
    high = [int(c) + draw(st.integers(0, around)) for c in count]
    return replace(plain, group=label, group_min=np.array(low), group_max=np.array(high))


def relabel(problem: Any, order: np.ndarray) -> Any:
    """Return the same problem with unit ``order[i]`` in place of unit i."""
    n = problem.n
    dense, present = np.zeros((n, n)), np.zeros((n, n), dtype=bool)
    rows = np.repeat(np.arange(n), np.diff(problem.indptr))
    dense[rows, problem.indices] = problem.weight
    present[rows, problem.indices] = True
    arrays = adjacency_from_dense(dense[np.ix_(order, order)], present[np.ix_(order, order)])
    shared = problem.forced[order], problem.forbidden[order]
    if isinstance(problem, DominatingSet):
        assert problem.cost is not None
        assert problem.demand is not None and not isinstance(problem.demand, int)
        return DominatingSet(*arrays, *shared, cost=problem.cost[order], demand=problem.demand[order])
    group = None if problem.group is None else problem.group[order]
    bounds = {"group": group, "group_min": problem.group_min, "group_max": problem.group_max}
    return type(problem)(*arrays, *shared, k=problem.k, importance=problem.importance[order], **bounds)


def random_graph(n: int, density: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an Erdos-Renyi graph with uniform distances in [0, 1]."""
    rng = np.random.default_rng(seed)
    distance = rng.random((n, n))
    present = np.triu(rng.random((n, n)) < density, 1)
    return adjacency_from_dense((distance + distance.T) / 2, present | present.T)


def named_graph(name: str) -> tuple[int, list[tuple[int, int]], int]:
    """Return (n, edges, domination number)."""
    clique = [(i, j) for i in range(7) for j in range(i)]
    return {
        "null": (0, [], 0),
        "single": (1, [], 1),
        "empty": (5, [], 5),
        "complete": (7, clique, 1),
        "star": (8, [(0, i) for i in range(1, 8)], 1),
        "path": (7, [(i, i + 1) for i in range(6)], 3),
        "cycle": (12, [(i, (i + 1) % 12) for i in range(12)], 4),
        "two cliques and an isolated unit": (15, clique + [(i + 7, j + 7) for i, j in clique], 3),
    }[name]


NAMED = ["null", "single", "empty", "complete", "star", "path", "cycle", "two cliques and an isolated unit"]

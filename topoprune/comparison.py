"""Solvers side by side on the same problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from topoprune.comparison_table import Comparison, best_bounds, solver_row
from topoprune.graph import Graph, ModelGraph
from topoprune.planning import Plan, solve
from topoprune_solvers import (
    Capabilities,
    DominatingSet,
    EdgeSelection,
    Solution,
    Solver,
    adjacency_from_edges,
    available_solvers,
    get_solver,
    solve_many,
    solver_names,
)
from topoprune_solvers.registry import install_hint
from topoprune_solvers.result import interruptible

__all__ = ["Comparison", "compare", "complete_request"]

Progress = Callable[[str, int, int], None]
_SITE_KINDS = {"heads": ("head", "kv_group"), "neurons": ("neuron",), "graph": ("node",)}
_SMALL = 64


def compare(
    graph: ModelGraph | Graph,
    solvers: Sequence[str | Solver] | None = None,
    *,
    progress: Progress | None = None,
    **request: Any,
) -> Comparison:
    """Solve the same problems with several solvers; sums over sites, worst gap.

    The bound of a site is the best that any of the solvers proved, so a heuristic without a
    bound of its own is measured too. The first Ctrl-C makes the running solver return its incumbent and
    leaves out the solvers after it; a second one raises KeyboardInterrupt. Every solver first solves a
    small problem unmeasured, so that its seconds are not those of loading and compiling.

    Args:
        graph: from `extract`, or a bare `Graph` (see `topoprune.read_graph`): the smallest set of nodes such
            that every other one has a kept neighbour, over all edges unless `theta` asks for the short ones.
        solvers: names or objects; default: every installed solver that takes problems of this size.
        progress: called with (solver, solved, in all) after every site.
        request: as for `solve` (theta or budget, problem, objective, time_limit, ...).

    Returns:
        A `Comparison`; a named solver that refuses the problem (too large, a feature it lacks) gets
        a row with its error, the others still run.

    Raises:
        ValueError: a solver that is unknown or not installed, or a request that no solver could take.

    Example:
        >>> import numpy as np
        >>> path = Graph.from_edges(5, np.array([[0, 1], [1, 2], [2, 3], [3, 4]]))
        >>> table = compare(path, ["exact", "random"])
        >>> table.best, table.plans["exact"].keep("graph").tolist()
        ('exact', [False, True, False, True, False])
    """
    graph, request = complete_request(graph, request)
    first = _first_problem(graph, request)
    problem_type, sizes = type(first), _sizes(graph, request)
    notes: list[str] = []
    names = _default_solvers(problem_type, sizes, notes) if solvers is None else list(solvers)
    engines = {engine.name: engine for engine in (get_solver(name, problem_type) for name in names)}
    if not engines:
        raise ValueError(f"no solver named; available: {', '.join(available_solvers(problem_type))}")
    plans: dict[str, Plan | str] = {}
    with interruptible() as stop:
        for name, engine in engines.items():
            if stop.is_set():
                notes.append(f"not run after Ctrl-C: {', '.join(other for other in engines if other not in plans)}")
                break
            _warm_up(engine, first)
            done = len(plans) * len(sizes)
            ticking = _Ticking(engine, progress, done, len(engines) * len(sizes))
            try:
                plans[name] = solve(graph, solver=ticking, **request)
            except ValueError as error:
                plans[name] = f"refused: {error}"
        interrupted = stop.is_set()
    solved = {name: plan for name, plan in plans.items() if isinstance(plan, Plan)}
    bounds = best_bounds(solved)
    rows = tuple(solver_row(name, plan, bounds) for name, plan in plans.items())
    return Comparison(rows, solved, tuple(notes), interrupted)


def complete_request(graph: ModelGraph | Graph, request: Mapping[str, Any]) -> tuple[ModelGraph, dict[str, Any]]:
    """Return graph and request as `solve` takes them: a bare graph is wrapped, and stands for all its edges.

    Args:
        graph: a model's graph (returned as it is), a bare `Graph`, or one wrapped by `ModelGraph.from_graph`.
        request: as for `solve`.

    Raises:
        ValueError: a problem of models asked of a bare graph, or the other way round.
    """
    if isinstance(graph, Graph):
        graph = ModelGraph.from_graph(graph)
    request = dict(request)
    bare = bool(graph.sites) and all(site.kind == "node" for site in graph.sites)
    if not bare:
        if request.get("problem") == "graph":
            raise ValueError("problem 'graph' is for bare graphs; this is a model's: heads, neurons or edges")
        return graph, request
    if request.setdefault("problem", "graph") != "graph":
        raise ValueError(f"this is a bare graph, without {request['problem']!r}; leave the problem out, or say 'graph'")
    if request.get("theta") is None and request.get("budget") is None:
        request["theta"] = max((float(g.weight.max(initial=0.0)) for g in graph.redundancy.values()), default=0.0)
    return graph, request


class _Asked(Exception):
    """Carries the first problem of a request out of `solve`."""

    def __init__(self, problem: Any) -> None:
        super().__init__()
        self.problem = problem


class _Asking:
    """A solver that takes any problem and reports it, so that a wrong request fails before any solver runs."""

    name: ClassVar[str] = "asking"
    capabilities: ClassVar[Capabilities] = Capabilities(object, exact=False, guarantee="none", complexity="O(1)")

    def solve(self, problem: Any, **_: Any) -> Solution:
        raise _Asked(problem)


def _first_problem(graph: ModelGraph, request: Mapping[str, Any]) -> Any:
    try:
        solve(graph, solver=_Asking(), **request)
    except _Asked as asked:
        return asked.problem
    raise AssertionError("solve returned without asking the solver")


def _warm_up(engine: Solver, problem: Any) -> None:
    """Solve a small problem for the side effects: imports, and kernels loaded or compiled."""
    if engine.capabilities.max_units is None:
        with suppress(ValueError):  # the measured run says why
            if problem.n <= _SMALL:
                solve_many([problem], engine, time_limit=1.0)
            else:
                solve_many([_small_twin(problem)], engine, time_limit=0.2)


def _small_twin(problem: Any) -> Any:
    """Return a problem of the same type on a random graph of 64 units, or the corner of an edge problem."""
    if isinstance(problem, EdgeSelection):
        score = problem.score[:12, :12]
        return EdgeSelection(score, score.size // 2, attachment=problem.attachment, reading=problem.reading)
    rng = np.random.default_rng(0)
    edges = rng.integers(0, _SMALL, (2 * _SMALL, 2))
    arrays = adjacency_from_edges(_SMALL, edges, rng.random(len(edges)))
    if isinstance(problem, DominatingSet):
        return DominatingSet(*arrays)
    return type(problem)(*arrays, k=_SMALL // 2)


class _Ticking:
    """A solver that reports every solved problem; all else is the solver's own."""

    def __init__(self, solver: Solver, progress: Progress | None, done: int, total: int) -> None:
        self.solver, self.progress, self.done, self.total = solver, progress, done, total
        self.report(0)

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(self.solver, attribute)
        if attribute != "solve_many":
            return value

        def solve_many(problems: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            solutions = value(problems, *args, **kwargs)
            self.report(len(problems))
            return solutions

        return solve_many

    @property
    def name(self) -> str:
        return self.solver.name

    @property
    def capabilities(self) -> Capabilities:
        return self.solver.capabilities

    def solve(
        self, problem: Any, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        solution = self.solver.solve(problem, warm_start=warm_start, time_limit=time_limit, seed=seed)
        self.report(1)
        return solution

    def report(self, solved: int) -> None:
        self.done = min(self.done + solved, self.total)
        if self.progress is not None:
            self.progress(self.solver.name, self.done, self.total)


def _sizes(graph: ModelGraph, request: Mapping[str, Any]) -> list[int]:
    """Return the units (or edges) of every site that will be decided on."""
    problem = request.get("problem", "heads")
    if request.get("scope") == "model":
        return [sum(_sizes(graph, {**request, "scope": "site"}))]
    if problem == "edges":
        return [wires.weight.size for wires in graph.connectivity.values()]
    kinds = _SITE_KINDS[problem]
    return [site.n_units for site in graph.sites if site.kind in kinds and site.name in graph.redundancy]


def _default_solvers(problem_type: type, sizes: Sequence[int], notes: list[str]) -> list[str]:
    here, largest = available_solvers(problem_type), max(sizes, default=0)
    for name in solver_names(problem_type):
        if name not in here:
            notes.append(f"not installed: {name} ({install_hint(name, problem_type)})")
    limits = {name: get_solver(name, problem_type).capabilities.max_units for name in here}
    small = {name: limit for name, limit in limits.items() if limit is not None and limit < largest}
    if small:
        notes.append(f"left out: {', '.join(f'{name} (takes at most {limit})' for name, limit in small.items())}")
    return [name for name in here if name not in small]

"""Solvers by problem type and name: a dict, plus the entry-point group ``topoprune.solvers``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from topoprune_solvers.base import SOLVERS, Solver, register
from topoprune_solvers.solution import Solution

__all__ = [
    "available_solvers",
    "get_solver",
    "install_hint",
    "solve",
    "solve_many",
    "solver_names",
]

ENTRY_POINT_GROUP = "topoprune.solvers"
# Importable module -> the extra of this distribution that brings it.
EXTRAS = {"numba": "fast", "pysat": "sat", "networkx": "networkx"}


@cache
def _load() -> None:
    from topoprune_solvers.builtin import import_all

    import_all()
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        register(entry.load()())


def solver_names(problem_type: type) -> list[str]:
    """Return the names of all solvers for a problem type, sorted, installed or not."""
    _load()
    return sorted(SOLVERS.get(problem_type, {}))


def available_solvers(problem_type: type) -> list[str]:
    """Return the names of the solvers whose required modules are installed, sorted."""
    _load()
    return [name for name in solver_names(problem_type) if not _missing(SOLVERS[problem_type][name])]


def _missing(solver: Solver) -> list[str]:
    return [module for module in solver.capabilities.requires if find_spec(module) is None]


def install_hint(name: str, problem_type: type) -> str:
    """Return the command that installs what a registered solver misses, e.g. ``pip install "topoprune[sat]"``."""
    _load()
    missing = _missing(SOLVERS[problem_type][name])
    extras = sorted({EXTRAS[module] for module in missing if module in EXTRAS})
    packages = [f'"topoprune[{",".join(extras)}]"'] if extras else []
    packages += [module for module in missing if module not in EXTRAS]
    return f"pip install {' '.join(packages)}"


def get_solver(name: str | Solver, problem_type: type) -> Solver:
    """Return the solver registered under a name, or the given solver itself, ready to run.

    Raises:
        ValueError: an unknown name (lists the known ones), a solver for another problem, or
            a solver whose required module is not installed.
    """
    _load()
    if not isinstance(name, str):
        if not issubclass(problem_type, name.capabilities.problem):
            raise ValueError(
                f"solver {name.name!r} takes {name.capabilities.problem.__name__}, not {problem_type.__name__}"
            )
        return name
    table = SOLVERS.get(problem_type, {})
    if name not in table:
        raise ValueError(
            f"unknown solver {name!r} for {problem_type.__name__}; available: {', '.join(solver_names(problem_type))}"
        )
    missing = _missing(table[name])
    if missing:
        raise ValueError(
            f"solver {name!r} needs the package {', '.join(missing)}, which is not installed: "
            f"{install_hint(name, problem_type)}; or use one of: {', '.join(available_solvers(problem_type))}"
        )
    return table[name]


def solve(
    problem: Any,
    solver: str | Solver,
    *,
    warm_start: Any = None,
    time_limit: float | None = None,
    seed: int = 0,
) -> Solution:
    """Solve one problem and verify the answer before returning it.

    Raises:
        ValueError: unknown solver, or an instance above the solver's `max_units`.
        AssertionError: the solver returned an invalid solution (a bug in the solver).
    """
    from topoprune_solvers.verify import verify

    engine = get_solver(solver, type(problem))
    _check_size(engine, problem)
    started = time.perf_counter()
    solution = engine.solve(problem, warm_start=warm_start, time_limit=time_limit, seed=seed)
    solution = replace(solution, seconds=time.perf_counter() - started, solver=engine.name)
    verify(problem, solution)
    return solution


def _check_size(engine: Solver, problem: Any) -> None:
    limit = engine.capabilities.max_units
    if limit is not None and problem.n > limit:
        raise ValueError(f"solver {engine.name!r} takes at most {limit} units, this problem has {problem.n}")


def solve_many(
    problems: Iterable[Any],
    solver: str | Solver,
    *,
    warm_starts: Sequence[Any] | None = None,
    time_limit: float | None = None,
    seed: int = 0,
) -> list[Solution]:
    """Solve several problems (all layers of a model) and verify the answers before returning them.

    A solver with a `solve_many` of its own gets all of them in one call, which saves most of the time on
    small graphs; the answers are the same as one by one.

    Args:
        problems: instances of one problem type (of several types: only for solvers without a `solve_many`).
        solver: name or instance. warm_starts: one each, or None. time_limit: seconds for each problem.
        seed: as in `solve`.

    Raises:
        As in `solve`.
    """
    from topoprune_solvers.verify import verify_many

    problems = list(problems)
    starts = [None] * len(problems) if warm_starts is None else list(warm_starts)
    kinds = {type(problem) for problem in problems}
    engine = get_solver(solver, kinds.pop()) if len(kinds) == 1 else None
    together = getattr(engine, "solve_many", None)
    if engine is None or together is None:
        return [
            solve(problem, solver, warm_start=start, time_limit=time_limit, seed=seed)
            for problem, start in zip(problems, starts, strict=True)
        ]
    for problem in problems:
        _check_size(engine, problem)
    solutions: list[Solution] = together(problems, warm_starts=starts, time_limit=time_limit, seed=seed)
    verify_many(problems, solutions)
    return solutions

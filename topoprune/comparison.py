"""Solvers side by side on the same problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from topoprune.graph import ModelGraph
from topoprune.planning import Plan, solve
from topoprune_solvers import (
    Bound,
    BudgetedDomination,
    DominatingSet,
    EdgeSelection,
    SoftDomination,
    Solver,
    available_solvers,
    best_bound,
    get_solver,
    relative_gap,
)

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Solvers side by side on the same problems.

    Args:
        rows: one dict a solver: solver, kept, units, objective, bound, gap, seconds, status, error.
    """

    rows: tuple[Mapping[str, Any], ...]

    def __str__(self) -> str:
        head = f"{'solver':14} {'kept':>13} {'objective':>12} {'bound':>12} {'gap':>8} {'ms':>10}  status"
        lines = [head]
        for row in self.rows:
            if row["error"]:
                lines.append(f"{row['solver']:14} {row['error']}")
                continue
            bound = "-" if row["bound"] is None else f"{row['bound']:.5g}"
            gap = "-" if math.isnan(row["gap"]) else f"{row['gap']:.2%}"
            kept = f"{row['kept']}/{row['units']}"
            lines.append(
                f"{row['solver']:14} {kept:>13} {row['objective']:12.5g} {bound:>12} {gap:>8} "
                f"{1e3 * row['seconds']:10.2f}  {row['status']}"
            )
        return "\n".join(lines)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return JSON-ready rows."""
        return [dict(row) for row in self.rows]


def compare(graph: ModelGraph, solvers: Sequence[str | Solver] | None = None, **request: Any) -> Comparison:
    """Solve the same problems with several solvers; sums over sites, worst gap.

    The bound of a site is the best that any of the solvers proved, so a heuristic without a
    bound of its own is measured too.

    Args:
        graph: from `extract`.
        solvers: names or objects; default: every solver available for the problem.
        request: as for `solve` (theta or budget, problem, objective, ...).

    Returns:
        A `Comparison`; a solver that refuses the problem (too large, wrong bounds) gets a row
        with its error, the others still run.

    Raises:
        ValueError: an unknown solver or a request that no solver could take.
    """
    problem_type: type = EdgeSelection if request.get("problem") == "edges" else DominatingSet
    if problem_type is DominatingSet and request.get("budget") is not None:
        problem_type = SoftDomination if request.get("objective") == "soft" else BudgetedDomination
    engines = [get_solver(solver, problem_type) for solver in (solvers or available_solvers(problem_type))]
    solve(graph, solver="greedy", **request)  # a wrong request fails here, once, before the table
    plans: dict[str, Plan | str] = {}
    for engine in engines:
        try:
            plans[engine.name] = solve(graph, solver=engine, **request)
        except ValueError as error:
            plans[engine.name] = f"refused: {error}"
    solved = [plan for plan in plans.values() if isinstance(plan, Plan)]
    bounds = {
        site: best_bound(solution.sense, [plan.solutions[site].bound for plan in solved])
        for site, solution in (solved[0].solutions.items() if solved else ())
    }
    return Comparison(tuple(_comparison_row(name, plan, bounds) for name, plan in plans.items()))


def _comparison_row(name: str, plan: Plan | str, bounds: Mapping[str, Bound | None]) -> dict[str, Any]:
    if isinstance(plan, str):
        return {"solver": name, "error": plan}
    solutions = plan.solutions
    known = [bound.value for bound in bounds.values() if bound is not None]
    complete = len(known) == len(bounds)
    gaps = [relative_gap(solutions[site].objective, b.value) for site, b in bounds.items() if b is not None]
    return {
        "solver": name,
        "kept": sum(s.n_kept for s in solutions.values()),
        "units": sum(s.n_units for s in solutions.values()),
        "objective": sum(s.objective for s in solutions.values()),
        "bound": sum(known) if complete else None,
        "gap": max(gaps, default=0.0) if complete else math.nan,
        "seconds": plan.seconds,
        "status": ", ".join(sorted({s.status.name for s in solutions.values()})),
        "error": "",
    }

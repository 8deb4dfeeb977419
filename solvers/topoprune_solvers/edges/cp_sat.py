"""Exact attachment-weighted edge selection on small instances with CP-SAT (OR-Tools)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.common import (
    bounded_sides,
    candidate_value,
    column_limits,
    edge_solution,
    edge_start,
    only_selection,
    row_limits,
)
from topoprune_solvers.edges.greedy import GreedyEdges
from topoprune_solvers.edges.min_cost_flow import MinCostFlowEdges
from topoprune_solvers.edges.row_values import budget_price, row_values
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["CpSatEdges"]


@dataclass(frozen=True)
class CpSatEdges:
    """Branch and cut over edges and degree levels; takes every bound and any attachment.

    Level variables ``z_i1 >= z_i2 >= ...`` count the degree of row i, and each step costs the
    increase of the degree cost there. Without column bounds rows keep their best edges, so the
    levels *are* the edges in sorted order and the model is a chain a row.

    Coefficients become integers, rounded up, so that the integer bound holds for the true
    objective. One worker and a fixed seed: the same answer on every run.
    """

    name: str = "cp-sat"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=EdgeSelection,
        exact=True,
        guarantee="optimal given time, else a valid selection and a proven bound",
        complexity="exponential in the worst case",
        requires=("ortools",),
        max_units=400,
        reference="OR-Tools CP-SAT",
        when="attachment with bounds on both sides, small matrices",
    )

    def solve(
        self, problem: EdgeSelection, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal selection, or at `time_limit` seconds the best one known.

        A feasible `warm_start` (n,) is the hint, else the solution of `greedy`, or of
        `min-cost-flow` at attachment 0 where both sides are bounded.

        Raises:
            Infeasible: no k edges meet all bounds.
        """
        only = only_selection(problem)
        if only is not None:
            return edge_solution(problem, only, self.name, bound=Bound(problem.objective(only), "only selection"))
        start = edge_start(problem, warm_start)
        if start is None:
            start = _first(problem)
        keep, bound, proven, stats = _search(problem, start.reshape(-1), time_limit, seed)
        relaxed = Bound(budget_price(row_values(problem), problem.k).bound, "Lagrangian over rows")
        best = best_bound("max", [relaxed, bound])
        return edge_solution(problem, keep, self.name, bound=best, timed_out=not proven, stats=stats)


def _first(problem: EdgeSelection) -> np.ndarray:
    if len(bounded_sides(problem)) < 2:
        return GreedyEdges().solve(problem).keep
    return MinCostFlowEdges().solve(replace(problem, attachment=0.0)).keep


def _search(
    problem: EdgeSelection, start: np.ndarray, time_limit: float | None, seed: int
) -> tuple[np.ndarray, Bound | None, bool, dict[str, Any]]:
    # Returns the mask, CP-SAT's upper bound in units of the objective, whether it was proven, counters.
    from ortools.sat.python import cp_model

    rows, cols = problem.shape
    by_columns = "column" in bounded_sides(problem)
    order = np.argsort(-candidate_value(problem, problem.score), axis=1, kind="stable")  # not allowed: last
    step_cost = problem.attachment * np.diff(problem.degree_cost(np.arange(cols + 1)))
    chain = -np.tile(step_cost, (rows, 1))  # worth of each further level, (r, c)
    if not by_columns:
        chain = chain + np.take_along_axis(problem.score, order, axis=1)
    largest = max(float(np.abs(chain).max()), float(problem.score.max()))
    unit = (largest or 1.0) / (2**51 // problem.n)  # the whole objective stays exact in a double

    model = cp_model.CpModel()
    level = [[model.new_bool_var(f"level_{i}_{t}") for t in range(cols)] for i in range(rows)]
    edge: list[Any] = [None] * problem.n
    low, high = row_limits(problem)
    for i in range(rows):
        for t in range(cols - 1):
            model.add_implication(level[i][t + 1], level[i][t])
        model.add_linear_constraint(sum(level[i]), int(low[i]), int(high[i]))
        for t in range(cols):
            flat = i * cols + int(order[i, t])
            edge[flat] = model.new_bool_var(f"edge_{flat}") if by_columns else level[i][t]
        if by_columns:
            model.add(sum(edge[i * cols : (i + 1) * cols]) == sum(level[i]))
    if by_columns:
        col_low, col_high = column_limits(problem)
        for j in range(cols):
            model.add_linear_constraint(sum(edge[j::cols]), int(col_low[j]), int(col_high[j]))
        if problem.allowed is not None:
            for flat in np.flatnonzero(~problem.allowed.reshape(-1)).tolist():
                model.add(edge[flat] == 0)
    model.add(sum(edge) == problem.k)

    terms = [variable for row in level for variable in row]
    worth = chain.reshape(-1)
    if by_columns:
        terms, worth = terms + edge, np.concatenate([worth, problem.score.reshape(-1)])
    model.maximize(cp_model.LinearExpr.weighted_sum(terms, np.ceil(worth / unit).astype(np.int64).tolist()))
    degree = start.reshape(problem.shape).sum(axis=1)
    for i in range(rows):
        for t in range(cols):
            model.add_hint(level[i][t], bool(t < degree[i]))
    if by_columns:
        for flat in range(problem.n):
            model.add_hint(edge[flat], bool(start[flat]))

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.linearization_level = 2
    if time_limit is not None:
        solver.parameters.max_time_in_seconds = time_limit
    status = solver.solve(model)
    assert status != cp_model.INFEASIBLE, "the start is feasible"
    keep = start
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = np.fromiter((solver.boolean_value(variable) for variable in edge), dtype=bool, count=problem.n)
        # The hint may be cut off by the clock, and the rounded objective may rank a near tie the other way.
        keep = found if problem.objective(found) >= problem.objective(start) else start
    constant = -problem.attachment * rows * float(problem.degree_cost(np.zeros(1))[0])
    slack = 1e-13 * (abs(constant) + largest * len(terms))  # what the float sums above can have lost
    stats = {"branches": solver.num_branches, "conflicts": solver.num_conflicts}
    if status == cp_model.UNKNOWN:
        # Its bound may then be a mere 0, which is no upper bound.
        return keep, None, False, stats
    bound = Bound(solver.best_objective_bound * unit + constant + slack, "CP-SAT")
    return keep, bound, status == cp_model.OPTIMAL, stats


register(CpSatEdges())

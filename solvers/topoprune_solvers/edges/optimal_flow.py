"""The minimum-cost flow behind edge selection at attachment 0, by OR-Tools."""

from __future__ import annotations

import numpy as np

from topoprune_solvers.edges.common import column_limits, row_limits
from topoprune_solvers.edges.core_flow import conflict, flow_scale
from topoprune_solvers.native import Channel
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.solution import Infeasible

__all__ = ["optimal_flow", "run_optimal_flow"]


def optimal_flow(problem: EdgeSelection) -> tuple[np.ndarray, float]:
    """Return an optimal flat mask at attachment 0 and an upper bound on the optimum, equal but for rounding.

    Raises:
        Infeasible: no k edges meet all bounds; says which bounds contradict each other.
    """
    from ortools.graph.python import min_cost_flow

    rows, cols = problem.shape
    row_low, row_high = row_limits(problem)
    col_low, col_high = column_limits(problem)
    capacity = np.ones(problem.n, np.int64) if problem.allowed is None else problem.allowed.reshape(-1).astype(np.int64)
    source, sink = rows + cols, rows + cols + 1

    largest, steps = flow_scale(problem.score, max(problem.k, sink + 1))
    value = np.ceil(problem.score.reshape(-1) / largest * steps).astype(np.int64)

    row_of, col_of = np.divmod(np.arange(problem.n), cols)
    solver = min_cost_flow.SimpleMinCostFlow()
    edges = solver.add_arcs_with_capacity_and_unit_cost(row_of, rows + col_of, capacity, -value)
    # Minimum degrees are supplies and demands of the nodes themselves; only the rest passes
    # through source and sink. So any feasible flow meets them, with no artificial costs.
    solver.add_arcs_with_capacity_and_unit_cost(
        np.full(rows, source), np.arange(rows), row_high - row_low, np.zeros(rows, np.int64)
    )
    solver.add_arcs_with_capacity_and_unit_cost(
        rows + np.arange(cols), np.full(cols, sink), col_high - col_low, np.zeros(cols, np.int64)
    )
    supply = np.concatenate([row_low, -col_low, [problem.k - row_low.sum(), col_low.sum() - problem.k]])
    solver.set_nodes_supplies(np.arange(sink + 1), supply)
    status = solver.solve()
    if status in (solver.INFEASIBLE, solver.UNBALANCED):
        raise Infeasible(f"no selection of k={problem.k} edges meets all degree bounds: {conflict(problem)}")
    if status != solver.OPTIMAL:
        raise RuntimeError(f"OR-Tools min-cost flow ended with status {status!r} on a {rows} x {cols} problem")
    keep = solver.flows(edges) > 0
    # Up, by more than the float division above can have lost.
    return keep, float(value[keep].sum()) / steps * largest * (1 + 2.0**-49)


def run_optimal_flow(channel: Channel, problem: EdgeSelection) -> tuple[np.ndarray, float]:
    """Return `optimal_flow` of a problem; the function of a process that can be killed."""
    return optimal_flow(problem)

"""What the edge solvers share: degree limits, a checked warm start, a finished Solution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.result import mask_solution, mask_start
from topoprune_solvers.solution import Bound, Solution

__all__ = [
    "bounded_sides",
    "candidate_value",
    "column_limits",
    "degrees_allowed",
    "edge_solution",
    "edge_start",
    "only_selection",
    "row_limits",
]

Side = Literal["row", "column"]
PROVEN = 1e-9  # relative distance of objective and bound that counts as equal: summation order


def bounded_sides(problem: EdgeSelection) -> tuple[Side, ...]:
    """Return the sides whose degree bounds can bind: (), ("row",), ("column",) or both."""
    sides: list[Side] = []
    if _binds(problem.row_min, problem.row_max, _available(problem, 1)):
        sides.append("row")
    if _binds(problem.col_min, problem.col_max, _available(problem, 0)):
        sides.append("column")
    return tuple(sides)


def _binds(low: np.ndarray | None, high: np.ndarray | None, available: np.ndarray) -> bool:
    return (low is not None and bool(np.any(low > 0))) or (high is not None and bool(np.any(high < available)))


def _available(problem: EdgeSelection, axis: int) -> np.ndarray:
    # Edges that may stay in each row (axis 1) or column (axis 0).
    if problem.allowed is None:
        return np.full(problem.shape[1 - axis], problem.shape[axis], dtype=np.int64)
    return problem.allowed.sum(axis=axis)


def row_limits(problem: EdgeSelection) -> tuple[np.ndarray, np.ndarray]:
    """Return (n_rows,) smallest and largest degree of each row; 0 and the allowed edges where unbounded."""
    available = _available(problem, 1)
    low = np.zeros_like(available) if problem.row_min is None else problem.row_min
    return low, available if problem.row_max is None else problem.row_max


def column_limits(problem: EdgeSelection) -> tuple[np.ndarray, np.ndarray]:
    """Return (n_cols,) smallest and largest degree of each column, as `row_limits` does."""
    available = _available(problem, 0)
    low = np.zeros_like(available) if problem.col_min is None else problem.col_min
    return low, available if problem.col_max is None else problem.col_max


def candidate_value(problem: EdgeSelection, value: np.ndarray) -> np.ndarray:
    """Return (n_rows, n_cols) `value` with -inf at the edges that are not allowed."""
    return value if problem.allowed is None else np.where(problem.allowed, value, -np.inf)


def degrees_allowed(problem: EdgeSelection, mask: np.ndarray) -> bool:
    """Return True if an (n_rows, n_cols) mask has k allowed edges and meets all degree bounds."""
    if int(mask.sum()) != problem.k or (problem.allowed is not None and np.any(mask & ~problem.allowed)):
        return False
    for axis, low, high in ((1, problem.row_min, problem.row_max), (0, problem.col_min, problem.col_max)):
        degree = mask.sum(axis=axis)
        if (low is not None and np.any(degree < low)) or (high is not None and np.any(degree > high)):
            return False
    return True


def only_selection(problem: EdgeSelection) -> np.ndarray | None:
    """Return the flat mask where k allows just one (no edge, or all that may stay), else None."""
    everything = np.ones(problem.n, dtype=bool) if problem.allowed is None else problem.allowed.reshape(-1)
    if problem.k == 0:
        return np.zeros(problem.n, dtype=bool)
    return everything if problem.k == int(everything.sum()) else None


def edge_start(problem: EdgeSelection, warm_start: Any) -> np.ndarray | None:
    """Return a warm start as an (n_rows, n_cols) mask, checked as `mask_start` does; None if there is none."""
    start = mask_start(problem, warm_start)
    return None if start is None else start.reshape(problem.shape)


def edge_solution(
    problem: EdgeSelection,
    keep: np.ndarray,
    solver: str,
    *,
    bound: Bound | None = None,
    timed_out: bool = False,
    stats: Mapping[str, Any] | None = None,
) -> Solution:
    """Build the Solution of a mask (flat or not): objective and the status the bound allows."""
    score, cost = problem.parts(keep.reshape(-1))
    # The two parts of the objective may cancel, so the scale is that of its parts.
    slack = PROVEN * (abs(score) + abs(cost))
    return mask_solution(problem, keep, solver, bound=bound, timed_out=timed_out, slack=slack, stats=stats)

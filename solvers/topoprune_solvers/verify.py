"""The checker: it uses only the problem and never trusts a solver."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from topoprune_solvers.problems import UnitProblem
from topoprune_solvers.solution import Solution, Status

__all__ = ["InvalidSolution", "dominators", "verify"]

TOLERANCE = 1e-6  # relative, for float objectives summed in another order


class InvalidSolution(AssertionError):
    """A solver broke its contract; the message says which unit, edge or number is wrong."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidSolution(message)


def dominators(problem: Any, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each unit its nearest kept neighbour and the distance to it.

    Ties go to the lower index. A kept unit dominates itself at distance 0; a unit without
    kept neighbour gets -1 and inf.

    Returns:
        (n,) int32 dominators and (n,) float64 distances. Complexity: O(n + nnz).
    """
    n = problem.n
    dominator = np.where(keep, np.arange(n), -1).astype(np.int32)
    distance = np.where(keep, 0.0, np.inf)
    rows = np.repeat(np.arange(n), np.diff(problem.indptr))
    candidate = keep[problem.indices] & ~keep[rows]
    row, col, weight = rows[candidate], problem.indices[candidate], problem.weight[candidate]
    order = np.lexsort((col, weight, row))
    row, col, weight = row[order], col[order], weight[order]
    first = np.ones(row.size, dtype=bool)
    first[1:] = row[1:] != row[:-1]
    dominator[row[first]] = col[first]
    distance[row[first]] = weight[first]
    return dominator, distance


def verify(problem: Any, solution: Solution) -> None:
    """Raise InvalidSolution unless the solution is feasible and its numbers are true.

    Checked: shape, constraints, objective, bound on the right side of the objective, a
    status of OPTIMAL only with a bound that meets the objective, dominators that are kept
    neighbours.

    Complexity: O(n + nnz), O(n_rows * n_cols) for edges.
    """
    keep = solution.keep
    _require(keep.shape == (problem.n,), f"keep has shape {keep.shape}, expected ({problem.n},)")
    _require(solution.sense == problem.sense, f"sense {solution.sense!r}, expected {problem.sense!r}")
    wrong = problem.violation(keep)
    _require(wrong is None, wrong or "")
    if isinstance(problem, UnitProblem):
        _check_dominators(problem, solution)
    true = problem.objective(keep)
    _require(_close(true, solution.objective), f"objective {solution.objective!r}, recomputed {true!r}")
    if solution.bound is not None:
        slack = TOLERANCE * max(1.0, abs(true)) if math.isfinite(true) else 0.0
        ahead = solution.bound.value - true if problem.sense == "min" else true - solution.bound.value
        _require(not ahead > slack, f"bound {solution.bound.value!r} is beyond the objective {true!r}")
    if solution.status is Status.OPTIMAL:
        _require(solution.bound is not None, "status OPTIMAL without a bound")
        assert solution.bound is not None
        _require(_close(true, solution.bound.value), f"status OPTIMAL, but bound {solution.bound.value!r} != {true!r}")


def _close(left: float, right: float) -> bool:
    return left == right or abs(left - right) <= TOLERANCE * max(1.0, abs(left), abs(right))


def _check_dominators(problem: Any, solution: Solution) -> None:
    _require(solution.dominator is not None, "no dominators given")
    _require(solution.dominator_distance is not None, "no dominator distances given")
    expected, distance = dominators(problem, solution.keep)
    _require(np.array_equal(expected, solution.dominator), "a dominator is not the nearest kept neighbour")  # type: ignore[arg-type]
    _require(np.array_equal(distance, solution.dominator_distance), "a dominator distance is wrong")  # type: ignore[arg-type]

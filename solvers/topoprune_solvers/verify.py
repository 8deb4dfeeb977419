"""The checker: it uses only the problem and never trusts a solver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from topoprune_solvers.problems import DominatingSet, UnitProblem
from topoprune_solvers.solution import Solution, Status

__all__ = ["InvalidSolution", "dominators", "verify", "verify_many"]

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


def verify_many(problems: Sequence[Any], solutions: Sequence[Solution]) -> None:
    """Raise InvalidSolution unless every solution passes `verify`; dominating sets are checked all at once.

    The joint check works on the problems' arrays laid end to end and makes its own sums. Where it finds
    anything wrong, `verify` goes through the problems to name it.

    Complexity: O(n + nnz) over all problems, in a fixed number of array operations.
    """
    _require(len(solutions) == len(problems), f"{len(solutions)} solutions for {len(problems)} problems")
    if all(type(problem) is DominatingSet for problem in problems) and _dominating_sets_are_right(problems, solutions):
        return
    for problem, solution in zip(problems, solutions, strict=True):
        verify(problem, solution)


def _dominating_sets_are_right(problems: Sequence[Any], solutions: Sequence[Solution]) -> bool:
    sizes = [problem.n for problem in problems]
    if not sum(sizes):
        return False  # nothing to gain, and the sums below need a unit
    for size, solution in zip(sizes, solutions, strict=True):
        named, distance = solution.dominator, solution.dominator_distance
        if named is None or distance is None or solution.sense != "min":
            return False
        if solution.keep.shape != (size,) or named.shape != (size,) or distance.shape != (size,):
            return False
    counts = np.array(sizes)
    first = np.cumsum(counts) - counts
    offset = np.repeat(first, counts)  # of each unit: the first unit of its problem
    keep, dominator, distance = (
        np.concatenate([getattr(solution, name) for solution in solutions])
        for name in ("keep", "dominator", "dominator_distance")
    )
    cost, forced, forbidden, demand, weight, indices = (
        np.concatenate([getattr(problem, name) for problem in problems])
        for name in ("cost", "forced", "forbidden", "demand", "weight", "indices")
    )
    degree = np.concatenate([problem.indptr[1:] - problem.indptr[:-1] for problem in problems])
    if np.any(forced & ~keep) or np.any(forbidden & keep):
        return False

    row = np.repeat(np.arange(degree.size), degree)
    column = indices + offset[row]
    link = keep[column]  # entries of the graph that lead to a kept unit
    row, column, weight = row[link], column[link], weight[link]
    if np.any(keep + np.bincount(row, minlength=degree.size) < demand):
        return False

    nearest = np.full(degree.size, np.inf)
    named = np.full(degree.size, -1)
    if row.size:
        begin = _first_of_each(row)
        nearest[row[begin]] = np.minimum.reduceat(weight, begin)
        best = np.flatnonzero(weight == nearest[row])
        # ascending columns: the first of equally near units has the lowest number
        best = best[_first_of_each(row[best])]
        named[row[best]] = column[best] - offset[row[best]]
    nearest[keep] = 0.0
    named[keep] = (np.arange(degree.size) - offset)[keep]
    if not (np.array_equal(named, dominator) and np.array_equal(nearest, distance)):
        return False

    # reduceat wants no empty part: a problem without units has objective 0
    filled = counts > 0
    true = np.zeros(counts.size)
    true[filled] = np.add.reduceat(np.where(keep, cost, 0.0), first[filled])
    claimed = np.array([solution.objective for solution in solutions])
    bound = np.array([-np.inf if solution.bound is None else solution.bound.value for solution in solutions])
    optimal = np.array([solution.status is Status.OPTIMAL for solution in solutions])
    slack = TOLERANCE * np.maximum(1.0, true)
    right = np.abs(true - claimed) <= TOLERANCE * np.maximum(np.maximum(1.0, true), np.abs(claimed))
    right &= bound <= true + slack
    right &= ~optimal | (bound >= true - slack)
    return bool(np.all(right) and np.all(np.isfinite(true)))


def _first_of_each(ascending: np.ndarray) -> np.ndarray:
    """Return the position of the first of each run of equal numbers."""
    return np.concatenate([[0], np.flatnonzero(ascending[1:] != ascending[:-1]) + 1])


def _close(left: float, right: float) -> bool:
    return left == right or abs(left - right) <= TOLERANCE * max(1.0, abs(left), abs(right))


def _check_dominators(problem: Any, solution: Solution) -> None:
    _require(solution.dominator is not None, "no dominators given")
    _require(solution.dominator_distance is not None, "no dominator distances given")
    expected, distance = dominators(problem, solution.keep)
    _require(np.array_equal(expected, solution.dominator), "a dominator is not the nearest kept neighbour")  # type: ignore[arg-type]
    _require(np.array_equal(distance, solution.dominator_distance), "a dominator distance is wrong")  # type: ignore[arg-type]

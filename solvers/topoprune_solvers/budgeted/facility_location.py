"""Soft domination (facility location): lazy greedy, swaps, and a bound from submodularity."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import closed_rows
from topoprune_solvers.problems import SoftDomination
from topoprune_solvers.result import NEVER, Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution

__all__ = ["GreedyFacilityLocation", "Similarity", "greedy_with_bound"]

SWAP_UNITS = 128  # a round of swaps costs O(k n^2): some milliseconds up to here
BOUND_POINTS = 16  # sets along the greedy path at which the bound is evaluated
_ROUNDING = 1e-12


@dataclass(frozen=True)
class GreedyFacilityLocation:
    """Add the unit that explains most importance not yet explained; on up to 128 units then swap one for one.

    The bound is the best of f(S) + the k largest gains over sets S along the greedy path. The
    1 - 1/e ratio is about the explained importance; it says nothing about the unexplained rest.
    """

    name: str = "greedy"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=SoftDomination,
        exact=False,
        guarantee="at least 1 - 1/e of the optimum (without forced units), with a submodularity bound",
        complexity="O(k m) at worst, near O((n + m) log n) by lazy evaluation; swaps O(k n^2) a round",
        reference="Nemhauser, Wolsey, Fisher (1978); Minoux (1978), Accelerated greedy algorithms",
    )

    def solve(
        self, problem: SoftDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return greedy plus swaps, or the warm start filled up and swapped where that is better."""
        deadline = Deadline.after(time_limit)
        keep, bound = greedy_with_bound(problem, check_start(problem, warm_start), deadline)
        return unit_solution(problem, keep, self.name, bound=bound, timed_out=deadline.passed())


@dataclass(frozen=True, eq=False)
class Similarity:
    """Rows of a unit's explained neighbours: the unit itself first, at similarity 1.

    Args:
        indptr: (n + 1,) int. indices: (n + nnz,) int. value: (n + nnz,) float64 in [0, 1].
    """

    indptr: np.ndarray
    indices: np.ndarray
    value: np.ndarray

    @classmethod
    def of(cls, problem: SoftDomination) -> Similarity:
        """Build from a problem. O(n + m)."""
        assert problem.weight is not None
        indptr, indices, positions = closed_rows(problem.indptr, problem.indices)
        value = np.ones(indices.size)
        value[positions] = np.clip(1.0 - problem.weight, 0.0, 1.0)
        return cls(indptr, indices, value)

    def best(self, keep: np.ndarray) -> np.ndarray:
        """Return (n,) float64: similarity of each unit to its most similar kept one, 0 without."""
        if not keep.size:
            return np.zeros(0)
        return np.maximum.reduceat(np.where(keep[self.indices], self.value, 0.0), self.indptr[:-1])

    def gains(self, importance: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Return (n,) float64: importance each unit would newly explain."""
        if not best.size:
            return np.zeros(0)
        rise = np.maximum(self.value - best[self.indices], 0.0) * importance[self.indices]
        return np.add.reduceat(rise, self.indptr[:-1])

    def dense(self) -> np.ndarray:
        """Return the (n, n) matrix."""
        n = self.indptr.size - 1
        matrix = np.zeros((n, n))
        matrix[np.repeat(np.arange(n), np.diff(self.indptr)), self.indices] = self.value
        return matrix


def greedy_with_bound(
    problem: SoftDomination, start: np.ndarray | None = None, deadline: Deadline = NEVER
) -> tuple[np.ndarray, Bound]:
    """Return the best selection of greedy, swaps and the given start, with an upper bound.

    Args:
        problem: the problem. start: (n,) bool respecting forced and forbidden units, or None.
        deadline: ends the swaps early; greedy itself always finishes.
    """
    assert problem.importance is not None and problem.forced is not None
    similarity = Similarity.of(problem)
    keep, value = _lazy_greedy(problem, similarity, problem.forced)
    candidates = [keep]
    if start is not None:
        candidates.append(_lazy_greedy(problem, similarity, _cut(problem, similarity, start))[0])
    if problem.n <= SWAP_UNITS:
        matrix = similarity.dense()
        candidates = [_swap(problem, matrix, candidate, deadline) for candidate in candidates]
    best = max(candidates, key=problem.objective)
    return best, Bound(value, "submodularity (greedy path)")


def _lazy_greedy(problem: SoftDomination, similarity: Similarity, start: np.ndarray) -> tuple[np.ndarray, float]:
    """Return k units and an upper bound on every selection of k units that respects forced and forbidden ones."""
    assert problem.importance is not None and problem.forced is not None and problem.forbidden is not None
    importance = problem.importance
    keep = start.copy()
    missing = problem.k - int(keep.sum())
    picks = problem.k - int(problem.forced.sum())  # units any selection has beyond the forced ones
    best = similarity.best(keep)
    gains = similarity.gains(importance, best)
    bound = min(_path_bound(problem, best, gains, keep, picks), _row_bound(problem, similarity))
    candidates = np.flatnonzero(~keep & ~problem.forbidden)
    queue = [(-gain, unit) for gain, unit in zip(gains[candidates].tolist(), candidates.tolist(), strict=True)]
    heapq.heapify(queue)
    every = max(1, missing // BOUND_POINTS)
    indices, values, bounds = similarity.indices, similarity.value, similarity.indptr.tolist()
    for step in range(missing):
        while True:
            recorded, unit = queue[0]
            row = slice(bounds[unit], bounds[unit + 1])
            reached = indices[row]
            gain = float((np.maximum(values[row] - best[reached], 0.0) * importance[reached]).sum())
            # Gains only fall; the tolerance keeps rounding from sending an entry round for ever.
            if gain >= -recorded * (1 - _ROUNDING):
                break
            heapq.heapreplace(queue, (-gain, unit))
        heapq.heappop(queue)
        keep[unit] = True
        best[reached] = np.maximum(best[reached], values[row])
        if (step + 1) % every == 0 or step + 1 == missing:
            gains = similarity.gains(importance, best)
            bound = min(bound, _path_bound(problem, best, gains, keep, picks))
    return keep, bound * (1 + _ROUNDING)


def _path_bound(problem: SoftDomination, best: np.ndarray, gains: np.ndarray, keep: np.ndarray, picks: int) -> float:
    """Return f(S) + the largest `picks` gains: f(S u T) <= f(S) + sum of gains of T, for every T."""
    assert problem.importance is not None and problem.forbidden is not None
    open_gains = np.sort(gains[~keep & ~problem.forbidden])[::-1]
    return float(problem.importance @ best) + float(open_gains[:picks].sum())


def _row_bound(problem: SoftDomination, similarity: Similarity) -> float:
    """Return what all allowed units together explain."""
    assert problem.importance is not None and problem.forbidden is not None
    return float(problem.importance @ similarity.best(~problem.forbidden))


def _cut(problem: SoftDomination, similarity: Similarity, start: np.ndarray) -> np.ndarray:
    """Drop unforced units of a start that is too large, those that alone explain least first."""
    assert problem.importance is not None and problem.forced is not None
    surplus = int(start.sum()) - problem.k
    if surplus <= 0:
        return start
    alone = similarity.gains(problem.importance, np.zeros(problem.n))
    units = np.flatnonzero(start & ~problem.forced)
    cut = start.copy()
    cut[units[np.lexsort((-units, alone[units]))][:surplus]] = False
    return cut


def _swap(problem: SoftDomination, matrix: np.ndarray, keep: np.ndarray, deadline: Deadline) -> np.ndarray:
    """Exchange a kept for an unkept unit while that gains, best exchange first. O(k n^2) a round."""
    assert problem.importance is not None and problem.forced is not None and problem.forbidden is not None
    keep = keep.copy()
    value = problem.objective(keep)
    incoming = ~problem.forbidden
    while not deadline.passed():
        best_value, exchange = value * (1 + 1e-9), None
        for unit in np.flatnonzero(keep & ~problem.forced).tolist():
            others = keep.copy()
            others[unit] = False
            reach = matrix[:, others].max(axis=1, initial=0.0)
            totals = problem.importance @ np.maximum(matrix, reach[:, None])
            totals[keep | ~incoming] = -np.inf
            new = int(totals.argmax())
            if totals[new] > best_value:
                best_value, exchange = float(totals[new]), (unit, new)
        if exchange is None:
            return keep
        keep[exchange[0]], keep[exchange[1]] = False, True
        value = problem.objective(keep)
    return keep


register(GreedyFacilityLocation())

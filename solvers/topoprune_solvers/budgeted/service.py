"""Soft domination as arrays: what every unit gives to its neighbours, and greedy selections over that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.compiled import choose, enabled
from topoprune_solvers.domination.covering import closed_rows
from topoprune_solvers.problems import SoftDomination
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["ROUNDING", "GreedyRun", "Service", "path_bound", "run"]

ROUNDING = 1e-11  # relative: more than the sums of a bound can lose
_EFFORT = 20_000_000, 100_000  # row entries between two looks at the clock: compiled, and as Python; under 50 ms


def run(
    name: str,
    *columns: Any,
    state: np.ndarray | None = None,
    done: Callable[[Any], bool] | None = None,
    deadline: Deadline = NEVER,
) -> None:
    """Run a kernel of `facility_kernels`: compiled on the arrays, or as Python on lists that are copied back.

    Args:
        name: the kernel. columns: its arguments.
        state, done: a kernel that stops now and then is called again, with `state` and the effort as last arguments,
            until ``done(state)`` or the deadline has passed.
    """
    from topoprune_solvers.budgeted import facility_kernels

    function: Callable[..., None] = getattr(facility_kernels, name)
    compiled = enabled()
    arrays = columns if state is None else (*columns, state)
    values = arrays if compiled else [a.tolist() if isinstance(a, np.ndarray) else a for a in arrays]
    if done is None:
        function(*values) if compiled else choose(function)(*values)
    else:
        function, effort = (function, _EFFORT[0]) if compiled else (choose(function), _EFFORT[1])
        while not done(values[-1]) and not deadline.passed():
            function(*values, effort)
    if not compiled:
        for array, value in zip(arrays, values, strict=True):
            if isinstance(array, np.ndarray) and array.flags.writeable:
                array[...] = value


@dataclass(frozen=True, eq=False)
class Service:
    """Closed rows, the unit itself first; all arrays read-only.

    Args:
        indptr: (n + 1,) int64. indices: (n + nnz,) int64. rows: (n + nnz,) int64, the row of each entry.
        gives: (n + nnz,) float64, importance of the entry's unit that the row's unit explains.
        gets: (n + nnz,) float64, importance of the row's unit that the entry's unit explains.
    """

    indptr: np.ndarray
    indices: np.ndarray
    rows: np.ndarray
    gives: np.ndarray
    gets: np.ndarray

    @classmethod
    def of(cls, problem: SoftDomination) -> Service:
        """Build from a problem. O(n + m)."""
        assert problem.weight is not None and problem.importance is not None
        indptr, indices, positions = closed_rows(problem.indptr, problem.indices)
        similarity = np.ones(indices.size)
        similarity[positions] = np.clip(1.0 - problem.weight, 0.0, 1.0)
        return cls.build(indptr, indices, similarity, problem.importance)

    @classmethod
    def build(cls, indptr: np.ndarray, indices: np.ndarray, similarity: np.ndarray, importance: np.ndarray) -> Service:
        """Build from closed rows with symmetric similarities."""
        rows = np.repeat(np.arange(indptr.size - 1), np.diff(indptr))
        arrays = indptr, indices, rows, importance[indices] * similarity, importance[rows] * similarity
        for array in arrays:
            array.setflags(write=False)
        return cls(*arrays)

    @property
    def n(self) -> int:
        """Number of units."""
        return int(self.indptr.size - 1)

    def reached(self, keep: np.ndarray) -> np.ndarray:
        """Return (n,) float64: importance of each unit that the kept ones explain."""
        if not self.n:
            return np.zeros(0)
        return np.maximum.reduceat(np.where(keep[self.indices], self.gets, 0.0), self.indptr[:-1])

    def priced(self, price: np.ndarray) -> np.ndarray:
        """Return (n,) float64: what each unit gives beyond the price of the receivers (its gain over `reached`)."""
        if enabled():
            out = np.zeros(self.n)
            run("priced", self.indptr, self.indices, self.gives, price, out)
            return out
        # bincount adds one by one in the order of the entries, as the kernel does
        rise = np.maximum(self.gives - price[self.indices], 0.0)
        return np.bincount(self.rows, weights=rise, minlength=self.n)

    def served(self, price: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Return (n,) int64: how many kept units give each unit more than its price."""
        if enabled():
            out: np.ndarray = np.zeros(self.n, dtype=np.int64)
            run("served", self.indptr, self.indices, self.gives, price, np.flatnonzero(keep), out)
            return out
        hit = keep[self.rows] & (self.gives > price[self.indices])
        return np.bincount(self.indices[hit], minlength=self.n)

    def dense(self) -> np.ndarray:
        """Return the (n, n) matrix: entry (i, j) is the importance of i that j explains."""
        matrix = np.zeros((self.n, self.n))
        matrix[self.rows, self.indices] = self.gets
        return matrix


class GreedyRun:
    """A selection that grows by lazy greedy.

    Args:
        service: the table. groups: the bounds. start: (n,) bool, extendable. allowed: (n,) bool, units to pick from.
    """

    def __init__(self, service: Service, groups: Groups, start: np.ndarray, allowed: np.ndarray) -> None:
        self.service, self.groups = service, groups
        self.keep = start.copy()
        self.reached = service.reached(start)
        self.gains = service.priced(self.reached)
        self._count = groups.count(start)
        self._slack = np.array([groups.slack(self._count)])
        units = np.flatnonzero(~start & allowed)
        units = units[np.argsort(-self.gains[units], kind="stable")]  # sorted, so a heap
        self._heap_gain, self._heap_unit = self.gains[units], units
        self._state = np.array([units.size, 0, 0])

    def take(self, picks: int, deadline: Deadline = NEVER, least: float = -1.0) -> None:
        """Take up to `picks` units, fewer if the deadline passes, none fits or none gains more than `least`."""
        target = int(self._state[1]) + picks
        service, groups = self.service, self.groups
        run(
            "lazy_greedy",
            *(service.indptr, service.indices, service.gives, groups.label, groups.low, groups.high),
            *(self._count, self._slack, self.reached, self.keep, self._heap_gain, self._heap_unit, target, least),
            state=self._state,
            done=lambda state: state[1] >= target or state[0] == 0 or state[2] == 1,
            deadline=deadline,
        )


def path_bound(groups: Groups, problem: Any, price: np.ndarray, gains: np.ndarray) -> tuple[float, np.ndarray]:
    """Return ``sum price + max_T sum_{j in T} gains_j`` over feasible T, and the maximising T.

    An upper bound on facility location for every price >= 0 (Lagrangian relaxation of "each unit is served
    once"); at the amounts a selection S serves it is f(S) + the largest gains, the bound of submodularity.
    """
    order = np.argsort(-gains, kind="stable")
    chosen = groups.extend(problem.forced, order[~problem.forbidden[order]])
    return (float(price.sum()) + float(gains[chosen].sum())) * (1 + ROUNDING), chosen

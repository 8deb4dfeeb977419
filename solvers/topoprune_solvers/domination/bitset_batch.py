"""Many small dominating-set problems in one call, on bit sets; and the arrays that such a call works on.

Runs on Python ints or, compiled, on uint64 arrays: see `bitset_reductions` for the rules and the names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from topoprune_solvers.domination.bitset_reductions import drop_redundant, lowest, total
from topoprune_solvers.domination.branch_and_bound import (
    COMPLETE,
    CUTOFF,
    FOUND,
    LATER_ELEMENTS,
    LATER_UNITS,
    NODES,
    STACK,
    TAKEN,
    cover_search,
)
from topoprune_solvers.problems import DominatingSet

__all__ = ["MOST_UNITS", "Batch", "Workspace", "cover_search", "solve_batch"]

MOST_UNITS = 64  # bits of a word


def solve_batch(
    graphs: Any, units: Any, instance: Any, stack: Any, work: Any, state: Any, result: Any, first: int, node_limits: Any
) -> int:
    """Solve problems of at most 64 units each, from number `first` on, without a pause in a problem.

    Args:
        graphs: start (p + 1,) of each problem's units, edge_start (p,), and concatenated over the problems
            indptr (p more entries than units), indices (numbers within a problem) and weight.
        units: cost, forced, forbidden, demand, concatenated.
        instance, stack, work, state: see `branch_and_bound.cover_search`; overwritten.
        result: keep, dominator and distance of each unit; objective, nodes and complete of each problem.
        node_limits: of each problem, and of the call: it returns after the problem that exceeds the latter.

    Returns:
        The number of the first problem that is not done.
    """
    start, edge_start, indptr, indices, weight = graphs
    unit_cost, unit_forced, unit_forbidden, unit_demand = units
    near, _, cost, bit = instance
    wanted = work[4]
    masks, numbers, counters = state
    keep, dominator, distance, objective, nodes, complete = result
    none = bit[0] ^ bit[0]
    visited = 0
    for problem in range(first, len(start) - 1):
        if visited > node_limits[1]:
            return problem
        begin = start[problem]
        n = start[problem + 1] - begin
        at = begin + problem
        edges = edge_start[problem]
        everything = forced = candidates = elements = none
        for i in range(n):
            cost[i] = unit_cost[begin + i]
            everything |= bit[i]
            if unit_forced[begin + i]:
                forced |= bit[i]
            elif not unit_forbidden[begin + i]:
                candidates |= bit[i]
            mask = bit[i]
            for k in range(edges + indptr[at + i], edges + indptr[at + i + 1]):
                mask |= bit[indices[k]]
            near[i] = mask
        for i in range(n):
            wanted[i] = unit_demand[begin + i]
            rest = near[i] & forced
            while rest:
                rest ^= bit[lowest(rest)]
                wanted[i] -= 1
            if wanted[i] > 0:
                elements |= bit[i]
        for i in range(len(masks)):
            masks[i] = none
        for i in range(len(numbers)):
            numbers[i] = 0.0
        for i in range(len(counters)):
            counters[i] = 0
        masks[LATER_ELEMENTS], masks[LATER_UNITS] = elements, candidates
        numbers[CUTOFF] = math.inf
        counters[COMPLETE] = counters[FOUND] = 1
        cover_search(instance, stack, work, state, node_limits[0], True)
        for i in range(n):
            wanted[i] = unit_demand[begin + i]
        # Free units were all taken at the start; those that cover nothing of their own go again.
        chosen = drop_redundant(near, near, cost, wanted, bit, everything, masks[TAKEN] | forced, masks[TAKEN])
        objective[problem] = total(cost, bit, chosen)
        complete[problem] = counters[COMPLETE] == 1
        nodes[problem] = counters[NODES]
        visited += counters[NODES]
        for i in range(n):
            nearest, gap = -1, math.inf
            if chosen & bit[i]:
                nearest, gap = i, 0.0
            else:
                for k in range(edges + indptr[at + i], edges + indptr[at + i + 1]):
                    if chosen & bit[indices[k]] and (nearest < 0 or weight[k] < gap):
                        nearest, gap = indices[k], weight[k]
            keep[begin + i] = (chosen & bit[i]) != none
            dominator[begin + i] = nearest
            distance[begin + i] = gap
    return len(start) - 1


class Workspace:
    """Empty arrays for one call: of numpy for the compiled functions, lists of Python numbers otherwise."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self.bit = self.masks([1 << i for i in range(MOST_UNITS)])
        zeros, floats = [0] * MOST_UNITS, [0.0] * MOST_UNITS
        self.stack = (
            self._table(np.uint64, 3, 0),
            self._table(np.float64, 2, 0.0),
            self._table(np.float64, MOST_UNITS, 0.0),
            self._table(np.int64, MOST_UNITS, 0),
        )
        self.work = (
            self.array(floats, np.float64),
            self.array(floats, np.float64),
            self.array(zeros, np.int64),
            self.array(zeros, np.int64),
            self.array(zeros, np.int64),
        )
        self.state = self.masks([0] * 4), self.array([0.0] * 7, np.float64), self.array([0] * 7, np.int64)

    def masks(self, values: list[int]) -> Any:
        """Return a table of bit sets."""
        return self.array(values, np.uint64)

    def array(self, values: Any, dtype: Any) -> Any:
        """Return a table of numbers, a copy."""
        return np.array(values, dtype=dtype) if self.compiled else list(values)

    def _table(self, dtype: Any, width: int, zero: float) -> Any:
        if self.compiled:
            return np.zeros((STACK, width), dtype=dtype)
        return [[zero] * width for _ in range(STACK)]


class Batch:
    """The arrays of several problems laid end to end, with room for the answers.

    Args:
        problems: at least one, of at most 64 units each. compiled: whether the compiled function will run.
    """

    def __init__(self, problems: Sequence[DominatingSet], compiled: bool) -> None:
        sizes = np.array([problem.n for problem in problems], dtype=np.int64)
        edges = np.array([problem.indices.size for problem in problems], dtype=np.int64)
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        self.compiled = compiled
        self._work = Workspace(compiled)
        near, cost = self._work.masks([0] * MOST_UNITS), self._work.array([0.0] * MOST_UNITS, np.float64)
        self._instance = near, near, cost, self._work.bit
        count, total = len(problems), int(self.start[-1])
        of_units = np.zeros(total, dtype=bool), np.zeros(total, dtype=np.int32), np.zeros(total)
        of_problems = np.zeros(count), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool)

        def joined(*fields: str) -> list[np.ndarray]:
            return [np.concatenate([getattr(problem, field) for problem in problems]) for field in fields]

        self._graphs = self._pack([self.start, np.cumsum(edges) - edges, *joined("indptr", "indices", "weight")])
        self._units = self._pack(joined("cost", "forced", "forbidden", "demand"))
        self._result = self._pack([*of_units, *of_problems])

    def _pack(self, arrays: Sequence[np.ndarray]) -> tuple[Any, ...]:
        return tuple(arrays) if self.compiled else tuple(array.tolist() for array in arrays)

    def run(self, solve: Any, first: int, problem_nodes: int, call_nodes: int) -> int:
        """Call `solve_batch`, compiled or not, from a problem on; return the first one that is not done."""
        limits = [problem_nodes, call_nodes]
        return int(
            solve(
                self._graphs,
                self._units,
                self._instance,
                self._work.stack,
                self._work.work,
                self._work.state,
                self._result,
                first,
                np.array(limits) if self.compiled else limits,
            )
        )

    def of_units(self) -> list[np.ndarray]:
        """Return keep (bool), dominator (int32) and distance (float64) of all units."""
        kinds = bool, np.int32, np.float64
        return [np.asarray(values, dtype=kind) for values, kind in zip(self._result[:3], kinds, strict=True)]

    def of_problems(self) -> list[list[Any]]:
        """Return objective, nodes and complete of each problem."""
        return [values if isinstance(values, list) else values.tolist() for values in self._result[3:]]

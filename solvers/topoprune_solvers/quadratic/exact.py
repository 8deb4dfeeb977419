"""Exact quadratic subsets: enumeration up to 24 open units, above that branch and bound on a convex form."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import QuadraticSubset
from topoprune_solvers.quadratic.budgets import OpenPart
from topoprune_solvers.quadratic.common import PROVEN, Search, resolution, subset_solution
from topoprune_solvers.quadratic.convex import ConvexForm, largest_eigenvalue, tangent_bounds
from topoprune_solvers.quadratic.enumeration import ENUMERATED_UNITS, enumerate_subsets
from topoprune_solvers.quadratic.greedy import improve, starts
from topoprune_solvers.quadratic.local_search import SHARE, iterate, patience_of
from topoprune_solvers.quadratic.relaxation import relax
from topoprune_solvers.result import Deadline
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["ExactSubset", "branch"]

SOURCE = "branch and bound (convex tangents)"
BATCH = 256  # nodes bounded together, as one matrix product
STEPS = 12  # gradient steps at a node, from the point of its parent
OPEN_NODES = 400_000  # beyond, the deepest nodes go first: memory stays bounded


@dataclass(frozen=True)
class ExactSubset:
    """Try all sets of up to 24 open units; above that branch on the convex form of the semidefinite bound.

    Args:
        root_limit: share of the time limit the relaxation at the root may take.
    """

    name: str = "exact"
    root_limit: float = 0.5
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=QuadraticSubset,
        exact=True,
        guarantee="optimal up to 24 open units; above that a proven bound, and optimal if the search ends in time",
        complexity="O(2^n) matrix-product operations up to 24 units; exponential above",
        reference="Horowitz, Sahni (1974) for the halves; Billionnet, Elloumi, Plateau (2009) for the convex form",
        when="heads of one layer; up to some 60 units with a time limit",
    )

    def solve(
        self, problem: QuadraticSubset, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the optimum, or with a time limit the best set and bound found in time."""
        assert problem.forced is not None and problem.forbidden is not None
        deadline = Deadline.after(time_limit)
        if int((~problem.forced & ~problem.forbidden).sum()) <= ENUMERATED_UNITS:
            pruned, complete, tried = enumerate_subsets(problem, deadline)
            if complete:
                assert pruned is not None, "the problem was feasible on construction"
                rounding = resolution(problem, np.ones(problem.n, dtype=bool))
                bound = Bound(problem.objective(~pruned) - rounding, "enumeration of all sets")
                return subset_solution(
                    problem, ~pruned, self.name, bounds=[bound], rounding=2 * rounding, stats={"sets": tried}
                )
        searches = [improve(search, deadline) for search in starts(problem, warm_start, deadline)]
        best = min(searches, key=lambda search: search.value)
        best, _ = iterate(best, deadline, patience_of(problem.n), SHARE, np.random.default_rng(seed))
        root = Deadline.after(None if time_limit is None else self.root_limit * deadline.remaining())
        best, bounds, part, form = relax(best, root)
        top = best_bound("min", bounds)
        assert top is not None
        nodes = 0
        if part.f and top.value < best.value * (1 - PROVEN) - resolution(problem, best.pruned):
            best, value, nodes = branch(part, form, best, deadline)
            bounds.append(Bound(value, SOURCE))
        return subset_solution(
            problem,
            ~best.pruned,
            self.name,
            bounds=bounds,
            timed_out=deadline.passed(),
            rounding=resolution(problem, best.pruned),
            stats={"nodes": nodes},
        )


def branch(part: OpenPart, form: ConvexForm, best: Search, deadline: Deadline) -> tuple[Search, float, int]:
    """Return the best set, a lower bound on the optimum and the number of nodes.

    Best first, `BATCH` nodes at a time. A node fixes units in or out; its tangent bound also fixes units whose other
    value would cost too much. Branches on the unit nearest to one half.
    """
    problem, f = part.problem, part.f
    lipschitz = 2 * largest_eigenvalue(form.quadratic)
    state = np.full(f, -1, dtype=np.int8)  # -1 open, 0 kept, 1 pruned
    start = best.pruned[part.units].astype(np.float32)
    queue: list[tuple[float, int, bytes, bytes]] = [(-np.inf, 0, state.tobytes(), start.tobytes())]
    nodes = number = 0
    settled = np.inf  # least bound among nodes given up because the incumbent is as good
    while queue and not deadline.passed():
        if len(queue) > OPEN_NODES:
            batch = heapq.nsmallest(BATCH, queue, key=lambda node: node[2].count(b"\xff"))
            chosen = {node[1] for node in batch}
            queue = [node for node in queue if node[1] not in chosen]
            heapq.heapify(queue)
        else:
            batch = [heapq.heappop(queue) for _ in range(min(BATCH, len(queue)))]
        nodes += len(batch)
        states = np.frombuffer(b"".join(node[2] for node in batch), dtype=np.int8).reshape(-1, f)
        points = np.frombuffer(b"".join(node[3] for node in batch), dtype=np.float32).reshape(-1, f)
        low, high = (states == 1).astype(np.float64), (states != 0).astype(np.float64)
        # Below the incumbent by less than this counts as proven.
        cutoff = best.value * (1 - PROVEN / 2) - resolution(problem, best.pruned) / 2
        values, x, slopes = tangent_bounds(
            form,
            part,
            low,
            high,
            points.astype(np.float64),
            steps=STEPS,
            lipschitz=lipschitz,
            cutoff=cutoff,
            deadline=deadline,
        )
        values = np.maximum(values, [node[0] for node in batch])
        low, high = _fix_by_slope(part, slopes, values, low, high, cutoff)
        for row in np.flatnonzero(np.isfinite(values) | (values == -np.inf)).tolist():
            value = float(values[row])
            if value >= cutoff:
                settled = min(settled, value)
                continue
            free = np.flatnonzero(high[row] > low[row])
            chosen_set = _only_choice(part, low[row], high[row], free)
            if chosen_set is not None:
                # The last node of a branch: its exact value takes the place of a bound.
                pruned = part.pruned(chosen_set)
                if problem.violation(~pruned) is None:
                    search = Search.at(problem, pruned)
                    settled = min(settled, search.value - resolution(problem, pruned))
                    if search.value < best.value:
                        best = search
                continue
            unit = int(free[np.abs(x[row, free] - 0.5).argmin()])
            for bit in (0, 1):
                child = np.where(high[row] > low[row], -1, low[row]).astype(np.int8)
                child[unit] = bit
                number += 1
                heapq.heappush(queue, (value, number, child.tobytes(), x[row].astype(np.float32).tobytes()))
    least = min([settled, best.value, *(node[0] for node in queue)])
    return best, least, nodes


def _fix_by_slope(
    part: OpenPart, slopes: np.ndarray, values: np.ndarray, low: np.ndarray, high: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fix open units whose other value would lift the tangent bound over the cutoff (cardinality budgets).

    The tangent's minimum takes the smallest slopes: leaving one of them out costs its distance to the next
    slope, taking another in its distance to the last one taken.
    """
    if part.count is None:
        return low, high
    free = high > low
    missing = part.count - low.sum(axis=1).astype(np.int64)
    rows = np.arange(low.shape[0])
    ordered = np.sort(np.where(free, slopes, np.inf), axis=1)
    usable = (missing >= 1) & (missing < free.sum(axis=1)) & np.isfinite(values)
    at = np.clip(missing, 1, max(part.f - 1, 1))
    last, following = ordered[rows, at - 1], ordered[rows, np.minimum(at, part.f - 1)]
    room = (cutoff - values)[:, None] * (1 + 1e-9)
    taken = free & usable[:, None] & (slopes < following[:, None])
    spare = free & usable[:, None] & (slopes > last[:, None])
    with np.errstate(invalid="ignore"):
        low = np.where(taken & (following[:, None] - slopes > room), 1.0, low)
        high = np.where(spare & (slopes - last[:, None] > room), 0.0, high)
    return low, high


def _only_choice(part: OpenPart, low: np.ndarray, high: np.ndarray, free: np.ndarray) -> np.ndarray | None:
    """Return the (f,) pruned vector where the box leaves one only, else None."""
    if free.size == 0:
        return low
    if part.count is not None:
        missing = part.count - int(low.sum())
        if missing <= 0:
            return low
        if missing >= free.size:
            return high
    return None


register(ExactSubset())

"""Exact repaired subsets: depth-first branch and bound on the elimination itself.

A node has pruned some units and kept some. Its state is that of the elimination: inverse moment and refitted
weight on the undecided columns only. Kept columns drop out of both for free, pruned ones by one update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import RepairedSubset
from topoprune_solvers.quadratic.common import PROVEN, affordable, feasible_start, subset_solution
from topoprune_solvers.quadratic.elimination import eliminate_repaired
from topoprune_solvers.quadratic.exchange import EXCHANGE_COLUMNS, exchange
from topoprune_solvers.quadratic.moments import block_scores, inverse_moment, reduced_weight
from topoprune_solvers.quadratic.repaired_bounds import repaired_bounds, spread
from topoprune_solvers.result import Deadline
from topoprune_solvers.solution import Bound, Solution

__all__ = ["ExactRepaired"]

SOURCE = "branch and bound (monotone damage)"


@dataclass(frozen=True)
class ExactRepaired:
    """Prune or keep the unit that is dearest to prune next; cut with what the remaining prunings cost at least.

    The branch that prunes it has most descendants and the highest cost, so most of the tree falls at once. Pruning r
    more units costs at least the r-th smallest of their present costs, as the damage grows with the set,
    and at least the sum of the r smallest ones divided by the largest eigenvalue of the block-normalised inverse.
    """

    name: str = "exact"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=RepairedSubset,
        exact=True,
        guarantee="optimal if the search ends in time, else a proven bound; about 20 units",
        complexity="exponential in n, O(d^2 w) a node",
        reference="Furnival, Wilson (1974), Regressions by leaps and bounds",
        when="the heads of one layer, with a time limit above some 16 of them",
    )

    def solve(
        self, problem: RepairedSubset, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the optimum, or with a time limit the best set and bound found in time."""
        deadline = Deadline.after(time_limit)
        start = feasible_start(problem, warm_start)
        found = [] if start is None else [~start]
        if not (found and deadline.passed()):
            found.append(eliminate_repaired(problem, deadline))
        if problem.moment.shape[0] <= EXCHANGE_COLUMNS:
            found += [exchange(problem, pruned, deadline) for pruned in found]
        values = [problem.objective(~pruned) for pruned in found]
        best, value = found[int(np.argmin(values))], min(values)
        bounds, nodes = repaired_bounds(problem, deadline), 0
        top = max(bound.value for bound in bounds)
        if top < value * (1 - PROVEN) and affordable(deadline, 2.0 * problem.moment.shape[0] ** 3):
            best, value, bound, nodes = _search(problem, best, value, deadline)
            bounds.append(Bound(bound, SOURCE))
        return subset_solution(
            problem,
            ~best,
            self.name,
            bounds=bounds,
            timed_out=deadline.passed(),
            # Damages of updates and of a fresh factorisation differ by rounding.
            rounding=2 * PROVEN * value,
            stats={"nodes": nodes},
        )


@dataclass(frozen=True, eq=False)
class _Node:
    bound: float
    damage: float
    pruned: tuple[int, ...]
    units: np.ndarray  # undecided
    inverse: np.ndarray  # (c, c) on the columns of `units`
    weight: np.ndarray  # (c, o)


def _search(
    problem: RepairedSubset, best: np.ndarray, value: float, deadline: Deadline
) -> tuple[np.ndarray, float, float, int]:
    """Return the best pruned set, its damage, a lower bound on the optimum and the number of nodes."""
    assert problem.forced is not None and problem.forbidden is not None
    missing = problem.n - problem.k
    units = np.flatnonzero(~problem.forced)
    columns = problem.columns(units)
    inverse = inverse_moment(problem, full=True)[np.ix_(columns, columns)]
    node = _Node(0.0, 0.0, (), units, inverse, reduced_weight(problem).T[columns])
    for unit in np.flatnonzero(problem.forbidden).tolist():
        node = _prune(problem, node, int(np.flatnonzero(node.units == unit)[0]))
    stack = [node]
    nodes, settled = 0, np.inf
    while stack and not deadline.passed():
        node = stack.pop()
        cutoff = value * (1 - PROVEN)
        if node.bound >= cutoff:
            settled = min(settled, node.bound)
            continue
        nodes += 1
        left = missing - len(node.pruned)
        if left == 0 or left == node.units.size:
            rest = node.units if left else node.units[:0]
            damage = node.damage + (_all_damage(node) if left else 0.0)
            leaf = np.isin(np.arange(problem.n), np.concatenate([np.array(node.pruned, dtype=np.int64), rest]))
            settled = min(settled, damage)
            if damage < value:
                best, value = leaf, damage
            continue
        starts = np.concatenate([[0], np.cumsum(problem.width[node.units])])
        score = block_scores(node.inverse, node.weight, starts)
        order = np.argsort(score, kind="stable")
        if left == 1:
            damage = node.damage + float(score[order[0]])
            settled = min(settled, damage)
            if damage < value:
                value = damage
                best = np.isin(np.arange(problem.n), [*node.pruned, int(node.units[order[0]])])
            continue
        if left == 2 and score.size == node.inverse.shape[0]:
            damage, pair = _best_pair(node, score)
            settled = min(settled, damage)
            if damage < value:
                value = damage
                best = np.isin(np.arange(problem.n), [*node.pruned, *node.units[list(pair)].tolist()])
            continue
        least = max(
            float(score[order[left - 1]]),
            float(score[order[:left]].sum()) / spread(node.inverse, starts),
        )
        bound = max(node.bound, node.damage + least * (1 - 1e-12))
        if bound >= cutoff:
            settled = min(settled, bound)
            continue
        at = int(order[-1])
        stay = np.ones(node.inverse.shape[0], dtype=bool)
        stay[int(starts[at]) : int(starts[at + 1])] = False
        stack.append(
            _Node(
                bound,
                node.damage,
                node.pruned,
                np.delete(node.units, at),
                node.inverse[np.ix_(stay, stay)],
                node.weight[stay],
            )
        )
        child = _prune(problem, node, at)
        stack.append(_Node(max(bound, child.damage), *(getattr(child, name) for name in _FIELDS)))
    least = min([settled, value, *(node.bound for node in stack)])
    # The damages come from rounded updates.
    return best, value, least * (1 - PROVEN), nodes


_FIELDS = ("damage", "pruned", "units", "inverse", "weight")


def _prune(problem: RepairedSubset, node: _Node, at: int) -> _Node:
    """Eliminate the unit at a position of `node.units`."""
    from scipy.linalg import cholesky, solve_triangular

    starts = np.concatenate([[0], np.cumsum(problem.width[node.units])])
    own = slice(int(starts[at]), int(starts[at + 1]))
    stay = np.ones(node.inverse.shape[0], dtype=bool)
    stay[own] = False
    factor = cholesky(node.inverse[own, own], lower=True, check_finite=False)
    scaled = solve_triangular(factor, node.inverse[own][:, stay], lower=True, check_finite=False)
    change = solve_triangular(factor, node.weight[own], lower=True, check_finite=False)
    return _Node(
        node.bound,
        node.damage + float(np.square(change).sum()),
        (*node.pruned, int(node.units[at])),
        np.delete(node.units, at),
        node.inverse[np.ix_(stay, stay)] - scaled.T @ scaled,
        node.weight[stay] - scaled.T @ change,
    )


def _best_pair(node: _Node, score: np.ndarray) -> tuple[float, tuple[int, int]]:
    """Return the least damage of pruning two more units of width 1, and their positions. O(c^2 o)."""
    own = node.inverse.diagonal()
    share = node.inverse / own[:, None]  # share[u, v]: what v takes over when u goes
    energy = node.weight @ node.weight.T
    norm = energy.diagonal()
    second = norm - 2 * share * energy + share**2 * norm[:, None]
    left = own - share * node.inverse
    pairs = np.full(left.shape, np.inf)
    np.divide(second, left, out=pairs, where=np.triu(np.ones(left.shape, dtype=bool), 1))
    pairs += score[:, None]
    row, col = divmod(int(pairs.argmin()), own.size)
    return node.damage + float(pairs[row, col]), (row, col)


def _all_damage(node: _Node) -> float:
    """Return what pruning every undecided unit costs."""
    from scipy.linalg import cholesky, solve_triangular

    factor = cholesky(node.inverse, lower=True, check_finite=False)
    return float(np.square(solve_triangular(factor, node.weight, lower=True, check_finite=False)).sum())


register(ExactRepaired())

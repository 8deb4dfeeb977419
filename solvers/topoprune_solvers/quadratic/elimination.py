"""Elimination for repaired subsets: prune the cheapest unit, refit the rest, update the inverse moment.

With M = C^-1 on the remaining columns and W refitted, pruning unit u costs ``tr(W_u [M_uu]^-1 W_u^T)``. Then
``W -= W_u M_uu^-1 M_u:`` refits the rest and ``M -= M_:u M_uu^-1 M_u:`` is the inverse of the smaller moment. So kept
units never enter again, and rows of M that can never be pruned are not even stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import RepairedSubset
from topoprune_solvers.quadratic.common import affordable, feasible_start, subset_solution
from topoprune_solvers.quadratic.exchange import EXCHANGE_COLUMNS, EXCHANGE_UNITS, exchange
from topoprune_solvers.quadratic.moments import block_scores, inverse_moment, reduced_weight
from topoprune_solvers.result import NEVER, Deadline
from topoprune_solvers.solution import Solution

__all__ = ["BlockElimination", "eliminate_repaired"]

SINGLE_COLUMNS = 1024  # up to here neurons are eliminated one at a time
CANDIDATES = 4  # units compared in a batch, per unit eliminated


@dataclass(frozen=True)
class BlockElimination:
    """Prune one unit at a time, each time the one whose loss after the refit is least; small problems then exchange.

    Args:
        batch: units of width 1 eliminated between two updates of the whole inverse, or None: 1 up to 1024
            columns, beyond d / 128. Within a batch the choice is among the 4 * batch units that are cheapest at its
            start, with exact scores; wider units always go one by one.
    """

    name: str = "greedy"
    batch: int | None = None
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=RepairedSubset,
        exact=False,
        guarantee="none in general; optimal where one unit goes",
        complexity="O(d^3 + d^2 o), in blocks as matrix products; exchanges up to 1024 columns",
        reference="Hassibi, Stork (1993), Optimal brain surgeon; Frantar, Alistarh (2022) for the batched updates",
        when="heads and neurons whose consumer is refitted after pruning",
    )

    def solve(
        self, problem: RepairedSubset, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the result of elimination and exchanges, or the warm start improved where that is better."""
        deadline = Deadline.after(time_limit)
        start = feasible_start(problem, warm_start)
        found = [] if start is None else [~start]
        if not (found and deadline.passed()):
            found.append(eliminate_repaired(problem, deadline, self.batch))
        if problem.moment.shape[0] <= EXCHANGE_COLUMNS and problem.n <= EXCHANGE_UNITS:
            found += [exchange(problem, pruned, deadline) for pruned in found]
        best = found[0] if len(found) == 1 else min(found, key=lambda pruned: problem.objective(~pruned))
        return subset_solution(problem, ~best, self.name, timed_out=deadline.passed())


def eliminate_repaired(problem: RepairedSubset, deadline: Deadline = NEVER, batch: int | None = None) -> np.ndarray:
    """Return the (n,) pruned mask of greedy elimination.

    Past the deadline the rest goes by its last scores; where not even the inverse fits into the time left, all units
    go by their loss without repair.
    """
    assert problem.forced is not None and problem.forbidden is not None
    d = problem.moment.shape[0]
    missing = problem.n - problem.k
    pruned = problem.forbidden.copy()
    if missing == 0:
        return pruned
    if d == 0 or not affordable(deadline, 1.5 * d**3):
        alone = np.add.reduceat(np.square(problem.weight).sum(axis=0) * problem.moment.diagonal(), problem.offsets[:-1])
        return _cheapest(pruned, np.where(problem.forced, np.inf, alone), missing)
    if problem.width.max(initial=1) == 1:
        if batch is None:
            batch = 1 if d <= SINGLE_COLUMNS else -(-d // 128)
        return _eliminate_columns(problem, deadline, batch)
    return _eliminate_blocks(problem, deadline)


def _cheapest(pruned: np.ndarray, score: np.ndarray, missing: int) -> np.ndarray:
    """Return `pruned` with the units of lowest score added until `missing` are in it."""
    full = pruned.copy()
    order = np.argsort(np.where(pruned, np.inf, score), kind="stable")
    full[order[: missing - int(pruned.sum())]] = True
    return full


def _eliminate_columns(problem: RepairedSubset, deadline: Deadline, batch: int) -> np.ndarray:
    """Eliminate units of width 1; `inverse` holds its lower triangle only, in Fortran order."""
    from scipy.linalg import cholesky, solve_triangular
    from scipy.linalg.blas import dsyrk

    assert problem.forced is not None and problem.forbidden is not None
    missing = problem.n - problem.k
    inverse = inverse_moment(problem)
    weight = reduced_weight(problem).T.copy()  # (d, o)
    units = np.arange(problem.n)
    if problem.forced.any():
        units = np.flatnonzero(~problem.forced)
        inverse = np.asfortranarray(inverse[np.ix_(units, units)])
        weight = weight[units]
    pruned = np.zeros(problem.n, dtype=bool)
    gone = np.zeros(units.size, dtype=bool)
    while int(pruned.sum()) < missing:
        diagonal = np.where(gone, 1.0, inverse.diagonal())
        score = np.einsum("ij,ij->i", weight, weight) / diagonal
        score[gone] = np.inf
        due = problem.forbidden[units] & ~gone
        left = missing - int(pruned.sum())
        if deadline.passed():
            rest = np.full(problem.n, np.inf)
            rest[units] = np.where(due, -1.0, score)
            return _cheapest(pruned, rest, missing)
        if due.any():
            chosen = np.flatnonzero(due)[: max(batch, 64)]
        else:
            chosen = _choose(inverse, weight, score, min(batch, left), gone)
        columns = inverse[:, chosen]
        # Entries above the diagonal are not kept up to date: take them from their mirror image.
        above = np.arange(units.size)[:, None] < chosen
        columns = np.where(above, inverse[chosen].T, columns)
        factor = cholesky(columns[chosen], lower=True, check_finite=False)
        scaled = solve_triangular(factor, columns.T, lower=True, check_finite=False).T  # (d, b)
        change = solve_triangular(factor, weight[chosen], lower=True, check_finite=False)  # (b, o)
        weight -= scaled @ change
        inverse = dsyrk(-1.0, scaled, beta=1.0, c=inverse, lower=1, overwrite_c=1)
        gone[chosen] = True
        pruned[units[chosen]] = True
        if gone.sum() > units.size // 4:
            stay = np.flatnonzero(~gone)
            inverse = np.asfortranarray(inverse[np.ix_(stay, stay)])
            weight, units, gone = weight[stay], units[stay], gone[stay]
    return pruned


def _choose(inverse: np.ndarray, weight: np.ndarray, score: np.ndarray, count: int, gone: np.ndarray) -> np.ndarray:
    """Return `count` columns, eliminated one after the other among the currently cheapest ones."""
    if count == 1:
        return np.array([int(score.argmin())])
    pool = np.argsort(score, kind="stable")[: min(CANDIDATES * count, int((~gone).sum()))]
    pool.sort()
    small = np.tril(inverse[np.ix_(pool, pool)])
    small = small + np.tril(small, -1).T
    part = weight[pool]
    energy = part @ part.T
    out = np.zeros(pool.size, dtype=bool)
    chosen = []
    for _ in range(count):
        rating = np.full(pool.size, np.inf)
        np.divide(energy.diagonal(), small.diagonal(), out=rating, where=~out)
        unit = int(rating.argmin())
        chosen.append(pool[unit])
        out[unit] = True
        share = small[:, unit] / small[unit, unit]
        along = energy[:, unit].copy()
        # The refit of both sides: along is subtracted on each side, its own part was then subtracted twice.
        energy -= np.outer(share, along) + np.outer(along - along[unit] * share, share)
        small -= np.outer(share, small[unit].copy())
    return np.array(chosen)


def _eliminate_blocks(problem: RepairedSubset, deadline: Deadline) -> np.ndarray:
    """Eliminate units of any width, one by one."""
    from scipy.linalg import cholesky, solve_triangular

    assert problem.forced is not None and problem.forbidden is not None
    missing = problem.n - problem.k
    inverse = inverse_moment(problem, full=True)
    weight = reduced_weight(problem).T.copy()
    pruned = np.zeros(problem.n, dtype=bool)
    units = np.flatnonzero(~problem.forced)
    columns = problem.columns(units)
    inverse, weight = inverse[np.ix_(columns, columns)], weight[columns]
    while True:
        width = problem.width[units]
        starts = np.concatenate([[0], np.cumsum(width)])
        score = block_scores(inverse, weight, starts)
        score[problem.forbidden[units]] = -1.0  # due in any case
        if deadline.passed():
            rest = np.full(problem.n, np.inf)
            rest[units] = score
            return _cheapest(pruned, rest, missing)
        at = int(score.argmin())
        pruned[units[at]] = True
        if int(pruned.sum()) == missing:
            return pruned
        own = slice(int(starts[at]), int(starts[at + 1]))
        factor = cholesky(inverse[own, own], lower=True, check_finite=False)
        scaled = solve_triangular(factor, inverse[own], lower=True, check_finite=False)
        change = solve_triangular(factor, weight[own], lower=True, check_finite=False)
        stay = np.ones(columns.size, dtype=bool)
        stay[own] = False
        scaled = scaled[:, stay]
        inverse = inverse[np.ix_(stay, stay)] - scaled.T @ scaled
        weight = weight[stay] - scaled.T @ change
        columns, units = columns[stay], np.delete(units, at)


register(BlockElimination())

"""Lower bounds on the damage of repaired subsets, and the solver that reports them.

Three sources, each valid on its own:

- *Spectral tail.* The refitted output has at most the rank of the kept columns, so the damage is at least the
  sum of the eigenvalues of ``W C W^T`` beyond that rank (Eckart, Young 1936).
- *Single damages.* With D the block diagonal of M = C^-1 and s the largest eigenvalue of ``D^-1/2 M D^-1/2``,
  ``M_PP <= s D_PP``, hence damage(P) >= (1 / s) * sum over P of the damages of single units.
- *Perspective relaxation.* With F block diagonal, 0 <= F <= C, replace ``B_u F_u B_u^T`` by its 1/z_u-fold in the least
  squares of the repair, z_u in [0, 1] with sum k: exact at 0/1, convex in between. A tangent bounds it from below
  wherever it is taken. With F = D^-1 / s the tangent at z = 1 is the bound by single damages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.problems import RepairedSubset
from topoprune_solvers.quadratic.common import PROVEN, affordable, feasible_start, subset_solution
from topoprune_solvers.quadratic.elimination import eliminate_repaired
from topoprune_solvers.quadratic.exchange import EXCHANGE_COLUMNS, EXCHANGE_UNITS, exchange
from topoprune_solvers.quadratic.moments import block_scores, inverse_moment, reduced_weight
from topoprune_solvers.result import NEVER, Deadline
from topoprune_solvers.solution import Bound, Solution

__all__ = ["CertifiedRepaired", "perspective_bound", "repaired_bounds", "single_bound", "spectral_bound", "spread"]

BOUND_COLUMNS = 4096  # an eigenvalue decomposition takes half a minute
PERSPECTIVE_STEPS = 30
_LEAST_SHARE = 1e-4  # z stays above: its inverse enters a linear system


@dataclass(frozen=True)
class CertifiedRepaired:
    """Eliminate and exchange as `greedy` does, then bound the damage from below."""

    name: str = "relaxation"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=RepairedSubset,
        exact=False,
        guarantee="a certified lower bound >= 0 up to 4096 columns, 0 beyond, and hence the gap of the set found",
        complexity="O(d^3 + d^2 o) a step",
        reference="Eckart, Young (1936); Guenluek, Linderoth (2010) for the perspective",
        when="above 20 units, to know how far from the best the set can be",
    )

    def solve(
        self, problem: RepairedSubset, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best set of elimination and exchanges with the best bound that fits into the time limit."""
        deadline = Deadline.after(time_limit)
        start = feasible_start(problem, warm_start)
        found = [] if start is None else [~start]
        if not (found and deadline.passed()):
            found.append(eliminate_repaired(problem, deadline))
        if problem.moment.shape[0] <= EXCHANGE_COLUMNS and problem.n <= EXCHANGE_UNITS:
            half = Deadline.after(None if time_limit is None else deadline.remaining() / 2)
            found += [exchange(problem, pruned, half) for pruned in found]
        best = found[0] if len(found) == 1 else min(found, key=lambda pruned: problem.objective(~pruned))
        bounds = repaired_bounds(problem, deadline)
        return subset_solution(
            problem,
            ~best,
            self.name,
            bounds=bounds,
            timed_out=deadline.passed(),
            stats={bound.source: bound.value for bound in bounds},
        )


def repaired_bounds(problem: RepairedSubset, deadline: Deadline = NEVER) -> list[Bound]:
    """Return lower bounds from all sources that the size and the time allow; 0 always."""
    bounds = [Bound(0.0, "damage is never negative")]
    if problem.moment.shape[0] > BOUND_COLUMNS or problem.k == problem.n or not problem.n:
        return bounds
    work = float(problem.moment.shape[0]) ** 3
    for source, bound in (("spectral tail", spectral_bound), ("single damages", single_bound)):
        if affordable(deadline, 5 * work):
            bounds.append(Bound(bound(problem), source))
    if affordable(deadline, 6 * work):
        bounds.append(Bound(perspective_bound(problem, deadline), "perspective relaxation"))
    return bounds


def spectral_bound(problem: RepairedSubset) -> float:
    """Return the sum of the eigenvalues of ``W C W^T`` beyond the number of columns that can be kept. O(o^2 d)."""
    assert problem.forced is not None and problem.forbidden is not None
    width = problem.width
    optional = np.sort(width[~problem.forced & ~problem.forbidden])[::-1]
    rank = int(width[problem.forced].sum() + optional[: problem.k - int(problem.forced.sum())].sum())
    weight = reduced_weight(problem)
    energy = weight @ problem.moment @ weight.T + problem.ridge_value * (weight @ weight.T)
    value = np.linalg.eigvalsh(energy)
    tail = np.maximum(value[: max(value.size - rank, 0)], 0.0)
    return float(tail.sum()) - 1e-13 * value.size * float(np.abs(value).max(initial=0.0))


def single_bound(problem: RepairedSubset) -> float:
    """Return the sum of the smallest single damages over the spread of the inverse. O(d^3)."""
    inverse = inverse_moment(problem, full=True)
    score = block_scores(inverse, reduced_weight(problem).T, problem.offsets)
    return _least(problem, -score, np.ones(problem.n)) * (1 - PROVEN) / spread(inverse, problem.offsets)


def spread(inverse: np.ndarray, starts: np.ndarray) -> float:
    """Return at least the largest eigenvalue of ``D^-1/2 M D^-1/2``, D the diagonal blocks of M; at most their number.

    Args:
        inverse: (c, c), M. starts: (u + 1,) first row of each block, then c.
    """
    blocks = starts.size - 1
    if not blocks:
        return 1.0
    size = inverse.shape[0]
    normalised = _normalised(inverse, starts)
    if size <= 256 or size == blocks:
        top = float(np.linalg.eigvalsh(normalised)[-1])
    else:
        # The matrix of Frobenius norms of the blocks has an eigenvalue at least as large, and is small.
        norms = np.add.reduceat(np.add.reduceat(np.square(normalised), starts[:-1], axis=0), starts[:-1], axis=1)
        norms = np.sqrt(norms)
        norms[np.diag_indices(blocks)] = 1.0  # identities, whose norm is 1
        top = float(np.linalg.eigvalsh(norms)[-1])
        if top > blocks / 2 and size <= 2048:
            top = min(top, float(np.linalg.eigvalsh(normalised)[-1]))
    return min(max(top, 1.0) * (1 + 1e-10), float(blocks))


def _normalised(inverse: np.ndarray, starts: np.ndarray) -> np.ndarray:
    # L^-1 M L^-T with L the Cholesky factors of the diagonal blocks: similar to D^-1/2 M D^-1/2.
    from scipy.linalg import cholesky, solve_triangular

    if starts.size - 1 == inverse.shape[0]:
        root = np.sqrt(inverse.diagonal())
        return inverse / root / root[:, None]
    scaled = np.array(inverse)
    for unit in range(starts.size - 1):
        own = slice(int(starts[unit]), int(starts[unit + 1]))
        factor = cholesky(inverse[own, own], lower=True, check_finite=False)
        scaled[own] = solve_triangular(factor, scaled[own], lower=True, check_finite=False)
        scaled[:, own] = solve_triangular(factor, scaled[:, own].T, lower=True, check_finite=False).T
    return scaled


def perspective_bound(problem: RepairedSubset, deadline: Deadline = NEVER, steps: int = PERSPECTIVE_STEPS) -> float:
    """Return the best tangent bound of the perspective relaxation on an alternating minimisation.

    Weights at fixed z are one linear system; z at fixed weights is ``min(1, sqrt(tr(B_u F_u B_u^T)) / t)`` with t such
    that sum z = k. Any z gives a valid tangent. O(d^3 + d^2 o) a step.
    """
    from scipy.linalg import cho_factor, cho_solve

    offsets = problem.offsets
    inverse = inverse_moment(problem, full=True)
    # Exact where the eigenvalues are affordable: the bound is proportional to it at the start.
    size = inverse.shape[0]
    factor = spread(inverse, offsets) if size > 2048 else _exact_spread(inverse, offsets)
    share = [
        np.linalg.inv(inverse[a:b, a:b]) / (factor * (1 + 1e-9))
        for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
    del inverse
    weight = reduced_weight(problem)
    target = weight @ problem.moment + problem.ridge_value * weight  # W C
    whole = float((target * weight).sum())
    z = np.ones(problem.n)
    best = 0.0
    for _ in range(steps):
        system = np.array(problem.moment)
        system[np.diag_indices(size)] += problem.ridge_value
        for unit, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            system[a:b, a:b] += share[unit] * (1 / z[unit] - 1)
        refitted = cho_solve(
            cho_factor(system, lower=True, overwrite_a=True, check_finite=False), target.T, check_finite=False
        ).T
        value = whole - float((target * refitted).sum())
        energy = np.array(
            [
                float(((refitted[:, a:b] @ part) * refitted[:, a:b]).sum())
                for part, a, b in zip(share, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
            ]
        )
        slope = -energy / z**2
        bound = value + _least(problem, slope, z)
        # Differences of large sums: what they may have lost is taken off.
        bound -= 1e-10 * (abs(whole) * 1e-2 + abs(float((slope * z).sum())))
        if bound <= best * (1 + 1e-5) and best > 0:
            best = max(best, bound)
            break
        best = max(best, bound)
        z = _shares(problem, np.sqrt(energy))
        if not affordable(deadline, 3.0 * size**3):
            break
    return best


def _exact_spread(inverse: np.ndarray, starts: np.ndarray) -> float:
    top = float(np.linalg.eigvalsh(_normalised(inverse, starts))[-1])
    return max(top, 1.0) * (1 + 1e-10)


def _least(problem: RepairedSubset, slope: np.ndarray, z: np.ndarray) -> float:
    """Return the minimum of ``slope . (x - z)`` over 0/1 vectors x with k ones that respect forced and forbidden."""
    assert problem.forced is not None and problem.forbidden is not None
    optional = np.sort(slope[~problem.forced & ~problem.forbidden])
    chosen = float(optional[: problem.k - int(problem.forced.sum())].sum()) + float(slope[problem.forced].sum())
    return chosen - float((slope * z).sum())


def _shares(problem: RepairedSubset, root: np.ndarray) -> np.ndarray:
    """Return z in [1e-4, 1] proportional to `root` where not capped, with sum k."""
    assert problem.forced is not None and problem.forbidden is not None
    z = np.where(problem.forced, 1.0, _LEAST_SHARE)
    free = ~problem.forced & ~problem.forbidden
    target = problem.k - int(problem.forced.sum())
    low, high = 0.0, max(float(problem.n) * float(root.max(initial=0.0)), 1e-300)
    for _ in range(100):
        scale = (low + high) / 2
        total = np.minimum(1.0, root[free] / max(scale, 1e-300)).sum()
        low, high = (scale, high) if total > target else (low, scale)
    z[free] = np.clip(root[free] / max(high, 1e-300), _LEAST_SHARE, 1.0)
    return z


register(CertifiedRepaired())

"""Linear algebra on second moments that the solvers of repaired subsets share."""

from __future__ import annotations

import numpy as np

from topoprune_solvers.problems import RepairedSubset

__all__ = ["block_scores", "inverse_moment", "reduced_weight"]


def inverse_moment(problem: RepairedSubset, *, full: bool = False) -> np.ndarray:
    """Return (C + ridge)^-1, (d, d) float64 in Fortran order.

    Only the lower triangle is meant unless `full`. One (d, d) array, O(d^3).

    Raises:
        ValueError: a moment that is not positive definite even with its ridge.
    """
    from scipy.linalg.lapack import dpotrf, dpotri

    d = problem.moment.shape[0]
    system = np.array(problem.moment, order="F")
    system[np.diag_indices(d)] += problem.ridge_value
    if not d:
        return system
    factor, failed = dpotrf(system, lower=1, overwrite_a=1, clean=0)
    if failed:
        raise ValueError(problem.not_definite)
    inverse, failed = dpotri(factor, lower=1, overwrite_c=1)
    if failed:
        raise ValueError(problem.not_definite)
    if full:
        inverse = np.tril(inverse)
        inverse += np.tril(inverse, -1).T
    return np.asarray(inverse)


def reduced_weight(problem: RepairedSubset) -> np.ndarray:
    """Return a (min(o, d), d) weight with the same W^T W, hence the same damages. O(o d^2) where o > d, else O(1)."""
    weight = problem.weight
    if weight.shape[0] <= weight.shape[1]:
        return weight
    return np.asarray(np.linalg.qr(weight, mode="r"))


def block_scores(inverse: np.ndarray, weight: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return (u,) float64 ``tr(W_u [M_uu]^-1 W_u^T)``: what pruning each remaining unit costs.

    Args:
        inverse: (c, c), M. weight: (c, o), W transposed. starts: (u + 1,) first row of each unit, then c.
    """
    from scipy.linalg import cholesky, solve_triangular

    if starts.size - 1 == inverse.shape[0]:
        return np.einsum("ij,ij->i", weight, weight) / inverse.diagonal()
    score = np.zeros(starts.size - 1)
    for unit in range(score.size):
        own = slice(int(starts[unit]), int(starts[unit + 1]))
        factor = cholesky(inverse[own, own], lower=True, check_finite=False)
        score[unit] = float(np.square(solve_triangular(factor, weight[own], lower=True, check_finite=False)).sum())
    return score

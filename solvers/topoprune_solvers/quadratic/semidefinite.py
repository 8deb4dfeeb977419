"""A semidefinite bound on quadratic subsets by ADMM, with a dual value that is valid at every iterate.

With y = (1, x) and Y = y y^T the objective is <C, Y>. Y is positive semidefinite, its entries lie in [0, 1], its
diagonal equals its first column, and under a cardinality budget y is orthogonal to (-m, 1, ..., 1). For *any*
symmetric Z the objective splits into <C + Z, Y> - <Z, Y>: a linear function of x plus a non-negative coupling (entries
of C + Z outside diagonal and first row are made >= 0 by choice of Z), and a quadratic form made convex by adding
its most negative eigenvalue, which trace(Y) = 1 + sum(x) pays back. Both parts have a minimum from below by
sorting. ADMM finds a good Z.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from topoprune_solvers.quadratic.budgets import OpenPart
from topoprune_solvers.quadratic.convex import ConvexForm
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["SEMIDEFINITE_UNITS", "semidefinite_form"]

SEMIDEFINITE_UNITS = 1000  # an eigendecomposition takes about half a second
SOURCE = "semidefinite relaxation (ADMM)"
CHECK = 10  # iterations between two evaluations of the bound
_WORK = 4e10  # iterations times f^3
_STEP = 1.618  # relaxation of the multiplier update


def semidefinite_form(
    part: OpenPart,
    deadline: Deadline = NEVER,
    *,
    iterations: int | None = None,
    visit: Callable[[float, np.ndarray], bool] | None = None,
) -> tuple[float, ConvexForm | None]:
    """Return the best lower bound found and the convex form behind it.

    Args:
        part: the open part, 1 to 1000 units.
        deadline: asked at every iteration. iterations: at most this many; None: by size.
        visit: called with each better bound and the fractional (f,) x; True ends the run.

    References: Povh, Rendl, Wiegele (2006), boundary point method; Oliveira, Wolkowicz, Xu (2018), ADMM for the SDP
        relaxation of the QAP; safe bounds as in Jansson, Chaykin, Keil (2007).

    Complexity: O(f^3) an iteration.
    """
    f = part.f
    scale = max(float(np.abs(part.quadratic).max(initial=0.0)), float(np.abs(part.linear).max(initial=0.0))) or 1.0
    objective = np.zeros((f + 1, f + 1))
    objective[1:, 1:] = part.quadratic / scale
    objective[0, 1:] = objective[1:, 0] = part.linear / (2 * scale)
    normal = None
    if part.count is not None:
        normal = np.append(-float(part.count), np.ones(f))
        normal /= np.linalg.norm(normal)
    if iterations is None:
        iterations = int(np.clip(_WORK / (f + 1) ** 3, 30, 2000))
    zero, one = np.zeros((1, f)), np.ones((1, f))
    share = part.count / f if part.count is not None else 0.5
    lifted = _lift(np.full(f, share))
    lifted = _into_polytope(lifted, part, zero, one)
    multiplier = -objective  # the plain convex relaxation: its bound is where the iterations start
    penalty = max(float(np.linalg.norm(objective)), 1e-3) / max(share * f, 1.0)
    best, best_form, stalled, mark = -np.inf, None, 0, -np.inf
    longest, started = 0.0, time.perf_counter()
    for turn in range(1, iterations + 1):
        # Stop while there is time for one evaluation of the bound, or the iterations were in vain.
        now = time.perf_counter()
        longest = max(longest, now - started)
        started = now
        last = turn == iterations or deadline.remaining() < 2.5 * longest
        definite = _semidefinite(_orthogonal(lifted + multiplier / penalty, normal))
        before = lifted
        lifted = _into_polytope(definite - (objective + multiplier) / penalty, part, zero, one)
        apart = lifted - definite
        multiplier = multiplier + _STEP * penalty * apart
        if turn % CHECK == 0 or last:
            form, value = _dual(objective, multiplier, normal, part, scale)
            if value > best:
                best, best_form = value, form
            if last or (visit is not None and visit(best, lifted[0, 1:])):
                break
            stalled = stalled + 1 if best <= mark + 1e-4 * abs(mark) else 0
            mark = best if stalled == 0 else mark
            if stalled >= 6:
                break
            primal = float(np.linalg.norm(apart)) / max(float(np.linalg.norm(lifted)), 1e-300)
            dual = penalty * float(np.linalg.norm(lifted - before)) / max(float(np.linalg.norm(multiplier)), 1e-300)
            if turn <= iterations // 2:
                penalty *= 1.3 if primal > 3 * dual else 1 / 1.3 if dual > 3 * primal else 1.0
    return best, best_form


def _lift(x: np.ndarray) -> np.ndarray:
    y = np.append(1.0, x)
    lifted = np.outer(y, y)
    lifted[1:, 1:][np.diag_indices(x.size)] = x
    return lifted


def _orthogonal(matrix: np.ndarray, normal: np.ndarray | None) -> np.ndarray:
    """Return P M P, P the projection along `normal`."""
    if normal is None:
        return matrix
    column = matrix @ normal
    twice = column - 0.5 * float(normal @ column) * normal
    return matrix - np.outer(normal, twice) - np.outer(twice, normal)


def _semidefinite(matrix: np.ndarray) -> np.ndarray:
    """Return the positive semidefinite part. O(f^3)."""
    value, vector = np.linalg.eigh(matrix)
    positive = value > 0
    if positive.sum() * 2 > value.size:
        part = vector[:, ~positive]
        return matrix - (part * value[~positive]) @ part.T
    part = vector[:, positive]
    return (part * value[positive]) @ part.T


def _into_polytope(matrix: np.ndarray, part: OpenPart, zero: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return the nearest matrix with entries in [0, 1], its diagonal in its first column, and x within the budget."""
    x = (2 * matrix[0, 1:] + matrix.diagonal()[1:]) / 3
    x = part.project(x[None], zero, one)[0]
    inside = np.clip(matrix, 0.0, 1.0)
    inside[0, 0] = 1.0
    inside[0, 1:] = inside[1:, 0] = x
    inside[1:, 1:][np.diag_indices(x.size)] = x
    return inside


def _dual(
    objective: np.ndarray, multiplier: np.ndarray, normal: np.ndarray | None, part: OpenPart, scale: float
) -> tuple[ConvexForm, float]:
    """Return the convex form that a multiplier defines, and the bound of its linear part alone."""
    f = part.f
    outer = objective + multiplier
    coupling = np.maximum(outer[1:, 1:], 0.0)
    coupling[np.diag_indices(f)] = 0.0
    linear = outer.diagonal()[1:] + 2 * outer[0, 1:]
    # What is left of the objective is <rest, Y>, with rest = objective - (corner, linear on the diagonal, coupling).
    rest = objective.copy()
    rest[0, 0] -= outer[0, 0]
    rest[0, 1:] -= outer[0, 1:]
    rest[1:, 0] -= outer[0, 1:]
    rest[1:, 1:] -= coupling
    rest[1:, 1:][np.diag_indices(f)] -= outer.diagonal()[1:]
    rest = _orthogonal(rest, normal)
    least = float(np.linalg.eigvalsh(rest)[0])
    # Eigenvalues are accurate to some eps * norm; the shift covers that.
    shift = max(-least, 0.0) + 1e-14 * (f + 1) * float(np.linalg.norm(rest))
    if normal is None:
        convex = rest + shift * np.eye(f + 1)
    else:
        convex = rest + shift * (np.eye(f + 1) - np.outer(normal, normal))
    linear = linear - shift
    corner = outer[0, 0] - shift
    zero, one = np.zeros((1, f)), np.ones((1, f))
    rounding = 1e-13 * (float(np.abs(linear).sum()) + abs(corner) + float(np.abs(rest).max()) * f)
    value = corner + float(part.least(linear[None], zero, one)[0]) - rounding
    form = ConvexForm(
        quadratic=scale * convex[1:, 1:],
        linear=scale * (linear + 2 * convex[0, 1:]),
        constant=part.constant + scale * (corner + convex[0, 0]),
        coupling=scale * coupling,
        slack=scale * rounding,
        source=SOURCE,
    )
    return form, float(part.constant + scale * value)

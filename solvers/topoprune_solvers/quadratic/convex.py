"""Lower bounds from convex quadratics: valid at any point, tight near the minimum.

On 0/1 vectors ``x^T Q x + q^T x`` can be written as ``x^T A x + a^T x + x^T N x + c`` with A positive
semidefinite and N >= 0 outside its diagonal, in many ways: x_i^2 = x_i moves a diagonal between A and a.
Dropping ``x^T N x >= 0`` leaves a convex function. It lies above each of its tangents, so at every point y

    value(y) + min over x of gradient(y) . (x - y)

is a lower bound on the optimum, whatever the accuracy of y. That minimum is a sort.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from topoprune_solvers.quadratic.budgets import OpenPart
from topoprune_solvers.quadratic.common import affordable
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["ConvexForm", "diagonal_forms", "largest_eigenvalue", "row_bound", "tangent_bounds"]

FACTORED_UNITS = 4096  # a Cholesky factorisation takes about a second
_HALVINGS = 8
_ROWS = 512


@dataclass(frozen=True, eq=False)
class ConvexForm:
    """``x^T A x + a^T x + x^T N x + constant``, equal to the objective on feasible 0/1 vectors.

    Args:
        quadratic: (f, f) float64, A, positive semidefinite up to rounding. linear: (f,) float64, a.
        constant: c. coupling: (f, f) float64 >= 0 with zero diagonal, N, or None for 0.
        slack: what rounding can make a bound too large; subtracted from every bound.
        source: name of the bound.
    """

    quadratic: np.ndarray
    linear: np.ndarray
    constant: float
    coupling: np.ndarray | None
    slack: float
    source: str


def tangent_bounds(
    form: ConvexForm,
    part: OpenPart,
    low: np.ndarray,
    high: np.ndarray,
    x: np.ndarray,
    *,
    steps: int,
    lipschitz: float,
    cutoff: float = np.inf,
    deadline: Deadline = NEVER,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lower bounds for a batch of boxes ``low <= x <= high``, the last points and the slopes behind the bounds.

    Accelerated projected gradient; the best tangent bound on the way counts. Units fixed at 1 have their part of
    ``x^T N x`` counted too.

    Args:
        form: the convex form. part: the open part. low, high: (b, f) of 0 and 1. x: (b, f) points to start from.
        steps: gradient steps at most. lipschitz: about the largest eigenvalue of 2 A; sets the step length only.
        cutoff: stop when every bound exceeds it. deadline: asked at every step.

    Returns:
        (b,) bounds, (b, f) points, (b, f) slopes of the best tangents. Complexity: O(steps b f (f + log f)).
    """
    linear = np.broadcast_to(form.linear, x.shape)
    constant = np.full(x.shape[0], form.constant - form.slack)
    if form.coupling is not None:
        pull = low @ form.coupling
        linear = linear + 2 * pull
        constant = constant - (pull * low).sum(axis=1)
    best = np.full(x.shape[0], -np.inf)
    best_slope = np.zeros_like(x)
    point = x = part.project(x, low, high)
    momentum = 1.0
    step = 1.0 / max(lipschitz, 1e-300)
    for turn in range(steps + 1):
        curved = point @ form.quadratic
        slope = 2 * curved + linear
        least = part.least(slope, low, high)
        energy = (point * curved).sum(axis=1)
        # value(y) - slope . y = constant - y^T A y; rounding of the sums is taken off.
        size = np.abs(constant) + np.abs(energy) + np.where(np.isfinite(least), np.abs(least), 0.0)
        value = constant - energy + least - 1e-13 * size
        better = value > best
        best = np.where(better, value, best)
        best_slope[better] = slope[better]
        if turn == steps or deadline.passed() or np.all(best > cutoff):
            break
        moved = part.project(point - step * slope, low, high)
        # Restart the momentum where it points uphill (O'Donoghue, Candes 2015).
        uphill = (slope * (moved - x)).sum(axis=1) > 0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        point = moved + np.where(uphill, 0.0, (momentum - 1) / following)[:, None] * (moved - x)
        x, momentum = moved, 1.0 if uphill.all() else following
    return best, x, best_slope


def largest_eigenvalue(matrix: np.ndarray, deadline: Deadline = NEVER, rounds: int = 20) -> float:
    """Return about the largest eigenvalue of a symmetric matrix, by power iteration: for step lengths only."""
    if not matrix.size:
        return 0.0
    vector = np.ones(matrix.shape[0]) + np.arange(matrix.shape[0]) % 7
    value = 0.0
    for _ in range(rounds):
        vector = vector / max(float(np.linalg.norm(vector)), 1e-300)
        vector = matrix @ vector
        value = float(np.linalg.norm(vector))
        if deadline.passed():
            break
    return 1.1 * value


def row_bound(part: OpenPart, deadline: Deadline = NEVER) -> float:
    """Return a bound row by row: each pruned unit pays at least its diagonal and its m - 1 smallest other entries.

    Under a knapsack, its negative entries instead. Gilmore (1962) and Lawler (1963) bound the quadratic assignment
    problem so. O(f^2).
    """
    f = part.f
    pay = part.linear.copy()
    for start in range(0, f, _ROWS):
        if deadline.passed():
            return -np.inf
        rows = part.quadratic[start : start + _ROWS].copy()
        here = np.arange(rows.shape[0])
        own = rows[here, start + here].copy()
        rows[here, start + here] = np.inf
        if part.count is None:
            others = np.minimum(rows, 0.0).sum(axis=1)
        elif part.count > 1:
            others = np.partition(rows, part.count - 2, axis=1)[:, : part.count - 1].sum(axis=1)
        else:
            others = np.zeros(here.size)
        pay[start : start + _ROWS] += own + others
    zero, one = np.zeros((1, f)), np.ones((1, f))
    least = float(part.least(pay[None], zero, one)[0])
    return part.constant + least - 1e-12 * (abs(part.constant) + abs(least))


def diagonal_forms(part: OpenPart, deadline: Deadline = NEVER) -> Iterator[ConvexForm]:
    """Yield convex forms ``Q - D`` for some diagonal matrices D >= 0 that keep it positive semidefinite.

    D = 0 first; up to 4096 units also the largest multiples, found by Cholesky factorisations, of the identity,
    of the diagonal and of 1 / diag(Q^-1), the most that each single diagonal entry can give. O(f^3) each.
    """
    f = part.f
    quadratic = part.quadratic
    scale = float(np.abs(quadratic.diagonal()).sum())
    yield ConvexForm(quadratic, part.linear, part.constant, None, 1e-13 * scale * max(f, 1), "convex relaxation")
    if not 0 < f <= FACTORED_UNITS or not scale > 0:
        return
    diagonal = np.maximum(quadratic.diagonal(), 0.0)
    for shape, name in ((np.ones(f), "identity"), (diagonal, "diagonal"), (None, "inverse diagonal")):
        if not affordable(deadline, 2.0 * f**3):
            break
        if shape is None:
            system = quadratic.copy()
            system[np.diag_indices(f)] += 1e-9 * scale / f
            try:
                shape = 1.0 / np.maximum(np.linalg.inv(system).diagonal(), 1e-300)
            except np.linalg.LinAlgError:
                return
            shape = np.clip(shape, 0.0, diagonal)
        top = float((diagonal[shape > 0] / shape[shape > 0]).min(initial=np.inf))
        factor = _largest_multiple(quadratic, shape, top, 1e-12 * scale, deadline) if np.isfinite(top) else 0.0
        if factor > 0:
            reduced = quadratic.copy()
            reduced[np.diag_indices(f)] -= factor * shape
            slack = 1e-12 * scale * f + 1e-13 * scale * f
            yield ConvexForm(
                reduced,
                part.linear + factor * shape,
                part.constant,
                None,
                slack,
                f"convex relaxation ({name} split off)",
            )


def _largest_multiple(matrix: np.ndarray, shape: np.ndarray, top: float, tolerance: float, deadline: Deadline) -> float:
    """Return about the largest s with ``matrix - s diag(shape) + tolerance I`` positive semidefinite, from below."""
    below, above = 0.0, top
    for _ in range(_HALVINGS):
        if not affordable(deadline, matrix.shape[0] ** 3 / 3):
            break
        trial = (below + above) / 2
        system = matrix.copy()
        system[np.diag_indices_from(system)] += tolerance - trial * shape
        try:
            np.linalg.cholesky(system)
        except np.linalg.LinAlgError:
            above = trial
        else:
            below = trial
    return below

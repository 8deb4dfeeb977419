"""Exchanges for repaired subsets: all pairs of a pruned and a kept unit, from one factorisation.

With M = C^-1, N = [M_PP]^-1, E = N M_PS, V = W_P N and W' = W_S - W_P E, taking unit i out of P saves
``tr(V_i N_ii^-1 V_i^T)``, and pruning j then costs ``tr(B [M'_jj + E_ij^T N_ii^-1 E_ij]^-1 B^T)`` with
``B = W'_j + V_i N_ii^-1 E_ij`` and M' the inverse moment after P is gone.

M itself is never formed: inverting blocks of an inverse loses digits by the square of C's condition. From the Cholesky
factor of C with the kept columns first, ``N = L_PP L_PP^T``, ``E = -L_PS L_SS^-1`` and ``M' = L_SS^-T L_SS^-1``.
"""

from __future__ import annotations

import numpy as np

from topoprune_solvers.problems import RepairedSubset
from topoprune_solvers.quadratic.common import PROVEN
from topoprune_solvers.quadratic.moments import reduced_weight
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["EXCHANGE_COLUMNS", "EXCHANGE_UNITS", "exchange", "exchange_changes"]

EXCHANGE_COLUMNS = 1024  # a round of exchanges costs O(d^3)
EXCHANGE_UNITS = 1024
ROUNDS = 200


def exchange(problem: RepairedSubset, pruned: np.ndarray, deadline: Deadline = NEVER) -> np.ndarray:
    """Return the (n,) pruned mask after making the best exchange, again and again, while it lowers the damage.

    Complexity: O(d^3 + d^2 o) a round for units of width 1; wider ones add O(|P| |S| w^3).
    """
    assert problem.forced is not None and problem.forbidden is not None
    pruned = pruned.copy()
    if deadline.passed() or not pruned.any() or pruned.all():
        return pruned
    weight = reduced_weight(problem).T
    for _ in range(ROUNDS):
        leaving = np.flatnonzero(pruned & ~problem.forbidden)
        entering = np.flatnonzero(~pruned & ~problem.forced)
        if deadline.passed() or not leaving.size or not entering.size:
            break
        value, change = exchange_changes(problem, weight, pruned, leaving, entering, deadline)
        row, col = divmod(int(change.argmin()), entering.size)
        if not change[row, col] < -PROVEN * value:
            break
        pruned[leaving[row]], pruned[entering[col]] = False, True
    return pruned


def exchange_changes(
    problem: RepairedSubset,
    weight: np.ndarray,
    pruned: np.ndarray,
    leaving: np.ndarray,
    entering: np.ndarray,
    deadline: Deadline = NEVER,
) -> tuple[float, np.ndarray]:
    """Return the damage of P and the (leaving, entering) changes of all exchanges; inf where time ran out.

    Args:
        weight: (d, o), W transposed. pruned: (n,) bool, P. leaving: units of P. entering: kept units.

    Raises:
        ValueError: a moment that is not positive definite with its ridge.
    """
    from scipy.linalg import cholesky, solve_triangular

    inside, outside = np.flatnonzero(pruned), np.flatnonzero(~pruned)
    p, kept, s = problem.columns(inside), problem.columns(outside), problem.columns(entering)
    order = np.concatenate([kept, p])
    try:
        factor = cholesky(problem.regular_moment(order).T, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise ValueError(problem.not_definite) from None
    ours = np.flatnonzero(np.isin(kept, s))  # columns of units come in the units' order, in both
    wanted = np.zeros((kept.size, s.size))
    wanted[ours, np.arange(s.size)] = 1.0
    back = solve_triangular(factor[: kept.size, : kept.size], wanted, lower=True, check_finite=False)  # L_SS^-1
    tail = np.tril(factor[kept.size :, kept.size :])
    system = tail @ tail.T  # N
    reach = -factor[kept.size :, : kept.size] @ back  # E
    value_p = system @ weight[p]  # V transposed
    refitted = weight[s] - reach.T @ weight[p]  # W' transposed
    damage = float((value_p * weight[p]).sum())
    cross = value_p @ refitted.T  # (p, s)
    if p.size == inside.size and s.size == entering.size:
        rows = np.searchsorted(inside, leaving)
        own = system.diagonal()[rows, None]
        share = reach[rows] / own
        saved = np.square(value_p[rows]).sum(axis=1)[:, None]
        here = np.square(back).sum(axis=0)
        cost = np.square(refitted).sum(axis=1) + 2 * cross[rows] * share + saved * share**2
        return damage, cost / (here + reach[rows] * share) - saved / own
    change = np.full((leaving.size, entering.size), np.inf)
    starts = np.concatenate([[0], np.cumsum(problem.width[entering])])
    inner = np.concatenate([[0], np.cumsum(problem.width[inside])])
    # Per entering unit: its block of the inverse moment after P is gone, and its energy.
    blocks = []
    for col in range(entering.size):
        b = slice(int(starts[col]), int(starts[col + 1]))
        block = back[:, b].T @ back[:, b]
        blocks.append((b, block, refitted[b] @ refitted[b].T))
    for row, unit in enumerate(leaving.tolist()):
        if deadline.passed():
            break
        at = int(np.searchsorted(inside, unit))
        a = slice(int(inner[at]), int(inner[at + 1]))
        share_all = np.linalg.solve(system[a, a], reach[a])
        energy = value_p[a] @ value_p[a].T
        saved_here = float(np.trace(np.linalg.solve(system[a, a], energy)))
        for col, (b, block, own_energy) in enumerate(blocks):
            part = share_all[:, b]
            mixed = part.T @ cross[a, b]
            total = own_energy + mixed + mixed.T + part.T @ energy @ part
            change[row, col] = float(np.trace(np.linalg.solve(block + reach[a, b].T @ part, total))) - saved_here
    return damage, change

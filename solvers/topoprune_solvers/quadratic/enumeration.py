"""All subsets of up to 24 open units, as products of the subsets of two halves.

The damage of A from the first and B from the second half is ``a + b + 2 1_A^T G 1_B``: the damages of all pairs
are one matrix product, so that 2^24 sets cost a fraction of a second, without compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from topoprune_solvers.problems import QuadraticSubset
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["ENUMERATED_UNITS", "enumerate_subsets"]

ENUMERATED_UNITS = 24
_PAIRS = 1 << 20  # pairs held at once: 8 MiB


def enumerate_subsets(problem: QuadraticSubset, deadline: Deadline = NEVER) -> tuple[np.ndarray | None, bool, int]:
    """Return the best pruned set, whether all were tried, and how many.

    Args:
        problem: a problem with at most 24 units neither forced nor forbidden.
        deadline: asked after every million sets.

    Returns:
        (n,) bool pruned set, None if the deadline came before any; ties go to the set met first.

    Complexity: O(2^u) time for u open units and a knapsack, O(C(u, m)) for m pruned ones; O(2^(u/2) u) memory.
    """
    assert problem.forced is not None and problem.forbidden is not None
    units = np.flatnonzero(~problem.forced & ~problem.forbidden)
    assert units.size <= ENUMERATED_UNITS
    base = np.flatnonzero(problem.forbidden)
    half = units.size // 2
    left, right = units[:half], units[half:]
    linear = problem.gram.diagonal() + 2 * problem.gram[:, base].sum(axis=1)
    sets, values = [], []
    for side in (left, right):
        members = _all_subsets(side.size)
        gram = problem.gram[np.ix_(side, side)].copy()
        gram[np.diag_indices_from(gram)] = 0.0
        values.append(((members @ gram) * members).sum(axis=1) + members @ linear[side])
        sets.append(members)
    cross = 2 * sets[0] @ problem.gram[np.ix_(left, right)]
    best, best_value, tried = None, np.inf, 0
    for rows, cols in _feasible_pairs(problem, sets, (left, right)):
        if deadline.passed() and best is not None:
            return best, False, tried
        pairs = cross[rows] @ sets[1][cols].T
        pairs += values[0][rows, None]
        pairs += values[1][cols]
        tried += pairs.size
        at = int(pairs.argmin())
        row, col = divmod(at, pairs.shape[1])
        if pairs[row, col] < best_value:
            best_value = float(pairs[row, col])
            best = problem.forbidden.copy()
            best[left[sets[0][rows[row]] > 0]] = True
            best[right[sets[1][cols[col]] > 0]] = True
    return best, True, tried


def _all_subsets(size: int) -> np.ndarray:
    # (2^size, size) float64 of 0 and 1.
    return ((np.arange(1 << size)[:, None] >> np.arange(size)) & 1).astype(np.float64)


def _feasible_pairs(
    problem: QuadraticSubset, sets: list[np.ndarray], sides: tuple[np.ndarray, np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield index arrays of first and second halves all pairs of which meet the budget and cover every such pair."""
    if problem.k is not None:
        assert problem.forbidden is not None
        missing = problem.n - problem.k - int(problem.forbidden.sum())
        counts = [members.sum(axis=1).astype(int) for members in sets]
        for count in range(missing + 1):
            rows = np.flatnonzero(counts[0] == count)
            cols = np.flatnonzero(counts[1] == missing - count)
            if rows.size and cols.size:
                step = max(1, _PAIRS // cols.size)
                for start in range(0, rows.size, step):
                    yield rows[start : start + step], cols
        return
    assert problem.cost is not None and problem.budget is not None and problem.forbidden is not None
    kept = float(problem.cost[~problem.forbidden].sum())
    need = kept - problem.budget - problem.cost_slack / 2
    freed = [members @ problem.cost[side] for members, side in zip(sets, sides, strict=True)]
    order = np.argsort(-freed[1], kind="stable")
    falling = freed[1][order]
    for row in np.argsort(-freed[0], kind="stable").tolist():
        # Second halves that free what the first one leaves; one row at a time, as each has its own range.
        last = int(np.searchsorted(-falling, -(need - freed[0][row]), side="right"))
        if last:
            yield np.array([row]), order[:last]

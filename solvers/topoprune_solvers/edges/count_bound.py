"""A tighter Lagrangian bound where one row jumps: a branch on the number of rows above a degree.

With a strong attachment rows keep either few edges or nearly all, and k is seldom a sum of such degrees. The plain
bound lets one row be a mixture of both; a branch on how many rows are above a degree `split` forbids that:
``at most h`` and ``at least h + 1`` rows are bounded apart, each with its own price of an edge, and the larger bound
counts. With `split` just below the degree that the odd row has in a good selection, both are nearly tight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from topoprune_solvers.edges.row_values import BudgetPrice, RowValues
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["count_bound"]

STEPS = 24  # prices tried in each branch


def count_bound(
    table: RowValues, k: int, price: BudgetPrice, split: int, goal: float, deadline: Deadline = NEVER
) -> float:
    """Return an upper bound on the optimum, valid for any `split`, never above that of `price`.

    Args:
        split: degree, 0 <= split < n_cols; rows above it are counted.
        goal: a bound as low as this is good enough.

    Complexity: O(r c) a price, at most some 50 prices.
    """
    count = int(np.count_nonzero(price.fewer > split))
    work = np.empty_like(table.value)

    def branch(more: bool) -> Callable[[float], tuple[float, int]]:
        return lambda mu: _branch(table.value, work, k, mu, split, count, more)

    bounds = [_lowest(branch(more), k, price, goal, deadline) for more in (False, True)]
    return min(price.bound, max(bounds))


def _branch(
    value: np.ndarray, work: np.ndarray, k: int, mu: float, split: int, count: int, more: bool
) -> tuple[float, int]:
    # The bound at price mu if at most `count` rows (else, with `more`, at least one more) are above the split,
    # and the number of edges of the selection that attains it.
    np.multiply(np.arange(value.shape[1]), -mu, out=work[0])
    np.add(value[1:], work[0], out=work[1:])
    work[0] += value[0]
    every = np.arange(len(value))
    low_degree, high_degree = work[:, : split + 1].argmax(axis=1), work[:, split + 1 :].argmax(axis=1) + split + 1
    low, high = work[every, low_degree], work[every, high_degree]
    gain = high - low
    order = np.argsort(-gain, kind="stable")
    above = gain > 0
    if more:
        above[order[: count + 1]] = True
    else:
        above[order[count:]] = False
    worth = np.where(above, high, low)
    if not np.all(np.isfinite(worth)):  # row bounds rule this branch out
        return -np.inf, k
    # Up, by more than the sums above can have lost: keeps the bound above the true optimum.
    bound = float(worth.sum()) + mu * k + 1e-12 * (float(np.abs(worth).sum()) + abs(mu) * k)
    return bound, int(np.where(above, high_degree, low_degree).sum())


def _lowest(
    branch: Callable[[float], tuple[float, int]], k: int, price: BudgetPrice, goal: float, deadline: Deadline
) -> float:
    # Minimise a convex function of the price, of slope k - edges: step out until the sign changes, then cross lines.
    best, edges = branch(price.price)
    mu, step = price.price, 0.01 * abs(price.price) + 1e-9
    # End of the interval on either side: price, bound, edges there.
    ends: dict[bool, tuple[float, float, int]] = {edges > k: (mu, best, edges)}
    for _ in range(STEPS):
        if best <= goal or edges == k or deadline.passed():
            break
        if len(ends) == 2:
            (left, bound_left, edges_left), (right, bound_right, edges_right) = ends[True], ends[False]
            # Lines bound + (mu - price) (k - edges) through both ends.
            mu = (bound_right - right * (k - edges_right)) - (bound_left - left * (k - edges_left))
            mu /= float(edges_right - edges_left)
            if not left < mu < right:
                break
        else:
            mu += step if edges > k else -step
            step *= 2
        bound, edges = branch(mu)
        if edges in {end[2] for end in ends.values()} and len(ends) == 2:
            return min(best, bound)
        best = min(best, bound)
        ends[edges > k] = (mu, bound, edges)
    return best

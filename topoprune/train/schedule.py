"""When to decide and how much to remove: the cubic ramp and exact shares of a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

__all__ = ["cubic_ramp", "ramp", "share_out", "solve_steps", "spread"]


def cubic_ramp(progress: float) -> float:
    """Return ``1 - (1 - t)^3`` for progress t, clipped to [0, 1] (Zhu & Gupta 2017).

    >>> cubic_ramp(0.5)
    0.875
    """
    t = min(max(progress, 0.0), 1.0)
    return 1.0 - (1.0 - t) ** 3


def ramp(progress: float, shape: str) -> float:
    """Return the share of the target reached at progress t: cubic, or the same amount at every decision.

    >>> ramp(0.5, "cubic"), ramp(0.5, "stepwise")
    (0.875, 0.5)
    """
    return cubic_ramp(progress) if shape == "cubic" else min(max(progress, 0.0), 1.0)


def solve_steps(total_steps: int, ramp: tuple[float, float], solves: int) -> list[int]:
    """Return the steps after which to decide, distinct and rising; the last ends the ramp.

    >>> solve_steps(100, (0.1, 0.6), 6)
    [10, 20, 30, 40, 50, 60]
    """
    first = min(max(1, round(ramp[0] * total_steps)), total_steps)
    last = min(max(first, round(ramp[1] * total_steps)), total_steps)
    if solves == 1:
        return [last]
    return sorted({round(step) for step in np.linspace(first, last, solves)})


def spread(total: int, capacities: Sequence[int]) -> list[int]:
    """Share out `total` units in proportion to the capacities, exactly, none above its capacity.

    Ties are spread evenly over the sequence, not heaped at one end.

    Raises:
        ValueError: more than fits.

    >>> spread(3, [4, 4, 4, 4])
    [0, 1, 1, 1]
    """
    room = sum(capacities)
    if not 0 <= total <= room:
        raise ValueError(f"cannot share out {total} units over room for {room}")
    shares, given, filled = [], 0, 0
    for capacity in capacities:
        filled += capacity
        upto = int(Fraction(total * filled, room)) if room else 0
        shares.append(upto - given)
        given = upto
    return shares


def share_out(
    target: float, units: Sequence[int], costs: Sequence[int], steps: Sequence[int] | None = None
) -> list[int]:
    """Return how many units of each site to remove so that their cost comes nearest to `target`.

    All sites lose the same share; one unit of each site always stays. The result misses the
    target by at most half the cost of one unit.

    Args:
        target: cost to remove, >= 0.
        units: units of each site. costs: cost of one unit of each site.
        steps: what stays in each site is a multiple of this, and at least one; the result then reaches the
            target and exceeds it by less than the cost of the dearest step.

    Raises:
        ValueError: the target cannot be reached with one unit (or step) left in each site; or every site
            left at a multiple exceeds it by a step.

    >>> share_out(25, [40, 40], [1, 1]), share_out(25, [40, 40], [1, 1], [8, 8])
    ([12, 13], [16, 16])
    """
    if steps is not None:
        return _share_out_steps(target, units, costs, steps)
    room = sum((n - 1) * c for n, c in zip(units, costs, strict=True))
    if target > room + max(costs, default=0) / 2:
        raise ValueError(f"target {target:g} is above the {room} that can be removed")
    whole = sum(n * c for n, c in zip(units, costs, strict=True))
    share = target / whole if whole else 0.0
    removed = [min(int(share * n), n - 1) for n in units]
    left = target - sum(r * c for r, c in zip(removed, costs, strict=True))
    while True:
        # Largest shortfall first, ties to the later site, until no unit brings us nearer.
        candidates = [i for i, n in enumerate(units) if removed[i] < n - 1 and left >= costs[i] / 2]
        if not candidates:
            return removed
        best = max(candidates, key=lambda i: (share * units[i] - removed[i], i))
        removed[best] += 1
        left -= costs[best]


def _share_out_steps(target: float, units: Sequence[int], costs: Sequence[int], steps: Sequence[int]) -> list[int]:
    whole = sum(n * c for n, c in zip(units, costs, strict=True))
    share = target / whole if whole else 0.0
    # Kept counts rounded up: fewer go than the share, but for what is above a multiple from the start.
    kept = [min(math.ceil((1 - share) * n / s - 1e-9), n // s) * s for n, s in zip(units, steps, strict=True)]
    removed = [n - max(k, s) for n, k, s in zip(units, kept, steps, strict=True)]
    left = target - sum(r * c for r, c in zip(removed, costs, strict=True))
    if -left > max((c * s for c, s in zip(costs, steps, strict=True)), default=0):
        raise ValueError(f"multiples of {list(steps)} units in every site exceed the target {target:g} by {-left:g}")
    while left > 1e-12 * whole:
        candidates = [i for i, n in enumerate(units) if removed[i] + 2 * steps[i] <= n]
        if not candidates:
            raise ValueError(f"target {target:g} is above the {target - left:g} that can be removed")
        best = max(candidates, key=lambda i: (share * units[i] - removed[i], i))
        removed[best] += steps[best]
        left -= costs[best] * steps[best]
    return removed

"""Swaps for soft domination: one kept unit against one other, while the explained importance grows."""

from __future__ import annotations

import numpy as np

from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.budgeted.service import Service, run
from topoprune_solvers.problems import SoftDomination
from topoprune_solvers.result import Deadline

__all__ = ["swap_while_better"]

SMALLEST_GAIN = 1e-9  # of the objective: swaps for less would be rounding
MOST_SWAPS = 64  # a unit; far more than a search needs, so a limit in principle only


def swap_while_better(
    problem: SoftDomination, service: Service, groups: Groups, keep: np.ndarray, deadline: Deadline
) -> np.ndarray:
    """Return a selection that no single swap improves, or the best one when the deadline passes.

    For each unit that is out, all exchanges are valued in one walk over its row: what it newly explains,
    minus what a kept unit alone explains, plus the part of that the new one takes over.

    Args:
        problem: gives forced and forbidden units. service: its table. groups: its bounds.
        keep: (n,) bool, feasible. deadline: ends the search early.

    Complexity: a round over all units is O(m); a swap O(n + sum of the degrees around both units).

    References:
        Whitaker (1983), A fast algorithm for the greedy interchange, INFOR 21; Resende and Werneck (2007),
        A fast swap-based local search procedure for location problems.
    """
    assert problem.forced is not None and problem.forbidden is not None
    n = problem.n
    if n == 0 or deadline.passed():
        return keep
    keep = keep.copy()
    server, first, second = _best_two(service, keep)
    alone = first - second
    loss = np.bincount(server[server >= 0], weights=alone[server >= 0], minlength=n)
    threshold = SMALLEST_GAIN * float(first.sum())
    columns = (
        *(service.indptr, service.indices, service.gives, service.gets, groups.label, groups.low, groups.high),
        *(groups.count(keep), problem.forced | problem.forbidden, keep, server, first, second, loss),
        *(np.zeros(n), np.zeros(n, dtype=np.int64), np.zeros(groups.low.size, dtype=np.int64), threshold),
    )
    run(
        "swap_units",
        *columns,
        state=np.zeros(3, dtype=np.int64),
        done=lambda state: state[1] >= n or state[2] >= MOST_SWAPS * n,
        deadline=deadline,
    )
    return keep


def _best_two(service: Service, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each unit the kept one it receives most from (-1 for none) and its two largest amounts."""
    amount = np.where(keep[service.indices], service.gets, 0.0)
    first = np.maximum.reduceat(amount, service.indptr[:-1])
    order = np.lexsort((np.arange(amount.size), -amount, service.rows))
    top = order[service.indptr[:-1]]
    server = np.where(first > 0, service.indices[top], -1)
    amount[top] = 0.0
    return server, first, np.maximum.reduceat(amount, service.indptr[:-1])

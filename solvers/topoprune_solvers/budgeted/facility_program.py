"""Facility location as a mixed-integer program for HiGHS."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.native import Channel, run_killable
from topoprune_solvers.result import Deadline

__all__ = ["run_program", "solve_program"]

IN_PROCESS = 5_000  # pairs; larger programs get a process that can be killed (0.3 s to start one)
_MARGIN = 0.05  # share of a process' time left for bringing the answer back

Answer = tuple["np.ndarray | None", "float | None", int]


def solve_program(
    row: np.ndarray,
    col: np.ndarray,
    profit: np.ndarray,
    forced: np.ndarray,
    forbidden: np.ndarray,
    groups: Groups,
    deadline: Deadline,
) -> Answer | str:
    """Maximise ``sum profit_p y_p`` with y_p <= x_col(p), sum of y over a row <= 1, and x within the groups.

    Args:
        row, col, profit: (pairs,) who is served, who serves, and what that is worth; about 1000 in all.
        forced, forbidden: (n,) bool. groups: bounds on the chosen units. deadline: kept by killing the process.

    Returns:
        The chosen units (n,) bool or None, an upper bound or None, and the nodes searched; or what went wrong.
    """
    columns = row, col, profit, forced, forbidden, groups
    if row.size <= IN_PROCESS:
        return run_program(None, *columns, deadline.remaining())
    outcome = run_killable(f"{__name__}:run_program", (*columns, None), deadline=deadline)
    if outcome.state == "crashed":
        return f"HiGHS: {outcome.message}"
    return (None, None, 0) if outcome.value is None else outcome.value


def run_program(
    channel: Channel | None,
    row: np.ndarray,
    col: np.ndarray,
    profit: np.ndarray,
    forced: np.ndarray,
    forbidden: np.ndarray,
    groups: Groups,
    seconds: float | None,
) -> Answer:
    """Run HiGHS; with a channel as the function of a process, under the limit it has."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    if seconds is None:
        assert channel is not None
        seconds = channel.remaining() * (1 - _MARGIN)
    n, pairs, g = forced.size, row.size, groups.low.size
    number, units = np.arange(pairs), np.arange(n)
    assign = sparse.csr_array((np.ones(pairs), (row, n + number)), shape=(n, n + pairs))
    sign = np.concatenate([np.ones(pairs), -np.ones(pairs)])
    place = np.tile(number, 2), np.concatenate([n + number, col])
    opened = sparse.csr_array((sign, place), shape=(pairs, n + pairs))
    # The last row counts all units, the others those of each group.
    member = np.concatenate([groups.label, np.full(n, g)]), np.concatenate([units, units])
    count = sparse.csr_array((np.ones(2 * n), member), shape=(g + 1, n + pairs))
    result = milp(
        -np.concatenate([np.zeros(n), profit]),
        # Only the units are integral: with them fixed the best assignment is integral by itself.
        integrality=np.concatenate([np.ones(n, dtype=np.int64), np.zeros(pairs, dtype=np.int64)]),
        bounds=Bounds(np.concatenate([forced, np.zeros(pairs)]), np.concatenate([~forbidden, np.ones(pairs)])),
        constraints=[
            LinearConstraint(assign, ub=1.0),
            LinearConstraint(opened, ub=0.0),
            LinearConstraint(count, lb=np.append(groups.low, groups.k), ub=np.append(groups.high, groups.k)),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": seconds},  # inf is no limit
    )
    dual: Any = result.mip_dual_bound
    return (
        None if result.x is None else result.x[:n] > 0.5,
        None if dual is None or not math.isfinite(dual) else -float(dual),
        int(result.mip_node_count or 0),
    )

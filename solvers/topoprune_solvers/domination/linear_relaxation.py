"""The linear relaxation of set cover by HiGHS, and a lower bound from its prices that holds whatever HiGHS' tolerances.

HiGHS computes in floats and may stop a little early. Its row prices are therefore only taken as a suggestion:
every y >= 0 bounds the optimum from below by ``sum_i r_i y_i + sum_j min(0, c_j - sum_{i in col j} y_i)``, and
that sum is evaluated here with its rounding error taken off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from topoprune_solvers.domination.covering import SetCover
from topoprune_solvers.domination.tally import LOCAL_ENTRIES
from topoprune_solvers.native import Channel, NativeTask, run_killable
from topoprune_solvers.result import NEVER, Deadline
from topoprune_solvers.scaling import is_integral

__all__ = ["SOURCE", "Relaxation", "linear_relaxation", "price_bound", "relaxation_task", "run_relaxation"]

SOURCE = "LP relaxation (HiGHS)"
_EPSILON = 2.0**-52


@dataclass(frozen=True, eq=False)
class Relaxation:
    """An optimal point of the linear relaxation, as far as floats go.

    Args:
        bound: certified lower bound on the cheapest cover, rounded up for integral costs.
        x: (c,) float64 in [0, 1], how much of each candidate the relaxation takes.
        prices: (e,) float64 >= 0, the dual values.
        reduced: (c,) float64, cost minus prices of the elements covered.
    """

    bound: float
    x: np.ndarray
    prices: np.ndarray
    reduced: np.ndarray


def linear_relaxation(
    instance: SetCover, deadline: Deadline = NEVER, *, apart: bool | None = None
) -> Relaxation | None:
    """Solve the linear relaxation, or return None if HiGHS fails or is not done in time.

    Args:
        instance: the instance. deadline: the time limit.
        apart: in a process of its own that is killed at the limit; by default above 10,000 nonzeros.

    Example:
        >>> from topoprune_solvers import DominatingSet
        >>> from topoprune_solvers.domination.covering import cover_of, open_part
        >>> cycle = DominatingSet.from_edges(7, [(i, (i + 1) % 7) for i in range(7)])
        >>> linear_relaxation(open_part(cover_of(cycle)).instance).bound  # 7/3, rounded up
        3.0
    """
    if deadline.passed():
        return None
    if not instance.n_elements or not instance.n_candidates:
        return _relaxation(instance, np.zeros(instance.n_candidates), np.zeros(instance.n_elements))
    if instance.row.size <= LOCAL_ENTRIES if apart is None else not apart:
        solved = _highs(instance, deadline.remaining())
    else:
        solved = run_killable(f"{__name__}:run_highs", (instance,), deadline=deadline).value
    return None if solved is None else _relaxation(instance, *solved)


def price_bound(instance: SetCover, prices: np.ndarray) -> float:
    """Return the certified lower bound that element prices give, rounded up for integral costs.

    Args:
        instance: the instance. prices: (e,) float64; negative and non-finite ones count as 0.

    Complexity: O(nnz). Every sum of k terms is off by at most k units in the last place of the sum of their
        magnitudes; that much is taken off before anything is rounded up.
    """
    prices = np.where(np.isfinite(prices), np.maximum(prices, 0.0), 0.0)
    paid = _paid(instance, prices)
    length = np.diff(instance.col_start)
    error = (length + 2) * _EPSILON * (instance.cost + paid)
    loss = np.minimum(0.0, instance.cost - paid - error)
    earned = instance.demand * prices
    terms = [*earned.tolist(), *loss[loss < 0].tolist()]
    value = math.fsum(terms) - 4 * _EPSILON * math.fsum(map(abs, terms))
    value = max(0.0, value)  # costs are >= 0
    return float(math.ceil(value)) if is_integral(instance.cost) else value


def relaxation_task(instance: SetCover, *, name: str = SOURCE) -> NativeTask:
    """Return the cover task (see `tally`) that solves the relaxation; `name` is the source of its bound."""
    return NativeTask(f"{__name__}:run_relaxation", (instance,), name)


def run_relaxation(channel: Channel, instance: SetCover) -> dict[str, int]:
    """Solve the relaxation and send its bound; the function behind `relaxation_task`."""
    solved = _highs(instance, channel.remaining())
    if solved is not None:
        channel.send(("bound", price_bound(instance, solved[1])))
    return {}


def run_highs(channel: Channel, instance: SetCover) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the relaxation's (c,) point and (e,) prices, or None; runs in a process of its own."""
    return _highs(instance, channel.remaining())


def _highs(instance: SetCover, seconds: float) -> tuple[np.ndarray, np.ndarray] | None:
    from scipy import optimize

    linprog: Any = optimize.linprog  # the stubs know no sparse rows
    rows = sparse.csr_array(
        (-np.ones(instance.row.size), instance.row, instance.row_start),
        shape=(instance.n_elements, instance.n_candidates),
    )
    # HiGHS' tolerances are absolute.
    scale = float(instance.cost.max()) or 1.0
    options = {"time_limit": seconds} if math.isfinite(seconds) else {}
    method = "highs-ipm" if instance.row.size > LOCAL_ENTRIES else "highs-ds"
    result = linprog(
        instance.cost / scale,
        A_ub=rows,
        b_ub=-instance.demand.astype(np.float64),
        bounds=(0, 1),
        method=method,
        options=options,
    )
    if result.status != 0 or result.x is None:
        return None
    return np.clip(result.x, 0.0, 1.0), np.maximum(-np.asarray(result.ineqlin.marginals), 0.0) * scale


def _relaxation(instance: SetCover, x: np.ndarray, prices: np.ndarray) -> Relaxation:
    return Relaxation(price_bound(instance, prices), x, prices, instance.cost - _paid(instance, prices))


def _paid(instance: SetCover, prices: np.ndarray) -> np.ndarray:
    columns = sparse.csr_array(
        (np.ones(instance.col.size), instance.col, instance.col_start),
        shape=(instance.n_candidates, instance.n_elements),
    )
    return np.asarray(columns @ prices)

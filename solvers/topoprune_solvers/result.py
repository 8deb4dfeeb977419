"""What every unit solver needs around its algorithm: a deadline, a checked warm start, a finished Solution."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from topoprune_solvers.solution import Bound, Solution, Status
from topoprune_solvers.verify import dominators

__all__ = [
    "NEVER",
    "Deadline",
    "baseline_order",
    "check_start",
    "fill_up",
    "interruptible",
    "mask_solution",
    "mask_start",
    "stopped_status",
    "unit_solution",
]


_INTERRUPTED = threading.Event()


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a request to stop: running solvers return their incumbent.

    Every `Deadline` has passed from then on, also for solves that start later in the block. A second
    Ctrl-C raises KeyboardInterrupt. Outside the main thread nothing is installed.

    Yields:
        The event; ``is_set()`` says whether the user asked to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _INTERRUPTED
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(signum: int, frame: Any) -> None:
        if _INTERRUPTED.is_set():
            raise KeyboardInterrupt
        _INTERRUPTED.set()

    signal.signal(signal.SIGINT, stop)
    try:
        yield _INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, before)
        _INTERRUPTED.clear()


@dataclass(frozen=True)
class Deadline:
    """A point in time on the monotonic clock, or never; a Ctrl-C inside `interruptible` passes every deadline.

    >>> Deadline.after(None).passed()
    False
    >>> Deadline.after(0.0).passed()
    True
    """

    at: float = math.inf

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        """Return the deadline `seconds` from now; None means never.

        Raises:
            ValueError: a negative or non-number limit.
        """
        if seconds is None:
            return cls()
        if not seconds >= 0:
            raise ValueError(f"time_limit must be a number of seconds >= 0 or None, found {seconds!r}")
        return cls(time.perf_counter() + seconds)

    def remaining(self) -> float:
        """Return the seconds left, >= 0; inf if there is no limit."""
        return 0.0 if _INTERRUPTED.is_set() else max(0.0, self.at - time.perf_counter())

    def passed(self) -> bool:
        """Return True once the time is up."""
        return _INTERRUPTED.is_set() or time.perf_counter() >= self.at


NEVER = Deadline()


def check_start(problem: Any, warm_start: Any) -> np.ndarray | None:
    """Return a warm start as a fresh (n,) bool mask with forced units in and forbidden units out.

    Raises:
        ValueError: a mask of another shape, e.g. from another layer.
    """
    if warm_start is None:
        return None
    start = np.array(warm_start, dtype=bool)
    if start.shape != (problem.n,):
        raise ValueError(f"warm_start has shape {start.shape}, expected ({problem.n},): a keep mask of this problem")
    start |= problem.forced
    start &= ~problem.forbidden
    return start


def stopped_status() -> Status:
    """Return INTERRUPTED after a Ctrl-C inside `interruptible`, else TIME_LIMIT."""
    return Status.INTERRUPTED if _INTERRUPTED.is_set() else Status.TIME_LIMIT


def baseline_order(name: str, score: np.ndarray, seed: int) -> np.ndarray:
    """Return the (n,) order of a baseline: ``"random"``, a seeded permutation; else by descending score."""
    if name == "random":
        return np.random.default_rng(seed).permutation(score.size)
    return np.argsort(-score, kind="stable")


def fill_up(problem: Any, keep: np.ndarray) -> np.ndarray:
    """Return `keep` with the most important allowed units added (ties: lower index) until exactly k stay.

    Args:
        problem: a problem with fields k, importance, forbidden.
        keep: (n,) bool with at most k units kept.
    """
    missing = problem.k - int(keep.sum())
    assert missing >= 0, "more units kept than the budget allows"
    full = keep.copy()
    order = np.argsort(-problem.importance, kind="stable")
    spare = order[~keep[order] & ~problem.forbidden[order]]
    full[spare[:missing]] = True
    return full


def unit_solution(
    problem: Any,
    keep: np.ndarray,
    solver: str,
    *,
    bound: Bound | None = None,
    timed_out: bool = False,
    tolerance: float = 1e-9,
    stats: Mapping[str, Any] | None = None,
) -> Solution:
    """Build the Solution of a unit problem: objective, dominators and the status the bound allows.

    Args:
        problem: a unit problem. keep: (n,) bool, feasible.
        bound: proven limit on the optimum, or None.
        timed_out: whether a time limit cut the search short.
        tolerance: relative distance of objective and bound that still counts as proven.
    """
    objective = problem.objective(keep)
    dominator, distance = dominators(problem, keep)
    status = stopped_status() if timed_out else Status.FEASIBLE
    if bound is not None:
        value = float(bound.value)
        apart = 0.0 if value == objective else abs(objective - value)
        beyond = value > objective if problem.sense == "min" else value < objective
        # A bound past the objective by rounding is cut back to it; by more it is wrong, and `verify` must see it.
        if apart <= (tolerance if beyond else 1e-9) * abs(objective) and math.isfinite(objective):
            value, apart = objective, 0.0
        bound = replace(bound, value=value)
        if value == objective or (math.isfinite(objective) and apart <= tolerance * abs(objective)):
            status = Status.OPTIMAL
    return Solution(
        keep=keep,
        objective=objective,
        sense=problem.sense,
        status=status,
        solver=solver,
        bound=bound,
        dominator=dominator,
        dominator_distance=distance,
        stats={} if stats is None else dict(stats),
    )


def mask_start(problem: Any, warm_start: Any) -> np.ndarray | None:
    """Return a warm start as a fresh flat (n,) bool mask; None if there is none or it breaks the problem's rules.

    Raises:
        ValueError: a mask of another size, e.g. from another layer.
    """
    if warm_start is None:
        return None
    start = np.array(warm_start, dtype=bool).reshape(-1)
    if start.size != problem.n:
        raise ValueError(f"warm_start has {start.size} entries, expected {problem.n}: a keep mask of this problem")
    return start if problem.violation(start) is None else None


def mask_solution(
    problem: Any,
    keep: np.ndarray,
    solver: str,
    *,
    bound: Bound | None = None,
    timed_out: bool = False,
    slack: float = 0.0,
    stats: Mapping[str, Any] | None = None,
) -> Solution:
    """Build the Solution of a problem without dominators: objective, and the status that bound and clock allow.

    Args:
        problem: any problem. keep: feasible mask, flat or not.
        bound: proven limit on the optimum, or None.
        timed_out: whether a limit cut the search short.
        slack: absolute distance of objective and bound that counts as met, on top of 1e-9 of the objective: what
            summing in another order can change. A bound past the objective by more is wrong, and is left for
            `verify` to see.
        stats: counters.
    """
    keep = np.asarray(keep, dtype=bool).reshape(-1)
    objective = problem.objective(keep)
    status = stopped_status() if timed_out else Status.FEASIBLE
    slack += 1e-9 * abs(objective)
    if bound is not None and math.isfinite(slack) and abs(objective - bound.value) <= slack:
        bound, status = replace(bound, value=objective), Status.OPTIMAL
    return Solution(
        keep=keep,
        objective=objective,
        sense=problem.sense,
        status=status,
        solver=solver,
        bound=bound,
        stats={} if stats is None else dict(stats),
    )

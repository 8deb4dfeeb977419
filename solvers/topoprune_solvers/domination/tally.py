"""What several solvers find and prove about one set-cover instance, put together; native ones may run apart.

A cover task is a module-level function ``f(channel, *arguments)`` that sends ``("cover", (c,) bool)`` and
``("bound", float)`` as it finds them and returns a dict of counters. Small instances run in this process
(starting one costs some tenths of a second), others apart, where they can be killed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import numpy as np

from topoprune_solvers.domination.covering import SetCover, cover_of, open_part
from topoprune_solvers.domination.greedy import best_greedy_cover, prune_redundant
from topoprune_solvers.domination.lagrangian import EFFORT, cover_bound
from topoprune_solvers.native import Channel, NativeOutcome, NativeTask, race
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import NEVER, Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution, Status, best_bound

__all__ = ["LOCAL_ENTRIES", "Tally", "race_covers", "run_cover", "solve_natively"]

LOCAL_ENTRIES = 10_000  # nonzeros up to which a native solver runs in this process
PROVEN = 1e-9  # relative distance of incumbent and bound at which float costs count as proven


@dataclass(eq=False)
class Tally:
    """The best cover and the best bound of an instance so far; solvers report to it.

    Args:
        instance: what is solved.
        chosen: (c,) bool or None, the best cover. found_by: who found it.
        bound: largest proven lower bound. source: what proved it.
        failures: what crashed, and why. stats: counters of the solvers that finished.
        cutoff: with a finite one the question is only whether a cover costs at most this.
    """

    instance: SetCover
    chosen: np.ndarray | None = None
    found_by: str = "start"
    bound: float = 0.0
    source: str = "costs are >= 0"
    failures: list[str] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    cutoff: float = math.inf
    value: float = field(init=False, default=math.inf)

    def __post_init__(self) -> None:
        if self.chosen is not None:
            self.value = self.instance.value(self.chosen)

    def offer(self, chosen: np.ndarray, source: str) -> bool:
        """Take a cover if it is one and better than what is known; return True if so."""
        chosen = np.asarray(chosen, dtype=bool)
        if chosen.shape != (self.instance.n_candidates,) or not self.instance.is_cover(chosen):
            return False
        value = self.instance.value(chosen)
        if value >= self.value:
            return False
        self.chosen, self.value, self.found_by = chosen, value, source
        return True

    def raise_bound(self, value: float, source: str) -> bool:
        """Take a proven lower bound if it is better than what is known; return True if so."""
        if not value > self.bound:
            return False
        self.bound, self.source = value, source
        return True

    @property
    def proven(self) -> bool:
        """True once the bound meets the cover."""
        return self.chosen is not None and self.bound >= self.value - PROVEN * abs(self.value)

    @property
    def settled(self) -> bool:
        """True once there is nothing left to search for: proven, or the cutoff's question is answered."""
        return self.proven or self.bound > self.cutoff or (math.isfinite(self.cutoff) and self.value <= self.cutoff)

    def receive(self, name: str, message: Any) -> bool:
        """Take a message ``("cover", chosen)`` or ``("bound", value)`` of a solver; return True once settled."""
        match message:
            case ("cover", np.ndarray() as chosen):
                self.offer(chosen, name)
            case ("bound", float() | int() as value):
                self.raise_bound(float(value), name)
            case _:
                self.failures.append(f"{name}: sent {message!r:.80}, expected a cover or a bound")
        return self.settled

    def end(self, name: str, outcome: NativeOutcome) -> bool:
        """Note how a solver's process ended; return True once settled."""
        if outcome.state == "crashed":
            self.failures.append(f"{name}: {outcome.message}")
        elif outcome.state == "finished" and isinstance(outcome.value, dict):
            self.stats.update(outcome.value)
        return self.settled


def race_covers(
    tally: Tally,
    tasks: Sequence[NativeTask],
    *,
    deadline: Deadline = NEVER,
    parallel: int = 2,
    memory_bytes: int | None = None,
    enough: Callable[[NativeTask, NativeOutcome], bool] | None = None,
) -> None:
    """Run cover tasks in processes of their own until the instance is settled, all end, or the time is up.

    Args:
        tally: what is known before; changed in place.
        tasks: cover tasks; their names become the sources of bounds.
        deadline, parallel, memory_bytes: as for `topoprune_solvers.native.race`.
        enough: asked when a task ends; True ends the race.
    """

    def on_end(task: NativeTask, outcome: NativeOutcome) -> bool:
        return tally.end(task.label, outcome) or bool(enough is not None and enough(task, outcome))

    if tally.settled:
        return
    race(
        tasks,
        deadline=deadline,
        parallel=parallel,
        memory_bytes=memory_bytes,
        on_message=lambda task, message: tally.receive(task.label, message),
        on_end=on_end,
    )


class _LocalChannel(Channel):
    """A channel without a process behind it."""

    def __init__(self, tally: Tally, name: str, deadline: Deadline) -> None:
        self._tally, self._name, self._deadline = tally, name, deadline

    def send(self, message: Any) -> None:
        """Hand a message to the tally."""
        self._tally.receive(self._name, message)

    def remaining(self) -> float:
        """Return the seconds left."""
        return self._deadline.remaining()


def run_cover(tally: Tally, task: NativeTask, *, deadline: Deadline = NEVER, apart: bool | None = None) -> None:
    """Run one cover task, here or apart; an exception is a failure in the tally, not one of the caller.

    Args:
        tally: what is known before; changed in place. task: a cover task. deadline: its time limit.
        apart: in a process of its own; by default if the instance has more than `LOCAL_ENTRIES` nonzeros.
    """
    if tally.instance.row.size > LOCAL_ENTRIES if apart is None else apart:
        race_covers(tally, [task], deadline=deadline)
        return
    module, name = task.function.split(":")
    arguments = task.arguments() if callable(task.arguments) else task.arguments
    try:
        counters = getattr(import_module(module), name)(_LocalChannel(tally, task.label, deadline), *arguments)
        tally.end(task.label, NativeOutcome("finished", counters))
    except Exception as error:
        tally.end(task.label, NativeOutcome("crashed", None, f"{type(error).__name__}: {error}"))


def solve_natively(
    problem: DominatingSet,
    solver: str,
    task: Callable[[SetCover, np.ndarray], NativeTask],
    *,
    warm_start: Any = None,
    time_limit: float | None = None,
    tolerance: float = PROVEN,
) -> Solution:
    """Return the solution of one native solver on the plain model, never worse than greedy or the repaired start.

    Args:
        problem: the problem. solver: name of the solver.
        task: makes the cover task from the open instance and a (c,) bool cover of it.
        warm_start, time_limit: as for every solver.
        tolerance: relative distance of objective and bound that counts as proven.
    """
    deadline = Deadline.after(time_limit)
    cover = cover_of(problem)
    keep = best_greedy_cover(cover, check_start(problem, warm_start))
    objective = problem.objective(keep)
    bound = cover_bound(cover, objective, effort=10 * EFFORT, deadline=deadline)
    if bound.value >= objective or deadline.passed():
        return unit_solution(problem, keep, solver, bound=bound, timed_out=deadline.passed())
    # Dearer candidates are in no better cover, and huge costs stay out of solvers with limited precision.
    part = open_part(cover, ceiling=objective)
    tally = Tally(part.instance, keep[part.units])
    run_cover(tally, task(part.instance, keep[part.units]), deadline=deadline)
    assert tally.chosen is not None
    # Native solvers may keep free units that cover nothing new.
    found = prune_redundant(cover, part.keep(cover, tally.chosen))
    keep = found if problem.objective(found) <= objective else keep
    proven = Bound(part.fixed + tally.bound, tally.source)
    solution = unit_solution(
        problem,
        keep,
        solver,
        bound=best_bound("min", [bound, proven]),
        # A native solver ends a little before the limit it is given.
        timed_out=deadline.passed() or (math.isfinite(deadline.at) and not tally.failures),
        tolerance=tolerance,
        stats=tally.stats,
    )
    if tally.failures and solution.status is not Status.OPTIMAL:
        return replace(solution, status=Status.FAILED, stats={**tally.stats, "failures": list(tally.failures)})
    return solution

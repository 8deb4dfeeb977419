"""What a solver is, and the table that solver modules enter themselves into on import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from topoprune_solvers.solution import Solution

__all__ = ["SOLVERS", "Capabilities", "Solver", "register"]


@dataclass(frozen=True)
class Capabilities:
    """What a solver can do, as data.

    Args:
        problem: the problem type it takes.
        exact: True if it proves optimality given time.
        guarantee: one sentence on solution quality.
        complexity: time complexity, n = units, m = edges.
        requires: importable modules it needs.
        max_units: largest instance it accepts, or None.
        reference: where the algorithm comes from.
        when: one short sentence for the solver table: when to use it.
        lacks: features of the problem type it refuses with a ValueError, e.g. ``"demand"``, ``"column bounds"``.
    """

    problem: type
    exact: bool
    guarantee: str
    complexity: str
    requires: tuple[str, ...] = ()
    max_units: int | None = None
    reference: str = ""
    when: str = ""
    lacks: tuple[str, ...] = ()


@runtime_checkable
class Solver(Protocol):
    """A named algorithm for one problem type; configuration lives in frozen fields."""

    # Properties, so that frozen dataclasses and class variables qualify.
    @property
    def name(self) -> str:
        """Registry name."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What the solver can do."""
        ...

    def solve(
        self, problem: Any, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return a valid solution.

        Args:
            problem: an instance of ``capabilities.problem``.
            warm_start: (n,) bool keep mask to start from, or None.
            time_limit: seconds, or None.
            seed: for solvers that draw random numbers.
        """
        ...


SOLVERS: dict[type, dict[str, Solver]] = {}


def register(solver: Solver) -> Solver:
    """Add a solver instance under its problem type and name; a later one replaces an earlier one."""
    SOLVERS.setdefault(solver.capabilities.problem, {})[solver.name] = solver
    return solver

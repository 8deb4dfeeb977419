"""What every solver returns: a decision, how good it is, and how that is known.

>>> from topoprune_solvers.solution import Bound, best_bound
>>> best_bound("min", [Bound(2.0, "degree bound"), Bound(3.0, "LP relaxation")])
Bound(value=3.0, source='LP relaxation')
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import numpy as np

__all__ = ["Bound", "Infeasible", "Sense", "Solution", "Status", "best_bound", "relative_gap"]

Sense = Literal["min", "max"]


class Infeasible(ValueError):
    """The problem has no solution; the message names the units or bounds in conflict."""


class Status(Enum):
    """How a solve ended; the value is the sentence the user reads."""

    OPTIMAL = "optimal: the objective equals a proven bound"
    FEASIBLE = "feasible: a valid solution, not proven optimal"
    TIME_LIMIT = "time limit: the best valid solution found in time"
    INTERRUPTED = "interrupted: the best valid solution found until Ctrl-C"
    FAILED = "the native solver failed: the warm start is returned"


@dataclass(frozen=True)
class Bound:
    """A proven limit on the objective: lower when minimising, upper when maximising.

    Args:
        value: the limit, in units of the objective.
        source: what proves it, e.g. ``"LP relaxation (HiGHS)"``.
    """

    value: float
    source: str


def best_bound(sense: Sense, bounds: Iterable[Bound | None]) -> Bound | None:
    """Return the tightest of several bounds (max when minimising, min when maximising)."""
    known = [bound for bound in bounds if bound is not None and not math.isnan(bound.value)]
    if not known:
        return None
    pick = max if sense == "min" else min
    return pick(known, key=lambda bound: bound.value)


def relative_gap(objective: float, bound: float) -> float:
    """Return ``|objective - bound| / max(|objective|, |bound|)``, 0 when both agree.

    >>> relative_gap(4.0, 3.0)
    0.25
    >>> relative_gap(0.0, 0.0)
    0.0
    """
    if objective == bound:
        return 0.0
    scale = max(abs(objective), abs(bound))
    return abs(objective - bound) / scale if math.isfinite(scale) else math.inf


@dataclass(frozen=True, eq=False)
class Solution:
    """One solved problem.

    Args:
        keep: (n,) bool, True for what stays. For edge problems the flattened
            ``(n_rows * n_cols,)`` mask, row-major.
        objective: value of ``keep`` under the problem, in the problem's units.
        sense: ``"min"`` or ``"max"``.
        status: how the solve ended.
        solver: registry name of the solver.
        bound: proven limit on the optimum, or None.
        dominator: (n,) int32 or None. For every pruned unit the kept unit that covers it;
            a kept unit is its own dominator; -1 where no kept unit is adjacent.
        dominator_distance: (n,) float64 or None. Edge weight between a unit and its
            dominator: 0 for kept units, inf where there is none.
        seconds: wall-clock time of the solve.
        stats: solver-specific counters (nodes, branches, thresholds tried, ...).
        importance: (n,) float64 >= 0 or None. What each unit is worth by itself, on a scale of which
            `dominator_distance`, then in [0, 1], is the share that the dominator leaves.
    """

    keep: np.ndarray
    objective: float
    sense: Sense
    status: Status
    solver: str
    bound: Bound | None = None
    dominator: np.ndarray | None = None
    dominator_distance: np.ndarray | None = None
    seconds: float = 0.0
    stats: Mapping[str, Any] = field(default_factory=dict)
    importance: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, dtype in (
            ("keep", bool),
            ("dominator", np.int32),
            ("dominator_distance", np.float64),
            ("importance", np.float64),
        ):
            value = getattr(self, name)
            if value is not None:
                array = np.array(value, dtype=dtype)
                array.setflags(write=False)
                object.__setattr__(self, name, array)
        object.__setattr__(self, "objective", float(self.objective))

    @property
    def n_units(self) -> int:
        """Number of units (or edges) decided on."""
        return int(self.keep.size)

    @property
    def n_kept(self) -> int:
        """Number of units (or edges) that stay."""
        return int(np.count_nonzero(self.keep))

    @property
    def gap(self) -> float:
        """Relative distance between objective and bound; nan when there is no bound."""
        if self.bound is None:
            return math.nan
        return relative_gap(self.objective, self.bound.value)

    def __repr__(self) -> str:
        bound = "none" if self.bound is None else f"{self.bound.value:.6g} ({self.bound.source})"
        return (
            f"Solution({self.solver}: keep {self.n_kept}/{self.n_units}, "
            f"objective {self.objective:.6g}, bound {bound}, gap {self.gap:.2%}, {self.status.name})"
        )

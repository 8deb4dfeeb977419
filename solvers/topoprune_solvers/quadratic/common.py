"""What the solvers of quadratic subsets share: the state of a search, and the finished Solution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from topoprune_solvers.problems import QuadraticSubset
from topoprune_solvers.result import Deadline, check_start, mask_solution
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["Search", "affordable", "feasible_start", "resolution", "subset_solution"]

PROVEN = 1e-9  # relative distance of objective and bound that counts as equal
SPEED = 1e10  # floating-point operations a second that a factorisation is taken to run at


@dataclass(eq=False)
class Search:
    """A pruned set P with what every move needs, updated in O(n) a move.

    Args:
        problem: the problem. pruned: (n,) bool. pull: (n,) float64, G 1_P. spent: cost of the kept units.
    """

    problem: QuadraticSubset
    pruned: np.ndarray
    pull: np.ndarray
    spent: float

    @classmethod
    def at(cls, problem: QuadraticSubset, pruned: np.ndarray) -> Search:
        """Start from a pruned set. O(n |P|), reading the rows of the smaller side only where P is small."""
        units = np.flatnonzero(pruned)
        if units.size > problem.n // 8:
            pull = problem.gram @ pruned.astype(np.float64)
        else:
            pull = problem.gram[units].sum(axis=0)
        spent = 0.0 if problem.cost is None else float(problem.cost[~pruned].sum())
        return cls(problem, pruned.copy(), pull, spent)

    @property
    def value(self) -> float:
        """Damage of the pruned set. O(n)."""
        return float(self.pull[self.pruned].sum())

    @property
    def room(self) -> float:
        """What more units may still cost; negative while the budget is exceeded (knapsack)."""
        assert self.problem.budget is not None
        return self.problem.budget + self.problem.cost_slack / 2 - self.spent

    def prune(self, unit: int) -> None:
        """Move a kept unit to P. O(n)."""
        self.pruned[unit] = True
        self.pull += self.problem.gram[unit]
        if self.problem.cost is not None:
            self.spent -= float(self.problem.cost[unit])

    def restore(self, unit: int) -> None:
        """Move a pruned unit back. O(n)."""
        self.pruned[unit] = False
        self.pull -= self.problem.gram[unit]
        if self.problem.cost is not None:
            self.spent += float(self.problem.cost[unit])


def resolution(problem: QuadraticSubset, pruned: np.ndarray) -> float:
    """Return how far rounding can move the damage of a pruned set: eps times a bound on the sum of its entries."""
    root = np.sqrt(np.maximum(problem.gram.diagonal()[pruned], 0.0)).sum()
    return 1e-14 * float(root) ** 2


def affordable(deadline: Deadline, operations: float) -> bool:
    """Return True if a factorisation, which cannot be interrupted, should end before the deadline."""
    return deadline.remaining() > operations / SPEED


def feasible_start(problem: Any, warm_start: Any) -> np.ndarray | None:
    """Return a checked warm start that meets the budget, or None: without one, or where it does not fit."""
    start = check_start(problem, warm_start)
    return start if start is not None and problem.violation(start) is None else None


def subset_solution(
    problem: Any,
    keep: np.ndarray,
    solver: str,
    *,
    bounds: Iterable[Bound | None] = (),
    timed_out: bool = False,
    rounding: float = 0.0,
    stats: Mapping[str, Any] | None = None,
) -> Solution:
    """Build the Solution of a subset problem, with the status its best bound allows.

    Args:
        bounds: proven lower bounds; the best is reported, at least 0, which damage never falls below.
        timed_out: whether a limit cut the search short.
        rounding: absolute float resolution of the objective; a bound this close, or within 1e-9, is met.
    """
    bound = best_bound("min", bounds)
    if bound is not None and bound.value <= 0:
        bound = Bound(0.0, "damage is never negative")
    return mask_solution(problem, keep, solver, bound=bound, timed_out=timed_out, slack=rounding, stats=stats)

"""Soft domination (facility location): lazy greedy, swaps, and a bound from submodularity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.budgeted.facility_swaps import swap_while_better
from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.budgeted.service import GreedyRun, Service, path_bound
from topoprune_solvers.problems import SoftDomination
from topoprune_solvers.result import NEVER, Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution

__all__ = ["GreedyFacilityLocation", "Prepared", "greedy_with_bound"]

BOUND_POINTS = 8  # sets along the greedy path at which the bound is evaluated


@dataclass(frozen=True)
class GreedyFacilityLocation:
    """Add the unit that explains most importance not yet explained; then swap one for one while that gains.

    The bound is the best of f(S) + the largest gains that fit, over sets S along the greedy path. The
    ratios are about the *explained* importance; they say nothing about the residual, the importance that
    no kept unit explains. Forced units count as given, and do not weaken the ratios.

    Args:
        swaps: exchange units after the greedy phase.
    """

    swaps: bool = True
    name: str = "greedy"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=SoftDomination,
        exact=False,
        guarantee=(
            "at least 1 - 1/e of the largest explained importance (with groups: 1/2), nothing about the residual; "
            "with a submodularity bound"
        ),
        complexity="O(k m) at worst, near O((n + m) log n) by lazy evaluation; swaps O(m) a round, O(n) each",
        reference=(
            "Nemhauser, Wolsey, Fisher (1978); Fisher, Nemhauser, Wolsey (1978) for matroids; Minoux (1978), "
            "Accelerated greedy algorithms; Resende and Werneck (2007) for the swaps"
        ),
        when="neurons, and whenever milliseconds matter more than a tight bound",
    )

    def solve(
        self, problem: SoftDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return greedy plus swaps, or the warm start filled up and swapped where that is better."""
        deadline = Deadline.after(time_limit)
        start = check_start(problem, warm_start)
        keep, bound = greedy_with_bound(problem, start, deadline, swaps=self.swaps)
        return unit_solution(problem, keep, self.name, bound=bound, timed_out=deadline.passed())


@dataclass(frozen=True, eq=False)
class Prepared:
    """A problem with its table and its bounds, built once for all phases of a solver."""

    problem: SoftDomination
    service: Service
    groups: Groups

    @classmethod
    def of(cls, problem: SoftDomination) -> Prepared:
        """Build from a problem. O(n + m)."""
        return cls(problem, Service.of(problem), Groups.of(problem))


def greedy_with_bound(
    problem: SoftDomination | Prepared,
    start: np.ndarray | None = None,
    deadline: Deadline = NEVER,
    *,
    swaps: bool = True,
) -> tuple[np.ndarray, Bound]:
    """Return the best selection of greedy, swaps and the given start, with an upper bound.

    Args:
        problem: the problem. start: (n,) bool respecting forced and forbidden units, or None.
        deadline: once it passes, what is missing is filled up by gain and the swaps end.
        swaps: exchange units after the greedy phase.
    """
    case = problem if isinstance(problem, Prepared) else Prepared.of(problem)
    assert case.problem.forced is not None
    keep, value = _greedy(case, case.problem.forced, deadline)
    candidates = [keep]
    if start is not None:
        alone = case.service.priced(np.zeros(case.problem.n))
        cut = case.groups.cut(case.problem, start, alone)
        candidates.append(_greedy(case, cut, deadline)[0])
    if swaps:
        candidates = [swap_while_better(case.problem, case.service, case.groups, c, deadline) for c in candidates]
    best = max(candidates, key=case.problem.objective)
    return best, Bound(value, "submodularity (greedy path)")


def _greedy(case: Prepared, start: np.ndarray, deadline: Deadline) -> tuple[np.ndarray, float]:
    """Return a feasible selection that contains an extendable start, and an upper bound on all feasible ones."""
    problem, service, groups = case.problem, case.service, case.groups
    assert problem.forbidden is not None
    allowed = ~problem.forbidden
    run = GreedyRun(service, groups, start, allowed)
    bound = float(service.reached(allowed).sum()) * (1 + 1e-12)  # what all allowed units together explain
    bound = min(bound, path_bound(groups, problem, run.reached, run.gains)[0])
    missing = problem.k - int(start.sum())
    step = max(1, -(-missing // BOUND_POINTS))
    while missing > 0 and not deadline.passed():
        before = int(run.keep.sum())
        run.take(min(step, missing), deadline)
        missing -= int(run.keep.sum()) - before
        bound = min(bound, path_bound(groups, problem, run.reached, service.priced(run.reached))[0])
    if missing > 0:
        gains = service.priced(run.reached)
        order = np.argsort(-gains, kind="stable")
        return groups.extend(run.keep, order[allowed[order]]), bound
    return run.keep, bound


register(GreedyFacilityLocation())

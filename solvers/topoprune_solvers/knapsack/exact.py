"""Exact layer budgets: Lagrangian bound, fixing by reduced damage, meet in the middle, CP-SAT for what is left."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.knapsack.core import PROVEN, Core, NoChoiceFound, core_of, start_pick
from topoprune_solvers.knapsack.dual import SOURCE, Dual, best_prices, reduced_damage
from topoprune_solvers.knapsack.halves import best_pair, count_partial_picks, partial_picks, split_sites
from topoprune_solvers.knapsack.local_search import best_repaired
from topoprune_solvers.problems import MultipleChoiceKnapsack
from topoprune_solvers.result import NEVER, Deadline, mask_solution
from topoprune_solvers.solution import Bound, Infeasible, Solution

__all__ = ["Closing", "ExactKnapsack", "close_gap", "tightened"]

ENUMERATION = "exhaustive search of all choices near the Lagrangian bound (meet in the middle, CP-SAT)"
RESOLUTION = PROVEN / 10  # relative: improvements smaller than this are not looked for
TARGETS = (1e3, 2e4, 2e5, 1e6)  # partial picks per half, stage by stage
OVERSHOOT = 3  # the count is an estimate from below
SLICED = 1e5  # from this target on CP-SAT tries first
QUICK, WIDER = 0.1, 0.4
EFFORT = 0.3  # its deterministic time, about seconds
TIGHTENINGS = 4
SEARCHES = 5


@dataclass(frozen=True)
class ExactKnapsack:
    """Prove the optimum by looking at every pick near the Lagrangian bound.

    In stages of growing reach, the cut lies between the proven bound and the best pick's damage. Choices whose
    reduced damage passes the cut are closed, which raises the bound on the rest and closes more;
    two halves of the sites are then enumerated and matched by what they spend; in late stages CP-SAT tries
    first, for a fixed effort. A stage finds the optimum or moves the proven bound up to its cut. What outgrows
    the last stage goes to CP-SAT.
    """

    name: str = "exact"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=MultipleChoiceKnapsack,
        exact=True,
        guarantee="optimal given time (to 1e-9), else the incumbent with the proven gap",
        complexity="exponential in the worst case; O(sites + choices) per price vector, then the core",
        requires=("ortools",),
        reference="Balas, Zemel (1980); Horowitz, Sahni (1974); Pisinger (1995), A minimal algorithm for the "
        "multiple-choice knapsack problem",
        when="the default: one or several budgets, proof wanted",
    )

    def solve(
        self,
        problem: MultipleChoiceKnapsack,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return the least damage.

        Raises:
            Infeasible: the budgets conflict, proven.
            NoChoiceFound: the time limit struck before a choice within all budgets was found.
        """
        deadline = Deadline.after(time_limit)
        core = core_of(problem)
        if core.sites == 0:
            return mask_solution(problem, np.zeros(0, dtype=bool), self.name, bound=Bound(0.0, "no sites"))
        dual = best_prices(core, deadline=deadline)
        warm = start_pick(core, warm_start)
        try:
            pick = best_repaired(core, dual.picks, dual.price, deadline, known=warm)
        except NoChoiceFound:
            from topoprune_solvers.knapsack.cp_sat import any_pick

            pick = any_pick(core, deadline=deadline, seed=seed)
        closing = close_gap(core, dual, pick, seed=seed, deadline=deadline)
        pick, bound = closing.pick, Bound(closing.bound, ENUMERATION if closing.stages else SOURCE)
        stats: dict[str, Any] = {"prices": dual.rounds, "stages": closing.stages, **closing.stats}
        if not closing.proven and not deadline.passed():
            from topoprune_solvers.knapsack.cp_sat import cp_sat_pick

            upper = core.objective(pick)
            part = tightened(core, dual, upper)
            if part is None:
                bound = Bound(upper, SOURCE)
            else:
                outcome = cp_sat_pick(part[0], hint=pick, whole=core, upper=upper, deadline=deadline, seed=seed)
                if outcome.pick is not None and core.objective(outcome.pick) < upper:
                    pick = outcome.pick
                if outcome.bound > bound.value:
                    bound = Bound(outcome.bound, "CP-SAT on the open choices")
                stats.update(branches=outcome.branches, conflicts=outcome.conflicts)
        keep = core.keep(pick)
        unproven = problem.objective(keep) - bound.value > PROVEN * abs(problem.objective(keep))
        return mask_solution(
            problem, keep, self.name, bound=bound, timed_out=unproven and deadline.passed(), stats=stats
        )


@dataclass(frozen=True, eq=False)
class Closing:
    """Result of `close_gap`: best (s,) pick, proven lower bound, and whether they meet."""

    pick: np.ndarray
    bound: float
    proven: bool
    stages: int = 0
    stats: dict[str, Any] = field(default_factory=dict)


def tightened(core: Core, dual: Dual, cut: float, deadline: Deadline = NEVER) -> tuple[Core, Dual] | None:
    """Close every choice that no pick below `cut` can contain; None if no pick is below it.

    Closing choices raises the Lagrangian bound of the rest, which closes more: repeated while it pays.

    Args:
        dual: prices and bound of `core`.
    """
    for _ in range(TIGHTENINGS):
        if dual.value >= cut:
            return None
        open_choice = dual.value + reduced_damage(core, dual.price) < cut
        before = core.damage.size
        core = core.only(open_choice)
        if core.damage.size > 0.98 * before:
            break
        dual = best_prices(core, start=dual.price, deadline=deadline)
    return None if dual.value >= cut else (core, dual)


def close_gap(core: Core, dual: Dual, pick: np.ndarray, *, seed: int = 0, deadline: Deadline = NEVER) -> Closing:
    """Raise the bound and improve the pick until they meet, the enumeration grows too large, or time is up.

    Args:
        dual: prices and bound of `core`. pick: (s,) feasible start.
    """
    upper, bound = core.objective(pick), dual.value
    stages, pairs, largest = 0, 0, 0

    def closed() -> bool:
        return upper - bound <= PROVEN / 2 * abs(upper)

    for target in TARGETS:
        while not closed() and not deadline.passed():
            top = upper - RESOLUTION * abs(upper)
            cut, part = _reachable(core, dual, bound, top, target, deadline)
            stages += 1
            if part is None:
                bound = max(bound, cut)
                if cut >= top:
                    break
                continue
            rest, local = part
            bound = max(bound, min(cut, local.value))
            if cut <= bound:
                break
            if target >= SLICED:
                pick, proven = _slice(core, rest, pick, upper, EFFORT, seed, deadline)
                upper = core.objective(pick)
                bound = max(bound, min(cut, proven, upper))
                if bound >= min(cut, upper - PROVEN / 2 * abs(upper)):
                    break
            found = _stage(rest, local, cut, int(OVERSHOOT * target), deadline)
            if found is None:
                break
            excess, better, looked, size = found
            pairs, largest = pairs + looked, max(largest, size)
            bound = max(bound, min(cut, local.value + excess))
            if better is not None:
                candidate = _in(core, rest, better)
                if core.objective(candidate) < upper and core.feasible(candidate):
                    pick, upper = candidate, core.objective(candidate)
            break
        if closed() or deadline.passed():
            break
        if target == TARGETS[1]:
            # What resists so far has a wide gap: choices well beyond the next stage hold a better pick.
            part = tightened(core, dual, bound + WIDER * (upper - bound), deadline)
            if part is not None:
                pick, _ = _slice(core, part[0], pick, upper, QUICK, seed, deadline)
                upper = core.objective(pick)
    bound = min(bound, upper)
    return Closing(pick, bound, closed(), stages, {"pairs": pairs, "partial_picks": largest})


def _slice(
    core: Core, rest: Core, pick: np.ndarray, upper: float, effort: float, seed: int, deadline: Deadline
) -> tuple[np.ndarray, float]:
    """Give CP-SAT a short try at a tightened core; return the better pick and the bound on picks within the core."""
    from topoprune_solvers.knapsack.cp_sat import cp_sat_pick

    try:
        outcome = cp_sat_pick(rest, whole=core, upper=upper, effort=effort, deadline=deadline, seed=seed)
    except Infeasible:
        return pick, math.inf  # of the core alone: everything feasible lies above the cut
    if outcome.pick is not None and core.objective(outcome.pick) < upper:
        pick = outcome.pick
    return pick, outcome.bound


def _reachable(
    core: Core, dual: Dual, bound: float, top: float, target: float, deadline: Deadline
) -> tuple[float, tuple[Core, Dual] | None]:
    """Return the highest cut in (bound, top] found whose halves have at most `target` partial picks, and its core.

    None instead of the core means that no pick damages less than the cut.
    """
    low, high = 0.0, 1.0
    best: tuple[float, tuple[Core, Dual] | None] = (bound, (core, dual))
    share = 1.0
    for _ in range(SEARCHES):
        if deadline.passed():
            break
        cut = top if share == 1.0 else bound + share * (top - bound)
        part = tightened(core, dual, cut, deadline)
        fits = (
            part is None
            or count_partial_picks(part[0], reduced_damage(part[0], part[1].price), cut - part[1].value) <= target
        )
        if fits:
            best, low = (cut, part), share
            if share == 1.0:
                break
        else:
            high = share
        share = (low + high) / 2
    return best


def _stage(
    core: Core, dual: Dual, cut: float, most: int, deadline: Deadline
) -> tuple[float, np.ndarray | None, int, int] | None:
    """Enumerate all picks below the cut; None if they are too many or the clock stops.

    Returns:
        The least excess over the dual's bound, at most up to the cut; its pick, if one is below the cut;
        the pairs looked at; the partial picks of the larger half.
    """
    rise = reduced_damage(core, dual.price)
    reach = cut - dual.value
    halves = []
    for sites in split_sites(core, rise):
        half = partial_picks(core, sites, rise, reach, most=most, deadline=deadline)
        if half is None:
            return None
        halves.append(half)
    result = best_pair(core, halves[0], halves[1], dual.price, reach, deadline=deadline)
    excess = result.excess if result.finished else -math.inf
    return excess, result.pick, result.pairs, max(half.rise.size for half in halves)


def _in(core: Core, part: Core, pick: np.ndarray) -> np.ndarray:
    # Positions in a restricted core -> positions in the whole one.
    return np.searchsorted(core.choice, part.choice[pick])


register(ExactKnapsack())

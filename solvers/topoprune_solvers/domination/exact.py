"""Exact dominating sets: reductions, components, branch and bound, CP-SAT for what stays large."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.branch_and_bound import SearchOutcome, branch_and_bound
from topoprune_solvers.domination.covering import Cover, cover_of
from topoprune_solvers.domination.cp_sat import cp_sat_cover
from topoprune_solvers.domination.greedy import best_greedy_cover, prune_redundant
from topoprune_solvers.domination.lagrangian import EFFORT, cover_bound
from topoprune_solvers.domination.reductions import Component, bits, reduce_cover
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import NEVER, Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["CoverOutcome", "ExactDominatingSet", "minimum_cover"]

BITSET_UNITS = 64  # largest component for the branch and bound in Python
HANDOVER_NODES = 20_000  # about a second; CP-SAT is the better tool for what is still open then


@dataclass(frozen=True)
class ExactDominatingSet:
    """Reduce, split into components, search each: bit sets up to 64 units, CP-SAT above.

    Without OR-Tools a component above 64 units is left to greedy, so the result may be FEASIBLE
    with a dual-ascent bound; the package stays optional.
    """

    name: str = "exact"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=True,
        guarantee="optimal given time (above 64 units a component: if OR-Tools is installed)",
        complexity="exponential in the worst case; well under 1 ms for 12 units",
        reference="Balas and Ho (1980), Set covering algorithms; Weihe (1998) for the reductions",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal cover, or the best one in time, never worse than the repaired warm start."""
        deadline = Deadline.after(time_limit)
        start = check_start(problem, warm_start)
        cover = cover_of(problem)
        outcome = minimum_cover(cover, deadline=deadline, seed=seed)
        keep = outcome.keep
        assert keep is not None, "the problem was checked to have a cover"
        bound: Bound | None = Bound(outcome.bound, outcome.source)
        if not outcome.complete:
            other = best_greedy_cover(cover, start)
            keep = other if problem.objective(other) < problem.objective(keep) else keep
            bound = best_bound("min", [bound, cover_bound(cover, problem.objective(keep), effort=10 * EFFORT)])
        timed_out = not outcome.complete and deadline.passed()
        return unit_solution(problem, keep, self.name, bound=bound, timed_out=timed_out, stats=outcome.stats)


@dataclass(frozen=True, eq=False)
class CoverOutcome:
    """What is known of the cheapest cover.

    Args:
        keep: (n,) bool, or None if there is none within the cutoff or none was found.
        bound: lower bound on the optimum. source: what proves it.
        complete: True if `keep` is optimal, or there is proven to be none within the cutoff.
        stats: counters.
    """

    keep: np.ndarray | None
    bound: float
    source: str
    complete: bool
    stats: dict[str, int]


def minimum_cover(cover: Cover, *, cutoff: float = math.inf, deadline: Deadline = NEVER, seed: int = 0) -> CoverOutcome:
    """Find a cheapest cover, or with a `cutoff` any cover within it or the proof that there is none.

    Args:
        cover: an instance that has a cover.
        cutoff: largest cost of interest; the answer need then not be the cheapest.
    """
    reduced = reduce_cover(cover, deadline)
    keep = cover.forced.copy()
    keep[reduced.chosen] = True
    # What later components cost at least; each search may spend only what they leave.
    floors = [_floor(part) for part in reduced.components]
    spent, bound = float(cover.cost[keep].sum()), float(cover.cost[keep].sum())
    complete, nodes, sources = True, 0, {"reductions"}
    if spent + sum(floors) > cutoff:
        return CoverOutcome(None, spent + sum(floors), "reductions", True, {"nodes": 0})
    for number, part in enumerate(reduced.components):
        later = sum(floors[number + 1 :])
        allowance = cutoff - spent - later
        decide = number == len(floors) - 1 and math.isfinite(cutoff)
        outcome, source = _search(part, allowance, decide, deadline, seed)
        nodes += outcome.nodes
        sources.add(source)
        complete &= outcome.complete
        bound += outcome.bound
        if outcome.chosen is None:
            return CoverOutcome(None, bound + later, _names(sources), outcome.complete, {"nodes": nodes})
        spent += outcome.value
        keep[[part.units[unit] for unit in bits(outcome.chosen)]] = True
    # Free units were all taken at the start; those that cover nothing of their own go again.
    keep = prune_redundant(cover, keep)
    left = sum(len(part.units) for part in reduced.components)
    stats = {"nodes": nodes, "components": len(floors), "candidates_left": left}
    return CoverOutcome(keep, bound, _names(sources), complete, stats)


def _names(sources: set[str]) -> str:
    return " + ".join(sorted(sources))


def _floor(part: Component) -> float:
    """Return a packing bound: elements that share no candidate each need their own. O(elements)."""
    used, total = 0, 0.0
    cost = part.cost.tolist()
    for row in sorted(part.rows, key=int.bit_count):
        if not row & used:
            used |= row
            total += min(cost[unit] for unit in bits(row))
    return total


@cache
def _has_cp_sat() -> bool:
    return find_spec("ortools") is not None


def _search(
    part: Component, allowance: float, decide: bool, deadline: Deadline, seed: int
) -> tuple[SearchOutcome, str]:
    has_cp_sat = _has_cp_sat()
    small = part.size <= BITSET_UNITS
    # A limit of zero nodes still gives the greedy incumbent and the root bound.
    limit = (HANDOVER_NODES if has_cp_sat else None) if small else 0
    good_enough = allowance if decide else -math.inf
    outcome = branch_and_bound(part, cutoff=allowance, good_enough=good_enough, deadline=deadline, node_limit=limit)
    if outcome.complete or not has_cp_sat or deadline.passed():
        return outcome, "branch and bound" if small else "dual ascent"
    rows = [list(bits(row)) for row in part.rows]
    hint = None
    if outcome.chosen is not None:
        hint = np.array([outcome.chosen >> unit & 1 for unit in range(len(part.units))], dtype=bool)
    if decide and bool(np.all(part.cost == 1)):
        answer = cp_sat_cover(rows, part.cost, at_most=int(allowance), deadline=deadline, seed=seed)
        if answer.chosen is None:
            bound = allowance + 1 if answer.proven else outcome.bound
            return SearchOutcome(None, math.inf, bound, answer.proven, outcome.nodes), "CP-SAT"
        chosen = sum(1 << unit for unit in np.flatnonzero(answer.chosen).tolist())
        return SearchOutcome(chosen, float(answer.chosen.sum()), outcome.bound, True, outcome.nodes), "CP-SAT"
    found = cp_sat_cover(rows, part.cost, hint=hint, deadline=deadline, seed=seed)
    chosen, value = outcome.chosen, outcome.value
    if found.chosen is not None and part.cost[found.chosen].sum() < value:
        chosen = sum(1 << unit for unit in np.flatnonzero(found.chosen).tolist())
        value = float(part.cost[found.chosen].sum())
    bound = min(max(outcome.bound, found.bound), value)
    if value > allowance:
        complete = found.proven or bound > allowance
        return SearchOutcome(None, math.inf, bound, complete, outcome.nodes), "CP-SAT"
    return SearchOutcome(chosen, value, bound, found.proven, outcome.nodes), "CP-SAT"


register(ExactDominatingSet())

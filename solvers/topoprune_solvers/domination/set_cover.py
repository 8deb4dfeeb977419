"""Dominating sets by OR-Tools' set-cover heuristics: greedy, then guided local search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import OpenPart, SetCover, cover_of, open_part
from topoprune_solvers.domination.greedy import best_greedy_cover, prune_redundant
from topoprune_solvers.domination.lagrangian import cover_bound
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import Deadline, check_start, unit_solution
from topoprune_solvers.solution import Solution

__all__ = ["SetCoverDominatingSet"]

_CHUNK = 20_000_000  # nonzeros a guided search may touch between two looks at the clock, about 50 ms
_BUILD = 20_000  # nonzeros added to the model between two looks at the clock


@dataclass(frozen=True)
class SetCoverDominatingSet:
    """Run OR-Tools' greedy, steepest descent and guided local search (C++) on the covering instance.

    Args:
        rounds: guided searches without a time limit; with one they go on until it is reached.
    """

    rounds: int = 10
    name: str = "set-cover"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=False,
        guarantee="at most H(largest degree + 1) times the optimum, with a dual bound",
        complexity="O((n + m) log n) and as much local search as time allows",
        requires=("ortools",),
        reference="Voudouris and Tsang (1999), Guided local search, EJOR 113; OR-Tools set_cover",
        when="to compare `local-search` with",
        lacks=("demand",),
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best cover found, never worse than greedy or the repaired warm start; `seed` has no use.

        Raises:
            ValueError: a demand other than 1.
        """
        if not problem.simple:
            raise ValueError("solver 'set-cover' takes demands of 1 only; use greedy, local-search or exact")
        deadline = Deadline.after(time_limit)
        cover = cover_of(problem)
        keep = best_greedy_cover(cover, check_start(problem, warm_start))
        bound = cover_bound(cover, problem.objective(keep), deadline=deadline)
        part = open_part(cover)
        if part.elements.size and bound.value < problem.objective(keep) and not deadline.passed():
            for chosen in _search(part, keep[part.units], deadline, self.rounds):
                found = prune_redundant(cover, part.keep(cover, chosen))
                if problem.objective(found) < problem.objective(keep):
                    keep = found
        return unit_solution(problem, keep, self.name, bound=bound, timed_out=deadline.passed())


def _search(part: OpenPart, start: np.ndarray, deadline: Deadline, rounds: int) -> list[np.ndarray]:
    """Return the covers worth looking at: the constructed one and the best of the local searches."""
    from ortools.set_cover.python import set_cover

    instance = part.instance
    model = _model(set_cover, instance, deadline)
    if model is None:
        return []
    invariant = set_cover.SetCoverInvariant(model)
    if not set_cover.GreedySolutionGenerator(invariant).next_solution():
        return []
    covers = [_selected(invariant)]
    begin = min([start, covers[0]], key=instance.value)
    invariant.clear()
    level = set_cover.consistency_level.REDUNDANCY
    invariant.recompute(level)
    for candidate in np.flatnonzero(begin).tolist():
        invariant.select(candidate, level)
    set_cover.SteepestSearch(invariant).set_max_iterations(instance.n_candidates).next_solution()
    search = set_cover.GuidedLocalSearch(invariant)
    search.initialize()
    # An iteration moves one candidate and those around it.
    around = max(1, instance.row.size // max(1, instance.n_candidates)) ** 2
    steps = max(100, min(50_000, _CHUNK // (40 * around)))
    best = min([begin, _selected(invariant)], key=instance.value)
    done = 0
    while not deadline.passed() and (math.isfinite(deadline.at) or done < rounds):
        search.set_max_iterations(steps).next_solution()
        found = _selected(invariant)
        if instance.is_cover(found) and instance.value(found) < instance.value(best):
            best = found
        done += 1
    return [*covers, best]


def _model(set_cover: Any, instance: SetCover, deadline: Deadline) -> Any:
    model = set_cover.SetCoverModel()
    cuts, flat = instance.col_start.tolist(), instance.col.tolist()
    added = 0
    for candidate, price in enumerate(instance.cost.tolist()):
        model.add_empty_subset(price)
        for element in flat[cuts[candidate] : cuts[candidate + 1]]:
            model.add_element_to_last_subset(element)
        if cuts[candidate + 1] - added > _BUILD:
            added = cuts[candidate + 1]
            if deadline.passed():
                return None
    model.create_sparse_row_view()
    return model


def _selected(invariant: Any) -> np.ndarray:
    chosen: Sequence[bool] = invariant.is_selected()
    return np.array(chosen, dtype=bool)


register(SetCoverDominatingSet())

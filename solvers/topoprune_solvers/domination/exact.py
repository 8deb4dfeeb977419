"""Exact dominating sets: bit sets for up to 64 units, all layers of a model in one call; a large path above."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.bitset_batch import MOST_UNITS, Batch
from topoprune_solvers.domination.bitset_search import CoverOutcome, engine_and_effort, search_small
from topoprune_solvers.domination.covering import Cover, SetCover, cover_of, open_part
from topoprune_solvers.domination.exact_large import exact_large
from topoprune_solvers.domination.greedy import best_greedy_cover, prune_redundant
from topoprune_solvers.domination.lagrangian import EFFORT, cover_bound
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import NEVER, Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution, Status, best_bound

__all__ = ["ExactDominatingSet", "minimum_cover"]


@dataclass(frozen=True)
class ExactDominatingSet:
    """Reduce, split into components, search each: branch and bound on bit sets up to 64 units, the large path above.

    `solve_many` solves all problems of at most 64 units in one compiled call where numba is installed; without it
    the same functions run in Python and take the same decisions. What exceeds the node budget of the batch is
    searched on its own under the time limit and handed to the large path if it stays hard.
    """

    name: str = "exact"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=True,
        guarantee="optimal given time; when it runs out, a cover with a proven lower bound",
        complexity="exponential in the worst case; about 0.01 ms for 12 units, 0.1 ms for 64 (compiled)",
        reference="Balas and Ho (1980), Set covering algorithms; Weihe (1998) for the reductions",
        when="head graphs: always; larger graphs: when the proof is worth seconds",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal cover, or the best one in time, never worse than the repaired warm start."""
        return self.solve_many([problem], warm_starts=[warm_start], time_limit=time_limit, seed=seed)[0]

    def solve_many(
        self,
        problems: Sequence[DominatingSet],
        *,
        warm_starts: Sequence[Any] | None = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> list[Solution]:
        """Solve several problems, those of up to 64 units together.

        Args:
            problems: e.g. all layers of a model. warm_starts: one (n,) bool or None each.
            time_limit: seconds for each problem. seed: for the large path.

        Returns:
            One solution each; `seconds` is an equal share of the common call plus the problem's own search.
        """
        Deadline.after(time_limit)  # refuses a wrong limit before any work
        starts = [None] * len(problems) if warm_starts is None else list(warm_starts)
        starts = [check_start(problem, start) for problem, start in zip(problems, starts, strict=True)]
        small = [number for number, problem in enumerate(problems) if problem.n <= MOST_UNITS]
        found: dict[int, Solution] = {}
        if small:
            solved = _solve_small([problems[number] for number in small], self.name, time_limit)
            found = {number: solution for number, solution in zip(small, solved, strict=True) if solution is not None}
        return [
            found[number] if number in found else self._solve_alone(problem, start, time_limit, seed)
            for number, (problem, start) in enumerate(zip(problems, starts, strict=True))
        ]

    def _solve_alone(
        self, problem: DominatingSet, start: np.ndarray | None, time_limit: float | None, seed: int
    ) -> Solution:
        began = time.perf_counter()
        deadline = Deadline.after(time_limit)
        cover = cover_of(problem)
        outcome = minimum_cover(cover, deadline=deadline, seed=seed, start=start)
        keep = outcome.keep
        bound: Bound | None = Bound(outcome.bound, outcome.source)
        if not outcome.complete:
            other = best_greedy_cover(cover, start)
            keep = other if keep is None or problem.objective(other) < problem.objective(keep) else keep
            dual = cover_bound(cover, problem.objective(keep), effort=10 * EFFORT, deadline=deadline)
            bound = best_bound("min", [bound, dual])
        assert keep is not None, "the problem was checked to have a cover"
        # Native solvers end a little before the limit they are given, so it need not have passed here.
        ended = math.isfinite(deadline.at) and "failed" not in outcome.stats
        timed_out = not outcome.complete and (ended or deadline.passed())
        solution = unit_solution(problem, keep, self.name, bound=bound, timed_out=timed_out, stats=outcome.stats)
        failed = "failed" in outcome.stats and not timed_out and solution.status is not Status.OPTIMAL
        status = Status.FAILED if failed else solution.status
        return replace(solution, status=status, seconds=time.perf_counter() - began)


def _solve_small(problems: Sequence[DominatingSet], name: str, time_limit: float | None) -> list[Solution | None]:
    """Solve problems of at most 64 units in one call; None for what exceeds the node budget and has time left."""
    began = time.perf_counter()
    engine, effort = engine_and_effort()
    batch = Batch(problems, effort.compiled)
    nodes = effort.batch if time_limit is None else int(min(effort.batch, time_limit * effort.per_second))
    first = 0
    while first < len(problems):
        # After Ctrl-C only the first node of each is searched.
        first = batch.run(engine.solve_batch, first, 0 if NEVER.passed() else nodes, effort.call)
    keep, dominator, distance = batch.of_units()
    objective, visited, complete = batch.of_problems()
    begin = batch.start.tolist()
    solutions: list[Solution | None] = []
    seconds = (time.perf_counter() - began) / len(problems)
    for number in range(len(problems)):
        if not complete[number]:
            solutions.append(None)
            continue
        own = slice(begin[number], begin[number + 1])
        source = "branch and bound" if visited[number] else "reductions"
        solutions.append(
            Solution(
                keep[own],
                objective[number],
                "min",
                Status.OPTIMAL,
                name,
                Bound(objective[number], source),
                dominator[own],
                distance[own],
                seconds,
                {"nodes": visited[number]},
            )
        )
    return solutions


def minimum_cover(
    cover: Cover,
    *,
    cutoff: float = math.inf,
    deadline: Deadline = NEVER,
    seed: int = 0,
    start: np.ndarray | None = None,
) -> CoverOutcome:
    """Find a cheapest cover, or with a `cutoff` any cover within it or the proof that there is none.

    Args:
        cover: an instance that has a cover.
        cutoff: largest cost of interest; the answer need then not be the cheapest.
        start: (n,) bool keep mask that the large path may begin with, or None.
    """
    part = open_part(cover)
    room = cutoff - part.fixed
    found: CoverOutcome | None = None
    if part.units.size <= MOST_UNITS and part.elements.size <= MOST_UNITS:
        found = search_small(part.instance, cutoff=room, deadline=deadline)
    if found is None or not (found.complete or deadline.passed()):
        hint = None if start is None else start[part.units]
        if found is not None and found.keep is not None:
            hint = found.keep
        other = _search_large(part.instance, room, hint, deadline, seed)
        found = other if found is None else _better(found, other, part.instance)
    keep = None
    if found.keep is not None:
        # Free candidates were taken at the start; those that cover nothing of their own go again.
        keep = prune_redundant(cover, part.keep(cover, found.keep))
    refuted = keep is None and found.complete
    bound = max(math.nextafter(cutoff, math.inf), part.fixed + found.bound) if refuted else part.fixed + found.bound
    return CoverOutcome(keep, bound, found.source, found.complete, found.stats)


def _better(one: CoverOutcome, other: CoverOutcome, instance: SetCover) -> CoverOutcome:
    """Return the cheaper cover of two searches with the better bound."""
    stats = {**one.stats, **other.stats}
    if other.complete:
        return replace(other, stats=stats)
    covers = [outcome.keep for outcome in (one, other) if outcome.keep is not None]
    keep = min(covers, key=instance.value) if covers else None
    best = max((one, other), key=lambda outcome: outcome.bound)
    return CoverOutcome(keep, best.bound, best.source, False, stats)


def _search_large(
    instance: SetCover, cutoff: float, start: np.ndarray | None, deadline: Deadline, seed: int
) -> CoverOutcome:
    """Search an instance of any size."""
    answer = exact_large(instance, start=start, deadline=deadline, seed=seed, cutoff=cutoff)
    keep = answer.chosen
    if keep is not None and instance.value(keep) > cutoff:
        keep = None
    stats = dict(answer.stats) if answer.failed is None else {**answer.stats, "failed": answer.failed}
    return CoverOutcome(keep, answer.bound, answer.source, answer.complete, stats)


register(ExactDominatingSet())

"""Dominating sets by rounding the linear relaxation, certified by the relaxation's own value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import SetCover, cover_of, open_part
from topoprune_solvers.domination.greedy import best_greedy_cover, greedy_choice
from topoprune_solvers.domination.lagrangian import EFFORT, cover_bound
from topoprune_solvers.domination.linear_relaxation import SOURCE, linear_relaxation
from topoprune_solvers.domination.reductions import reduce_cover
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import NEVER, Deadline, check_start, unit_solution
from topoprune_solvers.solution import Bound, Solution, best_bound

__all__ = ["LpRoundingDominatingSet", "round_relaxation"]

_THRESHOLDS = (0.999, 0.75, 0.5, 0.25)
_SHARE = 0.8  # of a time limit for the relaxation; the rest is for rounding


@dataclass(frozen=True)
class LpRoundingDominatingSet:
    """Reduce, solve the linear relaxation and round it in several ways; each is completed greedily and pruned.

    Deterministic: everything the relaxation takes to at least 1/f (f: most candidates of an element; for demands
    the classic 1/(f - r + 1)), and higher thresholds. Random: each candidate with a probability that grows with
    its share. Where the relaxation is not done in time the bound is the Lagrangian one and the cover greedy's.

    Args:
        trials: random roundings.
    """

    trials: int = 16
    name: str = "lp-rounding"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=False,
        guarantee="at most f times the optimum (f: largest closed neighbourhood), with the LP bound",
        complexity="one linear program, then O(trials (n + m) log n)",
        reference="Hochbaum (1982), Approximation algorithms for set covering and vertex cover, SIAM J. Comput. 11",
        when="a tight certificate matters more than the last percent of size",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best rounding, never worse than greedy or the repaired warm start."""
        deadline = Deadline.after(time_limit)
        cover = cover_of(problem)
        keep = best_greedy_cover(cover, check_start(problem, warm_start))
        objective = problem.objective(keep)
        bound: Bound | None = cover_bound(cover, objective, effort=EFFORT, deadline=deadline)
        assert bound is not None
        if bound.value >= objective or deadline.passed():
            return unit_solution(problem, keep, self.name, bound=bound, timed_out=deadline.passed())
        part = open_part(cover, ceiling=objective)
        reduced = reduce_cover(part.instance, deadline)
        for_lp = Deadline.after(deadline.remaining() * _SHARE if math.isfinite(deadline.at) else None)
        relaxation = linear_relaxation(reduced.core, for_lp)
        if relaxation is None:
            bound = best_bound("min", [bound, cover_bound(cover, objective, effort=10 * EFFORT, deadline=deadline)])
            return unit_solution(problem, keep, self.name, bound=bound, timed_out=deadline.passed(), stats={"lp": 0})
        lowest = Bound(part.fixed + reduced.fixed + relaxation.bound, SOURCE)
        bound = best_bound("min", [bound, lowest])
        assert bound is not None
        rounded = 0
        for chosen in round_relaxation(reduced.core, relaxation.x, trials=self.trials, seed=seed, deadline=deadline):
            rounded += 1
            found = part.keep(cover, reduced.invert(chosen))
            value = problem.objective(found)
            if value < objective:
                keep, objective = found, value
            if objective <= bound.value:
                break
        return unit_solution(
            problem, keep, self.name, bound=bound, timed_out=deadline.passed(), stats={"lp": 1, "roundings": rounded}
        )


def round_relaxation(
    instance: SetCover, x: np.ndarray, *, trials: int = 16, seed: int = 0, deadline: Deadline = NEVER
) -> Iterator[np.ndarray]:
    """Yield (c,) bool covers made from a point of the relaxation, until the deadline.

    Args:
        instance: the instance. x: (c,) float64 in [0, 1]. trials: random roundings. seed: for them.
    """
    length = np.diff(instance.row_start)
    most = int((length - instance.demand).max()) + 1 if length.size else 1
    # A little below 1/f: the solver's x is right to about 1e-7 only.
    for threshold in (*_THRESHOLDS, (1 - 1e-6) / most):
        if deadline.passed():
            return
        yield greedy_choice(instance, x >= threshold)
    rng = np.random.default_rng(seed)
    for trial in range(trials):
        if deadline.passed():
            return
        # Scales from 0.5 to 2: below 1 greedy mends much, above it pruning takes much back.
        scale = 0.5 * 4.0 ** (trial / max(1, trials - 1))
        yield greedy_choice(instance, rng.random(x.size) < scale * x)


register(LpRoundingDominatingSet())

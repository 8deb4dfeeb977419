"""Row-weighting local search for set cover and dominating set, on the reduced instance, part by part."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.compiled import choose, enabled
from topoprune_solvers.domination.covering import SetCover, cover_of, open_part
from topoprune_solvers.domination.dual_ascent import dual_ascent_bound
from topoprune_solvers.domination.greedy import best_greedy_cover, greedy_choice, prune_redundant
from topoprune_solvers.domination.lagrangian import cover_bound
from topoprune_solvers.domination.reductions import Reduction, components, reduce_cover
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import NEVER, Deadline, check_start, unit_solution
from topoprune_solvers.scaling import is_integral
from topoprune_solvers.solution import Bound, Solution

__all__ = ["LocalSearchDominatingSet", "RowWeighting", "local_search"]

SLICE = 0.02  # seconds of a kernel call between two looks at the clock
STEPS = 200  # for each candidate left after the reductions, where neither steps nor seconds are given
BOUND_SHARE = 0.05  # of a time limit, for the Lagrangian bounds
RESOLUTION = 50  # first weight of a row, times the mean number of candidates of a row
ROUNDS = 4  # in which each part gets its share: what a finished part leaves goes to the others


@dataclass(frozen=True)
class LocalSearchDominatingSet:
    """Reduce, split into parts, search each by row weighting from the better of two greedy covers.

    The incumbent is a cover at any time and never dearer than greedy's. A part whose cover meets its dual
    bound is done; the bounds of all parts, rounded up one by one, give the bound.

    With a time limit the number of steps, and so the answer, depends on the machine; with `max_steps` alone
    runs repeat exactly. The first call of all compiles the loops (some seconds, once a machine).

    Args:
        max_steps: steps in all, shared out among the parts by size; None: no limit under a time limit, else
            200 for each candidate that the reductions leave.
    """

    max_steps: int | None = None
    name: str = "local-search"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=False,
        guarantee="never worse than greedy, with a dual bound; usually within 1 % of the best known",
        complexity="about O(degree) a step; as long as it is given",
        reference="Gao, Weise, Li (2015), An efficient local search heuristic with row weighting for the unicost set "
        "covering problem, EJOR 246",
        when="large graphs with seconds to spend",
    )

    def __post_init__(self) -> None:
        if self.max_steps is not None and not (isinstance(self.max_steps, int) and self.max_steps >= 0):
            raise ValueError(f"max_steps must be an integer >= 0 or None, found {self.max_steps!r}")

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best cover found; `seed` chooses among uncovered units."""
        deadline = Deadline.after(time_limit)
        cover = cover_of(problem)
        keep = best_greedy_cover(cover, check_start(problem, warm_start))
        stats = {"steps": 0, "components": 0, "candidates_left": cover.n}
        if not deadline.passed():
            part = open_part(cover)
            reduced = reduce_cover(part.instance, deadline)
        if deadline.passed():
            bound = dual_ascent_bound(cover)
            return unit_solution(problem, keep, self.name, bound=bound, timed_out=True, stats=stats)
        core = reduced.core
        parts = _parts(core, keep[part.units[reduced.candidates]], seed)
        limit = STEPS * core.n_candidates if self.max_steps is None and time_limit is None else self.max_steps
        _search_parts(parts, deadline, limit)
        chosen = np.zeros(core.n_candidates, dtype=bool)
        for one in parts:
            chosen[one.candidates] = one.best
        found = prune_redundant(cover, part.keep(cover, reduced.invert(chosen)))
        if problem.objective(found) <= problem.objective(keep):
            keep = found
        value = part.fixed + reduced.fixed + math.fsum(one.bound for one in parts)
        if not is_integral(core.cost):
            value -= 1e-12 * abs(value)  # a sum of floats: stay below it
        bound = Bound(value, "reductions + dual bounds" if parts else "reductions")
        stats = {
            "steps": sum(one.steps for one in parts),
            "components": len(parts),
            "candidates_left": core.n_candidates,
        }
        return unit_solution(problem, keep, self.name, bound=bound, timed_out=deadline.passed(), stats=stats)


class _Part:
    """A component with its bound and its search, which is set up when it is first needed."""

    def __init__(self, instance: SetCover, candidates: np.ndarray, start: np.ndarray, seed: int) -> None:
        self.instance, self.candidates, self.start, self.seed = instance, candidates, start, seed
        self.search: RowWeighting | None = None
        self.value, self.bound, self.steps = instance.value(start), 0.0, 0

    @property
    def best(self) -> np.ndarray:
        """The cheapest cover so far."""
        return self.start if self.search is None else self.search.best

    @property
    def open(self) -> bool:
        """Return whether there may be a cheaper cover."""
        return self.value > self.bound and (self.search is None or not self.search.exhausted)

    def improve_bound(self, deadline: Deadline) -> None:
        self.bound = max(self.bound, cover_bound(self.instance, self.value, deadline=deadline).value)

    def run(self, deadline: Deadline, max_steps: int | None) -> None:
        if self.search is None:
            self.search = RowWeighting(self.instance, self.start, seed=self.seed)
        self.search.run(deadline=deadline, target=self.bound, max_steps=max_steps)
        self.value, self.steps = self.search.value, self.search.steps
        if self.search.exhausted:
            self.bound = max(self.bound, self.search.floor)


def _parts(core: SetCover, known: np.ndarray, seed: int) -> list[_Part]:
    """Split a core; each part starts from the better of its own greedy cover and the part of a known one."""
    starts = [greedy_choice(core), greedy_choice(core, known)]
    return [
        _Part(instance, numbers, min((start[numbers] for start in starts), key=instance.value), seed)
        for instance, numbers, _ in components(core)
    ]


def _search_parts(parts: list[_Part], deadline: Deadline, limit: int | None) -> None:
    """Give each open part its share of the steps or seconds, by size."""
    for one in parts:
        if deadline.passed():
            return
        one.improve_bound(Deadline.after(min(deadline.remaining() * BOUND_SHARE, 3600.0)))
    for turn in range(ROUNDS):
        rest = [one for one in parts if one.open]
        size = sum(one.instance.n_candidates for one in rest)
        share = 1.0 / (ROUNDS - turn)
        seconds = deadline.remaining() * share
        steps = None if limit is None else (limit - sum(one.steps for one in parts)) * share
        for one in rest:
            if deadline.passed():
                return
            fraction = one.instance.n_candidates / size
            until = Deadline.after(seconds * fraction) if math.isfinite(seconds) else deadline
            one.run(until, None if steps is None else int(steps * fraction))


def local_search(
    instance: SetCover,
    start: np.ndarray | None = None,
    *,
    deadline: Deadline = NEVER,
    seed: int = 0,
    target: float = -math.inf,
    max_steps: int | None = None,
) -> np.ndarray:
    """Return the cheapest cover found by row-weighting local search; never dearer than the (repaired) start.

    The instance is searched as it is: reduce and split it before. Without a deadline, a target that is
    met or `max_steps` the search does not end.

    Args:
        instance: a set cover that can be covered.
        start: (c,) bool to begin with, completed and pruned; greedy by default.
        seed: of the choice among uncovered elements. target: stop at a cover that costs no more.
        max_steps: most steps; the same number gives the same answer, with or without numba.

    Returns:
        (c,) bool cover.
    """
    if np.any(instance.cost == 0):
        # Scores are per cost: what is free is chosen beforehand.
        reduced = Reduction(("free",)).apply(instance)
        known = None if start is None else start[reduced.candidates]
        core = local_search(
            reduced.core, known, deadline=deadline, seed=seed, target=target - reduced.fixed, max_steps=max_steps
        )
        return reduced.invert(core)
    search = RowWeighting(instance, greedy_choice(instance, start), seed=seed)
    search.run(deadline=deadline, target=target, max_steps=max_steps)
    return search.best


class RowWeighting:
    """A local search that can be continued.

    Each step takes out the chosen candidate whose rows weigh least per cost, and covers a random bare row by the
    candidate that helps most weight per cost, unless nothing around it changed since it was taken out
    (configuration checking). Ties: the one that has not moved for longest, then the lower index. Then one of the
    rows that are still bare weighs 1 more.

    Two departures from the paper, which adds 1 to every bare row and starts at 1: on large graphs thousands
    of rows are bare then, and their weights race. All rows start at `RESOLUTION` times the mean number of candidates of
    a row, and when the mean weight has doubled, all weights are halved.

    Args:
        instance: a set cover without free candidates. cover: (c,) bool, where to begin.
        seed: of the choice among bare rows.

    References: Gao, Weise, Li (2015), An efficient local search heuristic with row weighting for the unicost set
        covering problem, EJOR 246.
    """

    def __init__(self, instance: SetCover, cover: np.ndarray, *, seed: int = 0) -> None:
        assert not np.any(instance.cost == 0), "reduce the instance first: free candidates are taken beforehand"
        e, c = instance.n_elements, instance.n_candidates
        chosen = np.flatnonzero(cover)
        count = instance.counts(cover)
        assert np.all(count >= instance.demand), "the search begins at a cover"
        owner = np.repeat(np.arange(e), np.diff(instance.row_start))
        only = np.zeros(e, dtype=np.int64)
        inside = cover[instance.row]
        np.bitwise_xor.at(only, owner[inside], instance.row[inside])
        # At a cover, only chosen candidates of rows just met have a score.
        tight = np.repeat(count == instance.demand, np.diff(instance.row_start)) & inside
        first = max(1, round(RESOLUTION * instance.row.size / max(1, e)))
        score = first * np.bincount(instance.row[tight], minlength=c).astype(np.int64)
        price = instance.cost
        order = chosen[np.argsort(score[chosen] / price[chosen], kind="stable")]
        heap, place = np.zeros(c, np.int64), np.full(c, -1, np.int64)
        heap[: order.size], place[order] = order, np.arange(order.size)
        value = float(price[cover].sum())
        spin = (seed * 2654435761 + 12345) % 2147483646 + 1
        self.instance = instance
        self.steps = 0
        self.exhausted = False
        self._period = max(1, first * e)  # steps that double the mean weight
        self._pace = 1e-5 if enabled() else 1e-3  # seconds a step, measured as it goes
        arrays: list[Any] = [
            instance.row_start, instance.row, instance.col_start, instance.col, instance.demand, price,
            cover.astype(np.int8), count.astype(np.int64), only, np.full(e, first), score, np.zeros(c, np.int64),
            np.ones(c, np.int8), heap, place, np.zeros(e, np.int64), np.zeros(e, np.int64), cover.astype(np.int8),
            np.zeros(c, np.int64), np.array([order.size, 0, 0, spin, 0, -1]),
            np.array([value, value, self._least(value)]),
        ]  # fmt: skip
        self._arrays = arrays if enabled() else [array.tolist() for array in arrays]

    @property
    def best(self) -> np.ndarray:
        """The (c,) bool cheapest cover so far."""
        return np.asarray(self._arrays[17], dtype=np.int8) == 1

    @property
    def value(self) -> float:
        """Cost of the cheapest cover so far (up to rounding; exact for integral costs)."""
        return float(self._arrays[20][1])

    @property
    def floor(self) -> float:
        """What every cover costs at least if the search is exhausted: no cheaper one by more than its tolerance."""
        return self.value if is_integral(self.instance.cost) else self.value * (1.0 - 2e-9)

    def state(self) -> dict[str, Any]:
        """Return copies of what the search keeps account of, for checks."""
        arrays = [np.array(array) for array in self._arrays]
        size, bare = int(arrays[19][0]), int(arrays[19][1])
        return {
            "chosen": arrays[6], "count": arrays[7], "weight": arrays[9], "score": arrays[10], "stamp": arrays[11],
            "heap": arrays[13][:size], "bare": arrays[15][:bare], "cost": float(arrays[20][0]),
        }  # fmt: skip

    def run(self, *, deadline: Deadline = NEVER, target: float = -math.inf, max_steps: int | None = None) -> bool:
        """Search on until a limit is met; return whether the search is over (target met or nothing cheaper exists)."""
        from topoprune_solvers.domination.local_search_kernels import search_kernel

        kernel: Callable[..., int] = choose(search_kernel)
        left = math.inf if max_steps is None else max_steps
        while not self.exhausted and self.value > target and left > 0 and not deadline.passed():
            until_halving = self._period - self.steps % self._period
            wanted = int(max(1, min(left, min(SLICE, deadline.remaining()) / self._pace, until_halving, 1_000_000)))
            began = time.perf_counter()
            answer = kernel(*self._arrays, wanted, target)
            spent = time.perf_counter() - began
            # A first call compiles: one slice must not make the next a single step.
            self._pace = min(max(spent / wanted, self._pace / 2, 1e-8), 1e-2)
            left -= wanted
            self.steps += wanted
            self.exhausted = answer == 2
            if wanted == until_halving and not self.exhausted:
                self._halve()
        return self.exhausted or self.value <= target

    def _least(self, value: float) -> float:
        # Running sums of floats drift; an improvement must be larger than that.
        return 0.5 if is_integral(self.instance.cost) else 1e-9 * value

    def _halve(self) -> None:
        """Halve all weights, so that new ones keep their say; scores and heap follow, and the cost is summed anew."""
        instance, state = self.instance, self.state()
        weight = (state["weight"] + 1) // 2
        degree = np.diff(instance.row_start)
        chosen = state["chosen"] == 1
        slack = np.repeat(state["count"] - instance.demand, degree)
        # A chosen candidate misses rows with nothing to spare, another helps those below their demand.
        counts = np.where(chosen[instance.row], slack <= 0, slack < 0)
        weighed = np.where(counts, np.repeat(weight, degree), 0)
        score = np.zeros(instance.n_candidates, dtype=np.int64)
        np.add.at(score, instance.row, weighed)
        inside = np.flatnonzero(chosen)
        heap = inside[np.lexsort((inside, state["stamp"][inside], score[inside] / instance.cost[inside]))]
        place = np.full(instance.n_candidates, -1)
        place[heap] = np.arange(heap.size)
        for number, array in ((9, weight), (10, score), (14, place)):
            self._arrays[number][:] = array if enabled() else array.tolist()
        self._arrays[13][: heap.size] = heap if enabled() else heap.tolist()
        self._arrays[20][0] = instance.value(chosen)


register(LocalSearchDominatingSet())

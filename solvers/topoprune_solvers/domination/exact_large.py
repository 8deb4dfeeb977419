"""The exact path for set-cover instances of any size: reduce, split, search locally, then race what can prove.

No single method proves optimality on all graphs. Unsatisfiable cores (MaxSAT) close sparse, street-like ones, the
linear relaxation hub-like ones, counting picks dense ones with small covers, CP-SAT and branch and cut others;
local search finds the covers. They run in processes of their own, share the best cover and the best bound, and
the first proof ends the race.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from topoprune_solvers.domination.bitset_search import search_small
from topoprune_solvers.domination.covering import SetCover
from topoprune_solvers.domination.cp_sat import cp_sat_task
from topoprune_solvers.domination.few_picks import few_picks_applies, few_picks_task
from topoprune_solvers.domination.greedy import greedy_choice
from topoprune_solvers.domination.lagrangian import cover_bound
from topoprune_solvers.domination.linear_relaxation import relaxation_task
from topoprune_solvers.domination.local_search import RowWeighting, local_search
from topoprune_solvers.domination.max_sat import max_sat_task
from topoprune_solvers.domination.milp import milp_task
from topoprune_solvers.domination.reductions import components, reduce_cover
from topoprune_solvers.domination.tally import LOCAL_ENTRIES, Tally, race_covers, run_cover
from topoprune_solvers.native import Channel, NativeTask
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["LargeOutcome", "exact_large", "run_local_search"]

SMALL = 64  # candidates and elements up to which the bit-set branch and bound searches a part
MEDIUM_ENTRIES = 2_000  # nonzeros up to which CP-SAT gets a part to itself, in this process
MEDIUM_EFFORT = 1.0  # CP-SAT's deterministic seconds for such a part; what stays open joins the race
MEDIUM_STEPS = 2_000  # of local search before that
FIRST_STEPS = 100_000  # of local search before anything else on the rest: some tenths of a second
SEARCH_SHARE = 0.2  # of a time limit for local search in the race ...
SEARCH_SECONDS = 15.0  # ... and the most it gets
SLICE_SHARE = 0.3  # of a time limit for each further SAT solver
DENSE_ROWS = 20  # candidates an element has on average in a dense instance


@dataclass(frozen=True, eq=False)
class LargeOutcome:
    """What is known of the cheapest cover.

    Args:
        chosen: (c,) bool, the best cover found, or None if the search ended before there was one.
        bound: lower bound on the optimum. source: what proves it.
        complete: True if `chosen` is optimal, or the question of the cutoff is answered.
        stats: counters, and where the best cover comes from (``"found_by"``).
        failed: what crashed, as one sentence, or None. The cover and the bound hold all the same.
    """

    chosen: np.ndarray | None
    bound: float
    source: str
    complete: bool
    stats: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None


def exact_large(
    cover: SetCover,
    *,
    start: np.ndarray | None = None,
    deadline: Deadline = NEVER,
    seed: int = 0,
    cutoff: float = math.inf,
) -> LargeOutcome:
    """Find a cheapest cover and prove it, or come as close as the time allows.

    Args:
        cover: an instance that has a cover.
        start: (c,) bool choice to begin with; repaired if it is no cover.
        deadline: kept also against solvers that overshoot: they are killed. Without one the search
            goes on to the proof, however long that takes.
        seed: for local search and CP-SAT. Which of several optimal covers is returned can depend on which
            solver is first.
        cutoff: with a finite one the search also ends at any cover that costs no more, or once the bound exceeds it.

    References: Weihe (1998) for the reductions; Ignatiev et al. (2019), RC2; Gao et al. (2015), row weighting.
    """
    reduced = reduce_cover(cover, deadline)
    core = reduced.core
    parts = sorted(components(core), key=lambda part: part[0].row.size)
    hint = None if start is None else np.asarray(start, dtype=bool)[reduced.candidates]
    chosen = np.zeros(core.n_candidates, dtype=bool)
    stats: dict[str, Any] = {"candidates_left": core.n_candidates, "components": len(parts)}
    floor, sources, rest = reduced.fixed, {"reductions"}, []
    for instance, candidates, _ in parts:
        first = greedy_choice(instance, None if hint is None else hint[candidates])
        tally = Tally(instance, first)
        _close_small(tally, deadline, seed, stats)
        if tally.proven:
            assert tally.chosen is not None
            chosen[candidates[tally.chosen]] = True
            floor += tally.value
            sources.add(tally.source)
        else:
            rest.append((tally, candidates))
    if not rest:
        return LargeOutcome(reduced.invert(chosen), floor, _names(sources), True, stats)
    tally = Tally(
        _joined([part.instance for part, _ in rest]),
        np.concatenate([part.chosen for part, _ in rest if part.chosen is not None]),
        bound=sum(part.bound for part, _ in rest),
        source=_names({part.source for part, _ in rest}),
        cutoff=cutoff - floor,
    )
    _close_large(tally, deadline, seed)
    assert tally.chosen is not None
    chosen[np.concatenate([candidates for _, candidates in rest])[tally.chosen]] = True
    sources.add(tally.source)
    stats.update(tally.stats, found_by=tally.found_by)
    source = tally.source if tally.bound > reduced.fixed else _names(sources)
    failed = "; ".join(tally.failures) or None
    return LargeOutcome(reduced.invert(chosen), floor + tally.bound, source, tally.settled, stats, failed)


def _close_small(tally: Tally, deadline: Deadline, seed: int, stats: dict[str, Any]) -> None:
    """Try to solve a small or medium part in this process."""
    instance = tally.instance
    if instance.n_candidates <= SMALL and instance.n_elements <= SMALL:
        outcome = search_small(instance, deadline=deadline)
        if outcome.keep is not None:
            tally.offer(outcome.keep, outcome.source)
        tally.raise_bound(outcome.bound, outcome.source)
        stats["nodes"] = stats.get("nodes", 0) + outcome.stats.get("nodes", 0)
    elif instance.row.size <= MEDIUM_ENTRIES and _has("ortools") and not deadline.passed():
        found = local_search(
            instance, tally.chosen, deadline=_share(deadline, 0.02, 0.1), seed=seed, max_steps=MEDIUM_STEPS
        )
        tally.offer(found, "local search")
        # Deterministic time: the same answer on every machine.
        settings = {"max_deterministic_time": MEDIUM_EFFORT}
        run_cover(
            tally, cp_sat_task(instance, tally.chosen, seed=seed, settings=settings), deadline=deadline, apart=False
        )


def _close_large(tally: Tally, deadline: Deadline, seed: int) -> None:
    """Search the joined remainder: local search and LP first, then the race."""
    instance = tally.instance
    if deadline.passed() or tally.settled:
        return
    quick = _share(deadline, 0.1, 2.0)
    found = local_search(instance, tally.chosen, deadline=quick, seed=seed, target=tally.bound, max_steps=FIRST_STEPS)
    tally.offer(found, "local search")
    small = instance.row.size <= LOCAL_ENTRIES
    if small:
        run_cover(tally, relaxation_task(instance), deadline=deadline, apart=False)
    else:
        dual = cover_bound(instance, tally.value, deadline=_share(deadline, 0.1, math.inf))
        tally.raise_bound(dual.value, dual.source)
    if few_picks_applies(instance, tally.value) and not tally.settled:
        # Often done before another process has started.
        task = few_picks_task(instance, tally.value, tally.bound)
        run_cover(tally, task, deadline=_share(deadline, 0.1, 1.0), apart=False)
    if tally.settled or deadline.passed():
        return
    race_covers(tally, _schedule(tally, deadline, seed, relaxed=small), deadline=deadline)


def _schedule(tally: Tally, deadline: Deadline, seed: int, *, relaxed: bool) -> list[NativeTask]:
    """Return who races, two at a time: cores from the start, beside them LP, local search, and the next in line.

    SAT solvers differ by orders of magnitude on one instance, so a second one gets a slice. On dense graphs with
    small covers counting picks comes first, and CP-SAT earlier.
    """
    instance = tally.instance
    limited = math.isfinite(deadline.at)
    seconds = deadline.remaining() if limited else 20 * SEARCH_SECONDS
    few = few_picks_applies(instance, tally.value)
    # Small covers are found at once; the time goes to the proof.
    searching = min(SEARCH_SECONDS, SEARCH_SHARE * seconds) / (10 if few else 1)
    tasks = [] if relaxed else [relaxation_task(instance)]

    def search() -> tuple[Any, ...]:
        return instance, tally.chosen, searching, seed

    def cp_sat() -> tuple[Any, ...]:
        task = cp_sat_task(instance, tally.chosen, seed=seed)
        assert not callable(task.arguments)
        return task.arguments

    dense = instance.row.size > DENSE_ROWS * instance.n_elements
    tasks.append(NativeTask(f"{__name__}:run_local_search", search, "local search"))
    if _has("pysat"):
        slices = SLICE_SHARE * seconds
        if dense:
            tasks.append(max_sat_task(instance, seconds=slices))
        else:
            tasks.insert(0, max_sat_task(instance))
            tasks.append(max_sat_task(instance, sat_solver="g3", seconds=slices))
            tasks.append(max_sat_task(instance, exhaust=False, seconds=slices))
    if few:
        tasks.insert(0, few_picks_task(instance, tally.value, tally.bound))
    if _has("ortools"):
        tasks.append(NativeTask("topoprune_solvers.domination.cp_sat:run_cp_sat", cp_sat, "CP-SAT"))
    tasks.append(milp_task(instance, tally.value))
    return tasks


def run_local_search(
    channel: Channel, instance: SetCover, start: np.ndarray, seconds: float, seed: int
) -> dict[str, int]:
    """Search for some seconds and stream what is better; a cover task (see `tally`)."""
    deadline = Deadline.after(min(seconds, channel.remaining()))
    search = RowWeighting(instance, start, seed=seed)
    best = instance.value(start)
    while not deadline.passed() and not search.exhausted:
        search.run(deadline=deadline, max_steps=50_000, target=math.nextafter(search.value, -math.inf))
        if search.value < best:
            best = search.value
            channel.send(("cover", search.best))
    return {"search_steps": search.steps}


def _share(deadline: Deadline, share: float, most: float) -> Deadline:
    """Return the deadline after a share of the time left, at most `most` seconds."""
    seconds = min(most, share * deadline.remaining())
    return Deadline.after(seconds) if math.isfinite(seconds) else NEVER


def _joined(instances: Sequence[SetCover]) -> SetCover:
    """Return several instances side by side as one."""
    if len(instances) == 1:
        return instances[0]
    row, length, candidates = [], [], 0
    for instance in instances:
        row.append(instance.row + candidates)
        length.append(np.diff(instance.row_start))
        candidates += instance.n_candidates
    return SetCover.from_rows(
        np.concatenate([[0], np.cumsum(np.concatenate(length))]),
        np.concatenate(row),
        np.concatenate([instance.cost for instance in instances]),
        np.concatenate([instance.demand for instance in instances]),
    )


@cache
def _has(module: str) -> bool:
    return find_spec(module) is not None


def _names(sources: set[str]) -> str:
    return " + ".join(sorted(sources))

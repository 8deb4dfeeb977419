"""Branch and bound on one instance of at most 64 candidates and elements, compiled where numba is installed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from topoprune_solvers.compiled import enabled
from topoprune_solvers.domination.bitset_batch import MOST_UNITS, Workspace
from topoprune_solvers.domination.branch_and_bound import (
    BOUND,
    COMPLETE,
    CUTOFF,
    FOUND,
    LATER_ELEMENTS,
    LATER_UNITS,
    NODES,
    TAKEN,
)
from topoprune_solvers.domination.covering import SetCover
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["CoverOutcome", "Effort", "engine_and_effort", "search_small"]


@dataclass(frozen=True)
class Effort:
    """Search nodes a second, of one problem in a batch, of a call, between two looks at the clock, until hand-over."""

    compiled: bool
    per_second: float
    batch: int
    call: int
    chunk: int
    handover: int


COMPILED = Effort(True, 1e5, batch=2_000, call=4_000, chunk=2_000, handover=200_000)
PYTHON = Effort(False, 1e3, batch=20, call=40, chunk=20, handover=5_000)


@dataclass(frozen=True, eq=False)
class CoverOutcome:
    """What is known of the cheapest cover.

    Args:
        keep: (n,) bool, or None if there is none within the cutoff or none was found.
        bound: lower bound on the optimum. source: what proves it.
        complete: True if `keep` is optimal, or there is proven to be none within the cutoff.
        stats: counters, and under "failed" what crashed on the way.
    """

    keep: np.ndarray | None
    bound: float
    source: str
    complete: bool
    stats: dict[str, Any]


def search_small(instance: SetCover, *, cutoff: float = math.inf, deadline: Deadline = NEVER) -> CoverOutcome:
    """Search an instance of at most 64 candidates and 64 elements by branch and bound on bit sets.

    Args:
        instance: as in `minimum_cover`; `keep` of the outcome is a (c,) bool choice of its candidates.
        cutoff: largest cost of interest. deadline: asked every 50 ms or so.
    """
    engine, effort = engine_and_effort()
    work = Workspace(effort.compiled)
    elements, candidates = instance.n_elements, instance.n_candidates
    assert elements <= MOST_UNITS and candidates <= MOST_UNITS, "larger instances take the large path"
    rows, cols = [0] * MOST_UNITS, [0] * MOST_UNITS
    bounds, row = instance.row_start.tolist(), instance.row.tolist()
    for e in range(elements):
        for c in row[bounds[e] : bounds[e + 1]]:
            rows[e] |= 1 << c
            cols[c] |= 1 << e
    masks, numbers, counters = work.state
    full = work.masks([(1 << elements) - 1, (1 << candidates) - 1])
    masks[LATER_ELEMENTS], masks[LATER_UNITS] = full[0], full[1]
    numbers[CUTOFF] = cutoff
    counters[COMPLETE] = counters[FOUND] = 1
    cost = work.array(instance.cost.tolist() + [0.0] * (MOST_UNITS - candidates), np.float64)
    problem = work.masks(rows), work.masks(cols), cost, work.bit
    work.work[4][:elements] = work.array(instance.demand.tolist(), np.int64)
    hurry = deadline.passed()
    limit = 0 if hurry else effort.chunk
    while not engine.cover_search(problem, work.stack, work.work, work.state, limit, hurry):
        hurry = deadline.passed() or counters[NODES] >= effort.handover
        limit += effort.chunk
    stats = {"nodes": int(counters[NODES])}
    complete = bool(counters[COMPLETE])
    source = "branch and bound" if stats["nodes"] else "reductions"
    if not counters[FOUND]:
        bound = math.nextafter(cutoff, math.inf) if complete else 0.0
        return CoverOutcome(None, bound, source, complete, stats)
    taken = int(masks[TAKEN])
    keep = np.array([taken >> c & 1 for c in range(candidates)], dtype=bool)
    return CoverOutcome(keep, float(numbers[BOUND]), source, complete, stats)


def engine_and_effort() -> tuple[Any, Effort]:
    """Return the module whose functions run, compiled or not, and how much work to give them."""
    if enabled():
        from topoprune_solvers.domination import exact_kernels

        return exact_kernels, COMPILED
    from topoprune_solvers.domination import bitset_batch

    return bitset_batch, PYTHON

"""Prove that a handful of candidates cannot cover everything: for dense graphs, whose linear relaxation says little.

A random graph of 250 nodes and density 0.28 needs 6 nodes, its relaxation 3.6. Whether 5 would do is a search five
levels deep with a few million nodes, each of them some bit-set operations.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from topoprune_solvers.compiled import choose, enabled
from topoprune_solvers.domination.covering import SetCover
from topoprune_solvers.native import Channel, NativeTask
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["SOURCE", "cover_of_at_most", "few_picks_applies", "few_picks_task", "run_few_picks"]

SOURCE = "search over few picks"
MOST_PICKS = 16  # deeper searches do not end
MOST_CANDIDATES = 4_000
_CHUNK = 2_000  # nodes between two looks at the clock, some 10 ms compiled


def few_picks_applies(instance: SetCover, value: float) -> bool:
    """Return True if all costs are equal, all demands 1, and a cover of cost `value` has few enough candidates."""
    cost = instance.cost
    if not 0 < cost.size <= MOST_CANDIDATES or not instance.n_elements or cost[0] <= 0:
        return False
    same = bool(np.all(cost == cost[0]) and np.all(instance.demand == 1))
    return same and round(value / float(cost[0])) <= MOST_PICKS


def few_picks_task(instance: SetCover, value: float, bound: float, *, name: str = SOURCE) -> NativeTask:
    """Return the cover task (see `tally`) that asks for covers of ever more candidates, up to the known one.

    Args:
        instance: one to which `few_picks_applies`. value: cost of a known cover. bound: a known lower bound.
        name: source of the bounds.
    """
    return NativeTask(f"{__name__}:run_few_picks", (instance, value, bound), name)


def run_few_picks(channel: Channel, instance: SetCover, value: float, bound: float) -> dict[str, int]:
    """Raise the bound pick by pick until a cover is found or the known one is proven; the task's function."""
    cost = float(instance.cost[0])
    seconds = channel.remaining()
    deadline = Deadline.after(seconds) if math.isfinite(seconds) else NEVER
    nodes = 0
    for picks in range(max(1, math.ceil(bound / cost - 1e-9)), round(value / cost)):
        chosen, complete, more = cover_of_at_most(instance, picks, deadline)
        nodes += more
        if chosen is not None:
            channel.send(("cover", chosen))
            break
        if not complete:
            break
        channel.send(("bound", (picks + 1) * cost))
    return {"few_picks_nodes": nodes}


def cover_of_at_most(instance: SetCover, picks: int, deadline: Deadline = NEVER) -> tuple[np.ndarray | None, bool, int]:
    """Search for a cover of at most `picks` candidates; all demands are 1, costs play no part.

    At each node the `r` largest gains must add up to what is uncovered; candidates too small for that go, and the
    uncovered element with fewest candidates left is branched on, each later branch without the earlier candidates.

    Returns:
        A (c,) bool cover or None, whether the search ended (so None means there is none), and its nodes.

    Complexity: O(d^(picks - 1) nnz / 62) for elements of d candidates, usually far less.

    Example:
        >>> from topoprune_solvers import DominatingSet
        >>> from topoprune_solvers.domination.covering import cover_of, open_part
        >>> cycle = open_part(cover_of(DominatingSet.from_edges(7, [(i, (i + 1) % 7) for i in range(7)]))).instance
        >>> cover_of_at_most(cycle, 2)[:2]
        (None, True)
        >>> int(cover_of_at_most(cycle, 3)[0].sum())
        3
    """
    from topoprune_solvers.domination.few_picks_kernels import BITS, FOUND, OUT_OF_NODES, picks_kernel

    c, e = instance.n_candidates, instance.n_elements
    if picks < 1 or not e:
        return (np.zeros(c, dtype=bool), True, 0) if not e else (None, True, 0)
    words, slots = -(-e // BITS), -(-c // BITS)
    col = _bit_sets(instance.col_start, instance.col, words).T
    row = _bit_sets(instance.row_start, instance.row, slots)
    bare, free = np.zeros((picks + 1, words), dtype=np.int64), np.zeros((picks + 1, slots), dtype=np.int64)
    bare[0], free[0] = _full(e, words), _full(c, slots)
    place = np.full(picks, -1, dtype=np.int64)
    state = np.zeros(2, dtype=np.int64)
    arrays: list[Any] = [
        col.ravel(), row.ravel(), c, e, picks, bare.ravel(), free.ravel(), np.zeros(picks * c, dtype=np.int64),
        np.zeros(picks, dtype=np.int64), place, np.full(picks, -1, dtype=np.int64), np.zeros(c, dtype=np.int64),
        np.zeros(e + 1, dtype=np.int64), state,
    ]  # fmt: skip
    chunk = _CHUNK
    if not enabled():
        arrays = [array.tolist() if isinstance(array, np.ndarray) else array for array in arrays]
        chunk = 10
    step: Any = choose(picks_kernel)
    limit, answer = chunk, OUT_OF_NODES
    while answer == OUT_OF_NODES and not deadline.passed():
        answer = step(*arrays, limit)
        limit += chunk
    nodes = int(arrays[-1][1])
    if answer != FOUND:
        return None, answer != OUT_OF_NODES, nodes
    chosen = np.zeros(c, dtype=bool)
    chosen[[candidate for candidate in arrays[10] if candidate >= 0]] = True
    return chosen, True, nodes


def _bit_sets(start: np.ndarray, items: np.ndarray, words: int) -> np.ndarray:
    from topoprune_solvers.domination.few_picks_kernels import BITS

    owner = np.repeat(np.arange(start.size - 1), np.diff(start))
    sets = np.zeros((start.size - 1, words), dtype=np.int64)
    np.bitwise_or.at(sets, (owner, items // BITS), np.left_shift(np.int64(1), (items % BITS).astype(np.int64)))
    return sets


def _full(n: int, words: int) -> np.ndarray:
    return _bit_sets(np.array([0, n]), np.arange(n), words)[0]

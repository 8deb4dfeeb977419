"""Exact reductions of set cover: rules that shrink an instance and lead each of its covers back.

Every rule keeps at least one optimal cover. Together they reach further than alone: a dropped element shrinks
candidates, a dropped candidate shrinks elements, until one candidate is all an element has left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from topoprune_solvers.compiled import choose, enabled
from topoprune_solvers.domination.covering import SetCover
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["RULES", "Reduced", "Reduction", "components", "reduce_cover"]

RULES = ("candidate-subset", "element-subset", "unit", "empty", "free")
BUDGET = 4_000_000  # entries a kernel looks at between two looks at the clock: about 10 ms
_MASK_BITS = 62


@dataclass(frozen=True, eq=False)
class Reduced:
    """A smaller instance and the way back from its covers.

    Args:
        core: what is left to decide.
        candidates: (core candidates,) int64, their numbers in the larger instance.
        elements: (core elements,) int64, likewise.
        taken: numbers of the candidates chosen for good.
        size: number of candidates of the larger instance.
        fixed: cost of the taken candidates. A cover of the core costs this much less than what it inverts to.
    """

    core: SetCover
    candidates: np.ndarray
    elements: np.ndarray
    taken: np.ndarray
    size: int
    fixed: float

    def invert(self, chosen: np.ndarray) -> np.ndarray:
        """Return the (size,) bool choice of the larger instance for a (core candidates,) bool choice of the core."""
        full = np.zeros(self.size, dtype=bool)
        full[self.candidates[chosen]] = True
        full[self.taken] = True
        return full

    def then(self, later: Reduced) -> Reduced:
        """Return this reduction followed by one of its core."""
        return Reduced(
            later.core,
            self.candidates[later.candidates],
            self.elements[later.elements],
            np.concatenate([self.taken, self.candidates[later.taken]]),
            self.size,
            self.fixed + later.fixed,
        )


@dataclass(frozen=True)
class Reduction:
    """One or several rules, applied together until none of them finds anything.

    - ``candidate-subset``: a candidate goes whose elements another covers at no higher cost (twins: the lower
      index stays); only where all its elements demand 1. NeuroPrune's inclusion rule, with costs.
    - ``element-subset``: an element goes whose candidates include all of another one's that demands at least as much.
    - ``unit``: an element with just as many candidates as it demands takes them all.
    - ``empty``: a candidate without elements goes.
    - ``free``: a candidate without cost is taken.

    Args:
        rules: names out of `RULES`.

    Example:
        >>> from topoprune_solvers import DominatingSet
        >>> from topoprune_solvers.domination.covering import cover_of, open_part
        >>> path = DominatingSet.from_edges(4, [(0, 1), (1, 2), (2, 3)])
        >>> instance = open_part(cover_of(path)).instance
        >>> Reduction(("candidate-subset",)).apply(instance).candidates.tolist()
        [1, 2]
        >>> Reduction().apply(instance).taken.tolist()
        [0, 2]
    """

    rules: Sequence[str] = RULES

    def __post_init__(self) -> None:
        unknown = set(self.rules) - set(RULES)
        if unknown:
            raise ValueError(f"unknown rules {sorted(unknown)}; known: {', '.join(RULES)}")

    def apply(self, instance: SetCover, deadline: Deadline = NEVER) -> Reduced:
        """Return the reduced instance; whatever stage a deadline ends it at is valid.

        Complexity: each change has the rows and columns around it looked at again; a look at an element compares
        it with those of its smallest candidate only, so hubs cost little. 0.1 to 0.5 s for 100,000 sparse nodes.
        References: Weihe (1998), Covering trains by stations; Beasley (1987), An algorithm for set covering problem.
        """
        done = self._apply(instance, deadline)
        # Demands that fell may enable rules for elements that did not change otherwise.
        while done.again and not deadline.passed():
            more = self._apply(done.reduced.core, deadline)
            if more.reduced.core.row.size == done.reduced.core.row.size:
                break
            done = _Outcome(done.reduced.then(more.reduced), more.again)
        return done.reduced

    def _apply(self, instance: SetCover, deadline: Deadline) -> _Outcome:
        from topoprune_solvers.domination.reduction_kernels import reduce_kernel, take_kernel

        e, c = instance.n_elements, instance.n_candidates
        degree, size = np.diff(instance.row_start), np.diff(instance.col_start)
        alive_e, alive_c = np.ones(e, np.int8), np.ones(c, np.int8)
        if "empty" in self.rules:
            alive_c[size == 0] = 0
        arrays = [
            instance.row.copy(), instance.row_start, degree.copy(),
            instance.col.copy(), instance.col_start, size.copy(),
            instance.cost, instance.demand.copy(), alive_e, alive_c, degree.copy(), size.copy(),
            np.arange(e), np.ones(e, np.int8), np.arange(c), np.ones(c, np.int8),
            _signatures(instance.row_start, instance.row), _signatures(instance.col_start, instance.col),
            np.array([0, e, 0, c, 0]), np.array([rule in self.rules for rule in RULES[:4]], dtype=np.int64),
        ]  # fmt: skip
        budget = BUDGET
        if not enabled():
            arrays, budget = [array.tolist() for array in arrays], BUDGET // 50  # type: ignore[misc]
        free = np.flatnonzero(instance.cost == 0) if "free" in self.rules else np.zeros(0, np.int64)
        if free.size:
            choose(take_kernel)(free if enabled() else free.tolist(), *arrays)
        step: Callable[..., bool] = choose(reduce_kernel)
        while not deadline.passed() and step(*arrays, budget):
            pass
        demand, alive_e, alive_c = np.asarray(arrays[7], np.int64), np.asarray(arrays[8]), np.asarray(arrays[9])
        taken = np.flatnonzero(alive_c == 2)
        elements, candidates = np.flatnonzero(alive_e == 1), np.flatnonzero(alive_c == 1)
        core = _restrict(instance, elements, candidates, demand)
        fixed = float(instance.cost[taken].sum())
        return _Outcome(Reduced(core, candidates, elements, taken, c, fixed), bool(arrays[18][4]))


@dataclass(frozen=True, eq=False)
class _Outcome:
    reduced: Reduced
    again: bool


def reduce_cover(instance: SetCover, deadline: Deadline = NEVER) -> Reduced:
    """Apply all rules together until none of them finds anything, or until the deadline."""
    return Reduction().apply(instance, deadline)


def components(instance: SetCover) -> list[tuple[SetCover, np.ndarray, np.ndarray]]:
    """Split an instance into parts that share no candidate, by their lowest element.

    Returns:
        For each part the instance, the numbers of its candidates and of its elements. Candidates without
        elements are in none.

    Complexity: O(nnz log nnz).
    """
    e, c = instance.n_elements, instance.n_candidates
    if not e:
        return []
    owner = np.repeat(np.arange(e), np.diff(instance.row_start))
    link = sparse.csr_array((np.ones(owner.size, np.int8), (owner, e + instance.row)), shape=(e + c, e + c))
    _, label = connected_components(link, directed=False)
    order, first = np.unique(label[:e], return_index=True)
    rank = np.full(int(label.max()) + 1, order.size)
    rank[order[np.argsort(first)]] = np.arange(order.size)
    of_e, of_c = rank[label[:e]], rank[label[e:]]
    elements = np.split(np.argsort(of_e, kind="stable"), np.cumsum(np.bincount(of_e))[:-1])
    count_c = np.bincount(of_c, minlength=order.size + 1)
    candidates = np.split(np.argsort(of_c, kind="stable"), np.cumsum(count_c)[:-1])[: order.size]
    if order.size == 1 and candidates[0].size == c:
        return [(instance, candidates[0], elements[0])]
    local_e, local_c = np.empty(e, np.int32), np.empty(c, np.int32)
    for part_c, part_e in zip(candidates, elements, strict=True):
        local_e[part_e], local_c[part_c] = np.arange(part_e.size), np.arange(part_c.size)
    # Entries sorted by part: each part then is a slice of them.
    row, row_at = _grouped(instance.row_start, local_c[instance.row], elements)
    col, col_at = _grouped(instance.col_start, local_e[instance.col], candidates)
    parts = []
    for number, (part_c, part_e) in enumerate(zip(candidates, elements, strict=True)):
        part = SetCover(
            _starts(instance.row_start, part_e),
            row[row_at[number] : row_at[number + 1]],
            _starts(instance.col_start, part_c),
            col[col_at[number] : col_at[number + 1]],
            instance.cost[part_c],
            instance.demand[part_e],
        )
        parts.append((part, part_c, part_e))
    return parts


def _grouped(start: np.ndarray, items: np.ndarray, groups: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the items of all lines, lines in order of the groups, and where each group begins."""
    size = np.diff(start)
    lines = np.concatenate(groups)
    begin, length = start[lines], size[lines]
    ends = np.cumsum(length)
    position = np.arange(int(ends[-1]) if ends.size else 0) + np.repeat(begin - (ends - length), length)
    per_group = np.array([int(size[group].sum()) for group in groups])
    return items[position], np.concatenate([[0], np.cumsum(per_group)])


def _starts(start: np.ndarray, lines: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(start[lines + 1] - start[lines])])


def _restrict(instance: SetCover, elements: np.ndarray, candidates: np.ndarray, demand: np.ndarray) -> SetCover:
    """Return the instance on some elements and candidates. O(nnz)."""
    e, c = instance.n_elements, instance.n_candidates
    local_e, local_c = np.full(e, -1, np.int32), np.full(c, -1, np.int32)
    local_e[elements], local_c[candidates] = np.arange(elements.size), np.arange(candidates.size)
    row_start, row = _restrict_lines(instance.row_start, instance.row, local_e >= 0, local_c, elements.size)
    col_start, col = _restrict_lines(instance.col_start, instance.col, local_c >= 0, local_e, candidates.size)
    return SetCover(row_start, row, col_start, col, instance.cost[candidates], demand[elements])


def _restrict_lines(
    start: np.ndarray, items: np.ndarray, kept: np.ndarray, local: np.ndarray, lines: int
) -> tuple[np.ndarray, np.ndarray]:
    size = np.diff(start)
    number = local[items]
    inside = (number >= 0) & np.repeat(kept, size)
    before = np.concatenate([[0], np.cumsum(inside)])
    count = (before[start[1:]] - before[start[:-1]])[kept]
    assert count.size == lines
    return np.concatenate([[0], np.cumsum(count)]), number[inside]


def _signatures(start: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return (lines,) int64: a bit for each residue of the line's items. O(nnz)."""
    sign = np.zeros(start.size - 1, dtype=np.int64)
    filled = np.flatnonzero(np.diff(start))
    if filled.size:
        bits = np.left_shift(np.int64(1), items.astype(np.int64) % _MASK_BITS)
        sign[filled] = np.bitwise_or.reduceat(bits, start[filled])
    return sign

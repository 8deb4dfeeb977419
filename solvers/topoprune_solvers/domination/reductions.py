"""Exact reductions of a set-cover instance and its split into components, on Python integers as bit sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from topoprune_solvers.domination.covering import Cover
from topoprune_solvers.result import NEVER, Deadline

__all__ = ["Component", "Reduced", "bits", "reduce_cover"]


@dataclass(frozen=True, eq=False)
class Component:
    """An independent covering instance with local numbers.

    Args:
        units: original number of each candidate.
        rows: per element the bit set of candidates covering it.
        columns: per candidate the bit set of elements it covers.
        cost: (c,) float64 > 0.
    """

    units: list[int]
    rows: list[int]
    columns: list[int]
    cost: np.ndarray

    @property
    def size(self) -> int:
        """Larger of the numbers of candidates and elements."""
        return max(len(self.rows), len(self.columns))


@dataclass(frozen=True, eq=False)
class Reduced:
    """The units some optimal cover contains, and what is left to decide, smallest component first."""

    chosen: list[int]
    components: list[Component] = field(default_factory=list)


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the set bits, ascending.

    >>> list(bits(0b1010))
    [1, 3]
    """
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def reduce_cover(cover: Cover, deadline: Deadline = NEVER) -> Reduced:
    """Shrink an instance without losing all its optimal covers, then split it into components.

    To a fixed point: drop a candidate whose elements another one covers at no higher cost (the case in
    which NeuroPrune's rule is exact), drop an element that every cover of another one covers too, take a
    candidate that alone covers an element. Free candidates are taken first. The time limit only
    ends the shrinking early.

    Complexity: O(n degree^2 n / 64) word operations a round.
    References: Weihe (1998), Covering trains by stations or the power of data reduction.
    """
    elements = np.flatnonzero(cover.counts(cover.forced) == 0).tolist()
    open_unit = (~cover.forced & ~cover.forbidden).tolist()
    columns: dict[int, int] = {}
    rows: dict[int, int] = {}
    for element in elements:
        mask = 0
        for unit in cover.row(element).tolist():
            if open_unit[unit]:
                mask |= 1 << unit
                columns[unit] = columns.get(unit, 0) | 1 << element
        rows[element] = mask
    columns = dict(sorted(columns.items()))
    work = _Work(rows, columns, cover.cost.tolist())
    for unit in [unit for unit in columns if work.cost[unit] == 0]:
        if columns[unit]:
            work.take(unit)
    while not deadline.passed():
        before = len(rows), len(columns)
        work.drop_dominated_columns()
        work.drop_implied_rows()
        work.take_forced_columns()
        if (len(rows), len(columns)) == before:
            break
    return Reduced(work.chosen, sorted(_components(work), key=lambda part: part.size))


@dataclass(eq=False)
class _Work:
    rows: dict[int, int]
    columns: dict[int, int]
    cost: list[float]
    chosen: list[int] = field(default_factory=list)

    def take(self, unit: int) -> None:
        """Choose a candidate and remove what it covers."""
        self.chosen.append(unit)
        for element in bits(self.columns[unit]):
            self.drop_row(element)
        del self.columns[unit]

    def drop_row(self, element: int) -> None:
        for unit in bits(self.rows.pop(element)):
            self.columns[unit] &= ~(1 << element)

    def drop_dominated_columns(self) -> None:
        rows, columns, cost = self.rows, self.columns, self.cost
        for unit in list(columns):
            mine = columns[unit]
            if not mine:
                del columns[unit]
                continue
            # Whoever covers all my elements covers the first one.
            for other in bits(rows[(mine & -mine).bit_length() - 1]):
                theirs = columns[other]
                if other == unit or mine & ~theirs or cost[other] > cost[unit]:
                    continue
                if mine != theirs or cost[other] < cost[unit] or other < unit:
                    for element in bits(mine):
                        rows[element] &= ~(1 << unit)
                    del columns[unit]
                    break

    def drop_implied_rows(self) -> None:
        rows, columns = self.rows, self.columns
        for element in list(rows):
            if element not in rows:
                continue
            mine = rows[element]
            # An element implied by this one shares all its candidates, the first among them.
            for other in list(bits(columns[(mine & -mine).bit_length() - 1])):
                if other != element and not mine & ~rows[other] and (mine != rows[other] or element < other):
                    self.drop_row(other)

    def take_forced_columns(self) -> None:
        for element in list(self.rows):
            mask = self.rows.get(element)
            if mask is not None and not mask & (mask - 1):
                self.take(mask.bit_length() - 1)


def _components(work: _Work) -> Iterator[Component]:
    left = dict.fromkeys(work.rows)
    while left:
        elements = 1 << next(iter(left))
        units, frontier = 0, elements
        while frontier:
            reached = 0
            for element in bits(frontier):
                reached |= work.rows[element]
            reached &= ~units
            units |= reached
            frontier = 0
            for unit in bits(reached):
                frontier |= work.columns[unit]
            frontier &= ~elements
            elements |= frontier
        yield _local(work, list(bits(units)), list(bits(elements)))
        for element in bits(elements):
            del left[element]


def _local(work: _Work, units: list[int], elements: list[int]) -> Component:
    unit_number = {unit: number for number, unit in enumerate(units)}
    rows = [sum(1 << unit_number[unit] for unit in bits(work.rows[element])) for element in elements]
    columns = [0] * len(units)
    for number, row in enumerate(rows):
        for unit in bits(row):
            columns[unit] |= 1 << number
    return Component(units, rows, columns, np.array([work.cost[unit] for unit in units]))

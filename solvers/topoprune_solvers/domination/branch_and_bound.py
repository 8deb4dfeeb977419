"""Branch and bound for small set-cover instances on Python integers as bit sets."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from topoprune_solvers.domination.reductions import Component, bits
from topoprune_solvers.result import NEVER, Deadline
from topoprune_solvers.scaling import is_integral

__all__ = ["SearchOutcome", "branch_and_bound"]


@dataclass(frozen=True)
class SearchOutcome:
    """End of a search.

    Args:
        chosen: bit set of local candidates, or None if none within the cutoff was found.
        value: cost of `chosen`, inf without one.
        bound: lower bound on the optimum (above the cutoff: a proof that none is within it).
        complete: True if the search finished.
        nodes: search nodes visited.
    """

    chosen: int | None
    value: float
    bound: float
    complete: bool
    nodes: int


class _Stop(Exception):
    """Time or node limit reached, or the first good enough cover found."""


def branch_and_bound(
    part: Component,
    *,
    cutoff: float = math.inf,
    good_enough: float = -math.inf,
    deadline: Deadline = NEVER,
    node_limit: int | None = None,
) -> SearchOutcome:
    """Find a cheapest cover of one component, among those that cost at most `cutoff`.

    Each node computes a dual ascent (elements with few candidates first) and a size bound; it drops the
    candidates whose reduced cost exceeds what is still affordable, and branches on the candidates of
    the element with fewest of them, each later branch without the earlier candidates.

    Args:
        part: the instance; fast up to about 64 candidates. cutoff: largest cost of interest.
        good_enough: stop at the first cover that costs at most this.

    Complexity: exponential in the worst case; well under 1 ms for 12 units.
    References: Balas and Ho (1980), Set covering algorithms using cutting planes, heuristics and
        subgradient optimization, Math. Prog. Study 12.
    """
    search = _Search(part, cutoff, good_enough, deadline, node_limit)
    everything, available = (1 << len(part.rows)) - 1, (1 << len(part.columns)) - 1
    root_bound, _ = search.lower_bound(everything, available, math.inf)
    search.try_greedy(everything, available)
    complete = True
    try:
        search.check_good_enough()
        search.branch(everything, available, 0.0, 0)
    except _Stop:
        complete = search.value <= good_enough
    if search.chosen is None:
        bound = max(root_bound, math.nextafter(cutoff, math.inf)) if complete else root_bound
        return SearchOutcome(None, math.inf, bound, complete, search.nodes)
    stopped_early = search.value <= good_enough
    bound = search.value if complete and not stopped_early else min(root_bound, search.value)
    return SearchOutcome(search.chosen, search.value, bound, complete, search.nodes)


class _Search:
    """State of one search: the incumbent and the largest cost that still interests (`limit`)."""

    def __init__(
        self, part: Component, cutoff: float, good_enough: float, deadline: Deadline, node_limit: int | None
    ) -> None:
        self.rows, self.columns, self.cost = part.rows, part.columns, part.cost.tolist()
        self.order = sorted(range(len(self.rows)), key=lambda element: self.rows[element].bit_count())
        self.integral = is_integral(part.cost)
        self.limit = cutoff
        self.good_enough, self.deadline, self.node_limit = good_enough, deadline, node_limit
        self.chosen: int | None = None
        self.value = math.inf
        self.nodes = 0

    def accept(self, chosen: int, value: float) -> None:
        """Take a cover as the new incumbent; from now on only better ones are of interest."""
        self.chosen, self.value = chosen, value
        self.limit = value - 1 if self.integral else value * (1 - 1e-12)

    def check_good_enough(self) -> None:
        if self.value <= self.good_enough:
            raise _Stop

    def try_greedy(self, uncovered: int, available: int) -> None:
        chosen, value = 0, 0.0
        queue = [(self.cost[unit] / self.columns[unit].bit_count(), unit) for unit in bits(available)]
        heapq.heapify(queue)
        while uncovered:
            rate, unit = heapq.heappop(queue)
            fresh = (self.columns[unit] & uncovered).bit_count()
            if not fresh:
                continue
            if self.cost[unit] / fresh > rate:
                heapq.heappush(queue, (self.cost[unit] / fresh, unit))
                continue
            chosen |= 1 << unit
            value += self.cost[unit]
            uncovered &= ~self.columns[unit]
        if value <= self.limit:
            self.accept(chosen, value)

    def lower_bound(self, uncovered: int, available: int, room: float) -> tuple[float, int]:
        """Return a bound on covering the rest and the candidates that can still be part of a cover within `room`."""
        rows, slack = self.rows, self.cost.copy()
        total, tight = 0.0, 0
        for element in self.order:
            if not uncovered >> element & 1:
                continue
            candidates = rows[element] & available
            if candidates & tight:
                continue
            if not candidates:
                return math.inf, 0
            members = list(bits(candidates))
            rise = min(slack[unit] for unit in members)
            total += rise
            for unit in members:
                slack[unit] -= rise
                if slack[unit] <= 0:
                    tight |= 1 << unit
        if total > room:
            return total, 0
        best_rate = math.inf
        affordable = available
        for unit in bits(available):
            size = (self.columns[unit] & uncovered).bit_count()
            if not size or total + slack[unit] > room:
                affordable ^= 1 << unit
            elif self.cost[unit] / size < best_rate:
                best_rate = self.cost[unit] / size
        if best_rate < math.inf:
            total = max(total, best_rate * uncovered.bit_count() * (1 - 1e-12))
        return total, affordable

    def branch(self, uncovered: int, available: int, value: float, chosen: int) -> None:
        self.nodes += 1
        if self.nodes % 64 == 0 and self.deadline.passed():
            raise _Stop
        if self.node_limit is not None and self.nodes > self.node_limit:
            raise _Stop
        if not uncovered:
            if value <= self.limit:
                self.accept(chosen, value)
                self.check_good_enough()
            return
        bound, available = self.lower_bound(uncovered, available, self.limit - value)
        if value + bound > self.limit:
            return
        candidates = min(
            (self.rows[element] & available for element in bits(uncovered)), key=lambda mask: mask.bit_count()
        )
        ranked = sorted(
            bits(candidates),
            key=lambda unit: (self.cost[unit] / max(1, (self.columns[unit] & uncovered).bit_count()), unit),
        )
        for unit in ranked:
            available &= ~(1 << unit)
            self.branch(uncovered & ~self.columns[unit], available, value + self.cost[unit], chosen | 1 << unit)

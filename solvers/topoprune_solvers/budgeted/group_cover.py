"""Dominating sets within groups: is there a cover that can be completed within k and the groups' bounds?"""

from __future__ import annotations

import math
from importlib.util import find_spec

import numpy as np

from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.budgeted.service import GreedyRun, Service
from topoprune_solvers.domination.covering import Cover, open_part
from topoprune_solvers.domination.exact import minimum_cover
from topoprune_solvers.native import Channel, run_killable
from topoprune_solvers.result import NEVER, Deadline

__all__ = [
    "NativeFailure",
    "cover_by_group",
    "cover_in_groups",
    "cover_natively",
    "cover_with_cp_sat",
    "cover_with_highs",
    "decide",
    "greedy_in_groups",
]

SEARCH_UNITS = 64  # largest instance for the search on bit sets
IN_PROCESS = 256  # largest instance that an integer solver gets without a process of its own (0.3 s to start one)
SEARCH_NODES = 20_000  # about a second; an integer solver takes over


def greedy_in_groups(cover: Cover, groups: Groups, deadline: Deadline = NEVER) -> np.ndarray:
    """Return an extendable selection: the fitting unit that newly covers most, until all is covered or nothing fits.

    Where it ends without a cover, one may still exist. O((n + nnz) log n).
    """
    if not cover.n:
        return np.zeros(0, dtype=bool)
    service = Service.build(cover.indptr, cover.indices, np.ones(cover.indices.size), np.ones(cover.n))
    run = GreedyRun(service, groups, cover.forced, ~cover.forbidden)
    run.take(groups.k - int(cover.forced.sum()), deadline, least=0.0)
    return run.keep


def cover_in_groups(cover: Cover, groups: Groups, deadline: Deadline, seed: int) -> tuple[np.ndarray | None, bool]:
    """Decide whether an extendable cover exists; (cover or None, whether a None is proven).

    Groups that no edge joins are decided one by one, each by its smallest cover. Otherwise: greedy, a search
    on bit sets up to 64 units, and CP-SAT (HiGHS where OR-Tools is missing).
    """
    if groups.separate(cover.indptr, cover.indices):
        return cover_by_group(cover, groups, deadline, seed)
    keep = greedy_in_groups(cover, groups, deadline)
    if np.all(cover.counts(keep) > 0):
        return keep, True
    if cover.n <= SEARCH_UNITS:
        found, decided = _Search(cover, groups, deadline).run()
        if decided or deadline.passed():
            return found, decided
    return cover_natively("CP-SAT" if find_spec("ortools") is not None else "HiGHS", cover, groups, deadline, seed)


def cover_by_group(cover: Cover, groups: Groups, deadline: Deadline, seed: int) -> tuple[np.ndarray | None, bool]:
    """Decide where no edge joins two groups: there is an extendable cover iff the smallest of each group fit."""
    keep = np.zeros(cover.n, dtype=bool)
    spent, least, complete = 0, 0, True
    rest = int(groups.low.sum())
    for group in range(groups.low.size):
        units = np.flatnonzero(groups.label == group)
        low, high = int(groups.low[group]), int(groups.high[group])
        rest -= low
        part = _restricted(cover, units)
        own = greedy_in_groups(part, Groups(np.zeros(units.size, dtype=np.int64), *_exactly(low), low), deadline)
        lower = low
        if np.any(part.counts(own) == 0):
            outcome = minimum_cover(part, deadline=deadline, seed=seed)
            assert outcome.keep is not None, "the instance is coverable"
            own, complete = outcome.keep, complete and outcome.complete
            lower = max(low, math.ceil(outcome.bound - 1e-6))
        size = int(own.sum())
        least += lower
        if lower > high or least + rest > groups.k:
            return None, True
        spent += max(low, size)
        keep[units[own]] = True
        if size > high or spent + rest > groups.k:
            if complete:
                return None, True
            # Too large, but perhaps not the smallest: go on only to prove that nothing fits.
            spent = groups.k + 1
    return (keep, True) if groups.extendable(keep) else (None, complete)


def _exactly(number: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array([number]), np.array([number])


def _restricted(cover: Cover, units: np.ndarray) -> Cover:
    """Return the instance on some units that no edge joins to the others."""
    local = np.full(cover.n, -1, dtype=np.int64)
    local[units] = np.arange(units.size)
    size = np.diff(cover.indptr)[units]
    inside = np.repeat(local >= 0, np.diff(cover.indptr))
    return Cover(
        np.concatenate([[0], np.cumsum(size)]),
        local[cover.indices[inside]],
        cover.cost[units],
        cover.forced[units],
        cover.forbidden[units],
    )


class _Search:
    """Depth-first over the unit that covers the uncovered element with fewest candidates; bit sets of units."""

    def __init__(self, cover: Cover, groups: Groups, deadline: Deadline) -> None:
        self.groups, self.deadline = groups, deadline
        self.label, self.low, self.high = groups.label.tolist(), groups.low.tolist(), groups.high.tolist()
        self.rows = [sum(1 << unit for unit in cover.row(element).tolist()) for element in range(cover.n)]
        self.members = [
            sum(1 << unit for unit in np.flatnonzero(groups.label == group).tolist()) for group in range(len(self.low))
        ]
        self.forced = np.flatnonzero(cover.forced).tolist()
        self.free = sum(1 << unit for unit in np.flatnonzero(~cover.forced & ~cover.forbidden).tolist())
        self.n, self.nodes = cover.n, 0

    def run(self) -> tuple[np.ndarray | None, bool]:
        count = [0] * len(self.low)
        uncovered = (1 << self.n) - 1
        for unit in self.forced:
            count[self.label[unit]] += 1
            uncovered &= ~self.rows[unit]
        try:
            chosen = self._descend(uncovered, self.free, count, [])
        except TimeoutError:
            return None, False
        if chosen is None:
            return None, True
        keep = np.zeros(self.n, dtype=bool)
        keep[self.forced + chosen] = True
        return keep, True

    def _descend(self, uncovered: int, free: int, count: list[int], chosen: list[int]) -> list[int] | None:
        if not uncovered:
            return list(chosen)
        self.nodes += 1
        if self.nodes > SEARCH_NODES or (self.nodes % 64 == 0 and self.deadline.passed()):
            raise TimeoutError
        slack = self.groups.k - sum(map(max, self.low, count))
        for group, number in enumerate(count):
            if number >= self.high[group] or (number >= self.low[group] and slack <= 0):
                free &= ~self.members[group]
        left = self.groups.k - sum(count)
        fewest, branch, packed, used = self.n + 1, 0, 0, 0
        rest = uncovered
        while rest:
            bit = rest & -rest
            rest ^= bit
            candidates = self.rows[bit.bit_length() - 1] & free
            number = candidates.bit_count()
            if number < fewest:
                fewest, branch = number, candidates
            if not candidates & used:
                # Elements without a common candidate each need a unit of their own.
                used |= candidates
                packed += 1
        if fewest == 0 or packed > left:
            return None
        units = [unit for unit in range(self.n) if branch >> unit & 1]
        units.sort(key=lambda unit: (-(self.rows[unit] & uncovered).bit_count(), unit))
        for unit in units:
            free &= ~(1 << unit)
            count[self.label[unit]] += 1
            chosen.append(unit)
            found = self._descend(uncovered & ~self.rows[unit], free, count, chosen)
            if found is not None:
                return found
            chosen.pop()
            count[self.label[unit]] -= 1
        return None


class NativeFailure(RuntimeError):
    """A native solver crashed; the message says which and how."""


def cover_natively(
    solver: str, cover: Cover, groups: Groups, deadline: Deadline, seed: int
) -> tuple[np.ndarray | None, bool]:
    """Decide by CP-SAT or HiGHS: small instances here, large ones in a process that can be killed.

    Raises:
        NativeFailure: the process crashed or ran out of memory.
    """
    if cover.n <= IN_PROCESS:
        return decide(None, solver, cover, groups, deadline, seed)
    if deadline.passed():
        return None, False
    outcome = run_killable(f"{__name__}:decide", (solver, cover, groups, None, seed), deadline=deadline)
    if outcome.state == "crashed":
        raise NativeFailure(f"{solver}: {outcome.message}")
    return (None, False) if outcome.value is None else outcome.value


def decide(
    channel: Channel | None, solver: str, cover: Cover, groups: Groups, deadline: Deadline | None, seed: int
) -> tuple[np.ndarray | None, bool]:
    """Call one of the two solvers; with a channel as the function of a process, under the limit it has."""
    if deadline is None:
        assert channel is not None
        seconds = channel.remaining()
        deadline = Deadline.after(seconds if math.isfinite(seconds) else None)
    if solver == "CP-SAT":
        return cover_with_cp_sat(cover, groups, deadline, seed)
    return cover_with_highs(cover, groups, deadline)


def cover_with_cp_sat(cover: Cover, groups: Groups, deadline: Deadline, seed: int) -> tuple[np.ndarray | None, bool]:
    """Decide by CP-SAT whether an extendable cover exists (one worker, so that runs repeat)."""
    if deadline.passed():
        return None, False
    from ortools.sat.python import cp_model

    part = open_part(cover)
    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in range(part.units.size)]
    for element in range(part.elements.size):
        model.add_bool_or([variables[unit] for unit in part.instance.candidates(element).tolist()])
    count = groups.count(cover.forced)
    label = groups.label[part.units]
    model.add(sum(variables) == groups.k - int(count.sum()))
    if not groups.single:
        for group in range(groups.low.size):
            own = [variables[unit] for unit in np.flatnonzero(label == group).tolist()]
            low, high = int(groups.low[group] - count[group]), int(groups.high[group] - count[group])
            model.add_linear_constraint(cp_model.LinearExpr.sum(own), max(0, low), high)
    solver = cp_model.CpSolver()
    # Level 2 puts the clauses into the LP; without it the search refutes little.
    solver.parameters.linearization_level = 2
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed & 0x7FFFFFFF
    if math.isfinite(deadline.at):
        solver.parameters.max_time_in_seconds = deadline.remaining()
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, status == cp_model.INFEASIBLE
    chosen = np.array([solver.boolean_value(variable) for variable in variables], dtype=bool)
    return part.keep(cover, chosen), True


def cover_with_highs(cover: Cover, groups: Groups, deadline: Deadline) -> tuple[np.ndarray | None, bool]:
    """Decide by HiGHS whether an extendable cover exists; all numbers in the program are small integers."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    part = open_part(cover)
    size, g = part.units.size, groups.low.size
    if not size:
        return (cover.forced.copy(), True) if not part.elements.size else (None, True)
    count = groups.count(cover.forced)
    row_start, row = part.instance.row_start, part.instance.row
    covers = sparse.csr_array((np.ones(row.size), row, row_start), shape=(part.elements.size, size))
    own = np.arange(size)
    place = np.concatenate([groups.label[part.units], np.full(size, g)]), np.concatenate([own, own])
    counts = sparse.csr_array((np.ones(2 * size), place), shape=(g + 1, size))
    total = groups.k - int(count.sum())
    constraints = [
        LinearConstraint(counts, lb=np.append(groups.low - count, total), ub=np.append(groups.high - count, total))
    ]
    if part.elements.size:
        constraints.append(LinearConstraint(covers, lb=1.0))
    if deadline.passed():
        return None, False
    result = milp(
        np.zeros(size),
        integrality=np.ones(size, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": deadline.remaining()},
    )
    if result.x is None:
        return None, result.status == 2
    keep = part.keep(cover, result.x > 0.5)
    fine = bool(np.all(cover.counts(keep) > 0)) and groups.extendable(keep)
    return (keep, True) if fine else (None, False)

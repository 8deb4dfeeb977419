"""Layer budgets with OR-Tools CP-SAT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.knapsack.core import Core, NoChoiceFound, core_of, start_pick
from topoprune_solvers.knapsack.dual import EPSILON, SOURCE, best_prices
from topoprune_solvers.knapsack.local_search import best_repaired
from topoprune_solvers.problems import MultipleChoiceKnapsack
from topoprune_solvers.result import NEVER, Deadline, mask_solution
from topoprune_solvers.scaling import integer_costs
from topoprune_solvers.solution import Bound, Infeasible, Solution, best_bound

__all__ = ["CpSatKnapsack", "CpSatPick", "any_pick", "cp_sat_pick"]


@dataclass(frozen=True)
class CpSatKnapsack:
    """One Boolean per choice, exactly one per site, one linear row per budget.

    Costs are scaled to integers and rounded down, so the integer problem allows every pick that the
    floats allow and its bound is valid; a pick it returns that breaks a float budget by less than the
    rounding is excluded and the search goes on.

    Args:
        num_workers: CP-SAT threads; one by default, so that runs repeat exactly.
    """

    num_workers: int = 1
    name: str = "cp-sat"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=MultipleChoiceKnapsack,
        exact=True,
        guarantee="optimal given time (to 1e-9), else the incumbent with the better of CP-SAT's and the dual bound",
        complexity="exponential in the worst case",
        requires=("ortools",),
        reference="Perron, Didier, Gay (2023), The CP-SAT-LP solver, CP 2023",
        when="an independent proof, or budgets in conflict",
    )

    def solve(
        self,
        problem: MultipleChoiceKnapsack,
        *,
        warm_start: Any = None,
        time_limit: float | None = None,
        seed: int = 0,
    ) -> Solution:
        """Return CP-SAT's best pick, never worse than the repaired Lagrangian one or the warm start.

        Raises:
            Infeasible: the budgets conflict, proven.
            NoChoiceFound: the time limit struck before a choice within all budgets was found.
        """
        deadline = Deadline.after(time_limit)
        core = core_of(problem)
        if core.sites == 0:
            return mask_solution(problem, np.zeros(0, dtype=bool), self.name, bound=Bound(0.0, "no sites"))
        dual = best_prices(core, deadline=deadline)
        pick = start_pick(core, warm_start)
        try:
            found = best_repaired(core, dual.picks, dual.price, deadline)
            if pick is None or core.objective(found) < core.objective(pick):
                pick = found
        except NoChoiceFound:
            pass
        upper = math.inf if pick is None else core.objective(pick)
        part = core
        if pick is not None:
            value = core.damage + core.cost @ dual.price
            open_choice = dual.value + (value - core.site_min(value)[core.site]) <= upper
            open_choice[pick] = True
            part = core.only(open_choice)
        outcome = cp_sat_pick(
            part, hint=pick, whole=core, upper=upper, deadline=deadline, seed=seed, workers=self.num_workers
        )
        if outcome.pick is not None and core.objective(outcome.pick) < upper:
            pick = outcome.pick
        if pick is None:
            raise NoChoiceFound("CP-SAT found no choice within all budgets in time; allow more time_limit")
        bound = best_bound("min", [Bound(dual.value, SOURCE), Bound(outcome.bound, "CP-SAT")])
        return mask_solution(
            problem,
            core.keep(pick),
            self.name,
            bound=bound,
            timed_out=not outcome.proven,
            stats={"branches": outcome.branches, "conflicts": outcome.conflicts},
        )


@dataclass(frozen=True, eq=False)
class CpSatPick:
    """Result of CP-SAT: a (s,) pick of the whole core or None, a lower bound, and whether the search finished."""

    pick: np.ndarray | None
    bound: float
    proven: bool
    branches: int = 0
    conflicts: int = 0


def any_pick(core: Core, *, deadline: Deadline = NEVER, seed: int = 0) -> np.ndarray:
    """Return a feasible pick that CP-SAT finds.

    Raises:
        Infeasible: there is none. NoChoiceFound: the clock stopped the search.
    """
    outcome = cp_sat_pick(core, whole=core, deadline=deadline, seed=seed, first=True)
    if outcome.pick is None:
        raise NoChoiceFound("no choice within all budgets was found in time; allow more time_limit")
    return outcome.pick


def cp_sat_pick(
    core: Core,
    *,
    whole: Core,
    hint: np.ndarray | None = None,
    upper: float = math.inf,
    first: bool = False,
    effort: float = math.inf,
    deadline: Deadline = NEVER,
    seed: int = 0,
    workers: int = 1,
) -> CpSatPick:
    """Minimise over the choices of a core, or find the `first` feasible pick.

    Args:
        core: choices to search, a part of `whole`, whose positions `hint` and the returned pick use.
        upper: objective of a known pick; the bound is at most this, for picks outside the part are not below it.
        effort: CP-SAT's deterministic time, about seconds; unlike a clock it repeats exactly.

    Raises:
        Infeasible: no pick of the core keeps the budgets and no `hint` is known.
    """
    if deadline.passed():
        return CpSatPick(None, -math.inf, False)
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    variables = [model.new_bool_var("") for _ in range(core.damage.size)]
    for begin, end in zip(core.start[:-1].tolist(), core.start[1:].tolist(), strict=True):
        model.add_exactly_one(variables[begin:end])
    for j in range(core.resource.size):
        scaled = integer_costs(core.cost[:, j])
        # Exact arithmetic: a float quotient could fall below a whole number and cut off a feasible pick.
        limit = math.floor(Fraction(float(core.outer[j])) / Fraction(scaled.unit))
        total = int(scaled.values.sum())
        if limit < total:
            model.add(cp_model.LinearExpr.weighted_sum(variables, scaled.values.tolist()) <= limit)
    least = core.site_min(core.damage)
    above = core.damage - least[core.site]
    # No pick that is better than `upper` holds a choice dearer than this.
    base = math.fsum(least.tolist())
    goal = integer_costs(np.minimum(above, max(upper - base, 0.0) * 2) if math.isfinite(upper) else above)
    if not first:
        model.minimize(cp_model.LinearExpr.weighted_sum(variables, goal.values.tolist()))
    if hint is not None:
        chosen = np.isin(core.choice, whole.choice[hint])
        for variable, value in zip(variables, chosen.tolist(), strict=True):
            model.add_hint(variable, value)
    slack = 4 * EPSILON * float((np.abs(least) + np.maximum.reduceat(above, core.start[:-1])).sum())
    branches = conflicts = 0
    while True:
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = workers
        solver.parameters.random_seed = seed & 0x7FFFFFFF
        solver.parameters.linearization_level = 2
        solver.parameters.stop_after_first_solution = first
        if math.isfinite(effort):
            solver.parameters.max_deterministic_time = effort
        if math.isfinite(deadline.at):
            solver.parameters.max_time_in_seconds = deadline.remaining()
        status = solver.solve(model)
        branches, conflicts = branches + int(solver.num_branches), conflicts + int(solver.num_conflicts)
        if status == cp_model.INFEASIBLE:
            if hint is None:
                raise Infeasible("no choice at each site keeps all budgets at once: the budgets conflict (CP-SAT)")
            return CpSatPick(None, upper, True, branches, conflicts)
        found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
        bound = -math.inf if first else min(upper, solver.best_objective_bound * goal.unit + base - slack)
        if not found:
            return CpSatPick(None, bound, False, branches, conflicts)
        local = np.flatnonzero([solver.boolean_value(variable) for variable in variables])
        pick = np.searchsorted(whole.choice, core.choice[local])
        if whole.feasible(pick):
            return CpSatPick(pick, bound, status == cp_model.OPTIMAL or first, branches, conflicts)
        if status != cp_model.OPTIMAL or deadline.passed():
            return CpSatPick(None, bound, False, branches, conflicts)
        # Over a budget by less than the integers resolve: exclude this pick alone.
        model.add_bool_or([variables[position].negated() for position in local.tolist()])


register(CpSatKnapsack())

"""Attachment-weighted edge selection at scale: exact row prefixes, a price for the budget, a repair to exactly k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.common import bounded_sides, edge_solution, edge_start, only_selection
from topoprune_solvers.edges.count_bound import count_bound
from topoprune_solvers.edges.degree_repair import repair_degrees
from topoprune_solvers.edges.row_values import budget_price, row_values
from topoprune_solvers.edges.sorting import select_edges
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.result import Deadline
from topoprune_solvers.solution import Bound, Solution, relative_gap

__all__ = ["LagrangianEdges"]


@dataclass(frozen=True)
class LagrangianEdges:
    """Price an edge so that the rows, each choosing its best degree, keep about k together; then repair to k.

    The price that bounds best is found exactly (the bound is piecewise linear in it). Only rows whose worth is
    not concave jump there, usually one; the gap is at most what that one row loses at an intermediate degree, so it
    shrinks with the number of rows. Where it is above `tolerance`, a branch on the number of rows above that degree
    (`count_bound`) closes most of it. Takes row bounds and any attachment; exact at attachment 0.

    Weak where rows are few and several of them jump.

    Args:
        tolerance: relative gap that needs no branch.
    """

    name: str = "lagrangian"
    tolerance: float = 1e-6
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=EdgeSelection,
        exact=False,
        guarantee="certified gap; it is at most the loss of one row at an intermediate degree, if no two rows tie",
        complexity="O(n log n_cols) and 10 to 30 passes over the rows still open, at most 50 more to close the gap",
        reference="Everett (1963), Generalized Lagrange multiplier method, Oper. Res. 11; Aubin and Ekeland (1976)",
        when="attachment > 0 at any size; row bounds allowed",
        lacks=("column bounds",),
    )

    def solve(
        self, problem: EdgeSelection, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the repaired selection, the top k or a feasible warm start (n,), whichever is best.

        Raises:
            ValueError: column bounds.
        """
        if "column" in bounded_sides(problem):
            raise ValueError(
                f"solver {self.name!r} takes no column bounds; use 'greedy' (bounds on one side), 'dual-flow' or "
                "'min-cost-flow' (attachment 0), or 'cp-sat' (small instances)"
            )
        deadline = Deadline.after(time_limit)
        only = only_selection(problem)
        if only is not None:
            return edge_solution(problem, only, self.name, bound=Bound(problem.objective(only), "only selection"))
        table = row_values(problem)
        price = budget_price(table, problem.k)
        candidates = [table.mask(repair_degrees(table, problem.k, price, deadline))]
        if problem.attachment:
            candidates.append(select_edges(problem, problem.score))
        given = edge_start(problem, warm_start)
        if given is not None:
            candidates.append(given)
        best = max(candidates, key=problem.objective)
        objective = problem.objective(best)
        bound = Bound(price.bound, "Lagrangian over rows")
        jump = price.more - price.fewer
        if relative_gap(objective, bound.value) > self.tolerance and np.any(jump) and not deadline.passed():
            # The odd row's degree in a selection of k edges that leaves the other rows as they are.
            row = int(jump.argmax())
            degree = int(price.fewer[row]) + (problem.k - int(price.fewer.sum())) % int(jump[row])
            split = min(max(degree - 1, 0), problem.shape[1] - 1)
            goal = objective + self.tolerance / 10 * abs(objective)
            tighter = count_bound(table, problem.k, price, split, goal, deadline)
            if tighter < bound.value:
                bound = Bound(tighter, "Lagrangian over rows, branching on the number of long rows")
        return edge_solution(
            problem,
            best,
            self.name,
            bound=bound,
            stats={"price": price.price, "jumping_rows": int(np.count_nonzero(jump))},
        )


register(LagrangianEdges())

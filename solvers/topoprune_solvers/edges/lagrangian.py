"""Attachment-weighted edge selection at scale: exact row prefixes, a price for the budget, a repair to exactly k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.edges.common import bounded_sides, edge_solution, edge_start, only_selection
from topoprune_solvers.edges.degree_repair import repair_degrees
from topoprune_solvers.edges.row_values import budget_price, row_values
from topoprune_solvers.edges.sorting import select_edges
from topoprune_solvers.problems import EdgeSelection
from topoprune_solvers.result import Deadline
from topoprune_solvers.solution import Bound, Solution

__all__ = ["LagrangianEdges"]


@dataclass(frozen=True)
class LagrangianEdges:
    """Price an edge so that the rows, each choosing its best degree, keep about k together; then repair to k.

    The price that bounds best is found exactly (the bound is piecewise linear in it). Only rows whose worth is
    not concave jump there, usually one; the gap is at most what that one row loses at an intermediate degree, so it
    shrinks with the number of rows. Takes row bounds and any attachment; exact at attachment 0.

    Weak where rows are few, or where an optimal price makes whole rows jump that are long against k.
    """

    name: str = "lagrangian"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=EdgeSelection,
        exact=False,
        guarantee="certified gap; it is at most the loss of one row at an intermediate degree, if no two rows tie",
        complexity="O(n log n_cols) and 10 to 30 passes over the rows still open",
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
        return edge_solution(
            problem,
            best,
            self.name,
            bound=Bound(price.bound, "Lagrangian over rows"),
            stats={"price": price.price, "jumping_rows": int(np.count_nonzero(price.fewer != price.more))},
        )


register(LagrangianEdges())

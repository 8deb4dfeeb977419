"""Edge selection by sorting; with attachment, by re-scoring and sorting again."""

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
from topoprune_solvers.solution import Bound, Solution

__all__ = ["GreedyEdges"]


@dataclass(frozen=True)
class GreedyEdges:
    """Keep the k best-scored edges; with attachment, move them to the rows that then have many.

    Attachment 0: sorting, exact, also with degree bounds on one side. Attachment > 0: three
    candidates compete.

    1. The plain top k.
    2. Re-scoring. The gain -attachment * f is convex in the degrees, so its tangent lies below
       it: selecting by ``score_ij - attachment / n_cols * f'(d_i / n_cols)`` and repeating
       never lowers the objective (minorise-maximise).
    3. The degrees of the Lagrangian, repaired to exactly k edges, then re-scored (without column bounds).

    The best one wins among those whose degree spread is at least that of the top k. So the
    result is never worse than the top k, and attachment never lowers the degree sd. Reading a
    needs no such filter: there ``sum f`` is a constant minus the sum of squared degrees over
    2 n_cols^2, and anything at least as good as the top k, whose score sum is largest, has a
    ``sum f`` at most as large. Reading b orders degrees by their logarithms; that
    the sd follows there is an observation (no exception in 45,000 random instances), not a theorem.

    Weak where rows are many and short: a degree jump of a whole row is then coarse against k.

    Args:
        rounds: largest number of re-scorings from one start.
    """

    name: str = "greedy"
    rounds: int = 12
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=EdgeSelection,
        exact=False,
        guarantee="optimal at attachment 0; else at least the top k, with a Lagrangian bound; bounds on one side only",
        complexity="O(n) at attachment 0 (O(n log n_cols) with bounds), else O(n log n_cols) and a few passes",
        reference="re-scoring: Hunter and Lange (2004), A tutorial on MM algorithms, Am. Stat. 58",
        when="attachment 0 with bounds on one side at most (exact), and attachment with column bounds",
        lacks=("two-sided bounds",),
    )

    def solve(
        self, problem: EdgeSelection, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return the best candidate; a feasible warm start (n,) competes too. The work is bounded.

        Raises:
            ValueError: degree bounds on both sides.
        """
        sides = bounded_sides(problem)
        if len(sides) == 2:
            raise ValueError(
                f"solver {self.name!r} takes degree bounds on rows or on columns, this problem has both; "
                "use 'dual-flow' or 'min-cost-flow' (attachment 0) or 'cp-sat' (small instances)"
            )
        only = only_selection(problem)
        if only is not None:
            return edge_solution(problem, only, self.name, bound=Bound(problem.objective(only), "only selection"))
        top = select_edges(problem, problem.score)
        if not problem.attachment:
            return edge_solution(problem, top, self.name, bound=Bound(problem.objective(top), "sorting"))

        table = row_values(problem)
        price = budget_price(table, problem.k)
        starts = [top]
        if "column" not in sides:
            starts.append(table.mask(repair_degrees(table, problem.k, price)))
        given = edge_start(problem, warm_start)
        if given is not None:
            starts.append(given)
        candidates, rounds = [top], 0
        for start in starts:
            reached, passes = self._rescore(problem, start)
            candidates += [start, reached]
            rounds += passes
        spread = _squared_degrees(top)
        allowed = [mask for mask in candidates if _squared_degrees(mask) >= spread]
        best = max(allowed, key=problem.objective)
        return edge_solution(
            problem,
            best,
            self.name,
            bound=Bound(price.bound, "Lagrangian over rows"),
            stats={"rounds": rounds, "dropped_for_spread": len(candidates) - len(allowed)},
        )

    def _rescore(self, problem: EdgeSelection, mask: np.ndarray) -> tuple[np.ndarray, int]:
        # Returns the mask no re-scoring improves any more (or the last one) and the passes made.
        value = problem.objective(mask)
        for passes in range(self.rounds):
            slope = problem.attachment / problem.shape[1] * problem.degree_cost_slope(mask.sum(axis=1))
            following = select_edges(problem, problem.score - slope[:, None])
            reached = problem.objective(following)
            if not reached > value:
                return mask, passes + 1
            mask, value = following, reached
        return mask, self.rounds


def _squared_degrees(mask: np.ndarray) -> int:
    # Orders the degree sds, and exactly so: rows and edges are the same in number.
    return int((mask.sum(axis=1, dtype=np.int64) ** 2).sum())


register(GreedyEdges())

"""Exact budgeted domination: the threshold search with an oracle that proves its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.budgeted.group_cover import cover_in_groups, cover_natively
from topoprune_solvers.budgeted.groups import Groups
from topoprune_solvers.budgeted.k_centre import Oracle, ThresholdSearch
from topoprune_solvers.domination.covering import Cover
from topoprune_solvers.domination.exact import minimum_cover
from topoprune_solvers.domination.greedy import best_greedy_cover
from topoprune_solvers.problems import BudgetedDomination
from topoprune_solvers.result import Deadline, check_start
from topoprune_solvers.solution import Solution

__all__ = ["CpSatKCentre", "ExactKCentre", "cp_sat_oracle", "exact_oracle"]


@dataclass(frozen=True)
class ExactKCentre:
    """Prove for one threshold that k units suffice, and for the next smaller one that they do not.

    Filling the cover up to k units cannot lower the radius below the first threshold: that would be a
    selection the second proof excludes.
    """

    name: str = "exact"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=BudgetedDomination,
        exact=True,
        guarantee="optimal given time (above 64 units a component: if OR-Tools is installed)",
        complexity="O(log m) exact dominating-set decisions",
        reference="Minieka (1970), The m-center problem, SIAM Review 12",
        when="heads: the default; neurons with a time limit",
    )

    def solve(
        self, problem: BudgetedDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal selection, or the best one in time with what is proven."""
        source = "exact oracle at the next smaller threshold"
        return _solve(self.name, problem, exact_oracle, source, warm_start, time_limit, seed)


@dataclass(frozen=True)
class CpSatKCentre:
    """The same search with CP-SAT deciding each threshold (one worker, so that runs repeat)."""

    name: str = "cp-sat"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=BudgetedDomination,
        exact=True,
        guarantee="optimal given time",
        complexity="O(log m) CP-SAT decisions",
        requires=("ortools",),
        reference="Perron, Didier, Gay (2023), The CP-SAT-LP solver, CP 2023",
        when="a second opinion on `exact`",
    )

    def solve(
        self, problem: BudgetedDomination, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return an optimal selection, or the best one in time with what is proven."""
        source = "CP-SAT at the next smaller threshold"
        return _solve(self.name, problem, cp_sat_oracle, source, warm_start, time_limit, seed)


def exact_oracle(cover: Cover, groups: Groups, deadline: Deadline, seed: int) -> tuple[np.ndarray | None, bool]:
    """Decide by reductions, components and search whether k units within the groups' bounds can cover an instance."""
    if not groups.single and groups.separate(cover.indptr, cover.indices):
        return cover_in_groups(cover, groups, deadline, seed)
    outcome = minimum_cover(cover, cutoff=float(groups.k), deadline=deadline, seed=seed)
    if outcome.keep is None:
        return None, outcome.complete
    if groups.extendable(outcome.keep):
        return outcome.keep, True
    return cover_in_groups(cover, groups, deadline, seed)


def cp_sat_oracle(cover: Cover, groups: Groups, deadline: Deadline, seed: int) -> tuple[np.ndarray | None, bool]:
    """Decide by CP-SAT whether k units within the groups' bounds can cover an instance; greedy is asked first."""
    keep = best_greedy_cover(cover)
    if groups.extendable(keep):
        return keep, True
    return cover_natively("CP-SAT", cover, groups, deadline, seed)


def _solve(
    name: str,
    problem: BudgetedDomination,
    oracle: Oracle,
    source: str,
    warm_start: Any,
    time_limit: float | None,
    seed: int,
) -> Solution:
    search = ThresholdSearch.start(problem, check_start(problem, warm_start), Deadline.after(time_limit))
    if problem.k < problem.n:
        search.exact_phase(oracle, seed)
    return search.solution(name, source)


register(ExactKCentre())
register(CpSatKCentre())

"""NeuroPrune's head redundancy step (Alg. 3) as a dominating-set solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import cover_of
from topoprune_solvers.domination.greedy import greedy_cover
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.result import unit_solution
from topoprune_solvers.solution import Solution

__all__ = ["NeuroPruneDominatingSet", "neuroprune_as_printed", "neuroprune_set"]

BLOCK_BYTES = 1 << 25  # of packed neighbourhoods at a time


@dataclass(frozen=True)
class NeuroPruneDominatingSet:
    """Drop every unit whose closed neighbourhood another unit's contains; ties to the later unit.

    The paper's algorithm, kept as it is for reproduction. It returns a dominating set, but with no
    ratio to the optimum (all 12 units of a 12-cycle, where 4 suffice), ignores costs and gives no
    bound. Forced and forbidden units and demands are our extension, outside the paper: forced units
    are added, forbidden ones taken out, and what is then covered less often than it demands is covered greedily.
    """

    name: str = "neuroprune"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=False,
        guarantee="a dominating set; no ratio to the optimum, costs are ignored",
        complexity="O(n m / 64) word operations",
        when="reproducing the paper",
        reference="Dhurandhar et al. (2024), NeuroPrune, Findings of ACL, Alg. 3",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return Alg. 3's set; deterministic, `warm_start`, `time_limit` and `seed` have no use here."""
        assert problem.forced is not None and problem.forbidden is not None
        keep = neuroprune_set(problem)
        if problem.forced.any() or problem.forbidden.any() or not problem.simple:
            keep = greedy_cover(cover_of(problem), (keep | problem.forced) & ~problem.forbidden)
        return unit_solution(problem, keep, self.name)


def neuroprune_set(problem: DominatingSet) -> np.ndarray:
    """Return (n,) bool, False for every unit that another one's closed neighbourhood makes redundant.

    Unit i goes if and only if some j has N[i] strictly inside N[j], or N[i] = N[j] and j > i.
    This is Alg. 3 without its order: the printed loop climbs from i through ever larger (or equal,
    later) neighbourhoods and so ends at an inclusion-wise maximal one, the last of its equals; and
    it stays at i exactly if i is such a unit itself. `neuroprune_as_printed` is the loop.

    Neighbourhoods are packed to 64-bit words, some columns at a time. N[i] inside N[j] needs j in N[i], so only
    edges are compared, and those found not to be inclusions are left out of the next columns.

    Complexity: O(n + m n / 64) word operations; about `BLOCK_BYTES` of memory beside the graph.

    Example:
        >>> path = DominatingSet.from_edges(4, [(0, 1), (1, 2), (2, 3)])
        >>> neuroprune_set(path).tolist()
        [False, True, True, False]
    """
    n = problem.n
    keep = np.ones(n, dtype=bool)
    degree = np.diff(problem.indptr)
    source, target = np.repeat(np.arange(n), degree), problem.indices
    # Inclusion needs at least as large a neighbourhood; an equal size makes it equality.
    fits = (degree[target] > degree[source]) | ((degree[target] == degree[source]) & (target > source))
    inner, outer = source[fits], target[fits]
    row, column = np.concatenate([source, np.arange(n)]), np.concatenate([target, np.arange(n)])
    order = np.argsort(column, kind="stable")
    row, column = row[order], column[order]
    width = 64 * max(1, BLOCK_BYTES // (8 * max(n, inner.size, 1)))
    for first in range(0, n, width):
        if not inner.size:
            break
        inside = slice(*np.searchsorted(column, [first, first + width]))
        place = column[inside] - first
        words = np.zeros((n, -(-min(width, n - first) // 64)), dtype=np.uint64)
        np.bitwise_or.at(words, (row[inside], place // 64), np.left_shift(np.uint64(1), (place % 64).astype(np.uint64)))
        still = ~np.any(words[inner] & ~words[outer], axis=1)
        inner, outer = inner[still], outer[still]
    keep[inner] = False
    return keep


def neuroprune_as_printed(problem: DominatingSet) -> np.ndarray:
    """Return (n,) bool by the loop of Alg. 3, line by line: the slow twin of `neuroprune_set`. O(n^2 * degree)."""
    closed = [{i, *problem.neighbours(i).tolist()} for i in range(problem.n)]
    keep = np.zeros(problem.n, dtype=bool)
    for i in range(problem.n):
        best = i
        for j in range(problem.n):
            if closed[best] <= closed[j]:
                best = j
        keep[best] = True
    return keep


register(NeuroPruneDominatingSet())

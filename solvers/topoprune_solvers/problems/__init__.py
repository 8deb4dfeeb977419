"""The decisions a pruning engine asks for, as plain arrays: no model, no torch.

========================  =========================================================
`DominatingSet`           A: the cheapest set of units that covers every unit
`BudgetedDomination`      B: exactly k units, smallest distance to the nearest kept one
`SoftDomination`          B: exactly k units, most importance explained by the kept ones
`QuadraticSubset`         C: pruned set with least 1_P^T G 1_P, k units or a knapsack
`RepairedSubset`          C: exactly k units, least loss after least-squares repair
`EdgeSelection`           D: exactly k weight edges, attachment-weighted
`BlockMask`               D: N of every M neighbouring edges, also transposable
`MultipleChoiceKnapsack`  E: one choice per site, least damage within every budget
========================  =========================================================

Problems are frozen and checked on construction; arrays are read-only. A problem without
any solution raises `Infeasible` on construction where that can be seen in linear time.
Every problem has ``n`` (length of a keep mask), ``sense``, ``objective(keep)`` and
``violation(keep)``; that is all the checker needs.
"""

from __future__ import annotations

from topoprune_solvers.problems.blocks import BlockMask
from topoprune_solvers.problems.budgeted import BudgetedDomination, SoftDomination
from topoprune_solvers.problems.dominating import DominatingSet
from topoprune_solvers.problems.edges import EdgeSelection
from topoprune_solvers.problems.knapsack import MultipleChoiceKnapsack
from topoprune_solvers.problems.quadratic import QuadraticSubset
from topoprune_solvers.problems.repaired import RepairedSubset, repaired_weight
from topoprune_solvers.problems.units import UnitProblem

__all__ = [
    "BlockMask",
    "BudgetedDomination",
    "DominatingSet",
    "EdgeSelection",
    "MultipleChoiceKnapsack",
    "Problem",
    "QuadraticSubset",
    "RepairedSubset",
    "SoftDomination",
    "UnitProblem",
    "repaired_weight",
]

Problem = (
    DominatingSet
    | BudgetedDomination
    | SoftDomination
    | EdgeSelection
    | BlockMask
    | MultipleChoiceKnapsack
    | QuadraticSubset
    | RepairedSubset
)

"""Graph optimisation for pruning: problems as arrays, pluggable solvers, certified answers.

>>> from topoprune_solvers import DominatingSet, solve
>>> star = DominatingSet.from_edges(4, [(0, 1), (0, 2), (0, 3)])
>>> solve(star, "greedy").keep.tolist()
[True, False, False, False]
"""

from topoprune_solvers.base import Capabilities, Solver, register
from topoprune_solvers.csr import adjacency_from_dense, adjacency_from_edges, check_adjacency
from topoprune_solvers.problems import (
    BlockMask,
    BudgetedDomination,
    DominatingSet,
    EdgeSelection,
    MultipleChoiceKnapsack,
    Problem,
    QuadraticSubset,
    RepairedSubset,
    SoftDomination,
    repaired_weight,
)
from topoprune_solvers.registry import (
    available_solvers,
    get_solver,
    solve,
    solve_many,
    solver_names,
)
from topoprune_solvers.solution import Bound, Infeasible, Sense, Solution, Status, best_bound, relative_gap
from topoprune_solvers.verify import InvalidSolution, dominators, verify

__all__ = [
    "BlockMask",
    "Bound",
    "BudgetedDomination",
    "Capabilities",
    "DominatingSet",
    "EdgeSelection",
    "Infeasible",
    "InvalidSolution",
    "MultipleChoiceKnapsack",
    "Problem",
    "QuadraticSubset",
    "RepairedSubset",
    "Sense",
    "SoftDomination",
    "Solution",
    "Solver",
    "Status",
    "adjacency_from_dense",
    "adjacency_from_edges",
    "available_solvers",
    "best_bound",
    "check_adjacency",
    "dominators",
    "get_solver",
    "register",
    "relative_gap",
    "repaired_weight",
    "solve",
    "solve_many",
    "solver_names",
    "verify",
]

"""Budgets: how many units stay in each site, or over the whole model, and the problems that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from topoprune.graph import Graph, ModelGraph
from topoprune.sites import Site
from topoprune_solvers import (
    Bound,
    BudgetedDomination,
    Infeasible,
    Sense,
    SoftDomination,
    Solution,
    Solver,
    Status,
    relative_gap,
    verify,
)
from topoprune_solvers import solve as solve_one
from topoprune_solvers.result import unit_solution

__all__ = ["Joint", "Objective", "budget_count", "model_problem", "site_problem", "solve_model"]

Objective = Literal["k-centre", "soft"]
OBJECTIVES = ("k-centre", "soft")


@dataclass(frozen=True)
class Joint:
    """The certificate of sites that were decided on together, under one budget for all of them.

    Args:
        sites: their names.
        objective: of the whole, see `model_problem`. sense: ``"min"`` or ``"max"``.
        status: how the solve ended. solver: registry name.
        bound: proven limit on the objective of the whole, or None.
        seconds: wall-clock time of the solve.
    """

    sites: tuple[str, ...]
    objective: float
    sense: Sense
    status: Status
    solver: str
    bound: Bound | None = None
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """Relative distance between objective and bound; nan when there is no bound."""
        return math.nan if self.bound is None else relative_gap(self.objective, self.bound.value)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            "sites": list(self.sites),
            "objective": self.objective,
            "sense": self.sense,
            "status": self.status.name,
            "solver": self.solver,
            "bound": None if self.bound is None else [self.bound.value, self.bound.source],
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Joint:
        """Rebuild from `to_dict` output."""
        bound = None if data["bound"] is None else Bound(*data["bound"])
        fields = {**data, "sites": tuple(data["sites"]), "status": Status[data["status"]], "bound": bound}
        return cls(**fields)


def budget_count(budget: float, site: Site) -> int:
    """Turn a budget into a number of units to keep in one site.

    Args:
        budget: how many (int), or what share (float in (0, 1], rounded, at least one unit).
        site: a site with `equal_groups` keeps equally many in each group: a share goes to the nearest such
            number, a count must be one.

    Raises:
        ValueError: out of range, or no multiple of the number of groups.
    """
    _check_budget(budget)
    n, groups = site.n_units, max(1, site.equal_groups)
    if not isinstance(budget, (int, np.integer)):
        return groups * max(1, math.floor(float(budget) * n / groups + 0.5)) if site.equal_groups else _share(budget, n)
    if not 1 <= budget <= n:
        raise ValueError(f"budget asks to keep {budget} units of {site.name!r}, which has {n}; expected 1..{n}")
    if budget % groups:
        below = budget // groups * groups
        options = [str(count) for count in (below, below + groups) if 1 <= count <= n]
        raise ValueError(
            f"budget asks to keep {budget} of the {n} query heads of {site.name!r}, which lie in {groups} KV groups "
            f"that must keep equally many; ask for {' or '.join(options)}, or use gqa='groups' to prune whole groups"
        )
    return int(budget)


def site_problem(graph: ModelGraph, site: Site, k: int, objective: str) -> BudgetedDomination | SoftDomination:
    """Return the problem of keeping exactly k units of one site, equally many in each of its groups.

    Raises:
        ValueError: an unknown objective, or ``"soft"`` on distances that are no similarity.
    """
    similarity = graph.redundancy[site.name]
    shared: dict[str, Any] = {"k": k, "importance": graph.importance.get(site.name)}
    if site.equal_groups:
        each = k // site.equal_groups
        shared |= {"group": site.groups, "group_min": each, "group_max": each}
    csr = similarity.indptr, similarity.indices, similarity.weight
    if _objective_type(graph, [site], objective) is SoftDomination:
        return SoftDomination(*csr, **shared)
    return BudgetedDomination(*csr, **shared)


def model_problem(
    graph: ModelGraph, sites: Sequence[Site], budget: float, objective: str, floor: int = 1
) -> BudgetedDomination | SoftDomination:
    """Return the problem of one budget over several sites: the disjoint union of their graphs.

    Every site counts the same: its importances are divided by their sum, so ``"soft"`` maximises the sum over
    sites of the *share* of the site's importance (output energy) that is explained. For ``"k-centre"`` distances
    have to be comparable over sites: those of normalised measures lie in [0, 1] and are taken as they are;
    others are divided by the median distance of their site.

    Args:
        graph: from `extract`. sites: sites with a similarity graph.
        budget: how many units to keep over all sites (int), or what share (float in (0, 1]).
        objective: ``"soft"`` or ``"k-centre"``.
        floor: least units to keep in each site (all of them where a site has fewer).

    Raises:
        ValueError: numbers out of range; sites whose groups must keep equally many, which is no bound on the
            units of a group as long as the site's own count is open.
    """
    _check_budget(budget)
    problem_type = _objective_type(graph, sites, objective)
    if isinstance(floor, bool) or not isinstance(floor, (int, np.integer)) or floor < 1:
        raise ValueError(f"floor is {floor!r}; expected the least number of units of each site, an integer >= 1")
    tied = [site.name for site in sites if site.equal_groups]
    if tied:
        raise ValueError(
            f"scope='model' cannot keep equally many query heads in every KV group of {tied[0]!r}: "
            "use gqa='groups' (whole KV groups), or scope='site'"
        )
    sizes = np.array([site.n_units for site in sites])
    low = np.minimum(floor, sizes)
    total = int(sizes.sum())
    if isinstance(budget, (int, np.integer)):
        k = int(budget)
        if not low.sum() <= k <= total:
            raise ValueError(
                f"budget asks to keep {k} of {total} units over {len(sites)} sites; expected {int(low.sum())} "
                f"(floor={floor} in each) to {total}"
            )
    else:
        k = max(int(low.sum()), _share(budget, total))
    parts = [graph.redundancy[site.name] for site in sites]
    normalised = all(part.normalised for part in parts)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    edges = np.concatenate([[0], np.cumsum([part.indices.size for part in parts])])
    starts = [part.indptr[1:].astype(np.int64) + edge for part, edge in zip(parts, edges, strict=False)]
    fields: dict[str, Any] = {
        "indptr": np.concatenate([[0], *starts]),
        "indices": np.concatenate([part.indices + offset for part, offset in zip(parts, offsets, strict=False)]),
        "weight": np.concatenate([part.weight.astype(np.float64) / _unit(part, normalised) for part in parts]),
        "importance": np.concatenate([_shares(graph, site) for site in sites]),
        "group": np.repeat(np.arange(len(sites)), sizes),
        "group_min": low,
    }
    try:
        return problem_type(k=k, **fields)
    except Infeasible as error:  # pragma: no cover - the counts were checked above
        raise ValueError(f"budget {budget!r} over the model: {error}") from error


def solve_model(
    graph: ModelGraph,
    sites: Sequence[Site],
    problem: BudgetedDomination | SoftDomination,
    solver: Solver,
    *,
    time_limit: float | None = None,
    seed: int = 0,
) -> tuple[dict[str, Solution], Joint]:
    """Solve the problem of `model_problem` once, and split the answer by site.

    Returns:
        Site name -> solution: objective and dominators in the site's own units (its own importances and
        distances, its own number of kept units), verified, without a bound, because what is proven holds for
        the whole; and the certificate of the whole.
    """
    whole = solve_one(problem, solver, time_limit=time_limit, seed=seed)
    objective = "soft" if isinstance(problem, SoftDomination) else "k-centre"
    solutions: dict[str, Solution] = {}
    offset = 0
    for site in sites:
        keep = whole.keep[offset : offset + site.n_units]
        offset += site.n_units
        own = site_problem(graph, site, int(keep.sum()), objective)
        solutions[site.name] = unit_solution(own, keep, whole.solver)
        verify(own, solutions[site.name])
    names = tuple(solutions)
    return solutions, Joint(names, whole.objective, whole.sense, whole.status, whole.solver, whole.bound, whole.seconds)


def _check_budget(budget: Any) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float, np.integer, np.floating)):
        raise ValueError(f"budget is {budget!r}; expected how many units to keep (int) or what share of them (float)")
    if not isinstance(budget, (int, np.integer)) and not 0 < budget <= 1:
        raise ValueError(f"budget is {budget!r}; as a share of units to keep it must lie in (0, 1]")


def _share(budget: float, n: int) -> int:
    return max(1, round(float(budget) * n))


def _objective_type(
    graph: ModelGraph, sites: Sequence[Site], objective: str
) -> type[BudgetedDomination] | type[SoftDomination]:
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; available: {', '.join(OBJECTIVES)}")
    if objective == "k-centre":
        return BudgetedDomination
    for site in sites:
        if not graph.redundancy[site.name].normalised:
            raise ValueError(
                f"objective 'soft' needs a similarity in [0, 1]; measure {graph.measures.get(site.name)!r} of "
                f"{site.name!r} has none. Use measure='output-gram', or objective='k-centre'"
            )
    return SoftDomination


def _unit(part: Graph, normalised: bool) -> float:
    middle = 1.0 if normalised or not part.n_edges else part.quantile(0.5)
    return middle if middle > 0 else 1.0


def _shares(graph: ModelGraph, site: Site) -> np.ndarray:
    """Return (n,) importances that sum to 1; equal ones where none is known or all are 0."""
    worth = graph.importance.get(site.name)
    total = 0.0 if worth is None else float(worth.sum())
    if worth is None or not total > 0:
        return np.full(site.n_units, 1 / max(1, site.n_units))
    return worth / total

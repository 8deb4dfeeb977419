"""Budgets: how many units stay in each site, or over the whole model, and the problems that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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

__all__ = [
    "Joint",
    "Objective",
    "budget_count",
    "check_rounding",
    "model_problem",
    "rounded_counts",
    "rounding_step",
    "site_problem",
    "solve_model",
]

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


def check_rounding(rounding: Any) -> None:
    """Raise ValueError unless rounding is None or a number of features >= 1."""
    if rounding is None:
        return
    if isinstance(rounding, bool) or not isinstance(rounding, (int, np.integer)) or rounding < 1:
        raise ValueError(f"rounding is {rounding!r}; expected a number of features >= 1, e.g. 8")


def rounding_step(site: Site, rounding: int | None) -> int:
    """Return how many units stay or go together: counts that are multiples of it keep what is asked.

    Args:
        site: its features are units times `unit_width`; with `equal_groups` equally many units stay in each.
        rounding: the number of features that is kept shall be a multiple of this; None for any number.

    Raises:
        ValueError: the site has fewer features than one such multiple.

    Example:
        >>> rounding_step(Site("attention", "head", 12, 32, ()), 64), rounding_step(Site("ffn", "neuron", 40, 1, ()), 8)
        (2, 8)
    """
    check_rounding(rounding)
    groups = max(1, site.equal_groups)
    if rounding is None:
        return groups
    step = math.lcm(int(rounding) // math.gcd(int(rounding), max(1, site.unit_width)), groups)
    if step > site.n_units:
        together = f" and {groups} KV groups that keep equally many" if site.equal_groups else ""
        raise ValueError(
            f"rounding={rounding} cannot be met in {site.name!r}: {site.n_units} units of width {site.unit_width} are "
            f"{site.n_units * site.unit_width} features{together}, and the least that would do is {step} units; "
            "ask for a smaller rounding"
        )
    return step


def budget_count(budget: float, site: Site, rounding: int | None = None) -> int:
    """Turn a budget into a number of units to keep in one site.

    Args:
        budget: how many (int), or what share (float in (0, 1], rounded, at least one unit).
        site: a site with `equal_groups` keeps equally many in each group: a share goes to the nearest such
            number, a count must be one.
        rounding: the number of features kept (units times `unit_width`) is a multiple of this: a share is then
            rounded *down* to such a number (at least one multiple), a count must be one.

    Raises:
        ValueError: out of range, or no multiple of the number of groups or of `rounding`.

    Example:
        >>> ffn = Site("ffn", "neuron", 100, 1, ())
        >>> budget_count(0.5, ffn), budget_count(0.5, ffn, rounding=16), budget_count(0.01, ffn, rounding=16)
        (50, 48, 16)
    """
    _check_budget(budget)
    n, groups, step = site.n_units, max(1, site.equal_groups), rounding_step(site, rounding)
    if not isinstance(budget, (int, np.integer)):
        if rounding is not None:
            return step * max(1, _whole_steps(budget, n, step))
        return groups * max(1, math.floor(float(budget) * n / groups + 0.5)) if site.equal_groups else _share(budget, n)
    if not 1 <= budget <= n:
        raise ValueError(f"budget asks to keep {budget} units of {site.name!r}, which has {n}; expected 1..{n}")
    if budget % groups:
        raise ValueError(
            f"budget asks to keep {budget} of the {n} query heads of {site.name!r}, which lie in {groups} KV groups "
            f"that must keep equally many; ask for {_nearest(budget, step, n)}, or use gqa='groups' to prune whole "
            "groups"
        )
    if budget % step:
        raise ValueError(
            f"budget asks to keep {budget} units of {site.name!r}, {budget * site.unit_width} features, which is no "
            f"multiple of rounding={rounding}; ask for {_nearest(budget, step, n)}, or for a share, which is rounded"
        )
    return int(budget)


def _whole_steps(budget: float, n: int, step: int) -> int:
    # The small addend undoes float noise only: 0.3 * 10 shall be 3 whole units.
    return math.floor(float(budget) * n / step + 1e-9)


def _nearest(count: int, step: int, n: int) -> str:
    """Return the counts around one that is no multiple of step, for an error message."""
    below = int(count) // step * step
    return " or ".join(str(near) for near in (below, below + step) if 1 <= near <= n)


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
    graph: ModelGraph,
    sites: Sequence[Site],
    budget: float,
    objective: str,
    floor: int = 1,
    rounding: int | None = None,
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
        rounding: sites will be rounded to multiples of so many features (`solve_model`): the budget becomes
            one that such counts can add up to, a share by rounding down; the problem itself does not round.

    Raises:
        ValueError: numbers out of range; sites whose groups must keep equally many, which is no bound on the
            units of a group as long as the site's own count is open; a rounding that is a different number of
            units from site to site, or that the budget is no multiple of.
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
    low, high, step = _limits(sites, floor, rounding)
    total = int(high.sum())
    if isinstance(budget, (int, np.integer)):
        k = int(budget)
        if not low.sum() <= k <= total:
            raise ValueError(
                f"budget asks to keep {k} of {total} units over {len(sites)} sites; expected {int(low.sum())} "
                f"(floor={floor} in each) to {total}"
            )
        if k % step:
            raise ValueError(
                f"budget asks to keep {k} units over {len(sites)} sites, which multiples of rounding={rounding} "
                f"features ({step} units) cannot add up to; ask for {_nearest(k, step, total)}, or for a share"
            )
    elif rounding is not None:
        k = min(max(int(low.sum()), step * _whole_steps(budget, int(sizes.sum()), step)), total)
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
    floor: int = 1,
    rounding: int | None = None,
    time_limit: float | None = None,
    seed: int = 0,
) -> tuple[dict[str, Solution], Joint]:
    """Solve the problem of `model_problem` once, and split the answer by site.

    With `rounding` the counts per site that the answer has are rounded to multiples (`rounded_counts`, the
    total stays) and every site is solved again for its count. What was proven for the whole without rounding
    bounds what is reached with it, so the certificate stays valid; the gap includes what rounding costs.

    Args:
        graph, sites, floor, rounding: as given to `model_problem`. problem: what it returned.
        solver: for the problem. time_limit: seconds for all of it. seed: for solvers that draw random numbers.

    Returns:
        Site name -> solution: objective and dominators in the site's own units (its own importances and
        distances, its own number of kept units), verified, without a bound, because what is proven holds for
        the whole; and the certificate of the whole.
    """
    whole = solve_one(problem, solver, time_limit=time_limit, seed=seed)
    objective = "soft" if isinstance(problem, SoftDomination) else "k-centre"
    keeps = np.split(whole.keep, np.cumsum([site.n_units for site in sites])[:-1])
    final, seconds = whole, whole.seconds
    if rounding is not None:
        counts = rounded_counts(sites, [int(keep.sum()) for keep in keeps], floor, rounding)
        for index, (site, count) in enumerate(zip(sites, counts, strict=True)):
            if int(keeps[index].sum()) != count:
                again = site_problem(graph, site, count, objective)
                left = None if time_limit is None else max(0.0, time_limit - seconds)
                redone = solve_one(again, solver, time_limit=left, seed=seed)
                keeps[index], seconds = redone.keep, seconds + redone.seconds
        final = unit_solution(problem, np.concatenate(keeps), whole.solver)
        verify(problem, final)
    solutions: dict[str, Solution] = {}
    for site, keep in zip(sites, keeps, strict=True):
        own = site_problem(graph, site, int(keep.sum()), objective)
        solutions[site.name] = unit_solution(own, keep, whole.solver)
        verify(own, solutions[site.name])
    bound = whole.bound
    status = whole.status
    if final is not whole:
        status = Status.FEASIBLE  # the optimum of the rounded problem was not asked for, only bounded
        bound = None if bound is None else replace(bound, source=f"{bound.source}, before rounding")
    joint = Joint(tuple(solutions), final.objective, whole.sense, status, whole.solver, bound, seconds)
    return solutions, joint


def rounded_counts(sites: Sequence[Site], counts: Sequence[int], floor: int, rounding: int) -> list[int]:
    """Return counts near the given ones that are multiples of `rounding` features; their sum stays.

    All are rounded down, then one multiple at a time goes where most was lost (ties: the first site).

    Args:
        sites: of one unit width. counts: units kept in each. floor: least units to keep in each.
        rounding: in features.

    Example:
        >>> ffns = [Site(f"{i}.ffn", "neuron", 40, 1, ()) for i in range(3)]
        >>> rounded_counts(ffns, [9, 17, 22], 1, 8)
        [8, 16, 24]
    """
    low, high, step = _limits(sites, floor, rounding)
    rounded = np.clip(np.asarray(counts) // step * step, low, high)
    missing = (sum(counts) - int(rounded.sum())) // step
    for _ in range(abs(missing)):
        lost = np.asarray(counts) - rounded
        if missing > 0:
            best = int(np.argmax(np.where(rounded + step <= high, lost, -math.inf)))
            rounded[best] += step
        else:
            best = int(np.argmin(np.where(rounded - step >= low, lost, math.inf)))
            rounded[best] -= step
    return [int(count) for count in rounded]


def _limits(sites: Sequence[Site], floor: int, rounding: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the least and the most units of each site, as multiples of the common step, and that step."""
    sizes = np.array([site.n_units for site in sites])
    if rounding is None:
        return np.minimum(floor, sizes), sizes, 1
    steps = sorted({rounding_step(site, rounding) for site in sites})
    if len(steps) > 1:
        raise ValueError(
            f"rounding={rounding} is {' or '.join(map(str, steps))} units, depending on the site: scope='model' shares "
            "single units among sites of one unit width; use scope='site'"
        )
    step = steps[0]
    high = sizes // step * step
    return np.minimum(-(-np.minimum(floor, sizes) // step) * step, high), high, step


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

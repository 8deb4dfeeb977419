"""From a graph and a wish to a verified plan: thresholds or budgets in, certificates out."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from topoprune.budgets import (
    Joint,
    Objective,
    budget_count,
    check_rounding,
    model_problem,
    site_problem,
    solve_model,
)
from topoprune.explaining import unit_rows
from topoprune.files import read_npz, write_npz
from topoprune.graph import SCHEMA_VERSION, Graph, ModelGraph, Site, structure_digest
from topoprune_solvers import (
    Bound,
    DominatingSet,
    EdgeSelection,
    Solution,
    Solver,
    Status,
    available_solvers,
    get_solver,
    solve_many,
)

__all__ = ["Joint", "Plan", "ProblemName", "resolve_theta", "solve"]

ProblemName = Literal["heads", "neurons", "edges", "graph"]
_KINDS: dict[str, tuple[Any, ...]] = {"heads": ("head", "kv_group"), "neurons": ("neuron",), "graph": ("node",)}


@dataclass(frozen=True, eq=False)
class Plan:
    """What stays, for every site decided on, with certificates.

    Args:
        sites: the sites of the model the plan was made for.
        solutions: site name -> `Solution` on its units, or parameter name -> `Solution` on
            its weight edges.
        edge_axes: parameter name -> (row axis, (rows, columns)) for edge solutions.
        request: what was asked for (theta or budget, problem, solver, ...), JSON-ready.
        weights_digest: digest of the weights the graph was made from, or ``""``.
        joint: one certificate for every set of sites that shared a budget; their own solutions have no bound.

    Raises:
        ValueError: a solution of an unknown site or of another size, or one that keeps unequal numbers of
            query heads in the KV groups of a site with `Site.equal_groups`.
    """

    sites: tuple[Site, ...]
    solutions: Mapping[str, Solution]
    edge_axes: Mapping[str, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    weights_digest: str = ""
    joint: tuple[Joint, ...] = ()

    def __post_init__(self) -> None:
        units = {site.name: site.n_units for site in self.sites}
        for name, solution in self.solutions.items():
            if name in self.edge_axes:
                expected = math.prod(self.edge_axes[name][1])
            elif name in units:
                expected = units[name]
            else:
                raise ValueError(f"plan names unknown site {name!r}; known: {', '.join(list(units)[:5])}, ...")
            if solution.keep.shape != (expected,):
                raise ValueError(f"plan of {name!r} decides on {solution.keep.shape}, expected ({expected},)")
        for site in self.sites:
            if site.equal_groups and site.name in self.solutions:
                counts = self.solutions[site.name].keep.reshape(site.equal_groups, -1).sum(axis=1)
                if counts.min() != counts.max():
                    raise ValueError(
                        f"plan of {site.name!r} keeps {counts.tolist()} query heads in its KV groups, expected equally "
                        "many in each: a model cut like that would pair query heads with the wrong keys and values"
                    )
        strange = [name for joint in self.joint for name in joint.sites if name not in self.solutions]
        if strange:
            raise ValueError(f"a joint certificate names {strange[:5]}, which the plan does not decide on")
        for label in ("solutions", "edge_axes", "request"):
            object.__setattr__(self, label, MappingProxyType(dict(getattr(self, label))))

    @property
    def structure_digest(self) -> str:
        """Digest of the sites; the plan only fits a model with the same one."""
        return structure_digest(self.sites)

    @property
    def gap(self) -> float:
        """Largest relative gap over all solutions; nan if one has no bound.

        Sites that shared a budget count once, with the gap of their joint certificate.
        """
        together = {name for joint in self.joint for name in joint.sites}
        gaps = [solution.gap for name, solution in self.solutions.items() if name not in together]
        gaps += [joint.gap for joint in self.joint]
        return math.nan if any(math.isnan(g) for g in gaps) else max(gaps, default=0.0)

    @property
    def seconds(self) -> float:
        """Solver time over all sites, in seconds."""
        alone = sum(solution.seconds for solution in self.solutions.values())
        return alone + sum(joint.seconds for joint in self.joint)

    def site(self, name: str) -> Site:
        """Return a site of the plan by name; KeyError lists the known ones."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"unknown site {name!r}; known: {', '.join(s.name for s in self.sites)}")

    def keep(self, name: str) -> np.ndarray:
        """Return the (n,) bool keep mask of a site, all True where nothing was decided."""
        if name in self.solutions:
            return self.solutions[name].keep
        return np.ones(self.site(name).n_units, dtype=bool)

    def unit_solutions(self) -> dict[str, Solution]:
        """Return the solutions on units (not on weight edges), by site name."""
        return {name: solution for name, solution in self.solutions.items() if name not in self.edge_axes}

    def combine(self, other: Plan) -> Plan:
        """Return a plan with the decisions of both; no site may be decided twice.

        Raises:
            ValueError: plans of different models, or a site decided in both.
        """
        if self.structure_digest != other.structure_digest:
            raise ValueError("cannot combine plans of different models (structure digests differ)")
        twice = sorted(set(self.solutions) & set(other.solutions))
        if twice:
            raise ValueError(f"both plans decide on {twice[:5]}")
        digest = self.weights_digest if self.weights_digest == other.weights_digest else ""
        return Plan(
            self.sites,
            {**self.solutions, **other.solutions},
            {**self.edge_axes, **other.edge_axes},
            {"combined": [dict(self.request), dict(other.request)]},
            digest,
            self.joint + other.joint,
        )

    def __or__(self, other: Plan) -> Plan:
        """Same as `combine`."""
        return self.combine(other)

    def table(self) -> list[dict[str, Any]]:
        """Return one row a site: kept, units, objective, bound and its source, gap, status, seconds."""
        return [
            {
                "site": name,
                "kept": solution.n_kept,
                "units": solution.n_units,
                "solver": solution.solver,
                "objective": solution.objective,
                "bound": None if solution.bound is None else solution.bound.value,
                "bound_source": None if solution.bound is None else solution.bound.source,
                "gap": solution.gap,
                "status": solution.status.name,
                "seconds": solution.seconds,
            }
            for name, solution in self.solutions.items()
        ]

    def explain(self, name: str) -> list[dict[str, Any]]:
        """Return one JSON-ready row a unit of a site: why it stays, or who stands for it.

        Returns:
            Rows with ``unit``, ``kept``, ``dominator`` (the kept unit most like it, itself if it stays, None if
            there is none), ``distance`` to it, ``importance`` (what the unit is worth by itself: output energy
            with a calibrated measure) and ``residual``, the part of it that the dominator leaves. Importance and
            residual are None where the measure is no similarity, or the decision knew none.

        Raises:
            KeyError: nothing was decided on units of that name; lists what was.

        Example:
            >>> site = Site("ffn", "neuron", 2, 1, ())
            >>> decided = Solution([True, False], 4.5, "max", Status.OPTIMAL, "exact", Bound(4.5, "all sets"),
            ...                    [0, 0], [0.0, 0.25], importance=[4.0, 2.0])
            >>> Plan((site,), {"ffn": decided}).explain("ffn")[1]["residual"]
            0.5
        """
        decided = self.unit_solutions()
        if name not in decided:
            raise KeyError(f"nothing was decided on the units of {name!r}; decided: {', '.join(decided)}")
        return unit_rows(decided[name])

    def summary(self) -> str:
        """Return a readable table, one line a site."""
        lines = [
            repr(self),
            f"{'site':34} {'kept':>13} {'objective':>11} {'bound':>11} {'gap':>7} {'ms':>8}  solver, bound source",
        ]
        for row in self.table():
            bound = "-" if row["bound"] is None else f"{row['bound']:.5g}"
            gap = "-" if math.isnan(row["gap"]) else f"{row['gap']:.2%}"
            source = "" if row["bound_source"] is None else f", {row['bound_source']}"
            kept = f"{row['kept']}/{row['units']}"
            lines.append(
                f"{row['site']:34} {kept:>13} {row['objective']:11.5g} {bound:>11} {gap:>7} "
                f"{1e3 * row['seconds']:8.2f}  {row['solver']}{source}"
            )
        for joint in self.joint:
            bound = "no bound" if joint.bound is None else f"bound {joint.bound.value:.5g}, gap {joint.gap:.2%}"
            source = "" if joint.bound is None else f", {joint.bound.source}"
            lines.append(
                f"{len(joint.sites)} sites under one budget: objective {joint.objective:.5g}, {bound}, "
                f"{1e3 * joint.seconds:.2f} ms  {joint.solver}{source}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        kept = sum(solution.n_kept for solution in self.solutions.values())
        units = sum(solution.n_units for solution in self.solutions.values())
        what = "edges" if self.edge_axes else "units"
        gap = "none" if math.isnan(self.gap) else f"{self.gap:.2%}"
        return f"Plan({len(self.solutions)} sites, keep {kept}/{units} {what}, worst gap {gap}, {self.seconds:.3f} s)"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one ``.npz`` with a JSON header (schema version, certificates); atomic, no pickle."""
        arrays: dict[str, np.ndarray] = {}
        rows = {}
        for name, s in self.solutions.items():
            arrays[f"keep/{name}"] = np.packbits(s.keep)
            if s.dominator is not None and s.dominator_distance is not None:
                arrays[f"dominator/{name}"] = s.dominator
                arrays[f"distance/{name}"] = s.dominator_distance
            if s.importance is not None:
                arrays[f"importance/{name}"] = s.importance
            rows[name] = {
                "size": s.n_units,
                "objective": s.objective,
                "sense": s.sense,
                "status": s.status.name,
                "solver": s.solver,
                "bound": None if s.bound is None else [s.bound.value, s.bound.source],
                "seconds": s.seconds,
            }
        header = {
            "format": "topoprune.Plan",
            "schema_version": SCHEMA_VERSION,
            "sites": [site.to_dict() for site in self.sites],
            "solutions": rows,
            "joint": [joint.to_dict() for joint in self.joint],
            "edge_axes": {name: [axis, list(shape)] for name, (axis, shape) in self.edge_axes.items()},
            "request": json.loads(json.dumps(dict(self.request), default=str)),
            "structure_digest": self.structure_digest,
            "weights_digest": self.weights_digest,
        }
        return write_npz(path, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan written by `save`; ValueError if it is not one, or was altered."""
        header, arrays = read_npz(path, "topoprune.Plan", SCHEMA_VERSION)
        try:
            plan = cls._from_file(header, arrays)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a complete topoprune.Plan file: {error!r} is missing or wrong") from error
        if plan.structure_digest != header["structure_digest"]:
            raise ValueError(f"{path}: the sites do not match the recorded digest; the file was altered")
        return plan

    @classmethod
    def _from_file(cls, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Plan:
        solutions = {}
        for name, row in header["solutions"].items():
            solutions[name] = Solution(
                keep=np.unpackbits(arrays[f"keep/{name}"], count=row["size"]).astype(bool),
                objective=row["objective"],
                sense=row["sense"],
                status=Status[row["status"]],
                solver=row["solver"],
                bound=None if row["bound"] is None else Bound(*row["bound"]),
                dominator=arrays.get(f"dominator/{name}"),
                dominator_distance=arrays.get(f"distance/{name}"),
                seconds=row["seconds"],
                importance=arrays.get(f"importance/{name}"),
            )
        return cls(
            tuple(Site.from_dict(site) for site in header["sites"]),
            solutions,
            {name: (axis, (shape[0], shape[1])) for name, (axis, shape) in header["edge_axes"].items()},
            header["request"],
            header["weights_digest"],
            tuple(Joint.from_dict(joint) for joint in header.get("joint", ())),
        )


def resolve_theta(theta: float | str, graph: Graph) -> float:
    """Return a distance threshold: a number as it is, or ``"auto:q"`` as the q-quantile of the distances.

    Raises:
        ValueError: negative, not finite, or not of the form ``"auto:q"`` with q in [0, 1].

    >>> resolve_theta("auto:0.5", Graph.from_edges(3, np.array([[0, 1], [1, 2]]), np.array([0.1, 0.3])))
    0.2
    """
    if isinstance(theta, str):
        head, _, tail = theta.partition(":")
        try:
            q = float(tail)
        except ValueError:
            q = math.nan
        if head != "auto" or not 0 <= q <= 1:
            raise ValueError(
                f"theta is {theta!r}; expected a number >= 0 or 'auto:q' with q in [0, 1], e.g. 'auto:0.1'"
            )
        return graph.quantile(q) if graph.n_edges else 0.0
    if isinstance(theta, bool) or not isinstance(theta, (int, float, np.floating, np.integer)):
        raise ValueError(f"theta is {theta!r}; expected a number >= 0 or 'auto:q'")
    if not (math.isfinite(theta) and theta >= 0):
        raise ValueError(f"theta is {theta!r}; a distance threshold must be finite and >= 0")
    return float(theta)


def solve(
    graph: ModelGraph,
    *,
    theta: float | str | None = None,
    budget: float | None = None,
    problem: ProblemName = "heads",
    solver: str | Solver | None = None,
    objective: Objective = "k-centre",
    attachment: float = 0.0,
    reading: Literal["a", "b"] = "b",
    scope: Literal["site", "model"] = "site",
    floor: int = 1,
    rounding: int | None = None,
    time_limit: float | None = None,
    seed: int = 0,
) -> Plan:
    """Decide what stays, site by site or over the model, with certificates.

    Query heads of grouped-query attention (``extract(..., gqa="query-heads")``) always stay in equal numbers
    in every KV group.

    Args:
        graph: from `extract`.
        theta: distance threshold (a number, or ``"auto:q"``, the q-quantile of each layer's
            distances): the smallest set of units such that every pruned one has a kept one
            within theta (problem A).
        budget: how many units of each site to keep (int), or what share (float in (0, 1]).
            Exactly that many stay (problem B; edges: problem D, share of weight edges). On query heads
            a count must be a multiple of the number of KV groups, a share goes to the nearest one.
        problem: ``"heads"`` (heads and KV groups), ``"neurons"`` or ``"edges"``.
        solver: registry name or object; default ``"exact"`` for heads, ``"greedy"`` else.
        objective: with `budget` on units: ``"k-centre"`` (smallest covering distance) or
            ``"soft"`` (most importance explained; needs a normalised measure).
        attachment: problem D, strength of preferential attachment, in units of mean |w|.
        reading: problem D, reading of NeuroPrune's Eq. 1.
        scope: ``"site"``: `budget` holds for each site. ``"model"``: for all sites together (units only); one
            problem on the disjoint union of their graphs in which every layer counts the same
            (`topoprune.budgets.model_problem`: importances sum to 1 per layer), with one certificate, `Plan.joint`.
        floor: with ``scope="model"``, least units to keep in each site.
        rounding: with `budget` on units, keep a number of features (units times their width) in every site that
            is a multiple of this (8, 16, 32, ...), as fast matrix kernels like it. A share is rounded down (at
            least one multiple stays), so that the budget stays met; a count must be a multiple already.
        time_limit: seconds per site, with ``scope="model"`` for all; None sets no limit. An exact solver then
            runs until it has a proof, which on neurons can take for ever: give one there.
        seed: for solvers that draw random numbers.

    Returns:
        A `Plan` whose every solution was verified against its problem.

    Raises:
        ValueError: theta and budget both or neither given, values out of range, an unknown
            solver or problem, a graph without what the problem needs, theta on query heads, a
            budget that their KV groups cannot share equally, or one that rounding cannot meet.

    Complexity: the solver's, per site.
    """
    if (theta is None) == (budget is None):
        raise ValueError("give exactly one of theta (a distance threshold) and budget (what to keep)")
    request: dict[str, Any] = {
        "problem": problem,
        "theta": theta,
        "budget": budget,
        "solver": solver if isinstance(solver, str) or solver is None else solver.name,
        "seed": seed,
    }
    if scope not in ("site", "model"):
        raise ValueError(f"unknown scope {scope!r}; available: site, model")
    if scope == "model" and (budget is None or problem == "edges"):
        raise ValueError("scope='model' shares a budget= of units among sites; theta and edges are decided per site")
    check_rounding(rounding)
    if rounding is not None:
        if budget is None or problem == "edges":
            raise ValueError("rounding= is an option of budget= on units: theta and edges fix no number of features")
        request["rounding"] = int(rounding)
    if problem == "edges":
        if budget is None:
            raise ValueError("problem 'edges' needs budget= (share of weight edges to keep), not theta")
        request |= {"attachment": attachment, "reading": reading}
        return _solve_edges(graph, budget, solver or "greedy", attachment, reading, request, time_limit, seed)
    if problem not in _KINDS:
        raise ValueError(f"unknown problem {problem!r}; available: edges, heads, neurons")
    sites = [site for site in graph.of_kind(*_KINDS[problem]) if site.name in graph.redundancy]
    if not sites:
        raise ValueError(
            f"the graph has no similarity graph for {problem}; run extract(model, include=({problem!r},)) "
            "on a model that has them"
        )
    if scope == "model":
        assert budget is not None
        whole = model_problem(graph, sites, budget, objective, floor, rounding)
        engine = get_solver(solver or _default_solver(problem, type(whole)), type(whole))
        limits: dict[str, Any] = {"time_limit": time_limit, "seed": seed}
        decided, joint = solve_model(graph, sites, whole, engine, floor=floor, rounding=rounding, **limits)
        request |= {"solver": engine.name, "objective": objective, "scope": scope, "floor": floor}
        weighed = _weighed(graph, decided)
        return Plan(graph.sites, weighed, request=request, weights_digest=graph.weights_digest, joint=(joint,))
    problems: list[Any] = []
    thresholds: dict[str, float] = {}
    for site in sites:
        if theta is None:
            assert budget is not None
            problems.append(site_problem(graph, site, budget_count(budget, site, rounding), objective))
            continue
        if site.equal_groups:
            raise ValueError(
                f"theta does not say how many query heads each KV group of {site.name!r} keeps, and they must be "
                "equally many; give budget=, or extract with gqa='groups'"
            )
        similarity = graph.redundancy[site.name]
        thresholds[site.name] = resolve_theta(theta, similarity)
        near = similarity.at_most(thresholds[site.name])
        problems.append(DominatingSet(near.indptr, near.indices, near.weight))
    engine = get_solver(solver or _default_solver(problem, type(problems[0])), type(problems[0]))
    solutions = solve_many(problems, engine, time_limit=time_limit, seed=seed)
    request |= {"solver": engine.name, "objective": "domination" if theta is not None else objective}
    if thresholds:
        request["thresholds"] = thresholds
    decided = _weighed(graph, {site.name: solution for site, solution in zip(sites, solutions, strict=True)})
    return Plan(graph.sites, decided, request=request, weights_digest=graph.weights_digest)


def _weighed(graph: ModelGraph, solutions: Mapping[str, Solution]) -> dict[str, Solution]:
    """Return the solutions with importances, where distances are shares of them (normalised measures)."""
    return {
        name: replace(solution, importance=graph.importance.get(name))
        if graph.redundancy[name].normalised
        else solution
        for name, solution in solutions.items()
    }


def _default_solver(problem: ProblemName, problem_type: type) -> str:
    return "exact" if problem == "heads" and "exact" in available_solvers(problem_type) else "greedy"


def _solve_edges(
    graph: ModelGraph,
    budget: float,
    solver: str | Solver,
    attachment: float,
    reading: Literal["a", "b"],
    request: dict[str, Any],
    time_limit: float | None,
    seed: int,
) -> Plan:
    if not graph.connectivity:
        raise ValueError("the graph has no weight edges; run extract(model, include=('edges',))")
    if isinstance(budget, (int, np.integer)) or not 0 < budget <= 1:
        raise ValueError(f"budget is {budget!r}; for edges it is the share of edges to keep, a float in (0, 1]")
    solutions, axes = {}, {}
    for name, wires in graph.connectivity.items():
        problem = EdgeSelection(
            wires.weight,
            k=round(float(budget) * wires.weight.size),
            attachment=attachment * float(wires.weight.mean()) * wires.shape[1],
            reading=reading,
        )
        solutions[name] = solve_many([problem], solver, time_limit=time_limit, seed=seed)[0]
        axes[name] = (wires.row_axis, wires.shape)
    return Plan(graph.sites, solutions, axes, request, graph.weights_digest)

"""What a training method decides at one step, and how decisions on live units become a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from topoprune.planning import Plan
from topoprune_solvers import Solution

__all__ = ["Decision", "Draft", "Job", "SolveEvent", "expand", "heirs"]


@dataclass(frozen=True)
class Decision:
    """A new plan and what goes with it.

    Args:
        plan: over all units, those gone before included.
        changed: parameter name -> tensor to write before the masks (merge or repair).
        thetas: site name -> resolved distance threshold.
        seconds: ``extract``, ``solve``, ``repair`` in seconds.
        energy: attention site -> (n_units,) mean squared output of each head before the decision, nan where it was
            gone; for the record only.
    """

    plan: Plan
    changed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    thetas: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    energy: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Solves one site, or all single weights; reads what was extracted for it, never the live model.

    Args:
        name: of the site. run: returns site name -> solution over all its units, or a whole decision.
    """

    name: str
    run: Callable[[], Mapping[str, Solution] | Decision]


@dataclass
class Draft:
    """A decision in the making: extracted, solved job by job, and not applied yet.

    Args:
        step: optimizer steps done when it was extracted.
        request: goes into the plan. thetas: as in `Decision`.
        jobs: lazily extracted, in the same order on all ranks. shared: every rank runs its share of them, else all.
        solutions: site (or parameter) name -> what the jobs found, over all units. edge_axes: as in `Plan`.
        moments: site name -> (features, features) second moment for the repair. units: site name -> the planned
            units that its features belong to.
        seconds, energy: as in `Decision`. at_work: site the last job was about.
    """

    step: int
    request: Mapping[str, object]
    thetas: dict[str, float] = field(default_factory=dict)
    jobs: Iterable[Job] = ()
    shared: bool = True
    solutions: dict[str, Solution] = field(default_factory=dict)
    edge_axes: dict[str, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    units: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"extract": 0.0, "solve": 0.0, "repair": 0.0})
    energy: dict[str, np.ndarray] = field(default_factory=dict)
    at_work: str = ""

    def plan(self, before: Plan) -> Plan:
        """Return the plan in force, with what was solved now in its place."""
        axes = {**before.edge_axes, **self.edge_axes}
        return Plan(before.sites, {**before.solutions, **self.solutions}, axes, dict(self.request))


@dataclass(frozen=True)
class SolveEvent:
    """One decision during training.

    Args:
        step: optimizer steps done when it was applied. solver: registry names used.
        removed: site (or parameter) name -> number of units (or edges) that went now.
        kept: site name -> units that stay, heads and KV groups.
        gap: worst relative gap of the solutions; nan if one has no bound.
        seconds: ``extract``, ``solve``, ``repair``.
        thetas: resolved distance thresholds (NeuroPrune).
        zeros, removable: shares after the decision.
        decided: optimizer steps done when the graphs were extracted: `step`, less ``solve_lag``.
        predicted: under ``allocation="output-kl"`` the divergence of the output that the curves add up to, as
            ``chosen`` and as ``uniform``, and the ``curve_seconds`` and ``curve_forwards`` they took; under a latency
            budget, after the last decision, the ``latency`` measured and its ``latency_noise``, as shares.
    """

    step: int
    solver: str
    removed: Mapping[str, int]
    kept: Mapping[str, int]
    gap: float
    seconds: Mapping[str, float]
    thetas: Mapping[str, float] = field(default_factory=dict)
    zeros: float = 0.0
    removable: float = 0.0
    decided: int = 0
    predicted: Mapping[str, float] = field(default_factory=dict)


def heirs(dominator: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Follow dominators that have been pruned since to one that is kept; -1 where the chain breaks.

    >>> heirs(np.array([1, 2, 2]), np.array([False, False, True])).tolist()
    [2, 2, 2]
    """
    result = np.array(dominator, dtype=np.int32)
    for _ in range(result.size):
        stale = (result >= 0) & ~keep[np.maximum(result, 0)]
        if not stale.any():
            break
        result[stale] = np.where(result[result[stale]] == result[stale], -1, result[result[stale]])
    return result


def expand(solution: Solution, live: np.ndarray, n_units: int, previous: Solution | None) -> Solution:
    """Lift a solution on the live units of a site to all its units.

    Args:
        solution: on ``len(live)`` units.
        live: indices of the live units.
        n_units: number of units of the site.
        previous: the last full solution; units not live are pruned as there and keep their importance and their
            dominator (or its heir, at a distance that bounds the true one). None: they count as kept (only
            new removals show).
    """
    keep = np.full(n_units, previous is None)
    keep[live] = solution.keep
    dominator = np.arange(n_units, dtype=np.int32)
    distance = np.zeros(n_units)
    if previous is not None:
        gone = np.setdiff1d(np.arange(n_units), live)
        dominator[gone] = -1 if previous.dominator is None else previous.dominator[gone]
        distance[gone] = np.inf if previous.dominator_distance is None else previous.dominator_distance[gone]
    if solution.dominator is None or solution.dominator_distance is None:
        dominator[live] = np.where(solution.keep, live, -1)
        distance[live] = np.where(solution.keep, 0.0, np.inf)
    else:
        dominator[live] = np.where(solution.dominator >= 0, live[solution.dominator], -1)
        distance[live] = solution.dominator_distance
    if solution.importance is None:
        return replace(solution, keep=keep, dominator=heirs(dominator, keep), dominator_distance=distance)
    importance = np.zeros(n_units)
    if previous is not None and previous.importance is not None:
        importance[:] = previous.importance  # of units that are gone: what they were worth when they went
    importance[live] = solution.importance
    settled = heirs(dominator, keep)
    return replace(
        solution,
        keep=keep,
        dominator=settled,
        dominator_distance=_chained(dominator, distance, settled),
        importance=importance,
    )


def _chained(dominator: np.ndarray, distance: np.ndarray, settled: np.ndarray) -> np.ndarray:
    """Return (n,) upper bounds on 1 - cos^2 to the settled dominators, which took over along chains.

    Angles between lines obey the triangle inequality: ``sin^2(a + b)`` bounds what is left after two hand-overs.
    """
    result = np.where(settled >= 0, distance, np.inf)
    angle = np.arcsin(np.sqrt(np.clip(distance, 0.0, 1.0)))
    for unit in np.flatnonzero((settled >= 0) & (settled != dominator)):
        total, at = angle[unit], int(dominator[unit])
        while at != settled[unit]:
            total, at = total + angle[at], int(dominator[at])
        result[unit] = np.sin(min(total, np.pi / 2)) ** 2
    return result

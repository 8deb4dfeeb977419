"""Minimum dominating set as MaxSAT: unsatisfiable cores (RC2 of PySAT) raise the lower bound step by step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from topoprune_solvers.base import Capabilities, register
from topoprune_solvers.domination.covering import SetCover
from topoprune_solvers.domination.tally import solve_natively
from topoprune_solvers.native import Channel, NativeTask
from topoprune_solvers.problems import DominatingSet
from topoprune_solvers.scaling import integer_costs
from topoprune_solvers.solution import Solution

__all__ = ["MaxSatDominatingSet", "max_sat_task", "run_max_sat"]

SOURCE = "MaxSAT cores (RC2)"


@dataclass(frozen=True)
class MaxSatDominatingSet:
    """Ask a SAT solver which candidates cannot all stay out; each such core raises the bound by its cheapest weight.

    A core-guided search works from below: it proves optimality on sparse, street-like graphs where branch and
    bound does not, but it finds no cover before it is done. Until then the cover is greedy's, or the repaired
    warm start. It runs in a process of its own, which streams its bound and is killed at the time limit.
    """

    name: str = "max-sat"
    capabilities: ClassVar[Capabilities] = Capabilities(
        problem=DominatingSet,
        exact=True,
        guarantee="optimal given time (float costs: to 1e-9), else the greedy cover with the bound of the cores found",
        complexity="exponential in the worst case",
        requires=("pysat",),
        reference="Ignatiev, Morgado, Marques-Silva (2019), RC2: an efficient MaxSAT solver, JSAT 11",
        when="large sparse graphs whose LP bound is weak, given minutes",
    )

    def solve(
        self, problem: DominatingSet, *, warm_start: Any = None, time_limit: float | None = None, seed: int = 0
    ) -> Solution:
        """Return RC2's optimum if it is done in time, else greedy or the repaired warm start; `seed` has no use."""

        def task(instance: SetCover, start: np.ndarray) -> NativeTask:
            return max_sat_task(instance)

        return solve_natively(problem, self.name, task, warm_start=warm_start, time_limit=time_limit)


def max_sat_task(
    instance: SetCover,
    *,
    name: str = SOURCE,
    sat_solver: str = "cd195",
    exhaust: bool = True,
    seconds: float = math.inf,
) -> NativeTask:
    """Return the cover task (see `tally`) that runs RC2 on an instance.

    Args:
        instance: the instance. name: source of the bounds.
        sat_solver: PySAT's name of the SAT solver. exhaust: raise the counter of each core as far as it goes at
            once; mostly better, and stuck on some instances (minimising or trimming cores never paid here).
        seconds: a time limit of its own.
    """
    return NativeTask(f"{__name__}:run_max_sat", (instance, sat_solver, exhaust), name, seconds)


def run_max_sat(channel: Channel, instance: SetCover, sat_solver: str, exhaust: bool) -> dict[str, int]:
    """Solve an instance, streaming the bound after every core; the function behind `max_sat_task`."""
    from pysat.card import CardEnc, EncType  # type: ignore[import-untyped]
    from pysat.examples.rc2 import RC2, RC2Stratified  # type: ignore[import-untyped]
    from pysat.formula import WCNF  # type: ignore[import-untyped]

    scaled = integer_costs(instance.cost)
    formula = WCNF()
    formula.nv = instance.n_candidates
    cuts, flat = instance.row_start.tolist(), (instance.row + 1).tolist()
    for start, end, demand in zip(cuts[:-1], cuts[1:], instance.demand.tolist(), strict=True):
        literals = flat[start:end]
        if demand == 1:
            formula.append(literals)
        elif demand == end - start:
            formula.extend([[literal] for literal in literals])
        else:
            bound = CardEnc.atleast(lits=literals, bound=demand, top_id=formula.nv, encoding=EncType.seqcounter)
            formula.extend(bound.clauses)
            formula.nv = max(formula.nv, bound.nv)
    for candidate, weight in enumerate(scaled.values.tolist()):
        if weight:  # free candidates need no reason to stay out
            formula.append([-(candidate + 1)], weight=weight)
    cores = 0

    def report(cost: int) -> bool:
        nonlocal cores
        cores += 1
        channel.send(("bound", cost * scaled.unit))
        return channel.remaining() <= 0

    weighted = np.unique(scaled.values[scaled.values > 0]).size > 1
    engine = _reporting(RC2Stratified if weighted else RC2, report)(formula, solver=sat_solver, exhaust=exhaust)
    model = engine.compute()
    if model is not None:
        chosen = np.zeros(instance.n_candidates, dtype=bool)
        positive = np.array([literal for literal in model if literal > 0], dtype=np.int64) - 1
        chosen[positive[positive < instance.n_candidates]] = True
        channel.send(("cover", chosen))
        channel.send(("bound", engine.cost * scaled.unit))
    return {"cores": cores}


def _reporting(engine: Any, report: Any) -> Any:
    class Reporting(engine):  # type: ignore[misc]
        def process_core(self) -> None:
            super().process_core()
            # `compute_` looks at this flag after each core.
            self.interrupted = report(self.cost)

    return Reporting


register(MaxSatDominatingSet())

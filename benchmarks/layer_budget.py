"""Layer budgets under two resources, parameters and latency: certified gap and seconds of every solver.

``gap`` and ``s`` are those of ``exact``, the worst over all instances (three tightness levels, several seeds),
each solved within a time limit. ``small`` instances check every exact solver against enumeration.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness import Figure, Options, Outcome
from topoprune_solvers import MultipleChoiceKnapsack, Solution, available_solvers, get_solver, solve
from topoprune_solvers.knapsack.core import core_of
from topoprune_solvers.knapsack.dual import best_prices

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Spec:
    """Instances and how they are timed.

    Args:
        sites, choices: shape of a model. shares: of the dense model's parameters that stay.
        models: seeds per share. repeats: timed runs of each, of which the fastest counts.
        limit: seconds allowed per solve. small: enumerable instances of the gate.
    """

    sites: int = 80
    choices: int = 64
    shares: tuple[float, ...] = (0.3, 0.5, 0.7)
    models: int = 5
    repeats: int = 2
    limit: float = 1.8
    small: int = 30


def run(options: Options) -> Outcome:
    """Solve all instances with each solver that takes two budgets."""
    spec = Spec(models=1, repeats=1, small=10) if options.quick else Spec()
    notes: list[str] = []
    correct = small_gate(spec, options, notes)
    known: dict[tuple[float, int], tuple[float, float]] = {}
    rows: list[dict[str, Any]] = []
    both = 0
    solvers = [name for name in available_solvers(MultipleChoiceKnapsack) if name not in ("brute", "dp")]
    warm_up = planted_curves(6, 4, 0.5, options.seed)
    for name in solvers:
        solve(warm_up, name)  # imports, compiled code
    for share in spec.shares:
        for seed in range(options.seed, options.seed + spec.models):
            problem = planted_curves(spec.sites, spec.choices, share, seed)
            both += bool(np.all(best_prices(core_of(problem)).price > 0))
            for name in solvers:
                solution, seconds = _timed(problem, name, spec, options)
                bound = -math.inf if solution.bound is None else solution.bound.value
                best, proven = known.get((share, seed), (math.inf, -math.inf))
                known[share, seed] = min(best, solution.objective), max(proven, bound)
                rows.append(
                    {
                        "solver": name,
                        "share": share,
                        "seed": seed,
                        "objective": solution.objective,
                        "bound": None if solution.bound is None else bound,
                        "source": None if solution.bound is None else solution.bound.source,
                        "own_gap": solution.gap,
                        "optimal": solution.status.name == "OPTIMAL",
                        "s": seconds,
                        "stats": dict(solution.stats),
                    }
                )
    for key, (best, proven) in known.items():
        if proven > best * (1 + TOLERANCE):
            correct = False
            notes.append(f"gate: share {key[0]}, seed {key[1]}: a bound {proven!r} lies above an objective {best!r}")
    figures: dict[str, Figure] = {}
    for name in ["exact", *(other for other in solvers if other != "exact")]:
        own = [row for row in rows if row["solver"] == name]
        for row in own:
            best, proven = known[row["share"], row["seed"]]
            row["excess"] = 1 - proven / row["objective"]
        prefix, targets = ("", (1e-3, 2.0)) if name == "exact" else (f"{name}_", (None, None))
        certified = not any(math.isnan(row["own_gap"]) for row in own)
        gap = max(0.0 if row["optimal"] else row["own_gap"] for row in own) if certified else math.nan
        if certified:
            figures[f"{prefix}gap"] = Figure(gap, "ratio", targets[0])
        figures[f"{prefix}s"] = Figure(max(row["s"] for row in own), "s", targets[1])
        figures[f"{prefix}median_s"] = Figure(float(np.median([row["s"] for row in own])), "s")
        figures[f"{prefix}excess"] = Figure(max(row["excess"] for row in own), "ratio")
        figures[f"{prefix}proven_share"] = Figure(float(np.mean([row["optimal"] for row in own])), "ratio")
    notes.append(
        f"{len(known)} instances of {spec.sites} sites x {spec.choices} choices, both budgets priced in {both} of "
        f"them; time limit "
        f"{spec.limit:g} s; gap: own bound, worst instance; excess: over the best bound of any solver, worst instance; "
        "s: worst instance, verification included"
    )
    return Outcome(correct, figures, rows, notes)


def small_gate(spec: Spec, options: Options, notes: list[str]) -> bool:
    """Return True if every exact solver agrees with enumeration, and no bound lies above the optimum."""
    correct = True
    for seed in range(options.seed, options.seed + spec.small):
        problem = planted_curves(4, 5, spec.shares[seed % len(spec.shares)], seed)
        optimum = solve(problem, "brute").objective
        for name in available_solvers(MultipleChoiceKnapsack):
            if name == "dp":
                continue  # one budget only
            solution = solve(problem, name)
            exact = get_solver(name, MultipleChoiceKnapsack).capabilities.exact
            wrong = solution.objective < optimum * (1 - TOLERANCE)
            wrong |= exact and solution.objective > optimum * (1 + TOLERANCE)
            wrong |= solution.bound is not None and solution.bound.value > optimum * (1 + TOLERANCE)
            if wrong:
                correct = False
                notes.append(f"gate: small instance {seed}: {name} contradicts the optimum {optimum!r}: {solution}")
    return correct


def _timed(problem: MultipleChoiceKnapsack, name: str, spec: Spec, options: Options) -> tuple[Solution, float]:
    best, found = math.inf, None
    for _ in range(spec.repeats):
        started = time.perf_counter()
        solution = solve(problem, name, time_limit=spec.limit, seed=options.seed)
        seconds = time.perf_counter() - started
        if found is None or seconds < best:
            best, found = seconds, solution
    assert found is not None
    return found, best


def planted_curves(sites: int, choices: int, share: float, seed: int) -> MultipleChoiceKnapsack:
    """Return a model's layer budgets: damage falls with the units kept, noisily; latency grows in steps.

    Both budgets matter: they lie up to 1 % above what a model spends that pays for both resources at
    the price at which it spends `share` of the dense model's parameters.

    Args:
        sites, choices: number of sites, and of choices at each (1/choices up to all units kept).
        share: of the dense model's parameters, in (0, 1).
    """
    rng = np.random.default_rng(seed)
    damage, cost = np.zeros((sites, choices)), np.zeros((sites, choices, 2))
    units = np.arange(1, choices + 1)
    kept = units / choices
    for site in range(sites):
        size = rng.lognormal(0.0, 0.7)
        fall = -np.diff((1 - np.concatenate([[0.0], kept])) ** rng.uniform(1.2, 4.0))
        fall *= rng.lognormal(0.0, 0.6, choices)  # noise on each step keeps the curve monotone
        damage[site] = rng.lognormal(0.0, 0.8) * (fall.sum() - np.cumsum(fall))
        tile = int(rng.choice([2, 4, 8]))
        steps = np.ceil(units / tile) * tile / choices
        cost[site, :, 0] = 1e6 * size * (kept + rng.uniform(0, 0.02))
        cost[site, :, 1] = 1e-3 * size * rng.lognormal(0.0, 0.5) * (rng.uniform(0.05, 0.3) + steps + 0.05 * kept)
    dense = cost[:, -1].sum(axis=0)
    low, high = 0.0, 1e6
    for _ in range(60):
        price = (low + high) / 2
        pick = (damage + price * (cost / dense).sum(axis=2)).argmin(axis=1)
        spent = cost[np.arange(sites), pick].sum(axis=0)
        low, high = (price, high) if spent[0] > share * dense[0] else (low, price)
    # Never below a known configuration, so that the problem is feasible at every size.
    budget = spent * rng.uniform(1.0, 1.01, 2)
    return MultipleChoiceKnapsack.from_curves(list(damage), list(cost), budget)

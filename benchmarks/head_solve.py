"""Every dominating-set solver on all head graphs of a model: kept heads, certificate gap, milliseconds.

``12x12``: 12 layers of 12 synthetic heads, some planted as noisy copies of others; each layer's
threshold is a quantile of its distances, so that densities run from about 0.1 to 0.25.
``minilm_6x12``: the real weight distances of a pretrained MiniLM, cut at the same quantiles.
``32x32``, ``48x40``, ``80x64``: larger models of the same making, `exact` beside CP-SAT.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.harness import Figure, Options, Outcome
from topoprune import Graph, extract
from topoprune_solvers import DominatingSet, Solution, available_solvers, get_solver, solve_many
from topoprune_solvers.compiled import enabled

TOLERANCE = 1e-9
TARGETS = {"12x12": 1.0, "32x32": 3.0, "48x40": 5.0, "80x64": 40.0}  # ms for a whole model, `exact`
KERNEL_TARGET = 0.1  # ms, 12x12


@dataclass(frozen=True)
class Spec:
    """The synthetic models and how they are timed.

    Args:
        layers, heads: shape of a model; 7 in 12 heads of a layer are distinct, the others are copies.
        width: features of a head. noise: largest standard deviation of a copy's difference.
        quantiles: of a layer's distances, of the first and the last layer: the densities.
        models: seeds, over which sizes are averaged. repeats: timed runs of each model.
        solvers: names, or None for all.
    """

    layers: int = 12
    heads: int = 12
    width: int = 64
    noise: float = 0.8
    quantiles: tuple[float, float] = (0.1, 0.25)
    models: int = 10
    repeats: int = 7
    solvers: tuple[str, ...] | None = None

    @property
    def prototypes(self) -> int:
        """Number of distinct heads of a layer."""
        return self.heads * 7 // 12


def run(options: Options) -> Outcome:
    """Solve all layers of each model with each available solver."""
    first = Spec(models=3, repeats=3) if options.quick else Spec()
    few = replace(first, models=1 if options.quick else 3, solvers=("exact", "cp-sat"))
    specs = {
        "12x12": first,
        "32x32": replace(few, layers=32, heads=32),
        "48x40": replace(few, layers=48, heads=40),
        "80x64": replace(few, layers=80, heads=64),
    }
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    correct = True
    sets: dict[str, tuple[Spec, list[list[DominatingSet]]]] = {}
    for name, spec in specs.items():
        seeds = range(options.seed, options.seed + spec.models)
        sets[name] = spec, [[_problem(graph, q) for graph, q in planted_heads(spec, seed)] for seed in seeds]
    real = minilm_heads(first, notes)
    if real is not None:
        sets["minilm_6x12"] = first, [real]
    for name, (spec, models) in sets.items():
        densities = [problem.indices.size / (problem.n * (problem.n - 1)) for model in models for problem in model]
        notes.append(f"{name}: {len(models)} model(s), densities {min(densities):.2f}..{max(densities):.2f}")
        solvers = [
            solver for solver in available_solvers(DominatingSet) if spec.solvers is None or solver in spec.solvers
        ]
        measured = {solver: _measure(solver, models, spec, options) for solver in solvers}
        correct &= _gate(name, measured, notes)
        optimum = [solution.objective for solution in measured["exact"].solutions]
        for solver, result in measured.items():
            row = {"graphs": name, "densities": densities, **_row(solver, result, optimum, models)}
            rows.append(row)
            target = TARGETS.get(name) if solver == "exact" else None
            figures[f"{name}_{solver}_ms"] = Figure(row["ms"], "ms", target)
            figures[f"{name}_{solver}_gap"] = Figure(row["gap"], "ratio")
            figures[f"{name}_{solver}_size"] = Figure(row["size"], "heads")
        for row in rows:
            if row["graphs"] == name and row["own_bound"]:
                sources = ", ".join(f"{source} {count}" for source, count in row["bound_sources"].items())
                notes.append(f"{name}, {row['solver']}: layers by what proves the bound: {sources}")
        unproven = [row["solver"] for row in rows if row["graphs"] == name and not row["own_bound"]]
        if unproven:
            notes.append(f"{name}: {', '.join(unproven)} prove no bound; their gap is measured against the optimum")
    if enabled():
        kernel = [_kernel_ms(model) for model in sets["12x12"][1]]
        figures["12x12_kernel_ms"] = Figure(float(np.median(kernel)), "ms", KERNEL_TARGET)
        notes.append("12x12_kernel: the compiled call alone, its arrays at hand, dominators included")
    else:
        notes.append("12x12_kernel was left out: numba is not installed or switched off")
    notes.append(
        "ms: one whole model, all layers, verification included, first call warm; gap: the worst layer; size: heads "
        "kept, mean over models"
    )
    return Outcome(correct, figures, rows, notes)


def planted_heads(spec: Spec, seed: int) -> list[tuple[Graph, float]]:
    """Return a complete distance graph and a quantile for each layer of a synthetic model."""
    rng = np.random.default_rng(seed)
    layers = []
    for q in np.linspace(*spec.quantiles, spec.layers):
        copies = rng.integers(spec.prototypes, size=spec.heads - spec.prototypes)
        origin = np.concatenate([np.arange(spec.prototypes), copies])
        feature = rng.normal(size=(spec.prototypes, spec.width))[origin]
        feature += rng.uniform(0, spec.noise, (spec.heads, 1)) * rng.normal(size=feature.shape)
        feature = feature[rng.permutation(spec.heads)]
        distance = np.abs(feature[:, None] - feature[None]).max(axis=2)
        layers.append((Graph.from_dense(distance), float(q)))
    return layers


def minilm_heads(spec: Spec, notes: list[str]) -> list[DominatingSet] | None:
    """Return the problems of the embedded MiniLM's heads, or None where it is not installed."""
    from topoprune.tasks.models import load_backbone

    try:
        model = load_backbone("embedded")
    except FileNotFoundError as error:
        notes.append(f"minilm_6x12 was left out: {error}")
        return None
    graph = extract(model, measure="weights-linf", include=("heads",))
    quantiles = np.linspace(*spec.quantiles, len(graph.redundancy))
    return [_problem(heads, q) for heads, q in zip(graph.redundancy.values(), quantiles, strict=True)]


def _problem(graph: Graph, quantile: float) -> DominatingSet:
    near = graph.at_most(graph.quantile(quantile))
    return DominatingSet(near.indptr, near.indices, near.weight)


@dataclass(frozen=True)
class Measured:
    """Solutions of all layers of all models, and (models, repeats) seconds."""

    solutions: list[Solution]
    seconds: np.ndarray


def _measure(solver: str, models: Sequence[Sequence[DominatingSet]], spec: Spec, options: Options) -> Measured:
    solve_many(models[0], solver, seed=options.seed)  # imports and caches
    solutions: list[Solution] = []
    # CP-SAT needs seconds for a larger model; its spread is small beside that.
    repeats = spec.repeats if spec.solvers is None or solver == "exact" else 1
    seconds = np.zeros((len(models), repeats))
    for i, problems in enumerate(models):
        for repeat in range(repeats):
            started = time.perf_counter()
            found = solve_many(problems, solver, seed=options.seed)
            seconds[i, repeat] = time.perf_counter() - started
        solutions += found
    return Measured(solutions, seconds)


def _kernel_ms(problems: Sequence[DominatingSet]) -> float:
    """Return the median milliseconds of the bare compiled call for all layers of a model."""
    from topoprune_solvers.domination.bitset_batch import Batch
    from topoprune_solvers.domination.exact_kernels import solve_batch

    batch = Batch(problems, compiled=True)
    seconds = []
    for _ in range(50):
        started = time.perf_counter()
        done = batch.run(solve_batch, 0, 10**6, 10**6)
        seconds.append(time.perf_counter() - started)
        assert done == len(problems), "the call went through all problems"
    return 1e3 * float(np.median(seconds))


def _row(solver: str, result: Measured, optimum: Sequence[float], models: Sequence[Any]) -> dict[str, Any]:
    own = [solution.gap for solution in result.solutions]
    proves = not any(math.isnan(gap) for gap in own)
    excess = [1 - best / s.objective if s.objective else 0.0 for s, best in zip(result.solutions, optimum, strict=True)]
    per_model = 1e3 * np.median(result.seconds, axis=1)
    sources: dict[str, int] = {}
    for solution in result.solutions:
        if solution.bound is not None:
            sources[solution.bound.source] = sources.get(solution.bound.source, 0) + 1
    return {
        "solver": solver,
        "size": sum(s.n_kept for s in result.solutions) / len(models),
        "optimum": sum(optimum) / len(models),
        "worst_over_optimum": max(s.objective / best for s, best in zip(result.solutions, optimum, strict=True)),
        "gap": max(own) if proves else max(excess),
        "own_bound": proves,
        "bound_sources": sources,
        "proven_optimal": sum(s.status.name == "OPTIMAL" for s in result.solutions),
        "layers": len(result.solutions),
        "ms": float(np.median(per_model)),
        "ms_lowest": float(per_model.min()),
        "ms_highest": float(per_model.max()),
        "solver_only_ms": 1e3 * sum(s.seconds for s in result.solutions) / len(models),
    }


def _gate(name: str, measured: dict[str, Measured], notes: list[str]) -> bool:
    """Exact solvers agree, nobody is below the optimum, no bound above it (validity: `solve` verifies)."""
    exact = [solver for solver in measured if get_solver(solver, DominatingSet).capabilities.exact]
    optimum = np.array([solution.objective for solution in measured["exact"].solutions])
    wrong = []
    for solver, result in measured.items():
        value = np.array([solution.objective for solution in result.solutions])
        bound = np.array([-np.inf if s.bound is None else s.bound.value for s in result.solutions])
        if solver in exact and not np.allclose(value, optimum, atol=TOLERANCE):
            wrong.append(f"{solver} is exact but keeps {value.sum():g}, exact keeps {optimum.sum():g}")
        if np.any(value < optimum - TOLERANCE) or np.any(bound > optimum + TOLERANCE):
            wrong.append(f"{solver} contradicts the optimum of exact")
    notes.extend(f"gate, {name}: {sentence}" for sentence in wrong)
    return not wrong

"""Dominating sets on neuron graphs: greedy with pruning in milliseconds, local search against it in size.

The graphs are built as `topoprune.extract` builds them for neurons: each unit's 16 nearest by cosine distance,
an edge where either end has the other; the features are standard normal. ``N_greedy_ms`` is greedy and
backward pruning on a built covering instance (closed neighbourhoods), median of the repeats;
``N_greedy_solve_ms`` is all of ``solve(problem, "greedy")``: instance, greedy, pruning, dual bound,
dominators and verification. ``N_local-search_size_ratio`` is the size of local search under its time limit
over the size of greedy, ``N_optimum_share`` the bound over the size of local search.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Figure, Options, Outcome
from topoprune import Graph
from topoprune.extraction import nearest_graph
from topoprune_solvers import DominatingSet, solve
from topoprune_solvers.compiled import VARIABLE, enabled
from topoprune_solvers.domination.covering import cover_of
from topoprune_solvers.domination.greedy import best_greedy_cover

TARGETS_MS = {3072: 2.0, 14336: 15.0}
TARGETS_RATIO = {3072: 0.92, 14336: 0.97}


@dataclass(frozen=True)
class Spec:
    """The graphs and how they are timed.

    Args:
        sizes: neurons of a layer (BERT base, Llama 3 8B). neighbours: k. width: features of a neuron.
        graphs: seeds of each size. repeats: timed runs of greedy, and of a whole solve.
        seconds: time limit of local search.
    """

    sizes: tuple[int, ...] = (3072, 14336)
    neighbours: int = 16
    width: int = 64
    graphs: int = 3
    repeats: int = 15
    seconds: float = 4.0


def run(options: Options) -> Outcome:
    """Time greedy and compare local search with it on each size."""
    spec = Spec(graphs=1, repeats=5, seconds=2.0) if options.quick else Spec()
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    notes = [
        f"{spec.neighbours} nearest neighbours of {spec.width} normal features, {spec.graphs} graph(s) a size; "
        f"local search: {spec.seconds:g} s a graph, reductions, bound and verification included",
        "greedy_ms: greedy and pruning on a built covering instance; greedy_solve_ms: the public solve() with bound "
        "and verification",
    ]
    if not enabled():
        notes.append(f"numba is not installed or {VARIABLE}=0: these are the times of numpy and Python")
    correct = True
    for n in spec.sizes:
        measured = [_measure(spec, n, options.seed + number) for number in range(spec.graphs)]
        rows += measured
        for row in measured:
            if row["problem"]:
                correct = False
                notes.append(f"gate, {n} nodes, seed {row['seed']}: {row['problem']}")
        median = {key: float(np.median([row[key] for row in measured])) for key in measured[0] if key != "problem"}
        figures[f"{n}_greedy_ms"] = Figure(median["greedy_ms"], "ms", TARGETS_MS.get(n))
        figures[f"{n}_greedy_solve_ms"] = Figure(median["greedy_solve_ms"], "ms")
        figures[f"{n}_greedy_size"] = Figure(median["greedy_size"], "units")
        figures[f"{n}_local-search_size"] = Figure(median["local_search_size"], "units")
        ratio = None if options.quick else TARGETS_RATIO.get(n)
        figures[f"{n}_local-search_size_ratio"] = Figure(median["size_ratio"], "ratio", ratio)
        figures[f"{n}_optimum_share"] = Figure(median["optimum_share"], "ratio", better="higher")
    return Outcome(correct, figures, rows, notes)


def neuron_graph(n: int, neighbours: int, width: int, seed: int) -> Graph:
    """Return the nearest-neighbour graph of n units with normal features."""
    feature = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    feature /= feature.norm(dim=1, keepdim=True)

    def tile(rows: slice, columns: slice) -> torch.Tensor:
        return 1.0 - feature[rows] @ feature[columns].T

    return nearest_graph(tile, n, neighbours, block=768, normalised=False)


def _measure(spec: Spec, n: int, seed: int) -> dict[str, Any]:
    graph = neuron_graph(n, spec.neighbours, spec.width, seed)
    problem = DominatingSet(graph.indptr, graph.indices, graph.weight)
    cover = cover_of(problem)
    keep = best_greedy_cover(cover)
    greedy = solve(problem, "greedy")
    solve(problem, "local-search", time_limit=0.1)  # compiles
    found = solve(problem, "local-search", time_limit=spec.seconds, seed=seed)
    assert found.bound is not None and greedy.bound is not None
    wrong = ""
    if not problem.covered(keep).all() or keep.sum() != greedy.objective:
        wrong = "the timed greedy cover is not that of solve()"
    elif found.objective > greedy.objective:
        wrong = f"local search keeps {found.objective:g} units, greedy {greedy.objective:g}"
    elif max(found.bound.value, greedy.bound.value) > found.objective:
        wrong = "a bound is above a cover"
    return {
        "n": n,
        "seed": seed,
        "edges": graph.indices.size // 2,
        "greedy_ms": _milliseconds(lambda: best_greedy_cover(cover), spec.repeats),
        "greedy_solve_ms": _milliseconds(lambda: solve(problem, "greedy"), spec.repeats),
        "greedy_size": greedy.objective,
        "greedy_bound": greedy.bound.value,
        "local_search_size": found.objective,
        "local_search_seconds": found.seconds,
        "local_search_steps": found.stats["steps"],
        "bound": found.bound.value,
        "size_ratio": found.objective / greedy.objective,
        "optimum_share": found.bound.value / found.objective,
        "problem": wrong,
    }


def _milliseconds(call: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1e3 * float(np.median(seconds))

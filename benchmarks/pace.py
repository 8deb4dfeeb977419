"""Dominating sets of public challenge instances (PACE 2025): size, bound and gap against the best known values.

The instances are read from ``$TOPOPRUNE_DATA/pace``: a ``manifest.csv`` (name, track, best_known, lower_bound,
status, ...) and one ``.gr`` file each. A full run takes about an hour; every measurement is kept in a cache folder
(``$TOPOPRUNE_BENCH_CACHE``, by default ``~/.cache/topoprune``) as soon as it is made, so a run that was stopped
goes on where it was. Measurements of other code, limits or seeds are not taken over.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import topoprune_solvers
from benchmarks.harness import Figure, Options, Outcome, data_folder
from topoprune import Graph
from topoprune.files import atomic_path
from topoprune.graph_files import read_graph
from topoprune_solvers import DominatingSet, solve

CACHE_VARIABLE = "TOPOPRUNE_BENCH_CACHE"
EXACT_TRACKS = ("exact", "exact-private", "test")
QUICK = ("1915", "duplication_divergence_graph_300_0.9", "exact_017", "exact_038", "exact_053", "private_exact_068")


@dataclass(frozen=True)
class Spec:
    """What runs on which instance, in seconds; nothing else runs beside it.

    Args:
        heuristic: limit of ``local-search``. exact: limit of ``exact``, on the exact and test tracks.
        cp_sat: limit of the plain ``cp-sat``, on instances of at most `cp_sat_units` nodes.
        names: instances by name, None for all.
    """

    heuristic: float = 10.0
    exact: float = 60.0
    cp_sat: float = 10.0
    cp_sat_units: int = 20_000
    names: tuple[str, ...] | None = None

    def jobs(self, instance: Mapping[str, str]) -> Iterator[tuple[str, float]]:
        """Yield the solvers that run on an instance, with their limits."""
        yield "local-search", self.heuristic
        if instance["track"] in EXACT_TRACKS:
            yield "exact", self.exact
        if int(instance["n"]) <= self.cp_sat_units and find_spec("ortools") is not None:
            yield "cp-sat", self.cp_sat
        if find_spec("networkx") is not None:
            yield "networkx", math.inf


def run(options: Options) -> Outcome:
    """Run each solver on each of its instances, one after the other."""
    data = data_folder()
    folder = None if data is None else data / "pace"
    if folder is None or not (folder / "manifest.csv").is_file():
        return Outcome(True, {}, notes=["no instances: set TOPOPRUNE_DATA to a folder with pace/manifest.csv in it"])
    spec = Spec(heuristic=3.0, exact=3.0, cp_sat=3.0, names=QUICK) if options.quick else Spec()
    with open(folder / "manifest.csv", newline="") as file:
        instances = [row for row in csv.DictReader(file) if spec.names is None or row["name"] in spec.names]
    cache = None if options.quick else _Cache(_cache_folder(), options.seed)
    _warm_up(options.seed)
    rows, notes = [], []
    for instance in instances:
        rows += _measure(folder, instance, spec, options.seed, cache)
    if cache is not None and cache.resumed:
        notes.append(
            f"{cache.resumed} of {len(rows)} measurements are of an earlier run of the same code ({cache.file})"
        )
    left_out = sorted({row["name"] for row in instances} - {row["name"] for row in rows if row["solver"] == "cp-sat"})
    notes.append(f"cp-sat was not run on graphs above {spec.cp_sat_units} nodes: {', '.join(left_out) or 'none'}")
    wrong = _gate(rows)
    notes += [f"gate: {sentence}" for sentence in wrong]
    return Outcome(not wrong, _figures(rows), rows, [*_table(rows), *notes])


def _measure(
    folder: Path, instance: Mapping[str, str], spec: Spec, seed: int, cache: _Cache | None
) -> list[dict[str, Any]]:
    """Return one row a solver; the graph is read only if something is to be run on it."""
    rows: list[dict[str, Any]] = []
    problem: DominatingSet | None = None
    for solver, limit in spec.jobs(instance):
        row = None if cache is None else cache.get(instance["name"], solver, limit)
        if row is None:
            problem = _problem(folder, instance["name"]) if problem is None else problem
            row = {**_known(instance), **_run(problem, solver, limit, seed)}
            if cache is not None:
                cache.put(row)
        rows.append(row)
        bound = "-" if row["bound"] is None else f"{row['bound']:g} ({row['source']})"
        line = f"{row['name']:40} {solver:13} {row['size']:>6} bound {bound}, best known {row['best_known']}"
        print(f"{line}, {row['seconds']:.1f} s", file=sys.stderr, flush=True)
    return rows


def _known(instance: Mapping[str, str]) -> dict[str, Any]:
    lower = instance["lower_bound"]
    return {
        "name": instance["name"],
        "track": instance["track"],
        "n": int(instance["n"]),
        "m": int(instance["m"]),
        "best_known": int(instance["best_known"]),
        "known_bound": int(lower) if lower else None,
        "open": instance["status"] != "optimal",
    }


def _problem(folder: Path, name: str) -> DominatingSet:
    (path,) = (path for path in folder.iterdir() if path.name.split(".gr")[0] == name and ".gr" in path.name)
    graph = read_graph(path)
    assert isinstance(graph, Graph)
    return DominatingSet(graph.indptr, graph.indices)


def _run(problem: DominatingSet, solver: str, limit: float, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    if solver == "networkx":
        keep = _networkx(problem)
        seconds = time.perf_counter() - started
        row = {"bound": None, "source": None, "status": "FEASIBLE", "gap": None, "stats": {}}
    else:
        solution = solve(problem, solver, time_limit=limit, seed=seed)
        seconds = time.perf_counter() - started
        keep = solution.keep
        bound = solution.bound
        row = {
            "bound": None if bound is None else bound.value,
            "source": None if bound is None else bound.source,
            "status": solution.status.name,
            "gap": None if bound is None else solution.gap,
            "stats": {key: str(value) for key, value in solution.stats.items()},
        }
    return {
        **row,
        "solver": solver,
        "limit": None if math.isinf(limit) else limit,
        "size": int(keep.sum()),
        "dominates": _dominates(problem, keep),
        "seconds": seconds,
    }


def _networkx(problem: DominatingSet) -> np.ndarray:
    import networkx

    rows = np.repeat(np.arange(problem.n), np.diff(problem.indptr))
    graph = networkx.Graph()
    graph.add_nodes_from(range(problem.n))
    graph.add_edges_from(zip(rows.tolist(), problem.indices.tolist(), strict=True))
    keep = np.zeros(problem.n, dtype=bool)
    keep[list(networkx.dominating_set(graph))] = True
    return keep


def _dominates(problem: DominatingSet, keep: np.ndarray) -> bool:
    """Return whether every node is kept or next to a kept one; from the adjacency alone."""
    reached = keep.copy()
    rows = np.repeat(np.arange(problem.n), np.diff(problem.indptr))
    reached[rows[keep[problem.indices]]] = True
    return bool(reached.all())


def _warm_up(seed: int) -> None:
    """Import and compile before anything is timed."""
    rng = np.random.default_rng(seed)
    problem = DominatingSet.from_edges(200, rng.integers(200, size=(500, 2)))
    for solver in ("local-search", "exact"):
        solve(problem, solver, time_limit=0.5)


def _gate(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what contradicts itself: sets that do not dominate, bounds above solutions, solutions below bounds."""
    wrong = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        best = min([own[0]["best_known"], *(row["size"] for row in own)])
        for row in own:
            if not row["dominates"]:
                wrong.append(f"{name}: the set of {row['solver']} does not dominate")
            if row["bound"] is not None and row["bound"] > best + 1e-9:
                wrong.append(f"{name}: {row['solver']} proves {row['bound']:g}, but {best} is known")
            if row["known_bound"] is not None and row["size"] < row["known_bound"]:
                wrong.append(f"{name}: {row['solver']} has {row['size']}, below the known bound {row['known_bound']}")
            if row["status"] == "OPTIMAL" and row["size"] != best:
                wrong.append(f"{name}: {row['solver']} calls {row['size']} optimal, but {best} is known")
    return wrong


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}

    def of(solver: str) -> list[Mapping[str, Any]]:
        return [row for row in rows if row["solver"] == solver]

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else math.nan

    def excess(solver: str) -> float:
        return mean([row["size"] / row["best_known"] - 1 for row in of(solver)])

    exact = of("exact")
    known, unknown = [row for row in exact if not row["open"]], [row for row in exact if row["open"]]
    heuristic = of("local-search")
    figures["local-search_mean_excess"] = Figure(excess("local-search"), "ratio", 0.005)
    ties = mean([row["size"] <= row["best_known"] for row in heuristic])
    figures["local-search_ties"] = Figure(ties, "share", 0.5, "higher")
    proven = mean([row["status"] == "OPTIMAL" for row in known])
    figures["exact_proven_share"] = Figure(proven, "share", 0.75, "higher")
    open_proven = sum(row["status"] == "OPTIMAL" for row in unknown)
    figures["exact_open_proven"] = Figure(float(open_proven), "count", better="higher")
    figures["exact_mean_excess"] = Figure(excess("exact"), "ratio")
    figures["exact_mean_gap"] = Figure(mean([row["gap"] for row in exact]), "ratio")
    better = {row["name"] for row in rows if row["size"] < row["best_known"]}
    figures["new_best_values"] = Figure(float(len(better)), "count", better="higher")
    tighter = {
        row["name"]
        for row in rows
        if None not in (row["bound"], row["known_bound"]) and row["bound"] > row["known_bound"]
    }
    figures["new_best_bounds"] = Figure(float(len(tighter)), "count", better="higher")
    limited = [row for row in rows if row["limit"] is not None and row["solver"] != "networkx"]
    late = max((row["seconds"] - row["limit"] for row in limited), default=math.nan)
    allowed = max((row["seconds"] - 1.1 * row["limit"] - 0.2 for row in limited), default=math.nan)
    figures["most_seconds_late"] = Figure(late, "s")
    figures["most_seconds_past_tolerance"] = Figure(allowed, "s", 0.0)
    for peer in ("cp-sat", "networkx"):
        if of(peer):
            figures[f"{peer}_mean_excess"] = Figure(excess(peer), "ratio")
    plain = [row for row in of("cp-sat") if not row["open"]]
    if plain:
        figures["cp-sat_proven_share"] = Figure(mean([row["status"] == "OPTIMAL" for row in plain]), "share")
    return figures


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'instance':40} {'n':>7} {'solver':13} {'size':>6} {'bound':>7} {'gap':>7} {'best known':>11} {'s':>6}"]
    for row in rows:
        bound = "-" if row["bound"] is None else f"{row['bound']:g}"
        gap = "-" if row["gap"] is None else f"{row['gap']:.2%}"
        known = f"{row['best_known']}{'?' if row['open'] else ''}"
        lines.append(
            f"{row['name']:40} {row['n']:>7} {row['solver']:13} {row['size']:>6} {bound:>7} {gap:>7} {known:>11} "
            f"{row['seconds']:>6.1f}"
        )
    return [*lines, "a best known value with ? is not proven optimal in the manifest"]


def _cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "topoprune"


class _Cache:
    """Measurements on disk, valid for one state of the solvers' code and one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        digest = hashlib.sha256(str(seed).encode())
        for path in sorted(Path(topoprune_solvers.__file__).parent.rglob("*.py")):
            digest.update(path.read_bytes())
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"pace-{digest.hexdigest()[:16]}.json"
        self.resumed = 0
        self._rows: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            self._rows = json.loads(self.file.read_text())

    def get(self, name: str, solver: str, limit: float) -> dict[str, Any] | None:
        row = self._rows.get(f"{name} {solver} {limit}")
        self.resumed += row is not None
        return row

    def put(self, row: dict[str, Any]) -> None:
        limit = math.inf if row["limit"] is None else row["limit"]
        self._rows[f"{row['name']} {row['solver']} {limit}"] = row
        with atomic_path(self.file) as temporary:
            temporary.write_text(json.dumps(self._rows, indent=1))

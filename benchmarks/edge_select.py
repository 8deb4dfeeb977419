"""Edge masks of one FFN matrix (768 x 3072) at 50 to 95 % sparsity: seconds, certified gaps, N:M masks beside.

``one_sided``: attachment 0, no bounds, row bounds or column bounds: exact by sorting (`greedy`).
``attachment``: both readings of the degree cost at three strengths lambda, as multiples of mean score x n_cols:
small 0.1, medium 1, large 10 (`lagrangian`; `greedy` beside it).
``two_sided``: every row and column degree within 50 %, within 10 % of the average, or equal (`dual-flow`;
`min-cost-flow`, which is exact, beside it).
Scores: |w| of normal weights times log-normal scales of rows and columns, and the first FFN matrix of the embedded
MiniLM where it is installed. Seconds: `solve` with its verification, the problem's construction outside.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.harness import Figure, Options, Outcome
from topoprune_solvers import BlockMask, EdgeSelection, Solution, Status, available_solvers, get_solver, solve

TOLERANCE = 1e-7  # relative, of objectives that must agree


@dataclass(frozen=True)
class Spec:
    """Sizes and repeats.

    Args:
        rows, cols: shape of the synthetic matrix. sparsities: shares of edges removed.
        strengths: lambda, in units of mean score x n_cols. bands: largest relative distance of a degree
            from the average. repeats: timed runs of the quick solvers; the median counts. twins: small instances of
            the gate. groups: N:M. peers: whether min-cost flow and greedy run beside.
    """

    rows: int = 768
    cols: int = 3072
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9, 0.95)
    strengths: tuple[float, ...] = (0.1, 1.0, 10.0)
    bands: tuple[float, ...] = (0.5, 0.1, 0.0)
    repeats: int = 5
    twins: int = 40
    groups: tuple[tuple[int, int], ...] = ((2, 4), (4, 8), (8, 16), (16, 32))
    peers: bool = True


QUICK = Spec(
    sparsities=(0.5, 0.95),
    strengths=(1.0, 10.0),
    bands=(0.1,),
    repeats=1,
    twins=10,
    groups=((2, 4), (4, 8)),
    peers=False,
)


def run(options: Options) -> Outcome:
    """Check on small instances, then measure; every answer is verified by `solve`."""
    spec = QUICK if options.quick else Spec()
    notes: list[str] = []
    correct = _gate(spec, options.seed, notes)
    matrices = {"synthetic": synthetic(spec.rows, spec.cols, options.seed)}
    real = minilm_matrix(notes)
    if real is not None:
        matrices["minilm"] = real
    rows: list[dict[str, Any]] = []
    for name, score in matrices.items():
        for part in (_one_sided, _attachment, _two_sided, _groups):
            rows += [{"matrix": name, "shape": list(score.shape), **row} for row in part(score, spec, options.seed)]
    correct &= _consistent(rows, notes)
    notes.append("lambda: multiples of mean score x n_cols; two-sided bands: degrees within that share of the average")
    notes.append("figures: the worst over matrices, sparsities, bounds, readings and strengths")
    return Outcome(correct, _figures(rows), rows, notes)


def synthetic(rows: int, cols: int, seed: int) -> np.ndarray:
    """Return |normal weights| with row and column scales."""
    rng = np.random.default_rng(seed)
    scale = np.exp(0.5 * rng.standard_normal((rows, 1)) + 0.3 * rng.standard_normal((1, cols)))
    return np.abs(rng.standard_normal((rows, cols))) * scale


def minilm_matrix(notes: list[str]) -> np.ndarray | None:
    """Return |w| of the first intermediate matrix of the embedded MiniLM, or None where it is not installed."""
    from safetensors.numpy import load_file

    from topoprune.tasks import embedded_model_path

    try:
        tensors = load_file(embedded_model_path() / "model.safetensors")
    except FileNotFoundError as error:
        notes.append(f"minilm was left out: {error}")
        return None
    name = next(key for key in sorted(tensors) if key.endswith("layer.0.intermediate.dense.weight"))
    return np.abs(tensors[name].T.astype(np.float64))  # (inputs, neurons), the shape of the synthetic one


def banded(score: np.ndarray, k: int, band: float) -> EdgeSelection:
    """Return the problem whose degrees stay within `band` of the average, rounded outwards; 0: as equal as can be."""
    bounds = {}
    for side, lines in (("row", score.shape[0]), ("col", score.shape[1])):
        if band:
            low, high = np.floor((1 - band) * k / lines), np.ceil((1 + band) * k / lines)
            bounds[f"{side}_min"], bounds[f"{side}_max"] = np.full(lines, int(low)), np.full(lines, int(high))
        else:
            degree = np.full(lines, k // lines) + (np.arange(lines) < k % lines)
            bounds[f"{side}_min"] = bounds[f"{side}_max"] = degree
    return EdgeSelection(score, k, **bounds)


def _kept(score: np.ndarray, sparsity: float) -> int:
    return round((1 - sparsity) * score.size)


def _timed(problem: Any, solver: str, repeats: int, seed: int, time_limit: float | None = None) -> dict[str, Any]:
    seconds, processor = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        solution = solve(problem, solver, seed=seed, time_limit=time_limit)
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return {
        "solver": solver,
        "s": float(np.median(seconds)),
        "s_lowest": min(seconds),
        "s_highest": max(seconds),
        "processor_s": float(np.median(processor)),
        "objective": solution.objective,
        "bound": None if solution.bound is None else solution.bound.value,
        "gap": solution.gap,
        "status": solution.status.name,
    }


def _one_sided(score: np.ndarray, spec: Spec, seed: int) -> Iterator[dict[str, Any]]:
    solve(EdgeSelection(score[:8, :8], 8), "greedy")  # imports
    for sparsity in spec.sparsities:
        k = _kept(score, sparsity)
        both = banded(score, k, 0.5)
        for bounds in ("none", "row", "col"):
            limits = (
                {}
                if bounds == "none"
                else {f"{bounds}_{end}": getattr(both, f"{bounds}_{end}") for end in ("min", "max")}
            )
            row = _timed(EdgeSelection(score, k, **limits), "greedy", spec.repeats, seed)
            yield {"part": "one_sided", "case": f"{sparsity:g} {bounds}", **row}


def _attachment(score: np.ndarray, spec: Spec, seed: int) -> Iterator[dict[str, Any]]:
    for sparsity in spec.sparsities:
        for reading in ("a", "b"):
            for strength in spec.strengths:
                problem = EdgeSelection(
                    score,
                    _kept(score, sparsity),
                    attachment=strength * float(score.mean()) * score.shape[1],
                    reading=reading,  # type: ignore[arg-type]
                )
                for solver in ("lagrangian", "greedy") if spec.peers else ("lagrangian",):
                    row = _timed(problem, solver, min(spec.repeats, 3) if solver == "lagrangian" else 1, seed)
                    yield {"part": "attachment", "case": f"{sparsity:g} {reading} {strength:g}", **row}


def _two_sided(score: np.ndarray, spec: Spec, seed: int) -> Iterator[dict[str, Any]]:
    solvers = ["dual-flow"]
    if spec.peers and find_spec("ortools") is not None:
        solvers.append("min-cost-flow")
    for sparsity in spec.sparsities:
        for band in spec.bands:
            problem = banded(score, _kept(score, sparsity), band)
            for solver in solvers:
                row = _timed(problem, solver, min(spec.repeats, 3) if solver == "dual-flow" else 1, seed)
                yield {"part": "two_sided", "case": f"{sparsity:g} {band:g}", **row}


def _groups(score: np.ndarray, spec: Spec, seed: int) -> Iterator[dict[str, Any]]:
    for kept, group in spec.groups:
        for transposable in (False, True):
            problem = BlockMask(score, kept, group, transposable)
            solvers = ("exact", "greedy", "random") if transposable and spec.peers else ("exact",)
            for solver in solvers:
                row = _timed(problem, solver, min(spec.repeats, 3) if solver == "exact" else 1, seed)
                case = f"{kept}:{group}{' transposable' if transposable else ''}"
                yield {"part": "groups", "case": case, "share_kept": row["objective"] / float(score.sum()), **row}


def _figures(rows: list[dict[str, Any]]) -> dict[str, Figure]:
    def worst(part: str, solver: str, key: str, case: Callable[[str], bool] = lambda case: True) -> float:
        found = [row[key] for row in rows if row["part"] == part and row["solver"] == solver and case(row["case"])]
        return max(found, default=float("nan"))

    figures = {
        "one_sided_s": Figure(worst("one_sided", "greedy", "s"), "s", 0.1),
        "two_sided_gap": Figure(worst("two_sided", "dual-flow", "gap"), "ratio", 0.0005),
        "two_sided_s": Figure(worst("two_sided", "dual-flow", "s"), "s", 6.0),
        "attachment_gap": Figure(worst("attachment", "lagrangian", "gap"), "ratio", 0.001),
        "attachment_s": Figure(worst("attachment", "lagrangian", "s"), "s", 1.0),
    }
    for part, solver in (("two_sided", "min-cost-flow"), ("attachment", "greedy")):
        if any(row["solver"] == solver and row["part"] == part for row in rows):
            figures[f"{part}_{solver}_s"] = Figure(worst(part, solver, "s"), "s")
            figures[f"{part}_{solver}_gap"] = Figure(worst(part, solver, "gap"), "ratio")
    for case in dict.fromkeys(row["case"] for row in rows if row["part"] == "groups"):
        for solver in ("exact", "greedy"):
            if any(row["case"] == case and row["solver"] == solver for row in rows):
                key = f"{case.replace(' ', '_')}_{solver}"
                figures[f"{key}_s"] = Figure(worst("groups", solver, "s", case.__eq__), "s")
                figures[f"{key}_gap"] = Figure(worst("groups", solver, "gap", case.__eq__), "ratio")
    return figures


def _consistent(rows: list[dict[str, Any]], notes: list[str]) -> bool:
    """No bound below a known objective of the same problem, and what is exact is proven."""
    wrong = []
    for row in rows:
        same = [r for r in rows if all(r[key] == row[key] for key in ("matrix", "part", "case"))]
        best = max(r["objective"] for r in same)
        if row["bound"] is not None and row["bound"] < best - TOLERANCE * abs(best):
            wrong.append(f"{row['matrix']} {row['part']} {row['case']}: the bound of {row['solver']} is below {best:g}")
        exact = row["part"] == "one_sided" or row["solver"] in ("exact", "min-cost-flow")
        if exact and row["status"] != Status.OPTIMAL.name:
            wrong.append(f"{row['matrix']} {row['part']} {row['case']}: {row['solver']} is {row['status']}")
    notes.extend(f"gate: {sentence}" for sentence in wrong)
    return not wrong


def _gate(spec: Spec, seed: int, notes: list[str]) -> bool:
    """On small instances exact solvers agree, nobody is above the optimum, no bound below it."""
    rng = np.random.default_rng(seed)
    wrong: list[str] = []
    for _ in range(spec.twins):
        score = np.abs(rng.standard_normal((3, 4)))
        k = int(rng.integers(1, 12))
        chosen = np.zeros(12, dtype=bool)
        chosen[rng.permutation(12)[:k]] = True
        row, col = chosen.reshape(3, 4).sum(axis=1), chosen.reshape(3, 4).sum(axis=0)
        rows = {"row_min": np.maximum(row - 1, 0), "row_max": row + 1}
        small = [
            EdgeSelection(score, k),
            EdgeSelection(score, k, **rows),
            EdgeSelection(score, k, attachment=float(rng.choice([0.3, 3.0])), reading=rng.choice(["a", "b"]), **rows),
            EdgeSelection(score, k, **rows, col_min=col, col_max=col),
            BlockMask(score.reshape(3, 4)[:, :4], 2, 4),
            BlockMask(np.abs(rng.standard_normal((4, 4))), 2, 4, transposable=True),
        ]
        for problem in small:
            wrong += _twin(problem)
        medium = np.abs(rng.standard_normal((12, 20)))
        priced = EdgeSelection(medium, int(rng.integers(20, 200)), attachment=3.0, reading=rng.choice(["a", "b"]))
        wrong += _compare(priced, solve(priced, "dp"), "dp", ("greedy", "lagrangian"))
    notes.extend(f"gate: {sentence}" for sentence in dict.fromkeys(wrong))
    notes.append(f"gate: {7 * spec.twins} small instances against enumeration or dynamic programming")
    return not wrong


def _twin(problem: Any) -> list[str]:
    names = [name for name in available_solvers(type(problem)) if name != "brute"]
    return _compare(problem, solve(problem, "brute"), "brute", tuple(names))


def _compare(problem: Any, twin: Solution, source: str, names: tuple[str, ...]) -> list[str]:
    wrong = []
    slack = TOLERANCE * max(1.0, abs(twin.objective))
    for name in names:
        try:
            solution = solve(problem, name)
        except ValueError:
            if not get_solver(name, type(problem)).capabilities.lacks:
                wrong.append(f"{name} refused a problem that it should take")
            continue
        if solution.objective > twin.objective + slack:
            wrong.append(f"{name} is above the optimum of {source}")
        if solution.bound is not None and solution.bound.value < twin.objective - slack:
            wrong.append(f"the bound of {name} is below the optimum of {source}")
        if get_solver(name, type(problem)).capabilities.exact and solution.objective < twin.objective - slack:
            wrong.append(f"{name} is exact, but below the optimum of {source}")
    return wrong

"""``topoprune extract``, ``solve`` and ``compare``: the graph on its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topoprune.cli.output import guarded, print_json, stderr_console

if TYPE_CHECKING:
    from topoprune import ModelGraph

__all__ = ["compare", "extract", "solve"]

_INCLUDE = {"heads": ("heads",), "neurons": ("neurons",), "edges": ("edges",)}
Source = Annotated[str, typer.Argument(help="A graph (.npz), a model folder, a hub id, or 'embedded'.")]
Measure = Annotated[
    str | None, typer.Option(help="Distance: circuit-cosine, weights-linf, output-gram, or a plug-in's.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Texts for measures that need data (a file with a text column); default: embedded docstrings."),
]
Samples = Annotated[int, typer.Option(help="Calibration texts.")]
Theta = Annotated[str | None, typer.Option(help="A distance, or auto:q for each layer's q-quantile.")]
Budget = Annotated[str | None, typer.Option(help="Keep so many units of a layer (8) or such a share (0.5).")]
Problem = Annotated[str, typer.Option(help="heads, neurons or edges.")]
Objective = Annotated[str, typer.Option(help="With --budget: k-centre, or soft (most importance explained).")]
Limit = Annotated[float | None, typer.Option(help="Seconds a layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@guarded
def extract(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or 'embedded'.")],
    out: Annotated[Path, typer.Option(help="The graph file to write (.npz).")],
    measure: Measure = None,
    include: Annotated[str, typer.Option(help="Some of heads,neurons,input_dims,edges.")] = "heads,neurons,input_dims",
    calibration_file: Calibration = None,
    calibration_samples: Samples = 256,
    as_json: Json = False,
) -> None:
    """Write a model's graph: units, distances, importance and cost."""
    kinds = tuple(part.strip() for part in include.split(",") if part.strip())
    graph = _from_model(model, measure, kinds, calibration_file, calibration_samples)
    path = graph.save(out)
    if as_json:
        sites = [
            {
                "site": site.name,
                "kind": site.kind,
                "units": site.n_units,
                "edges": graph.redundancy[site.name].n_edges if site.name in graph.redundancy else 0,
                "measure": graph.measures.get(site.name),
            }
            for site in graph.sites
        ]
        print_json(
            {
                "path": str(path),
                "model_type": graph.model_type,
                "structure_digest": graph.structure_digest,
                "sites": sites,
            }
        )
        return
    typer.echo(graph.summary())
    typer.echo(f"written: {path}")


@guarded
def solve(
    source: Source,
    theta: Theta = None,
    budget: Budget = None,
    problem: Problem = "heads",
    solver: Annotated[str | None, typer.Option(help="Registry name; default: exact for heads, greedy else.")] = None,
    objective: Objective = "k-centre",
    measure: Measure = None,
    calibration_file: Calibration = None,
    calibration_samples: Samples = 256,
    time_limit: Limit = None,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="The plan file to write (.npz).")] = None,
    as_json: Json = False,
) -> None:
    """Decide what stays, with a certificate for every layer."""
    from topoprune import solve as solve_graph

    request = _request(theta, budget, problem, objective, time_limit, seed)
    graph = _load(source, problem, measure, calibration_file, calibration_samples)
    plan = solve_graph(graph, solver=solver, **request)
    path = None if out is None else str(plan.save(out))
    if as_json:
        print_json(
            {
                "plan": path,
                "gap": plan.gap,
                "seconds": plan.seconds,
                "request": dict(plan.request),
                "rows": plan.table(),
            }
        )
        return
    typer.echo(plan.summary())
    if path is not None:
        typer.echo(f"written: {path}")


@guarded
def compare(
    source: Source,
    solvers: Annotated[str | None, typer.Option(help="Names, comma-separated; default: all available.")] = None,
    theta: Theta = None,
    budget: Budget = None,
    problem: Problem = "heads",
    objective: Objective = "k-centre",
    measure: Measure = None,
    calibration_file: Calibration = None,
    calibration_samples: Samples = 256,
    time_limit: Limit = 10.0,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Solve the same problems with several solvers."""
    from topoprune import compare as compare_solvers

    if theta is None and budget is None:
        theta = "auto:0.1"
    request = _request(theta, budget, problem, objective, time_limit, seed)
    graph = _load(source, problem, measure, calibration_file, calibration_samples)
    names = None if solvers is None else [name.strip() for name in solvers.split(",") if name.strip()]
    comparison = compare_solvers(graph, names, **request)
    if as_json:
        print_json({"request": request, "rows": comparison.to_dict()})
        return
    typer.echo(str(comparison))


def _request(
    theta: str | None, budget: str | None, problem: str, objective: str, time_limit: float | None, seed: int
) -> dict[str, Any]:
    request: dict[str, Any] = {"problem": problem, "time_limit": time_limit, "seed": seed}
    if theta is not None:
        try:
            request["theta"] = float(theta)
        except ValueError:
            request["theta"] = theta
    if budget is not None:
        try:
            # "8" is a count, "0.5" and "1.0" are shares.
            request["budget"] = int(budget) if budget.lstrip("+-").isdigit() else float(budget)
        except ValueError:
            raise ValueError(f"--budget is {budget!r}; expected a number of units (8) or a share (0.5)") from None
        if problem != "edges":
            request["objective"] = objective
    return request


def _load(source: str, problem: str, measure: str | None, calibration_file: Path | None, samples: int) -> ModelGraph:
    if problem not in _INCLUDE:
        raise ValueError(f"unknown problem {problem!r}; available: {', '.join(_INCLUDE)}")
    path = Path(source).expanduser()
    if not (path.suffix == ".npz" or path.is_file()):
        return _from_model(source, measure, _INCLUDE[problem], calibration_file, samples)
    from topoprune import ModelGraph

    if measure is not None or calibration_file is not None:
        raise ValueError(
            f"--measure and --calibration-file are for models; {source} is a graph that was extracted already"
        )
    return ModelGraph.load(path)


def _from_model(
    source: str, measure: str | None, include: tuple[str, ...], calibration_file: Path | None, samples: int
) -> ModelGraph:
    from topoprune import extract as extract_graph
    from topoprune.tasks.models import calibration_batches, load_backbone

    model = load_backbone(source)
    console = stderr_console()

    def batches() -> Iterator[dict[str, Any]]:
        # A generator, so that data-free measures read no data and load no tokenizer.
        texts, origin = _calibration_texts(calibration_file, samples)
        console.print(f"calibration: {len(texts)} texts, {origin}", highlight=False)
        yield from calibration_batches(source, model, texts)

    with warnings.catch_warnings():
        if calibration_file is None:
            warnings.filterwarnings("ignore", message="calibration is not used")
        asked: dict[str, Any] = {} if measure is None else {"measure": measure}
        return extract_graph(model, include=include, calibration=batches(), **asked)


def _calibration_texts(path: Path | None, samples: int) -> tuple[list[str], str]:
    if samples < 1:
        raise ValueError(f"--calibration-samples is {samples}; expected at least 1")
    if path is None:
        from topoprune.tasks.docstrings import load_docstrings

        data = load_docstrings().limit(samples, None)
        return [example.text for example in data.train], "docstrings of the standard library (embedded)"
    from topoprune.tasks.tables import read_table

    table = read_table(path)
    column = next((name for name in ("text", "sentence", "sentence1") if name in table.columns), None)
    if column is None:
        raise ValueError(
            f"{path} has no column text, sentence or sentence1; its columns are: {', '.join(table.columns)}"
        )
    return [str(row.get(column, "")) for _, row in table.rows[:samples]], f"{path}, column {column!r}"

"""``topoprune extract`` and ``topoprune solve``: the graph on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topoprune.cli.output import Json, check_target, emit_json, guarded, progress_bar, stderr_console
from topoprune.cli.sources import (
    Budget,
    Calibration,
    Floor,
    Gqa,
    Limit,
    Measure,
    ModelOptions,
    Objective,
    Problem,
    Samples,
    Scope,
    Source,
    Theta,
    from_model,
    load,
    requested,
)

__all__ = ["extract", "solve"]


@guarded
def extract(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or 'embedded'.")],
    out: Annotated[Path, typer.Option(help="The graph file to write (.npz).")],
    measure: Measure = None,
    include: Annotated[str, typer.Option(help="Some of heads,neurons,input_dims,edges.")] = "heads,neurons,input_dims",
    calibration_file: Calibration = None,
    calibration_samples: Samples = 256,
    gqa: Gqa = "groups",
    json_file: Json = None,
) -> None:
    """Write a model's graph: units, distances, importance and cost."""
    check_target("--json", json_file)
    kinds = tuple(part.strip() for part in include.split(",") if part.strip())
    graph = from_model(model, kinds, ModelOptions(measure, calibration_file, calibration_samples, gqa))
    path = graph.save(out)
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
    described = {"path": str(path), "model_type": graph.model_type, "structure_digest": graph.structure_digest}
    if emit_json(json_file, {**described, "sites": sites}):
        return
    typer.echo(graph.summary())
    for name in filter(None, (path, json_file)):
        typer.echo(f"written: {name}")


@guarded
def solve(
    source: Source,
    theta: Theta = None,
    budget: Budget = None,
    problem: Problem = None,
    solver: Annotated[
        str | None, typer.Option(help="Registry name; default: exact for heads and up to 64 nodes, greedy else.")
    ] = None,
    objective: Objective = "k-centre",
    scope: Scope = "site",
    floor: Floor = None,
    measure: Measure = None,
    calibration_file: Calibration = None,
    calibration_samples: Samples = 256,
    gqa: Gqa = "groups",
    time_limit: Limit = None,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="The plan file to write (.npz).")] = None,
    json_file: Json = None,
) -> None:
    """Decide what stays, with a certificate for every layer. Ctrl-C returns the best found so far."""
    from topoprune import solve as solve_graph
    from topoprune_solvers.result import interruptible

    check_target("--out", out)
    check_target("--json", json_file)
    request = requested(theta, budget, objective, scope, floor, time_limit, seed)
    options = ModelOptions(measure, calibration_file, calibration_samples, gqa)
    graph, request = load(source, problem, request, options)
    if solver is None and request["problem"] == "graph" and max(site.n_units for site in graph.sites) <= 64:
        solver = "exact"
    with interruptible() as stop, progress_bar() as show:
        show(f"solving {request['problem']}", 0, 0)
        plan = solve_graph(graph, solver=solver, **request)
        interrupted = stop.is_set()
    path = None if out is None else str(plan.save(out))
    described = {
        "plan": path,
        "gap": plan.gap,
        "seconds": plan.seconds,
        "request": dict(plan.request),
        "rows": plan.table(),
        "interrupted": interrupted,
    }
    if not emit_json(json_file, described):
        typer.echo(plan.summary())
        for name in filter(None, (path, json_file)):
            typer.echo(f"written: {name}")
    if interrupted:
        stderr_console().print("[yellow]stopped by Ctrl-C: the best found so far[/]", highlight=False)
        raise typer.Exit(130)

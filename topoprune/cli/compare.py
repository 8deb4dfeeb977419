"""``topoprune compare``: solvers side by side, as a table, JSON and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topoprune.cli.output import Json, check_target, emit_json, guarded, progress_bar, stderr_console, stdout_console
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
    load,
    requested,
)

__all__ = ["compare"]


@guarded
def compare(
    source: Source,
    solvers: Annotated[
        str | None, typer.Option(help="Names, comma-separated; default: all that are installed and take the size.")
    ] = None,
    theta: Theta = None,
    budget: Budget = None,
    problem: Problem = None,
    objective: Objective = "k-centre",
    scope: Scope = "site",
    floor: Floor = None,
    measure: Measure = None,
    calibration_file: Calibration = None,
    calibration_samples: Samples = 256,
    gqa: Gqa = "groups",
    time_limit: Limit = 10.0,
    seed: int = 0,
    json_file: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw objectives and times here (.png, .svg, .pdf).")] = None,
) -> None:
    """Solve the same problems with several solvers. Ctrl-C returns the best found so far."""
    from topoprune import compare as compare_solvers
    from topoprune.comparison_figure import check_picture_path

    check_target("--json", json_file)
    if plot is not None:
        check_picture_path(plot)
    request = requested(theta, budget, objective, scope, floor, time_limit, seed)
    options = ModelOptions(measure, calibration_file, calibration_samples, gqa)
    graph, request = load(source, problem, request, options)
    if request.get("theta") is None and request.get("budget") is None and request.get("problem") != "edges":
        request["theta"] = "auto:0.1"
    names = None if solvers is None else [name.strip() for name in solvers.split(",") if name.strip()]
    with progress_bar() as show:
        comparison = compare_solvers(graph, names, progress=show, **request)
    if not comparison.plans:
        reasons = "; ".join(f"{row['solver']} {row['error']}" for row in comparison.rows)
        raise ValueError(f"no solver took the problem: {reasons}")
    title = f"{source}: {request['problem']}"
    picture = None if plot is None else str(comparison.plot(plot, title=title))
    if not emit_json(json_file, {"source": source, "request": request, **comparison.to_dict()}):
        stdout_console().print(comparison)
        for name in filter(None, (json_file, picture)):
            typer.echo(f"written: {name}")
    if comparison.interrupted:
        stderr_console().print("[yellow]stopped by Ctrl-C: the best found so far[/]", highlight=False)
        raise typer.Exit(130)

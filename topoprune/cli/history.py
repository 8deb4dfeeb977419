"""``topoprune history``: what happened in a run, decision by decision, and the paper's figures of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from topoprune.cli.output import Json, check_target, emit_json, guarded, stdout_console

__all__ = ["history"]


@guarded
def history(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of pruned runs, or history.json files.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw the four figures here (.png, .svg, .pdf); needs matplotlib.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Show the record of one run, or of several of the same model (seeds): sparsity, connectivity, heads that went."""
    check_target("--json", json_file)
    from topoprune.comparison_figure import check_picture_path
    from topoprune.tasks.paper_figures import draw_history, history_data, history_table
    from topoprune.train.record import RunRecord

    if out is not None:
        check_picture_path(out)
    records = [RunRecord.load(run) for run in runs]
    data = history_data(records)
    picture = None if out is None else str(draw_history(records, out))
    if emit_json(json_file, data):
        return
    console = stdout_console()
    console.print(history_table(records))
    for run in data["runs"]:
        energy = "" if run["energy_ratio"] != run["energy_ratio"] else f", output energy {run['energy_ratio']:.2f}"
        if run["importance_ratio"] == run["importance_ratio"]:
            console.print(
                f"{run['name']}: removed heads to kept ones, mean |W_O| {run['importance_ratio']:.2f}{energy}",
                highlight=False,
                markup=False,
            )
    console.print(
        "sd: standard deviation, over rows, of the share of weights that are not zero, in percentage points",
        highlight=False,
    )
    for name in filter(None, (json_file, picture)):
        typer.echo(f"written: {name}")

"""The command-line application: its commands and its entry point. Each command imports what it needs."""

from __future__ import annotations

from typing import Annotated

import typer

import topoprune
from topoprune.cli.compare import compare
from topoprune.cli.doctor import doctor
from topoprune.cli.graphs import extract, solve
from topoprune.cli.history import history
from topoprune.cli.output import set_debug
from topoprune.cli.prune import compact, prune
from topoprune.cli.solvers import solvers
from topoprune.cli.training import demo, train

__all__ = ["app", "main"]

app = typer.Typer(
    name="topoprune",
    help="Prune transformers through an explicit graph: prune, train, compact; extract, solve with proof, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"topoprune {topoprune.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Set what holds for every command."""
    set_debug(debug)


for command in (demo, train, history, prune, compact, extract, solve, compare, solvers, doctor):
    app.command()(command)


def main() -> None:
    """Run the command line; exit code 0 fine, 1 the demo failed, 2 wrong input, 130 Ctrl-C."""
    app()

"""What all commands share: consoles, JSON on stdout, errors as one line."""

from __future__ import annotations

import functools
import json
import shlex
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import typer

from topoprune.tasks.results import Interrupted, json_ready

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["guarded", "print_json", "set_debug", "stderr_console", "stdout_console"]

P = ParamSpec("P")
R = TypeVar("R")
_STATE = {"debug": False}


def set_debug(debug: bool) -> None:
    """Say whether errors show their traceback."""
    _STATE["debug"] = debug


def stderr_console() -> Console:
    """Return the console for progress and messages."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def stdout_console() -> Console:
    """Return the console for results; wide where nobody looks at a terminal, so that tables stay whole."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140)


def print_json(value: Any) -> None:
    """Print one JSON document to stdout (nan becomes null)."""
    typer.echo(json.dumps(json_ready(value), indent=2))


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors that are the user's to solve into one red line and exit code 2, Ctrl-C into 130."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        console = stderr_console()
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: console.print(  # type: ignore[assignment]
                f"[yellow]warning:[/] {message}", highlight=False
            )
            try:
                return command(*args, **kwargs)
            except Interrupted as stop:
                console.print(f"[yellow]{stop}[/]", highlight=False)
                again = shlex.join(
                    ["topoprune", *(word for word in sys.argv[1:] if word not in ("--overwrite", "--resume"))]
                )
                if sys.argv[1:2] == ["demo"]:
                    console.print(f"The demo starts anew with: {again}", highlight=False, markup=False)
                else:
                    console.print(f"Continue with: {again} --resume", highlight=False, markup=False)
                raise typer.Exit(130) from None
            except KeyboardInterrupt:
                console.print("[yellow]stopped at once; nothing was saved since the last checkpoint[/]")
                raise typer.Exit(130) from None
            except (ValueError, OSError) as error:
                if _STATE["debug"]:
                    raise
                console.print("[bold red]error:[/] ", end="")
                console.print(str(error), style="red", highlight=False, markup=False)
                raise typer.Exit(2) from None

    return run

"""What all commands share: consoles, a progress bar, JSON, errors as one line."""

from __future__ import annotations

import functools
import json
import shlex
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from topoprune.tasks.results import Interrupted, json_ready, write_json

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "JSON_HELP",
    "Json",
    "check_target",
    "emit_json",
    "guarded",
    "progress_bar",
    "set_debug",
    "stderr_console",
    "stdout_console",
]

P = ParamSpec("P")
R = TypeVar("R")
JSON_HELP = "Write JSON to this file; - prints it, and nothing else, to stdout."
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help=JSON_HELP)]
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


def emit_json(target: str | None, value: Any) -> bool:
    """Write one JSON document (nan becomes null) to a file, or to stdout for ``-``.

    Returns:
        True if stdout is taken by it, so that nothing else may be printed there.
    """
    if target == "-":
        typer.echo(json.dumps(json_ready(value), indent=2))
    elif target is not None:
        write_json(target, value)
    return target == "-"


def check_target(option: str, target: str | Path | None) -> None:
    """Refuse a file that could not be written, before the work is done; None and ``-`` are fine.

    Raises:
        ValueError: a value that looks like another option. OSError: no such folder, or a folder in the way.
    """
    if target is None or str(target) == "-":
        return
    if str(target).startswith("-"):
        raise ValueError(f"{option} is {str(target)!r}; expected a file name, or - for stdout")
    file = Path(target)
    if file.is_dir():
        raise IsADirectoryError(f"cannot write {option} {target}: it is a folder")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"cannot write {option} {target}: folder {file.parent} does not exist; create it first")


@contextmanager
def progress_bar(delay: float = 1.0) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (what, done, in all) that moves a bar on stderr; it shows after `delay` seconds.

    Nothing is drawn where stderr is no terminal.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=None)
    # A thread of its own starts the bar, for the work may be one long call into a solver.
    timer = threading.Timer(delay, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


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
                training = sys.argv[1:2] in (["train"], ["demo"])
                console.print(
                    f"[yellow]stopped at once{'; nothing was saved since the last checkpoint' if training else ''}[/]"
                )
                raise typer.Exit(130) from None
            except (ValueError, OSError) as error:
                if _STATE["debug"]:
                    raise
                console.print("[bold red]error:[/] ", end="")
                console.print(str(error), style="red", highlight=False, markup=False)
                raise typer.Exit(2) from None

    return run

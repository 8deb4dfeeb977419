"""``topoprune solvers``: which solvers there are, what they promise, and when to use which."""

from __future__ import annotations

from typing import Annotated

import typer

from topoprune.cli.output import Json, check_target, emit_json, guarded, stdout_console

__all__ = ["solvers"]


@guarded
def solvers(
    problem: Annotated[str | None, typer.Argument(help="Only these: a part of the problem's name.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the documentation.")] = False,
    json_file: Json = None,
) -> None:
    """List the solvers by problem: guarantee, complexity, when to use which."""
    from rich.markup import escape
    from rich.table import Table

    from topoprune_solvers.table import TITLES, markdown, problem_types, solver_table

    check_target("--json", json_file)
    if as_markdown:
        typer.echo(markdown())
        return
    known = [kind.__name__ for kind in problem_types()]
    wanted = [name for name in known if problem is None or problem.lower() in name.lower()]
    if not wanted:
        raise ValueError(f"unknown problem {problem!r}; available: {', '.join(known)}")
    rows = [row for row in solver_table() if row["problem"] in wanted]
    if emit_json(json_file, rows):
        return
    out = stdout_console()
    for name in wanted:
        table = Table(title=escape(TITLES.get(name, name).replace("`", "")), title_justify="left")
        for title in ("solver", "exact", "guarantee", "complexity", "when to use it"):
            table.add_column(title, no_wrap=title in ("solver", "exact"))
        for row in rows:
            if row["problem"] == name:
                label = row["solver"] if row["installed"] else f"{row['solver']} (not installed: {row['install']})"
                exact = "yes" if row["exact"] else "no"
                table.add_row(*map(escape, (label, exact, row["guarantee"], row["complexity"], row["when"])))
        out.print(table)

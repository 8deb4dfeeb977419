"""Print the solver table, or write it into Markdown files: ``python -m topoprune_solvers [--update FILE ...]``."""

from __future__ import annotations

import argparse
import json

from topoprune_solvers.table import markdown, solver_table, update


def main() -> None:
    """Print the table as Markdown (or ``--json``), or bring the tables of files up to date."""
    parser = argparse.ArgumentParser(prog="python -m topoprune_solvers", description="The table of all solvers.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--short", action="store_true", help="without baselines, needs and refusals")
    parser.add_argument(
        "--update", nargs="+", metavar="FILE", help="write the table between the markers of these files"
    )
    arguments = parser.parse_args()
    for path in arguments.update or ():
        try:
            print(f"{path}: {'updated' if update(path) else 'up to date'}")
        except (ValueError, OSError) as error:
            parser.error(str(error))
    if not arguments.update:
        print(json.dumps(solver_table(), indent=2) if arguments.json else markdown(short=arguments.short))


if __name__ == "__main__":
    main()

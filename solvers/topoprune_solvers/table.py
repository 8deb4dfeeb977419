"""The table of all solvers, made from what each says about itself; README and docs hold copies of it.

`update` writes the copies between their markers:

    python -m topoprune_solvers --update README.md docs/solvers.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from topoprune_solvers.base import SOLVERS
from topoprune_solvers.registry import available_solvers, install_hint, solver_names

__all__ = ["TITLES", "markdown", "problem_types", "solver_table", "update"]

TITLES = {
    "DominatingSet": "A: dominating set (`theta=`)",
    "BudgetedDomination": "B: exactly k units, k-centre (`budget=`)",
    "SoftDomination": 'B: exactly k units, soft (`objective="soft"`)',
    "QuadraticSubset": "C: exactly k units by Gram matrix",
    "RepairedSubset": "C: exactly k units, survivors refitted",
    "EdgeSelection": 'D: weight edges (`problem="edges"`)',
    "BlockMask": "D: N:M masks, also transposable",
    "MultipleChoiceKnapsack": "E: budgets of layers",
}
_BASELINES = ("brute", "magnitude", "random")
_MARKED = re.compile(r"(<!-- solvers(?P<short>, short)?: [^>]*-->\n).*?(<!-- end of solvers -->)", re.DOTALL)


def problem_types() -> list[type]:
    """Return the problem types that have solvers: ours in their order, then those of other packages by name."""
    solver_names(object)  # loads the registry
    order = list(TITLES)
    return sorted(SOLVERS, key=lambda t: (order.index(t.__name__) if t.__name__ in order else len(order), t.__name__))


def solver_table(problem_type: type | None = None) -> list[dict[str, Any]]:
    """Return one JSON-ready row a solver: what it promises, what it costs, when to use it, what it needs and refuses.

    Args:
        problem_type: only its solvers; default: all.

    >>> from topoprune_solvers import DominatingSet
    >>> rows = solver_table(DominatingSet)
    >>> [row["exact"] for row in rows if row["solver"] in ("exact", "greedy")]
    [True, False]
    """
    rows = []
    for problem in problem_types() if problem_type is None else [problem_type]:
        here = available_solvers(problem)
        for name in solver_names(problem):
            told = SOLVERS[problem][name].capabilities
            refuses = [f"more than {told.max_units:,} units"] if told.max_units is not None else []
            rows.append(
                {
                    "problem": problem.__name__,
                    "solver": name,
                    "exact": told.exact,
                    "guarantee": told.guarantee,
                    "complexity": told.complexity,
                    "when": told.when,
                    "needs": list(told.requires),
                    "refuses": [*refuses, *told.lacks],
                    "reference": told.reference,
                    "installed": name in here,
                    "install": "" if name in here else install_hint(name, problem),
                }
            )
    return rows


def markdown(*, short: bool = False) -> str:
    """Return the table of our own solvers as Markdown.

    Args:
        short: leave out the baselines and what a solver needs and refuses.
    """
    own = [row for problem in problem_types() for row in solver_table(problem) if _is_own(problem, row["solver"])]
    if short:
        head = "| problem | solver | exact | guarantee | complexity | when to use it |\n|---|---|---|---|---|---|\n"
        rows, before = [], ""
        for row in own:
            if row["solver"] in _BASELINES:
                continue
            title, before = ("" if row["problem"] == before else _title(row["problem"])), row["problem"]
            rows.append(_line(title, f"`{row['solver']}`", *_facts(row)))
        rows.append(
            _line("all", "`random`, `magnitude`, `brute`", "", "baselines; the slow twin, by trying all", "", "")
        )
        return head + "\n".join(rows)
    parts = []
    for problem in dict.fromkeys(row["problem"] for row in own):
        lines = [
            f"### {_title(problem)}",
            "",
            "| solver | exact | guarantee | complexity | when to use it | needs | refuses | source |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in own:
            if row["problem"] == problem:
                needs, refuses = ", ".join(row["needs"]), ", ".join(row["refuses"])
                lines.append(_line(f"`{row['solver']}`", *_facts(row), needs, refuses, row["reference"]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def update(path: str | Path) -> bool:
    """Write the table between the markers of a Markdown file; return True if the file changed.

    Raises:
        ValueError: a file without ``<!-- solvers: ... -->`` and ``<!-- end of solvers -->``.
    """
    file = Path(path)
    text = file.read_text(encoding="utf-8")
    if not _MARKED.search(text):
        raise ValueError(f"{path} has no markers '<!-- solvers: ... -->' and '<!-- end of solvers -->'")
    new = _MARKED.sub(lambda m: f"{m[1]}{markdown(short=bool(m['short']))}\n{m[3]}", text)
    if new != text:
        file.write_text(new, encoding="utf-8")
    return new != text


def _is_own(problem: type, name: str) -> bool:
    return type(SOLVERS[problem][name]).__module__.startswith("topoprune_solvers.")


def _title(problem: str) -> str:
    return TITLES.get(problem, problem)


def _facts(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return "yes" if row["exact"] else "no", row["guarantee"], row["complexity"], row["when"]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

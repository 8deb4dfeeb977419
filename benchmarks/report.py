"""The README's figures, from the result files: ``python -m benchmarks --report``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "markdown"]

RESULTS = Path(__file__).parent / "results"


def markdown(folder: Path = RESULTS) -> str:
    """Return Markdown over all result files: figures with a target, commands and machine, then the rest folded."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    results = [result for result in results if result["correct"]]
    aimed = [_row(r, k, f) for r in results for k, f in r["figures"].items() if f["target"] is not None]
    other = [_row(r, k, f) for r in results for k, f in r["figures"].items() if f["target"] is None]
    head = ["| benchmark | figure | value | target | met |", "|---|---|---|---|---|"]
    lines = [*head, *aimed, "", *(_command(result) for result in results)]
    if other:
        plain = [line.rsplit("|", 3)[0] + "|" for line in (*head, *other)]
        lines += ["", "<details><summary>All other figures</summary>", "", *plain, "", "</details>"]
    return "\n".join(lines)


def _row(result: Mapping[str, Any], key: str, figure: Mapping[str, Any]) -> str:
    sign = "≤" if figure["better"] == "lower" else "≥"
    target = "" if figure["target"] is None else f"{sign} {figure['target']:g}"
    met = {True: "yes", False: "**no**", None: ""}[figure["met"]]
    unit = "" if figure["unit"] == "ratio" else f" {figure['unit']}"
    return f"| {result['benchmark']} | `{key}` | {_number(figure['value'])}{unit} | {target} | {met} |"


def _command(result: Mapping[str, Any]) -> str:
    where = result["environment"]
    return (
        f"- `{result['command']}`: {where['device']}, {where['cores']} cores, torch {where['versions']['torch']}, "
        f"transformers {where['versions']['transformers']}, commit {where['commit'][:10]}, seed {where['seed']}"
    )


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"

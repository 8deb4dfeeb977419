"""The README's figures, from the result files: ``python -m benchmarks --report``."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["RESULTS", "markdown"]

RESULTS = Path(__file__).parent / "results"


def markdown(folder: Path = RESULTS) -> str:
    """Return one Markdown table over all result files: figure, value, target, command, machine."""
    lines = ["| benchmark | figure | value | target | met |", "|---|---|---|---|---|"]
    commands = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if not result["correct"]:
            continue
        for key, figure in result["figures"].items():
            sign = "≤" if figure["better"] == "lower" else "≥"
            target = "" if figure["target"] is None else f"{sign} {figure['target']:g}"
            met = {True: "yes", False: "**no**", None: ""}[figure["met"]]
            unit = "" if figure["unit"] == "ratio" else f" {figure['unit']}"
            lines.append(f"| {result['benchmark']} | `{key}` | {_number(figure['value'])}{unit} | {target} | {met} |")
        where = result["environment"]
        commands.append(
            f"- `{result['command']}`: {where['device']}, {where['cores']} cores, torch {where['versions']['torch']}, "
            f"transformers {where['versions']['transformers']}, commit {where['commit'][:10]}, seed {where['seed']}"
        )
    return "\n".join([*lines, "", *commands])


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"

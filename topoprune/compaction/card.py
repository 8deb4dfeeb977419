"""The model card (``README.md``) of a saved folder: what went, how good the decision was, how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["check_speed", "model_card"]


def check_speed(speed: Mapping[str, float] | None) -> dict[str, float]:
    """Return measured speed-ups as plain numbers; {} for None.

    Raises:
        ValueError: no mapping of text to positive, finite numbers.
    """
    if speed is None:
        return {}
    if not isinstance(speed, Mapping):
        raise ValueError(f"speed is a {type(speed).__name__}; expected {{setting: times as fast as the dense model}}")
    for name, value in speed.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(name, str) or not number or not math.isfinite(value) or value <= 0:
            raise ValueError(
                f"speed has {name!r}: {value!r}; expected a setting and how many times as fast as the dense model the "
                "compacted one ran there, e.g. {'batch 8, 128 tokens, 2 CPU cores': 4.5}"
            )
    return {_line(name): float(value) for name, value in speed.items()}


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the text of the card.

    Args:
        facts: what `topoprune.save` writes into the manifest: ``class``, ``auto_class``, ``base_model``,
            ``parameters``, ``matrices``, ``removed``, ``sites``, ``certificates``, ``joint``, ``speed``.

    Complexity: O(sites).
    """
    parts = [
        _front_matter(facts),
        f"# {facts['class'].removeprefix('Compact')}, compacted with topoprune\n",
        _summary(facts),
        _layers(facts["sites"]),
        _speed(facts["speed"]),
        _certificates(facts["certificates"], facts["joint"]),
        _loading(facts["auto_class"]),
        _LIMITS,
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(facts: Mapping[str, Any]) -> str:
    lines = ["---"]
    if facts["base_model"]:
        lines.append(f'base_model: "{facts["base_model"]}"')
    lines += ["library_name: transformers", "tags:", "- topoprune", "- pruned", "- structured-pruning", "---\n"]
    return "\n".join(lines)


def _summary(facts: Mapping[str, Any]) -> str:
    total, matrices = facts["parameters"], facts["matrices"]
    origin = f" of [{facts['base_model']}](https://huggingface.co/{facts['base_model']})" if facts["base_model"] else ""
    return (
        f"Attention heads and feed-forward neurons{origin} were removed physically: every layer has a shape of its "
        f"own, and the model computes what the masked model computed.\n\n"
        f"| | before | after | removed |\n|---|---|---|---|\n"
        f"| attention and FFN weights | {matrices['before']:,} | {matrices['after']:,} | {facts['removed']:.1%} |\n"
        f"| all parameters | {total['before']:,} | {total['after']:,} "
        f"| {1 - total['after'] / max(total['before'], 1):.1%} |\n"
    )


def _layers(sites: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of what stays, one line a layer, one column a kind of block."""
    blocks = list(dict.fromkeys(name.split(".", 2)[2] for name in sites))
    rows: dict[str, dict[str, str]] = {}
    for name, site in sites.items():
        stack, layer, block = name.split(".", 2)
        kv = f" ({site['kv_heads']} KV)" if "kv_heads" in site else ""
        rows.setdefault(f"{stack} {layer}", {})[block] = f"{site['kept']} of {site['of']}{kv}"
    if not rows:
        return ""
    titles = {"attention": "heads", "cross_attention": "cross-attention heads", "ffn": "neurons"}
    lines = ["## What stays\n", "| layer | " + " | ".join(titles.get(block, block) for block in blocks) + " |"]
    lines.append("|---" * (len(blocks) + 1) + "|")
    for layer, row in rows.items():
        lines.append(f"| {layer} | " + " | ".join(row.get(block, "") for block in blocks) + " |")
    return "\n".join(lines) + "\n"


def _speed(speed: Mapping[str, float]) -> str:
    if not speed:
        return ""
    lines = ["## Speed\n", "Measured by whoever saved the model.\n"]
    lines += ["| setting | times as fast as dense |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value:.2f} |" for name, value in speed.items()]) + "\n"


def _certificates(rows: list[Mapping[str, Any]], joint: list[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    lines = [
        "## Certificates\n",
        "What the solver proved about the last decision: objective and bound are those of its own problem on the "
        "graph of the layer, not of the model's quality.\n",
        "| site | kept | solver | status | objective | bound | gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['site']} | {row['kept']} of {row['units']} | {row['solver']} | {row['status'].lower()} | "
            f"{_number(row['objective'])} | {_number(row['bound'])} | {_share(row['gap'])} |"
        )
    for row in joint:
        lines.append(
            f"| {len(row['sites'])} sites under one budget | | {row['solver']} | {row['status'].lower()} | "
            f"{_number(row['objective'])} | {_number(row['bound'])} | {_share(row['gap'])} |"
        )
    return "\n".join(lines) + "\n"


def _loading(auto_class: str) -> str:
    return (
        "## Loading\n\n"
        "With [topoprune](https://pypi.org/project/topoprune/), which checks the files and runs no code from here:\n\n"
        "```python\nimport topoprune\n\nmodel = topoprune.load(PATH_OR_ID)\n```\n\n"
        "With transformers alone; `trust_remote_code=True` runs `modeling_topoprune.py` from this folder:\n\n"
        f"```python\nfrom transformers import {auto_class}\n\n"
        f"model = {auto_class}.from_pretrained(PATH_OR_ID, trust_remote_code=True)\n```\n"
    )


_LIMITS = """## Limits

- Without topoprune or `trust_remote_code=True` the weights do not fit transformers' own classes, which refuse them.
- Runtimes that read the config alone (vLLM, llama.cpp, TensorRT-LLM) expect equal layers and cannot run it.
- Pruning changes a model's answers. Biases and other limits of the original model stay, and may grow; evaluate
  the model on your own task before you use it.
"""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _line(text: str) -> str:
    """One line of a table, whatever the caller wrote."""
    return " ".join(text.replace("|", "/").split())

"""The commands of docs/training.md, task × family, on tiny models and files."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny import FAMILIES, build
from tests.tinytask import WORDS, save_model
from topoprune.cli import app

__all__ = ["NAMES", "assert_prunes", "make_folder", "table"]

GUIDE = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
SHORT = "--max-train-samples 16 --max-eval-samples 4 --max-steps 2 --batch-size 8"
NAMES = {
    "BERT": "bert", "RoBERTa": "roberta", "DistilBERT": "distilbert", "BART": "bart", "Marian": "marian", "T5": "t5",
    "OPT": "opt", "GPT-2": "gpt2", "Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "ViT": "vit",
}  # fmt: skip


def table(*tasks: str) -> list[Any]:
    """(task, family, command) of the guide's table, for these tasks; the same once more, with other labels, is slow."""
    rows, before = [], ""
    for task, families, command in re.findall(r"^\| ([^|]+) \| ([^|]+) \| `(topoprune train [^`]+)` \|$", GUIDE, re.M):
        before = before if families == "the same" else families
        again = before if families == "the same" else ""
        for family in before.split(", "):
            slow = [pytest.mark.slow] if again and family not in ("BERT", "GPT-2") else []
            rows.append(pytest.param(task, NAMES[family], command, marks=slow, id=f"{task}-{family}"))
    return [row for row in rows if not tasks or row.values[0] in tasks]


def make_folder(made: Path) -> Path:
    """Write a model of every family with a tokenizer, and files with every column."""
    for family in FAMILIES:
        save_model(made / family)  # its tokenizer
        for file in ("config.json", "model.safetensors"):
            (made / family / file).unlink()
        model: Any = build(family)
        if family.startswith("t5"):  # its classifier reads the token that ends a text, here [SEP]
            model.config.eos_token_id = 3
        model.save_pretrained(made / family)
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    for name, count in (("train", 16), ("dev", 8)):
        rows: list[dict[str, Any]] = [
            {"sentence1": text(5), "sentence2": text(4), "score": i % 6 / 2, "sentence": text(6), "label": i % 2,
             "document": text(9), "summary": text(3), "translation": {"en": text(4), "de": text(5)}}
            for i in range(count)
        ]  # fmt: skip
        keep = {
            "classes": ("sentence", "label"), "pairs": ("sentence1", "sentence2", "score"),
            "summaries": ("document", "summary"), "translations": ("translation",),
        }  # fmt: skip
        for kind, columns in keep.items():
            lines = [json.dumps({"label" if c == "score" else c: row[c] for c in columns}) for row in rows]
            (made / f"{kind}-{name}.jsonl").write_text("\n".join(lines))
        (made / f"{name}.txt").write_text("\n".join(text(12) for _ in range(80)))
    return made


def local(command: str, family: str, folder: Path, out: Path) -> list[str]:
    """Return the words of a documented command with a tiny model and files for those it names."""
    words = shlex.split(command)[1:]
    kind = {"summarization": "summaries", "translation": "translations"}.get(
        words[words.index("--task") + 1] if "--task" in words else "", "classes"
    )
    if "glue/stsb" in words:
        kind = "pairs"
    if "glue/sst2" in words or "glue/stsb" in words:  # the hub's columns and metrics, local files
        words += ["--train-file", "train.jsonl", "--validation-file", "dev.jsonl"]
    files = {"train.jsonl": folder / f"{kind}-train.jsonl", "dev.jsonl": folder / f"{kind}-dev.jsonl",
             "train.txt": folder / "train.txt", "dev.txt": folder / "dev.txt"}  # fmt: skip
    words = [str(files.get(word, word)) for word in words]
    if "--model" in words:
        words[words.index("--model") + 1] = str(folder / family)
        words += [] if "language-modelling" in words else ["--max-length", "16"]
    return [*words, *shlex.split(SHORT), "--output-dir", str(out)]


def assert_prunes(task: str, family: str, command: str, folder: Path, out: Path) -> None:
    """Run a documented command on a family; it must prune half of it and say so."""
    words = local(command, family, folder, out)
    if "--block-size" in words:
        words[words.index("--block-size") + 1] = "16"  # fits the files
    if task in ("summarization", "translation"):
        words += ["--max-target-length", "8"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (words, result.output, result.exception)
    told = json.loads((out / "result.json").read_text())
    assert told["method"] == "budget" and told["removable"] == pytest.approx(0.5, abs=0.06)
    assert (out / "plan.npz").is_file() and told["metrics"]

"""Tiny text tasks in files, and tiny models of every family that writes text."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

from topoprune import Recipe
from topoprune.tasks import NewModel, RunResult, Task, Training, new_model, train

__all__ = [
    "BUDGET",
    "CAUSAL",
    "PAPER",
    "SEQ2SEQ",
    "SHORT",
    "TINY",
    "assert_equal_weights",
    "assert_goes_on_exactly",
    "assert_pruned",
    "make_story",
    "make_translations",
    "run",
    "tiny",
    "write_jsonl",
]

_HALVES = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=64,
)
_WIDTHS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
TINY: dict[str, dict[str, Any]] = {
    "t5": dict(d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2),
    "bart": _HALVES,
    "marian": _HALVES,
    "opt": _WIDTHS | dict(ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": _WIDTHS | dict(intermediate_size=48, num_key_value_heads=2),
}
SEQ2SEQ, CAUSAL = ("t5", "bart", "marian"), ("opt", "gpt2", "llama")
BUDGET = Recipe.budget(0.5, solves=2)
PAPER = Recipe.neuroprune(alpha=3.0, beta=3.0, theta="auto:0.3")
SHORT = Training(epochs=2, batch_size=8, learning_rate=3e-3, max_length=24)


def tiny(model_type: str, vocab_size: int = 300) -> NewModel:
    return new_model(model_type, TINY[model_type], vocab_size=vocab_size)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_translations(folder: Path, train: int = 32, validation: int = 6) -> tuple[Path, Path]:
    """Write word-by-word translations: each word of ``de`` has one of ``en``."""
    words = [(f"wort{i}", f"word{i}") for i in range(12)]
    paths = []
    for name, count, seed in (("train", train, 1), ("dev", validation, 2)):
        draw = random.Random(seed)
        rows = []
        for _ in range(count):
            chosen = draw.choices(words, k=draw.randint(3, 6))
            rows.append({"de": " ".join(a for a, _ in chosen) + ".", "en": " ".join(b for _, b in chosen) + "."})
        paths.append(write_jsonl(folder / f"{name}.jsonl", rows))
    return paths[0], paths[1]


def make_story(folder: Path, train: int = 400, validation: int = 80) -> tuple[Path, Path]:
    """Write two plain text files in which every word says what follows."""
    words = [f"word{i}" for i in range(16)]
    for name, count in (("train", train), ("dev", validation)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(" ".join(words[i % len(words)] for i in range(count)), encoding="utf-8")
    return folder / "train.txt", folder / "dev.txt"


def run(model_type: str, task: Task, recipe: Any, folder: Path, **options: Any) -> RunResult:
    """Train a new tiny model of a type."""
    options.setdefault("training", SHORT)
    return train(tiny(model_type), task, recipe, output_dir=folder, **options)


def assert_pruned(result: RunResult, sparsity: float | None) -> None:
    """Check what every pruned run must show; `sparsity` is the budget, if there was one."""
    assert result.score == result.metrics[result.metric]
    assert set(result.floors) <= set(result.metrics)
    assert result.metrics["perplexity"] > 1 and 0 <= result.metrics["token_accuracy"] <= 1
    assert result.decisions > 0 and Path(result.files["plan"]).is_file()
    if sparsity is not None:
        assert abs(result.removable - sparsity) < 0.03  # within one unit
    else:
        assert result.zeros > 0


def assert_goes_on_exactly(make: Any, folder: Path, monkeypatch: Any, stop_at: int) -> None:
    """Check that a run stopped after a step and resumed ends as the uninterrupted one.

    Args:
        make: ``(output_dir, resume) -> RunResult``.
    """
    import pytest

    from topoprune.tasks import Interrupted
    from topoprune.tasks.monitor import StopAtStep

    whole = make(folder / "whole", False)
    before = StopAtStep.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.requested = state.global_step == stop_at
        return before(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(StopAtStep, "on_step_end", stop)
        warnings.simplefilter("ignore")  # the pruner says that the recipe is not met yet
        with pytest.raises(Interrupted, match=f"stopped after step {stop_at} of"):
            make(folder / "parts", False)
    resumed = make(folder / "parts", True)
    assert resumed.resumed and not whole.resumed
    assert resumed.metrics == whole.metrics and resumed.heads == whole.heads and resumed.neurons == whole.neurons
    assert_equal_weights(folder / "parts", folder / "whole")


def assert_equal_weights(folder: Path, other: Path) -> None:
    """Check that two saved models are bit for bit the same."""
    import torch
    from safetensors.torch import load_file

    one, two = (load_file(path / "model.safetensors") for path in (folder, other))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

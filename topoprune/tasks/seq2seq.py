"""What summarization and translation share: pairs of texts, an encoder-decoder, teacher forcing, generation."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from topoprune.tasks.tables import Table, read_table
from topoprune.tasks.task import ModelSource, NewModel, Splits, Task, draw

if TYPE_CHECKING:
    import torch

    from topoprune.tasks.settings import Training

__all__ = [
    "Generation",
    "Seq2SeqTask",
    "TextPair",
    "read_splits",
    "require_columns",
    "teacher_forced",
    "text_of",
    "token_sums",
]

SelfTask = TypeVar("SelfTask", bound="Seq2SeqTask")


@dataclass(frozen=True)
class TextPair:
    """A text and what is to be written for it.

    Args:
        source: what is read. targets: right answers, at least one; the first is learnt from, all count when scored.
        trivial: what the simplest answer is, which a model has to beat.
    """

    source: str
    targets: tuple[str, ...]
    trivial: str


@dataclass(frozen=True)
class Generation:
    """How texts are fed and answers are written; sources are cut to `Training.max_length` tokens.

    Args:
        prefix: put before every source, as T5 was pretrained with (``"summarize: "``).
        max_target_length: tokens of an answer, in training and in generation.
        num_beams: 1 is greedy.

    Raises:
        ValueError: numbers out of range.
    """

    prefix: str = ""
    max_target_length: int = 128
    num_beams: int = 1

    def __post_init__(self) -> None:
        for name, least in (("max_target_length", 2), ("num_beams", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value!r}; expected a whole number >= {least}")


@dataclass(frozen=True)
class Seq2SeqTask(Task):
    """Write a text for a text; subclasses say how it is scored.

    Args:
        name: short. source: where the data comes from, one sentence.
        train, validation: pairs. generation: lengths, beams, prefix.
    """

    name: str
    source: str
    train: tuple[TextPair, ...]
    validation: tuple[TextPair, ...]
    generation: Generation = Generation()

    # -- data -------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """Short hex digest of all pairs and of how they are fed."""
        state = hashlib.sha256(repr((self.kind, self.generation)).encode())
        for split in (self.train, self.validation):
            state.update(b"split")
            for pair in split:
                state.update(repr((pair.source, pair.targets)).encode())
        return state.hexdigest()[:16]

    @property
    def floors(self) -> Mapping[str, float]:
        """Scores of the trivial answers."""
        return self.scores([pair.trivial for pair in self.validation])

    def limit(self: SelfTask, train: int | None, validation: int | None, seed: int = 0) -> SelfTask:
        """Return a task with at most so many pairs of each split."""
        return replace(self, train=draw(self.train, train, seed), validation=draw(self.validation, validation, seed))

    @abstractmethod
    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Return the metrics of one answer for each validation pair."""

    # -- model ------------------------------------------------------------------------------------

    def default_model(self) -> ModelSource:
        """Return a small T5 to train from scratch."""
        sizes = {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 256, "num_layers": 2, "dropout_rate": 0.1}
        return NewModel("t5", sizes, vocab_size=4000)

    def load_processor(self, model: ModelSource, training: Training) -> Any:
        """Return the model's tokenizer; for a new model one trained on the training pairs."""
        from topoprune.tasks.scratch import tokenizer_for

        return tokenizer_for(model, self._texts(), kind="bpe")

    def _texts(self) -> Iterator[str]:
        for pair in self.train:
            yield self.generation.prefix + pair.source
            yield from pair.targets

    def load_model(self, model: ModelSource, processor: Any, training: Training) -> Any:
        """Return an encoder-decoder with a language-modelling head.

        Raises:
            ValueError: no such model, one without decoder, or one with fewer embeddings than the tokenizer has tokens.
        """
        from transformers import AutoModelForSeq2SeqLM

        from topoprune.tasks.scratch import language_model

        network = language_model(model, AutoModelForSeq2SeqLM, processor)
        if getattr(network.config, "decoder_start_token_id", None) is None:
            raise ValueError(
                f"the configuration of {model} names no decoder_start_token_id, which generation begins with; set it "
                "in its config.json (T5 and Marian: the padding token, BART: the end token)"
            )
        return network

    # -- training and scoring ---------------------------------------------------------------------

    def encode(self, processor: Any, network: Any, training: Training) -> Splits:
        """Return sources and first targets as token ids, cut to their lengths.

        Raises:
            ValueError: lengths beyond the model's positions, or a model that fails to generate.
        """
        longest = max(self.generation.max_target_length, training.max_length)
        positions = getattr(network.config, "max_position_embeddings", None)  # T5 has none: its positions are relative
        if positions is not None and longest > positions:
            raise ValueError(
                f"max_length (of sources) or max_target_length is {longest}, but this {network.config.model_type} has "
                f"{positions} positions; expected at most that"
            )
        splits = {
            name: _encode(processor, split, self.generation, training.max_length)
            for name, split in (("train", self.train), ("validation", self.validation))
        }
        _try_generation(network, splits["validation"][0], self.generation)
        return splits

    def collator(self, processor: Any, network: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that pads, and gives the decoder its inputs."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(processor, model=network)

    def trainer_classes(self) -> tuple[Any, Any]:
        """Return the Seq2SeqTrainer and its arguments."""
        from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

        return Seq2SeqTrainer, Seq2SeqTrainingArguments

    def trainer_arguments(self, training: Training) -> Mapping[str, Any]:
        """Ask for generation when predicting; batches as in training, since their logits are large."""
        return {
            "predict_with_generate": True,
            "per_device_eval_batch_size": training.eval_batch_size or training.batch_size,
        }

    def evaluate(self, trainer: Any, splits: Splits) -> dict[str, float]:
        """Return the scores of generated answers, and loss, perplexity and token accuracy of the first targets."""
        tokenizer = trainer.data_collator.tokenizer  # the task itself holds none
        forced = teacher_forced(trainer, splits["validation"])
        output = trainer.predict(
            splits["validation"],
            max_new_tokens=self.generation.max_target_length,
            num_beams=self.generation.num_beams,
            do_sample=False,
        )
        ids = np.where(output.predictions < 0, tokenizer.pad_token_id, output.predictions)
        answers = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return {**self.scores(answers), **forced}


def token_sums(logits: Any, labels: torch.Tensor, *, shift: bool = False) -> torch.Tensor:
    """Return of every text the negative log-likelihood, the tokens predicted rightly, and the tokens.

    Args:
        logits: (texts, tokens, vocabulary), or a tuple that begins with them.
        labels: (texts, tokens); -100 does not count.
        shift: the logits at a token speak about the next one (decoder-only models).

    Returns:
        (texts, 3), float64.
    """
    import torch
    from torch.nn.functional import cross_entropy

    scores = logits[0] if isinstance(logits, (tuple, list)) else logits
    if shift:
        scores, labels = scores[:, :-1], labels[:, 1:]
    # (texts, vocabulary, tokens) is what cross_entropy wants; text by text: the float32 copy stays small.
    nats = torch.stack(
        [
            cross_entropy(row.float(), label, ignore_index=-100, reduction="sum")
            for row, label in zip(scores, labels, strict=True)
        ]
    )
    counted = labels != -100
    right = (scores.argmax(dim=-1) == labels) & counted
    return torch.stack([nats.double(), right.sum(dim=1).double(), counted.sum(dim=1).double()], dim=1)


def teacher_forced(trainer: Any, split: Sequence[Any], *, shift: bool = False) -> dict[str, float]:
    """Return loss, perplexity and token accuracy of a Trainer's model on encoded texts, each given the true past."""
    from topoprune.tasks.text_metrics import perplexity

    generates = getattr(trainer.args, "predict_with_generate", None)
    before = trainer.preprocess_logits_for_metrics
    trainer.preprocess_logits_for_metrics = lambda logits, labels: token_sums(logits, labels, shift=shift)
    try:
        if generates:
            trainer.args.predict_with_generate = False
        return perplexity(trainer.predict(split).predictions)
    finally:
        trainer.preprocess_logits_for_metrics = before
        if generates:
            trainer.args.predict_with_generate = generates


def read_splits(
    train_file: str | os.PathLike[str] | None,
    validation_file: str | os.PathLike[str] | None,
    dataset_name: str | None,
    dataset_config: str | None,
    *,
    read: Callable[[str | os.PathLike[str]], Table] = read_table,
    embedded: str = "stdlib-summaries",
) -> tuple[Table, Table, str]:
    """Return training rows, validation rows and a sentence on where they come from: two files, or the hub.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither or both are named, half of the files, an unreadable file, an unknown data set, or the hub
            cannot be reached.
    """
    files = {"--train-file": train_file, "--validation-file": validation_file}
    given = [flag for flag, value in files.items() if value is not None]
    if dataset_name is not None:
        if given:
            raise ValueError(f"give either the data set {dataset_name!r} or {given[0]}, not both")
        from topoprune.tasks.hub import load_splits

        hint = f"use an embedded task (--task {embedded})"
        splits = load_splits(dataset_name, dataset_config, hint=hint)
        return splits["train"], splits["validation"], f"the hub, {dataset_name} {dataset_config or ''}".strip()
    if train_file is None or validation_file is None:
        missing = " and ".join(flag for flag, value in files.items() if value is None)
        raise ValueError(f"no data: {missing} missing; the two files go together, or name a data set of the hub")
    train, validation = read(train_file), read(validation_file)
    return train, validation, f"files {train.path} and {validation.path}"


def require_columns(table: Table, *names: str | None) -> None:
    """Refuse a table that lacks a column, naming those it has.

    Raises:
        ValueError: a column is missing, or the table holds no rows.
    """
    if not table.rows:
        raise ValueError(f"{table.path} holds no rows")
    missing = [name for name in names if name is not None and name not in table.columns]
    if missing:
        raise ValueError(f"{table.path} has no column {missing[0]!r}; its columns are: {', '.join(table.columns)}")


def text_of(table: Table, line: int, column: str, value: Any) -> tuple[str, ...]:
    """Return the texts of a cell: one, or those of a list of texts; empty ones in a list are left out.

    Raises:
        ValueError: no text; names file, line and column.
    """
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts):
        found = tuple(text.strip() for text in texts if text.strip())
        if found:
            return found
    raise ValueError(
        f"{table.path}, line {line}: column {column!r} holds {value!r}, expected a text or a list of texts"
    )


def _encode(tokenizer: Any, pairs: Sequence[TextPair], generation: Generation, length: int) -> list[dict[str, Any]]:
    sources = tokenizer([generation.prefix + pair.source for pair in pairs], truncation=True, max_length=length)
    targets = tokenizer(
        text_target=[pair.targets[0] for pair in pairs], truncation=True, max_length=generation.max_target_length
    )
    return [
        {"input_ids": source, "attention_mask": mask, "labels": target}
        for source, mask, target in zip(
            sources["input_ids"], sources["attention_mask"], targets["input_ids"], strict=True
        )
    ]


def _try_generation(network: Any, example: Mapping[str, Any], generation: Generation) -> None:
    """Write two tokens: what is wrong with a model comes out before training, not after it."""
    import torch

    from topoprune.tasks.monitor import quiet_libraries

    inputs = {name: torch.tensor([example[name]], device=network.device) for name in ("input_ids", "attention_mask")}
    training = network.training
    network.eval()
    try:
        with quiet_libraries(), torch.no_grad():
            network.generate(**inputs, max_new_tokens=2, num_beams=generation.num_beams, do_sample=False)
    except (ValueError, IndexError, TypeError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
        raise ValueError(
            f"this {network.config.model_type} fails to generate ({type(error).__name__}: {first}); check its "
            "configuration. In transformers 5 a T5 with more decoder than encoder layers does"
        ) from error
    finally:
        network.train(training)

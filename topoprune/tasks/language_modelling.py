"""Causal language modelling: predict each token from those before it; scored by perplexity."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topoprune.tasks.seq2seq import read_splits, require_columns, teacher_forced
from topoprune.tasks.tables import Table, read_table
from topoprune.tasks.task import ModelSource, NewModel, Splits, Task, draw
from topoprune.tasks.text_metrics import unigram_floor

if TYPE_CHECKING:
    import torch

    from topoprune.tasks.settings import Training

__all__ = ["LanguageModelling", "load_text"]

_TEXT_COLUMNS = ("text", "content", "sentence", "document", "story", "code")
_BLOCK = 256  # where neither the user nor the model says otherwise


@dataclass(frozen=True)
class LanguageModelling(Task):
    """Text in blocks of tokens, scored by perplexity; that of the token frequencies alone is what to beat.

    The texts of a split are put one after the other, with the special tokens that the tokenizer adds, or with its
    end-of-text token after each where it adds none, and cut into blocks; the last one may be shorter. The first
    token of a block has nothing before it and is not predicted.

    Args:
        name: short. source: where the data comes from, one sentence.
        train, validation: texts, in order.
        block_size: tokens; default: 256, or what the model has positions for.
        drawn: blocks to draw of each split at most (None: all), and the seed.
    """

    name: str
    source: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    block_size: int | None = None
    drawn: tuple[int | None, int | None, int] = (None, None, 0)

    kind = "language modelling"
    main_metric = "perplexity"
    higher_is_better = False
    cuts_texts = False

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size!r}; expected at least 2 tokens")

    # -- data -------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """Short hex digest of all texts and of how they are cut."""
        state = hashlib.sha256(repr((self.kind, self.block_size, self.drawn)).encode())
        for split in (self.train, self.validation):
            state.update(repr(split).encode())
        return state.hexdigest()[:16]

    @property
    def floors(self) -> Mapping[str, float]:
        """Nothing is known before there are tokens; see `floors_for`."""
        return {"perplexity": float("inf"), "token_accuracy": 0.0}

    def floors_for(self, processor: Any, training: Training) -> Mapping[str, float]:
        """Return perplexity and token accuracy of the training text's token frequencies, without any context."""
        train, validation = (_stream(processor, split) for split in (self.train, self.validation))
        return unigram_floor(train, validation, len(processor))

    def limit(self, train: int | None, validation: int | None, seed: int = 0) -> LanguageModelling:
        """Return a task with at most so many blocks (not texts) of each split."""
        for count in (train, validation):
            if count is not None and count < 1:
                raise ValueError(f"asked for {count} blocks; expected at least 1")
        return replace(self, drawn=(train, validation, seed))

    # -- model ------------------------------------------------------------------------------------

    def default_model(self) -> ModelSource:
        """Return a small GPT-2 to train from scratch."""
        return NewModel("gpt2", {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": _BLOCK}, vocab_size=2000)

    def load_processor(self, model: ModelSource, training: Training) -> Any:
        """Return the model's tokenizer; for a new model one trained on the training texts."""
        from topoprune.tasks.scratch import tokenizer_for

        return tokenizer_for(model, self.train, kind="byte-bpe")

    def load_model(self, model: ModelSource, processor: Any, training: Training) -> Any:
        """Return a decoder with a language-modelling head.

        Raises:
            ValueError: no such model, one that is no decoder, or one with fewer embeddings than tokens.
        """
        from transformers import AutoModelForCausalLM

        from topoprune.tasks.scratch import language_model

        return language_model(model, AutoModelForCausalLM, processor)

    # -- training and scoring ---------------------------------------------------------------------

    def encode(self, processor: Any, network: Any, training: Training) -> Splits:
        """Return blocks of token ids, which are their own labels."""
        positions = getattr(network.config, "max_position_embeddings", None)
        size = self.block_size or min(_BLOCK, positions or _BLOCK)
        if positions is not None and size > positions:
            raise ValueError(
                f"block_size is {size}, but this {network.config.model_type} has {positions} positions; expected at "
                "most that"
            )
        *counts, seed = self.drawn
        splits = {}
        for name, texts, count in zip(("train", "validation"), (self.train, self.validation), counts, strict=True):
            blocks = list(_blocks(_stream(processor, texts), size))
            if not blocks:
                raise ValueError(f"the {name} text gives a single token; expected at least two")
            splits[name] = draw([{"input_ids": block, "labels": block} for block in blocks], count, seed)
        return splits

    def collator(self, processor: Any, network: Any) -> Callable[[list[Any]], dict[str, Any]]:
        """Return what pads blocks of different lengths."""
        pad = processor.pad_token_id
        return _Padding(0 if pad is None else int(pad))

    def trainer_arguments(self, training: Training) -> Mapping[str, Any]:
        """Score in batches as in training: their logits are large."""
        return {"per_device_eval_batch_size": training.eval_batch_size or training.batch_size}

    def evaluate(self, trainer: Any, splits: Splits) -> dict[str, float]:
        """Return loss (nats a token), perplexity and token accuracy."""
        return teacher_forced(trainer, splits["validation"], shift=True)


def load_text(
    train_file: str | os.PathLike[str] | None = None,
    validation_file: str | os.PathLike[str] | None = None,
    *,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    text_column: str | None = None,
    block_size: int | None = None,
) -> LanguageModelling:
    """Read texts from two files, or from the Hugging Face hub.

    Args:
        train_file, validation_file: ``.txt`` (one text) or a table, see `read_table` (a text a row; empty ones are
            left out).
        dataset_name, dataset_config: of a data set on the hub (or in its local cache) instead.
        text_column: default: text, or another usual name.
        block_size: see `LanguageModelling`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file or data set, a missing column (lists those that exist), or no text at all.
    """
    train, validation, source = read_splits(
        train_file, validation_file, dataset_name, dataset_config, read=_read, embedded="stdlib-text"
    )
    column = _find_column(train, text_column)
    require_columns(validation, column)
    splits = [_texts(table, column) for table in (train, validation)]
    return LanguageModelling("language-modelling", source, splits[0], splits[1], block_size)


def _read(path: str | os.PathLike[str]) -> Table:
    """Return a table; of a plain text file one with the single text."""
    source = Path(path)
    if source.suffix != ".txt" or not source.is_file():
        return read_table(source)
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"{source} holds no text")
    return Table(str(source), ("text",), ((1, {"text": text}),))


def _find_column(table: Table, asked: str | None) -> str:
    require_columns(table, asked)
    if asked is not None:
        return asked
    found = next((name for name in _TEXT_COLUMNS if name in table.columns), None)
    if found is None:
        raise ValueError(
            f"{table.path}: no text column found among {', '.join(table.columns)} (known names: "
            f"{', '.join(_TEXT_COLUMNS)}); give --text-column"
        )
    return found


def _texts(table: Table, column: str) -> tuple[str, ...]:
    texts = []
    for line, row in table.rows:
        value = row.get(column)
        if not isinstance(value, str):
            raise ValueError(f"{table.path}, line {line}: column {column!r} holds {value!r}, expected a text")
        if value.strip():
            texts.append(value)
    if not texts:
        raise ValueError(f"{table.path}: all {len(table.rows)} texts in column {column!r} are empty")
    return tuple(texts)


def _stream(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Return all texts as one row of token ids."""
    rows = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
    adds = len(tokenizer("a", add_special_tokens=True)["input_ids"]) > len(
        tokenizer("a", add_special_tokens=False)["input_ids"]
    )
    end = [] if adds or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.concatenate([np.asarray([*row, *end], dtype=np.int64) for row in rows])


def _blocks(stream: np.ndarray, size: int) -> Iterator[list[int]]:
    for start in range(0, len(stream), size):
        block = stream[start : start + size].tolist()
        if len(block) > 1:  # a single token predicts nothing
            yield block


@dataclass(frozen=True)
class _Padding:
    """Pads blocks at their end; what is padded is neither seen nor scored."""

    pad: int

    def __call__(self, blocks: list[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(block["input_ids"]) for block in blocks)

        def padded(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([[*block[name], *[filler] * (longest - len(block[name]))] for block in blocks])

        lengths = torch.tensor([[len(block["input_ids"])] for block in blocks])
        seen = (torch.arange(longest)[None] < lengths).long()
        return {"input_ids": padded("input_ids", self.pad), "attention_mask": seen, "labels": padded("labels", -100)}

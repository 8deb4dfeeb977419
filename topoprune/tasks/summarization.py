"""Summarization: write a short text that says what a long one says; scored by ROUGE."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from topoprune.tasks.seq2seq import Generation, Seq2SeqTask, TextPair, read_splits, require_columns, text_of
from topoprune.tasks.tables import Table
from topoprune.tasks.text_metrics import first_sentence, need_package, rouge_scores

__all__ = ["Summarization", "load_summarization"]

# Most specific first; those of the data sets that the transformers examples know.
_COLUMNS: tuple[tuple[str, str], ...] = (
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "abstract"),
    ("article", "summary"),
    ("description", "abstract"),
    ("body", "summary"),
    ("text", "summary"),
    ("text", "headline"),
    ("text", "title"),
    ("source", "target"),
)


@dataclass(frozen=True)
class Summarization(Seq2SeqTask):
    """Summaries, scored by ROUGE-1, -2, -L and -Lsum (percent); the first sentence is what to beat."""

    kind = "summarization"
    main_metric = "rougeL"

    def __post_init__(self) -> None:
        need_package("rouge_score", "rouge-score", "ROUGE")  # now, not after training

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Return ROUGE; with several references each score takes the one that fits best."""
        return rouge_scores(answers, [pair.targets for pair in self.validation])


def load_summarization(
    train_file: str | os.PathLike[str] | None = None,
    validation_file: str | os.PathLike[str] | None = None,
    *,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    text_column: str | None = None,
    summary_column: str | None = None,
    prefix: str = "",
    max_target_length: int = 128,
    num_beams: int = 1,
) -> Summarization:
    """Read texts and their summaries from two table files, or from the Hugging Face hub.

    A text may be a list of its sentences, which are joined. A list of summaries holds several references: the first
    is learnt from, all of them count in the score.

    Args:
        train_file, validation_file: see `read_table`.
        dataset_name, dataset_config: of a data set on the hub (or in its local cache) instead.
        text_column, summary_column: default: a usual pair of names, such as document and summary.
        prefix, max_target_length, num_beams: see `Generation`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file or data set, missing columns (lists those that exist), empty texts (names file
            and line).
    """
    generation = Generation(prefix, max_target_length, num_beams)
    train, validation, source = read_splits(train_file, validation_file, dataset_name, dataset_config)
    return _assemble(train, validation, text_column, summary_column, source, generation)


def _assemble(
    train: Table, validation: Table, text: str | None, summary: str | None, source: str, generation: Generation
) -> Summarization:
    require_columns(train, text, summary)
    text, summary = _find_columns(train, text, summary)
    require_columns(validation, text, summary)
    splits = [
        tuple(_pair(table, line, row, text, summary) for line, row in table.rows) for table in (train, validation)
    ]
    return Summarization("summarization", source, splits[0], splits[1], generation)


def _find_columns(table: Table, text: str | None, summary: str | None) -> tuple[str, str]:
    if text is not None and summary is not None:
        return text, summary
    for known_text, known_summary in _COLUMNS:
        pair = (text or known_text, summary or known_summary)
        if set(pair) <= set(table.columns) and len(set(pair)) == 2:
            return pair
    missing = " and ".join(
        flag for flag, given in (("--text-column", text), ("--summary-column", summary)) if given is None
    )
    known = ", ".join("+".join(pair) for pair in _COLUMNS)
    raise ValueError(
        f"{table.path}: no text with a summary found among the columns {', '.join(table.columns)} (known pairs: "
        f"{known}); give {missing}"
    )


def _pair(table: Table, line: int, row: dict[str, Any], text: str, summary: str) -> TextPair:
    parts = text_of(table, line, text, row.get(text))
    lead = parts[0] if len(parts) > 1 else first_sentence(parts[0])
    return TextPair(" ".join(parts), text_of(table, line, summary, row.get(summary)), lead)

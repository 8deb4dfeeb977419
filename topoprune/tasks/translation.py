"""Translation: write a text in another language; scored by sacreBLEU's BLEU and chrF."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topoprune.tasks.seq2seq import Generation, Seq2SeqTask, TextPair, read_splits, require_columns, text_of
from topoprune.tasks.tables import Table
from topoprune.tasks.text_metrics import bleu_scores, need_package

__all__ = ["Translation", "load_translation"]

_NESTED = "translation"  # the hub's form: {"translation": {"de": ..., "en": ...}}


@dataclass(frozen=True)
class Translation(Seq2SeqTask):
    """Translations, scored by BLEU and chrF (percent); the untranslated source is what to beat.

    Args:
        languages: from and to. The others: see `Seq2SeqTask`.
    """

    languages: tuple[str, str] = field(kw_only=True)

    kind = "translation"
    main_metric = "bleu"

    def __post_init__(self) -> None:
        need_package("sacrebleu", "sacrebleu", "BLEU and chrF")  # now, not after training

    def scores(self, answers: Sequence[str]) -> dict[str, float]:
        """Return BLEU and chrF; all references of a text count."""
        return bleu_scores(answers, [pair.targets for pair in self.validation], language=self.languages[1])


def load_translation(
    train_file: str | os.PathLike[str] | None = None,
    validation_file: str | os.PathLike[str] | None = None,
    *,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    source_lang: str | None = None,
    target_lang: str | None = None,
    prefix: str = "",
    max_target_length: int = 128,
    num_beams: int = 1,
) -> Translation:
    """Read texts and their translations from two table files, or from the Hugging Face hub.

    A row holds a column for each language, or one column ``translation`` with an object that has a text for each.

    Args:
        train_file, validation_file: see `read_table`.
        dataset_name, dataset_config: of a data set on the hub (or in its local cache) instead.
        source_lang, target_lang: names of the columns, such as ``de`` and ``en``.
        prefix, max_target_length, num_beams: see `Generation`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file or data set, a language that is not there (lists those that are), empty texts
            (names file and line).
    """
    if source_lang is None or target_lang is None:
        flag = "--source-lang" if source_lang is None else "--target-lang"
        raise ValueError(f"translation needs both languages: {flag} is missing")
    generation = Generation(prefix, max_target_length, num_beams)
    train, validation, source = read_splits(train_file, validation_file, dataset_name, dataset_config)
    return _assemble(
        train, validation, (source_lang, target_lang), f"{source}, {source_lang} to {target_lang}", generation
    )


def _assemble(
    train: Table, validation: Table, languages: tuple[str, str], source: str, generation: Generation
) -> Translation:
    if languages[0] == languages[1]:
        raise ValueError(f"source and target language are both {languages[0]!r}; expected two different ones")
    splits = [tuple(_pairs(table, languages)) for table in (train, validation)]
    return Translation("translation", source, splits[0], splits[1], generation, languages=languages)


def _pairs(table: Table, languages: tuple[str, str]) -> list[TextPair]:
    require_columns(table)
    nested = _NESTED in table.columns and not set(languages) <= set(table.columns)
    if not nested:
        _require_languages(table.path, table.columns, languages)
    pairs = []
    for line, row in table.rows:
        cells: Any = row
        if nested:
            cells = row.get(_NESTED)
            if not isinstance(cells, Mapping):
                raise ValueError(
                    f"{table.path}, line {line}: column {_NESTED!r} holds {cells!r}, expected an object with a text "
                    "for each language"
                )
            _require_languages(f"{table.path}, line {line}", tuple(cells), languages)
        source, targets = (text_of(table, line, language, cells.get(language)) for language in languages)
        joined = " ".join(source)
        pairs.append(TextPair(joined, targets, joined))
    return pairs


def _require_languages(where: str, found: Sequence[str], languages: tuple[str, str]) -> None:
    missing = [language for language in languages if language not in found]
    if missing:
        raise ValueError(
            f"{where} has no language {missing[0]!r}; found: {', '.join(found)}. Give --source-lang and --target-lang "
            "by these names"
        )

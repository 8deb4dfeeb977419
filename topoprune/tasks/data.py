"""Classification and regression data as plain records, from files, from the hub, or from the embedded task."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from topoprune.tasks.labels import Labels, label_reader
from topoprune.tasks.tables import Table, read_table
from topoprune.tasks.task import draw

__all__ = ["ClassificationData", "Columns", "Example", "assemble", "load_files", "load_hub_task"]

# Most specific first: a file with a pair of sentences may have other text columns as well.
_TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text",),
    ("sentence",),
    ("content",),
)
_LABEL_COLUMNS = ("label", "labels", "target")


@dataclass(frozen=True)
class Example:
    """One text (or pair of texts) and the index of its class, or the number to be predicted."""

    text: str
    label: int | float
    pair: str | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None finds them by their usual names.

    Args:
        text: the text, or the first of two. pair: the second of two. label: the class.
    """

    text: str | None = None
    pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class ClassificationData:
    """Texts with their classes, or with numbers to be predicted (a regression).

    Args:
        name: for people. labels: class names, in index order; empty for a regression.
        train, validation: examples.
        source: where it comes from, one sentence.
        extra: further splits to score, by name.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    source: str
    extra: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)

    @property
    def regression(self) -> bool:
        """True where labels are numbers to be predicted."""
        return not self.labels

    @property
    def floor(self) -> float:
        """Accuracy on validation of always answering the commonest training class: what to beat."""
        common = Counter(example.label for example in self.train).most_common(1)[0][0]
        return sum(example.label == common for example in self.validation) / len(self.validation)

    @property
    def digest(self) -> str:
        """Short hex digest of all texts and labels: what a resumed run must have again."""
        state = hashlib.sha256(repr(self.labels).encode())
        for example in (*self.train, *self.validation, *(e for split in self.extra.values() for e in split)):
            state.update(repr((example.text, example.pair, example.label)).encode())
        return state.hexdigest()[:16]

    def limit(self, train: int | None, validation: int | None, seed: int = 0) -> ClassificationData:
        """Return at most so many examples of each split, drawn without replacement with a seed.

        Drawn, not the first ones: files are often sorted by class.
        """
        return replace(
            self,
            train=draw(self.train, train, seed),
            validation=draw(self.validation, validation, seed),
            extra={name: draw(split, validation, seed) for name, split in self.extra.items()},
        )


def load_files(
    train_file: str | os.PathLike[str],
    validation_file: str | os.PathLike[str],
    columns: Columns | None = None,
    *,
    labels: Labels | None = None,
    extra: Mapping[str, str | os.PathLike[str]] | None = None,
    name: str | None = None,
) -> ClassificationData:
    """Read a task from two table files.

    Labels are whole numbers >= 0 or strings; the classes are those of the training file, sorted.

    Args:
        train_file, validation_file: see `read_table`.
        columns: names of the columns.
        labels: classes or numbers that a task fixes; ``Labels(regression=True)`` reads numbers to be predicted.
        extra: files of further splits to score, by name.
        name: of the task; default: the training file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file, missing columns (lists those that exist), empty texts,
            wrong labels (names file and line), a single class.
    """
    tables = {"train": read_table(train_file), "validation": read_table(validation_file)}
    tables |= {split: read_table(file) for split, file in (extra or {}).items()}
    files = [table.path for table in tables.values()]
    source = f"files {', '.join(files[:-1])} and {files[-1]}"
    return assemble(tables, columns or Columns(), source, name or files[0], labels or Labels())


def load_hub_task(task: str, columns: Columns | None = None, *, labels: Labels | None = None) -> ClassificationData:
    """Load a task from the Hugging Face hub (or its local cache).

    Args:
        task: ``"glue/sst2"`` and the other GLUE tasks, or ``"owner/name"`` or ``"owner/name:config"``.
        columns, labels: as `load_files`.

    Raises:
        ValueError: an unknown task, or the hub cannot be reached.
    """
    if task.startswith("glue/"):
        from topoprune.tasks.glue import load_glue

        return load_glue(task, columns=columns).data
    from topoprune.tasks.hub import load_splits

    path, _, config = task.partition(":")
    tables = load_splits(path, config or None, name=task)
    source = f"the Hugging Face hub, {path} {config}".rstrip()
    return assemble(tables, columns or Columns(), source, task, labels or Labels())


def assemble(
    tables: Mapping[str, Table], columns: Columns, source: str, name: str, labels: Labels
) -> ClassificationData:
    """Return the data of tables ``"train"``, ``"validation"`` and any others; ValueError as `load_files`."""
    for table in tables.values():
        if not table.rows:
            raise ValueError(f"{table.path} holds no rows")
    train = tables["train"]
    text, pair, label = _find_columns(train, columns)
    for table in tables.values():
        _require(table, [c for c in (text, pair, label) if c is not None])
    classes, read = label_reader(train, label, labels)
    splits = {}
    for split, table in tables.items():
        examples = []
        for line, row in table.rows:
            first = _text(table, line, row, text)
            second = None if pair is None else _text(table, line, row, pair)
            examples.append(Example(first, read(table, line, row), second))
        splits[split] = tuple(examples)
    return ClassificationData(name, classes, splits.pop("train"), splits.pop("validation"), source, splits)


def _text(table: Table, line: int, row: Mapping[str, object], column: str) -> str:
    content = row.get(column)
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{table.path}, line {line}: column {column!r} holds {content!r}, expected a text")
    return content


def _require(table: Table, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise ValueError(f"{table.path} has no column {missing[0]!r}; its columns are: {', '.join(table.columns)}")


def _find_columns(table: Table, asked: Columns) -> tuple[str, str | None, str]:
    if asked.pair is not None and asked.text is None:
        raise ValueError("a pair column needs a text column as well: give --text-column")
    _require(table, [c for c in (asked.text, asked.pair, asked.label) if c is not None])
    text, pair = asked.text, asked.pair
    if text is None:
        found = next((names for names in _TEXT_COLUMNS if set(names) <= set(table.columns)), None)
        if found is None:
            known = ", ".join("+".join(names) for names in _TEXT_COLUMNS)
            raise ValueError(
                f"{table.path}: no text column found among {', '.join(table.columns)} (known names: {known}); "
                "give --text-column"
            )
        text, pair = found[0], found[1] if len(found) > 1 else None
    label = asked.label or next((name for name in _LABEL_COLUMNS if name in table.columns), None)
    if label is None:
        raise ValueError(
            f"{table.path}: no label column found among {', '.join(table.columns)} (known names: "
            f"{', '.join(_LABEL_COLUMNS)}); give --label-column"
        )
    return text, pair, label

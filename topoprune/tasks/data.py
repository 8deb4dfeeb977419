"""Classification data as plain records, from files, from the hub, or from the embedded task."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from topoprune.tasks.tables import Table, read_table

__all__ = ["ClassificationData", "Columns", "Example", "load_files", "load_hub_task"]

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
_GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli")


@dataclass(frozen=True)
class Example:
    """One text (or pair of texts) and the index of its class."""

    text: str
    label: int
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
    """A classification task.

    Args:
        name: for people. labels: class names, in index order.
        train, validation: examples.
        source: where it comes from, one sentence.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    source: str

    @property
    def floor(self) -> float:
        """Accuracy on validation of always answering the commonest training class: what to beat."""
        common = Counter(example.label for example in self.train).most_common(1)[0][0]
        return sum(example.label == common for example in self.validation) / len(self.validation)

    @property
    def digest(self) -> str:
        """Short hex digest of all texts and labels: what a resumed run must have again."""
        state = hashlib.sha256(repr(self.labels).encode())
        for example in (*self.train, *self.validation):
            state.update(repr((example.text, example.pair, example.label)).encode())
        return state.hexdigest()[:16]

    def limit(self, train: int | None, validation: int | None, seed: int = 0) -> ClassificationData:
        """Return at most so many examples of each split, drawn without replacement with a seed.

        Drawn, not the first ones: files are often sorted by class.
        """
        return replace(self, train=_draw(self.train, train, seed), validation=_draw(self.validation, validation, seed))


def _draw(examples: tuple[Example, ...], count: int | None, seed: int) -> tuple[Example, ...]:
    if count is None or count >= len(examples):
        return examples
    if count < 1:
        raise ValueError(f"asked for {count} examples; expected at least 1")
    return tuple(random.Random(seed).sample(examples, count))


def load_files(
    train_file: str | os.PathLike[str], validation_file: str | os.PathLike[str], columns: Columns | None = None
) -> ClassificationData:
    """Read a task from two table files.

    Labels are whole numbers >= 0 or strings; the classes are those of the training file, sorted.

    Args:
        train_file, validation_file: see `read_table`.
        columns: names of the columns.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file, missing columns (lists those that exist), empty texts,
            wrong labels (names file and line), a single class.
    """
    train, validation = read_table(train_file), read_table(validation_file)
    return _assemble(train, validation, columns or Columns(), f"files {train.path} and {validation.path}", train.path)


def load_hub_task(task: str, columns: Columns | None = None) -> ClassificationData:
    """Load a task from the Hugging Face hub (or its local cache).

    Args:
        task: ``"glue/sst2"`` and the other GLUE classification tasks, or ``"owner/name"`` or
            ``"owner/name:config"``.

    Raises:
        ValueError: a regression task, an unknown task, or the hub cannot be reached.
    """
    if task in ("glue/stsb", "glue/sts-b"):
        raise ValueError(f"task {task!r} is a regression task; only classification is supported so far")
    family, _, name = task.partition("/")
    if family == "glue":
        if name not in _GLUE:
            raise ValueError(f"unknown task {task!r}; known GLUE tasks: {', '.join(f'glue/{n}' for n in _GLUE)}")
        path, config = "nyu-mll/glue", name
    else:
        path, _, config = task.partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"--task {task} needs the package datasets: pip install datasets") from None
    try:
        splits: Mapping[str, Any] = load_dataset(path, config or None)
    except Exception as error:  # the hub client raises many unrelated types, offline ones among them
        raise ValueError(
            f"cannot load task {task!r} ({type(error).__name__}: {str(error).splitlines()[0][:200]}). If the hub "
            "is out of reach, give local files with --train-file and --validation-file, or use the embedded task "
            "(--task stdlib-docs)"
        ) from error
    held_out = next((s for s in ("validation", "validation_matched", "test") if s in splits), None)
    if "train" not in splits or held_out is None:
        raise ValueError(f"task {task!r} has splits {', '.join(splits)}; expected train and validation")
    tables = []
    for split in ("train", held_out):
        rows = tuple(enumerate((dict(row) for row in splits[split]), start=1))
        tables.append(Table(f"{task} [{split}]", tuple(splits[split].column_names), rows))
    return _assemble(
        tables[0], tables[1], columns or Columns(), f"the Hugging Face hub, {path} {config}".rstrip(), task
    )


def _assemble(train: Table, validation: Table, columns: Columns, source: str, name: str) -> ClassificationData:
    for table in (train, validation):
        if not table.rows:
            raise ValueError(f"{table.path} holds no rows")
    text, pair, label = _find_columns(train, columns)
    _require(validation, [c for c in (text, pair, label) if c is not None])
    classes = _classes(train, label)
    if len(classes) < 2:
        raise ValueError(f"{train.path}: column {label!r} has the single class {classes[0]!r}; expected at least two")
    index = {value: i for i, value in enumerate(classes)}
    splits = [_examples(table, text, pair, label, index, train.path) for table in (train, validation)]
    return ClassificationData(name, tuple(str(c) for c in classes), splits[0], splits[1], source)


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


def _classes(table: Table, label: str) -> list[int] | list[str]:
    values = [(line, _plain(table, line, label, row.get(label))) for line, row in table.rows]
    strings = [(line, value) for line, value in values if isinstance(value, str)]
    numbers = [(line, value) for line, value in values if isinstance(value, int)]
    if strings and numbers:
        line, value = strings[0] if len(strings) <= len(numbers) else numbers[0]
        raise ValueError(
            f"{table.path}, line {line}: label {value!r} is a {'word' if isinstance(value, str) else 'number'} "
            f"among {'numbers' if isinstance(value, str) else 'words'}; column {label!r} must hold one kind"
        )
    if strings:
        return sorted({str(value) for _, value in strings})
    return sorted({int(value) for _, value in numbers})


def _plain(table: Table, line: int, label: str, value: Any) -> int | str:
    """Return a label as an int >= 0 or a non-empty string; csv cells that are whole numbers count as numbers."""
    where = f"{table.path}, line {line}: label {value!r} in column {label!r}"
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        text = value.strip()
        if not text:
            raise ValueError(f"{where} is empty")
        try:
            value = float(text)
        except ValueError:
            return text
    if isinstance(value, (int, float)):
        if value != value or value in (float("inf"), float("-inf")) or int(value) != value:
            raise ValueError(
                f"{where} is not a whole number; regression is not supported, classes are whole numbers or words"
            )
        if value < 0:
            raise ValueError(f"{where} is negative (-1 marks unlabelled test data); give a labelled file")
        return int(value)
    raise ValueError(f"{where} is a {type(value).__name__}; expected a whole number >= 0 or a word")


def _examples(
    table: Table, text: str, pair: str | None, label: str, index: Mapping[Any, int], train_path: str
) -> tuple[Example, ...]:
    examples = []
    for line, row in table.rows:
        value = _plain(table, line, label, row.get(label))
        if value not in index:
            known = ", ".join(str(c) for c in list(index)[:10]) + (", ..." if len(index) > 10 else "")
            raise ValueError(
                f"{table.path}, line {line}: label {value!r} in column {label!r} does not occur in {train_path}, whose "
                f"classes are {known}"
            )
        texts = [row.get(column) for column in (text, pair) if column is not None]
        for column, content in zip((text, pair), texts, strict=False):
            if not isinstance(content, str) or not content.strip():
                raise ValueError(f"{table.path}, line {line}: column {column!r} holds {content!r}, expected a text")
        examples.append(Example(str(texts[0]), index[value], str(texts[1]) if pair is not None else None))
    return tuple(examples)

"""Labels of table rows: classes found in the data, classes that a task fixes, or numbers to be predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from topoprune.tasks.tables import Table

__all__ = ["Labels", "label_reader"]


@dataclass(frozen=True)
class Labels:
    """What labels a task has; the default finds the classes in the training data.

    Args:
        classes: names of the classes, in the order of their numbers; files may hold either.
        regression: labels are numbers to be predicted.
        low, high: least and greatest number of a regression.
    """

    classes: tuple[str, ...] = ()
    regression: bool = False
    low: float = -math.inf
    high: float = math.inf


def label_reader(
    train: Table, label: str, labels: Labels
) -> tuple[tuple[str, ...], Callable[[Table, int, Mapping[str, Any]], int | float]]:
    """Return the names of the classes (none for a regression) and a function (table, line, row) -> label.

    Raises:
        ValueError: by this function, or by the one returned: wrong labels, with file and line.
    """
    if labels.regression:
        return (), lambda table, line, row: _number(table, line, label, row.get(label), labels)
    if labels.classes:
        return labels.classes, lambda table, line, row: _fixed(table, line, label, row.get(label), labels.classes)
    classes = _classes(train, label)
    if len(classes) < 2:
        raise ValueError(f"{train.path}: column {label!r} has the single class {classes[0]!r}; expected at least two")
    index = {value: i for i, value in enumerate([*classes])}

    def read(table: Table, line: int, row: Mapping[str, Any]) -> int:
        value = _plain(table, line, label, row.get(label))
        if value not in index:
            raise ValueError(
                f"{table.path}, line {line}: label {value!r} in column {label!r} does not occur in {train.path}, "
                f"whose classes are {_some([str(c) for c in index])}"
            )
        return index[value]

    return tuple(str(c) for c in classes), read


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _number(table: Table, line: int, label: str, value: Any, labels: Labels) -> float:
    where = f"{table.path}, line {line}: label {value!r} in column {label!r}"
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} is no number; a regression needs one in every row") from None
    if not math.isfinite(number):
        raise ValueError(f"{where} is not a finite number; a regression needs one in every row")
    if not labels.low <= number <= labels.high:
        raise ValueError(f"{where} is out of range; expected a number from {labels.low:g} to {labels.high:g}")
    return number


def _fixed(table: Table, line: int, label: str, value: Any, classes: tuple[str, ...]) -> int:
    plain = _plain(table, line, label, value)
    if plain in classes:
        return classes.index(str(plain))
    if isinstance(plain, int) and plain < len(classes):
        return plain
    known = ", ".join(f"{i} ({name})" for i, name in enumerate(classes))
    raise ValueError(
        f"{table.path}, line {line}: label {plain!r} in column {label!r} is out of range; the task's classes are "
        f"{known}"
    )


def _classes(table: Table, label: str) -> list[int | str]:
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
                f"{where} is not a whole number; classes are whole numbers or words (numbers to be predicted: "
                "--regression)"
            )
        if value < 0:
            raise ValueError(f"{where} is negative (-1 marks unlabelled test data); give a labelled file")
        return int(value)
    raise ValueError(f"{where} is a {type(value).__name__}; expected a whole number >= 0 or a word")

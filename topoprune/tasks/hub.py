"""Data sets from the Hugging Face hub (or its local cache) as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from topoprune.tasks.tables import Table

__all__ = ["HELD_OUT", "load_splits"]

HELD_OUT = ("validation", "validation_matched", "dev", "test")


def load_splits(
    path: str,
    config: str | None = None,
    *,
    name: str | None = None,
    extra: Sequence[str] = (),
    hint: str = "use the embedded task (--task stdlib-docs)",
) -> dict[str, Table]:
    """Load a data set's splits.

    Args:
        path: ``"owner/name"``. config: of data sets that have several.
        name: what the user calls it; default: the path.
        extra: further splits to load.
        hint: what else can be done where the hub is out of reach.

    Returns:
        ``"train"``, ``"validation"`` (the first of `HELD_OUT` that exists) and the extra ones.

    Raises:
        ValueError: no package datasets, an unknown data set, the hub out of reach, or missing or empty splits.
    """
    name = name or path
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"--task {name} needs the package datasets: pip install datasets") from None
    try:
        splits: Mapping[str, Any] = load_dataset(path, config or None)
    except Exception as error:  # the hub client raises many unrelated types, offline ones among them
        first = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
        raise ValueError(
            f"cannot load task {name!r} ({type(error).__name__}: {first}). If the hub is out of reach, give local "
            f"files with --train-file and --validation-file, or {hint}"
        ) from error
    held_out = next((split for split in HELD_OUT if split in splits), None)
    if "train" not in splits or held_out is None:
        raise ValueError(f"task {name!r} has splits {', '.join(splits)}; expected train and validation")
    wanted = {"train": "train", "validation": held_out, **{split: split for split in extra}}
    missing = [split for split in extra if split not in splits]
    if missing:
        raise ValueError(f"task {name!r} has splits {', '.join(splits)}; expected {missing[0]} among them")
    tables = {}
    for target, split in wanted.items():
        rows = tuple(enumerate((dict(row) for row in splits[split]), start=1))
        if not rows:
            raise ValueError(f"task {name!r}: split {split} holds no rows")
        tables[target] = Table(f"{name} [{split}]", tuple(splits[split].column_names), rows)
    return tables

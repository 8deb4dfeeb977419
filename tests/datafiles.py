"""Rows written to files of every format, and read back as classification data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from topoprune.tasks import ClassificationData, load_files
from topoprune.tasks.data import Columns

__all__ = ["jsonl", "load", "save_rows", "write"]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(items: list[dict[str, object]]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def save_rows(path: Path, items: list[dict[str, object]]) -> Path:
    """Write rows in the format the name asks for."""
    if ".parquet" in path.suffixes:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(items), path)
        return path
    if ".csv" in path.suffixes:
        import csv
        import io

        text = io.StringIO()
        writer = csv.DictWriter(text, items[0])
        writer.writeheader()
        writer.writerows(items)
        return write(path, text.getvalue())
    return write(path, jsonl(items))


def load(
    tmp_path: Path, train: list[dict[str, object]], dev: list[dict[str, object]] | None = None, **columns: str
) -> ClassificationData:
    files = [save_rows(tmp_path / f"{n}.jsonl", r) for n, r in (("train", train), ("dev", dev or train))]
    return load_files(files[0], files[1], Columns(**columns))

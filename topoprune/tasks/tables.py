"""Read table files into rows: jsonl, csv and tsv (plain or gzip) with the standard library, parquet through pyarrow."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Table", "read_table"]

EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Table:
    """Rows of one file.

    Args:
        path: where they come from.
        columns: names, in the order of the file.
        rows: (line number or row number in the file, values by column).
    """

    path: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, Any]], ...]


def read_table(path: str | os.PathLike[str]) -> Table:
    """Read a whole file.

    Args:
        path: ``.jsonl`` / ``.json`` (one object a line), ``.csv``, ``.tsv``, each also with
            ``.gz``, or ``.parquet``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown extension, a damaged or truncated file, a bad line (names file and
            line), or no rows.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no data file {source}" + (": it is a folder" if source.is_dir() else ""))
    suffixes = source.suffixes
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    kind = (suffixes[-2] if len(suffixes) > 1 else "") if zipped else (suffixes[-1] if suffixes else "")
    if kind not in EXTENSIONS or (zipped and kind == ".parquet"):
        raise ValueError(
            f"{source}: unknown extension {''.join(suffixes[-2:]) or '(none)'!r}; "
            "expected .jsonl, .csv, .tsv (each also .gz) or .parquet"
        )
    if kind == ".parquet":
        table = _read_parquet(source)
    else:
        with _lines(source, zipped) as lines:
            if kind in (".jsonl", ".json"):
                table = _read_jsonl(source, lines)
            else:
                table = _read_csv(source, lines, "," if kind == ".csv" else "\t")
    if not table.rows:
        raise ValueError(f"{source} holds no rows")
    return table


@contextmanager
def _lines(source: Path, zipped: bool) -> Iterator[Iterator[str]]:
    """Yield the lines of a text file; damage becomes a ValueError that names the line."""
    count = 0

    def counted(file: Iterable[str]) -> Iterator[str]:
        nonlocal count
        for line in file:
            count += 1
            yield line

    try:
        with source.open("rb") as raw:
            plain = gzip.GzipFile(fileobj=raw) if zipped else raw
            with io.TextIOWrapper(plain, encoding="utf-8-sig", newline="") as file:
                yield counted(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}, after line {count}: not UTF-8 text ({error.reason})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{source}, after line {count}: damaged or truncated gzip data ({error})") from error


def _read_jsonl(source: Path, lines: Iterator[str]) -> Table:
    rows = []
    columns: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source}, line {number}: not a JSON object ({error.msg} at column {error.colno}); "
                "one object a line is expected, and the last line may be cut off"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{source}, line {number}: found {type(row).__name__}, expected one JSON object a line")
        columns.update(dict.fromkeys(row))
        rows.append((number, row))
    return Table(str(source), tuple(columns), tuple(rows))


def _read_csv(source: Path, lines: Iterator[str], delimiter: str) -> Table:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    rows = []
    try:
        header = next(reader, None)
        if header is None:
            raise ValueError(f"{source} is empty; a header line with column names is expected")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{source}, line {reader.line_num}: {len(cells)} cells, the header names {len(header)} columns"
                )
            rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num}: not valid csv ({error})") from error
    return Table(str(source), tuple(header), tuple(rows))


def _read_parquet(source: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading {source} needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source} is not a readable parquet file: {error}") from error
    rows = tuple(enumerate(table.to_pylist(), start=1))
    return Table(str(source), tuple(table.column_names), rows)

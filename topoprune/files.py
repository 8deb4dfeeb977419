"""Artefact files: numpy arrays plus a JSON header, written atomically, read without pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["atomic_path", "read_npz", "write_npz"]

_HEADER = "__header__"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place if the block succeeds.

    A kill at any moment leaves the old file or the new one, never half of one.

    Raises:
        OSError: the folder does not exist or cannot be written; names the folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: folder {target.parent} does not exist; create it first")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
    except OSError as error:
        raise PermissionError(f"cannot write to folder {target.parent}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; give it ordinary rights
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_npz(path: str | os.PathLike[str], header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
    """Write a compressed ``.npz`` whose member ``__header__`` is JSON; return the path."""
    target = Path(path)
    if target.suffix != ".npz":
        target = target.with_name(target.name + ".npz")
    blob = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **{_HEADER: blob}, **arrays)
    return target


def read_npz(
    path: str | os.PathLike[str], expected_format: str, newest_schema: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a file written by `write_npz`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, truncated, another format, or a newer schema version.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        header = json.loads(arrays.pop(_HEADER).tobytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except Exception as error:  # damaged bytes surface as zlib, zipfile, struct, type and many other errors
        raise ValueError(f"{path} is not a readable {expected_format} file: {error}") from error
    if header.get("format") != expected_format:
        raise ValueError(f"{path} holds a {header.get('format')!r}, expected {expected_format!r}")
    if header.get("schema_version", 0) > newest_schema:
        raise ValueError(
            f"{path} has schema version {header['schema_version']}, this version reads up to {newest_schema}; "
            "upgrade topoprune"
        )
    return header, arrays

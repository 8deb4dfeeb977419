"""What takes seconds to collect, kept in a file of the user's cache folder."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from topoprune.files import atomic_path

__all__ = ["cache_folder", "cached"]

T = TypeVar("T")


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/topoprune``, or ``~/.cache/topoprune``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "topoprune"


def cached(
    name: str, collect: Callable[[], T], accept: Callable[[Any], T | None], *, folder: Path | None, use_cache: bool
) -> T:
    """Return what was collected from this Python's standard library, from the cache or afresh.

    A file that cannot be read or written is warned about and done without.

    Args:
        name: of the file, without the version of Python, which it gets as well.
        collect: collects it; JSON-ready. accept: turns what the file holds into that, or None (or TypeError or
            ValueError) if it is unusable.
        folder: of the file; default `cache_folder()`. use_cache: False neither reads nor writes it.
    """
    if not use_cache:
        return collect()
    version = "-".join(str(part) for part in sys.version_info[:3])
    path = (cache_folder() if folder is None else folder) / f"{name}-{sys.implementation.name}-{version}.json"
    found: T | None = None
    try:
        found = accept(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"the cache {path} is not readable ({error}); reading the docstrings again", stacklevel=3)
    if found is None:
        found = collect()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
        except OSError as error:
            warnings.warn(f"cannot write the cache {path} ({error}); going on without it", stacklevel=3)
    return found

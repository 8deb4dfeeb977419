"""``topoprune.json``: what a saved folder holds, how it came about, and the hashes of its files.

The hashes tell damaged, mixed-up and edited files from what was written. They are no signature, which no file
in the folder could be: so they are XXH3-128, ten times as fast as SHA-256 (docs/design/0005-saved-models.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from topoprune.compaction.modeling_topoprune import FILE_NAME, MANIFEST_NAME

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "PLAN_NAME",
    "Hashes",
    "check_sizes",
    "is_model_file",
    "json_ready",
    "read_json",
    "read_manifest",
    "write_manifest",
]

PLAN_NAME = "topoprune_plan.npz"
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
MANIFEST_VERSION = 1
_FORMAT = "topoprune.SavedModel"
_WEIGHTS = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?(\.[\w-]+)*\.(safetensors|bin)(\.index\.json)?")


def is_model_file(name: str) -> bool:
    """Return whether a file of that name belongs to one saved model, so that it goes when another is saved there.

    >>> is_model_file("model-00001-of-00002.safetensors"), is_model_file("tokenizer.json")
    (True, False)
    """
    own = (MANIFEST_NAME, PLAN_NAME, FILE_NAME, CONFIG_NAME, "generation_config.json")
    return name in own or _WEIGHTS.fullmatch(name) is not None


def write_manifest(folder: Path, facts: Mapping[str, Any], files: list[str]) -> None:
    """Write the manifest of a folder that is complete but for it.

    Args:
        folder: where the files lie. facts: JSON-ready, what is said beside the files.
        files: names of the files that `load` checks.

    Complexity: every file is read and hashed once, at about 7 GB/s.
    """
    import transformers

    import topoprune

    with Hashes(folder, files) as hashes:
        found = {name: hashes.result(name) for name in files}
    manifest = {
        "format": _FORMAT,
        "schema_version": MANIFEST_VERSION,
        "versions": {
            "topoprune": topoprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **facts,
        "files": {name: {"bytes": (folder / name).stat().st_size, "xxh3_128": found[name]} for name in files},
    }
    manifest = json_ready(manifest)
    manifest["digest"] = _digest(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder; None if there is none.

    Raises:
        ValueError: no manifest of ours, a newer schema version, or one that was edited.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    manifest = read_json(path)
    if manifest.get("format") != _FORMAT:
        raise ValueError(f"{path} holds a {manifest.get('format')!r}, expected {_FORMAT!r}")
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version > MANIFEST_VERSION:
        raise ValueError(
            f"{path} has schema version {version!r}, this version reads up to {MANIFEST_VERSION}; upgrade topoprune"
        )
    if manifest.get("digest") != _digest(manifest):
        raise ValueError(
            f"{path} was edited or damaged after it was written (its digest does not fit). Save the model again, or "
            "delete the file to load without verification"
        )
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError that names the file if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no readable JSON ({error}); the file is damaged") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}, expected an object; the file is damaged")
    return found


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError if a file of the manifest is missing or has another size.

    Complexity: one stat a file.
    """
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).name != name:
            raise ValueError(f"{folder / MANIFEST_NAME} names {name!r}, which is not a file of this folder")
        if not path.is_file():
            raise ValueError(
                f"{folder} is incomplete: {name} is missing; copy the folder again or save the model again"
            )
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(
                f"{path} has {size:,} bytes, {MANIFEST_NAME} says {entry['bytes']:,}: the file is truncated or was "
                "replaced; copy the folder again or save the model again"
            )


class Hashes:
    """XXH3-128 of files, computed in threads while other things happen, e.g. while weights load.

    Args:
        folder: where the files lie. names: their names.
        expected: name -> entry of a manifest, for `check`.
    """

    def __init__(self, folder: Path, names: list[str], expected: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.folder = folder
        self.expected = expected or {}
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "topoprune-hash")
        self._jobs = {name: self._pool.submit(_hash, folder / name) for name in names}

    def result(self, name: str) -> str:
        """Return the hex digest of a file."""
        return self._jobs[name].result()

    def check(self) -> None:
        """Raise ValueError naming the first file that is not what the manifest says."""
        for name in self._jobs:
            if self.result(name) != self.expected[name]["xxh3_128"]:
                raise ValueError(
                    f"{self.folder / name} is not the file that was saved (its hash does not fit {MANIFEST_NAME}): it "
                    "was damaged, edited or replaced. Copy the folder again or save the model again"
                )

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _hash(path: Path) -> str:
    from xxhash import xxh3_128_hexdigest

    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return xxh3_128_hexdigest(b"")
        # One call on mapped memory: nothing is copied, and other threads run meanwhile.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as whole:
            return xxh3_128_hexdigest(whole)


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def json_ready(value: Any) -> Any:
    """Return `value` with plain JSON types: NaN and infinities become None, what JSON lacks becomes text."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "item"):  # numpy scalars
        return json_ready(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)

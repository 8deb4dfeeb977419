"""`load`: read a saved model after checking it, without running code or unpickling."""

from __future__ import annotations

import errno
import os
import re
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from topoprune.compaction.facts import quiet_layers
from topoprune.compaction.folders import existing_folder
from topoprune.compaction.layout import units_of
from topoprune.compaction.manifest import (
    CONFIG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    PLAN_NAME,
    Hashes,
    check_sizes,
    is_model_file,
    read_json,
    read_manifest,
)
from topoprune.compaction.modeling_topoprune import KEY, LAYOUT_VERSION, compact_class
from topoprune.planning import Plan

__all__ = ["load"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_DECIDED_HERE = (
    "config",
    "state_dict",
    "output_loading_info",
    "ignore_mismatched_sizes",
    "trust_remote_code",
    "use_safetensors",
    "subfolder",
    "variant",
    "gguf_file",
)


def load(path: str | os.PathLike[str], *, verify: bool = True, **options: Any) -> Any:
    """Read a compacted model that `save` or ``save_pretrained`` wrote.

    No code of the folder is run and nothing is unpickled: the class is topoprune's own, the weights are
    safetensors. Weights that are missing, left over or of another shape are errors.

    Args:
        path: the folder, or a model id of the hub, whose files are downloaded first.
        verify: compare the hash of every file with the manifest; threads do it while the weights load.
        options: of ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ...; for a model id
            also ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Returns:
        A model of class ``Compact<class>`` in eval mode.

    Raises:
        FileNotFoundError: neither a folder nor a model id that could be fetched.
        ValueError: a dense model; files missing, truncated, altered or of a newer version; no safetensors.

    Complexity: O(parameters); about what ``from_pretrained`` takes for as many bytes.
    """
    clash = sorted(set(options) & set(_DECIDED_HERE))
    if clash:
        raise ValueError(f"load decides on {', '.join(clash)} itself; leave it out")
    folder = _local(path, options)
    for attempt in range(5):
        before = _identity(folder)
        try:
            model = _load(existing_folder(folder), verify, options)
        except Exception:
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return model
        time.sleep(0.1 * attempt)  # another process saved there meanwhile: what was read may be a mixture
    raise OSError(f"{folder} is being replaced again and again while it is read; try again when saving is over")


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _local(path: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    folder = Path(path)
    if folder.is_dir() or existing_folder(folder) != folder:
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file; load takes the folder that save wrote, or a model id")
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(errno.ENOENT, "there is no such folder, and it is no model id of the hub", str(path))
    from huggingface_hub import snapshot_download

    given = {name: options.pop(name) for name in _HUB_ARGUMENTS if name in options}
    try:
        return Path(snapshot_download(path, ignore_patterns=list(_PICKLES), **given))
    except Exception as error:  # network, rights, names and caches fail in many types
        raise FileNotFoundError(
            errno.ENOENT,
            f"there is no such folder, and the hub gave no such model (offline, private or misspelt?): {error}",
            path,
        ) from error


def _load(folder: Path, verify: bool, options: Mapping[str, Any]) -> Any:
    config = _check_config(folder)
    manifest = read_manifest(folder)
    weights = _weight_files(folder)
    with ExitStack() as stack:
        hashes: Hashes | None = None
        if manifest is None:
            warnings.warn(
                f"{folder} has no {MANIFEST_NAME} (save_pretrained writes none): loading without verification",
                stacklevel=3,
            )
        else:
            check_sizes(folder, manifest)
            expected = manifest["files"]
            strange = [name for name in weights if name not in expected]
            if strange:
                raise ValueError(f"{folder} has weights that {MANIFEST_NAME} does not name: {', '.join(strange)}")
            if verify:
                hashes = stack.enter_context(Hashes(folder, weights, expected))
                small = [name for name in expected if name not in weights]
                stack.enter_context(Hashes(folder, small, expected)).check()
            else:  # a plan with the right hash is the plan that was written
                _check_plan(folder, manifest)
        model = _build(folder, _class_named(folder, config, manifest), hashes, options)
        if hashes is not None:
            hashes.check()
    return model


def _check_config(folder: Path) -> dict[str, Any]:
    """Return the parsed config of a compacted model; ValueError if the folder holds none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no model: {CONFIG_NAME} is missing")
    config = read_json(path)
    layout = config.get(KEY)
    if layout is None:
        if (folder / MANIFEST_NAME).is_file():
            raise ValueError(f"{path} has no entry {KEY!r} any more: it was replaced; save the model again")
        raise ValueError(
            f"{folder} holds a dense model (its {CONFIG_NAME} has no entry {KEY!r}); load it with transformers: "
            "AutoModel….from_pretrained"
        )
    version = layout.get("version") if isinstance(layout, dict) else None
    if not isinstance(version, int) or version > LAYOUT_VERSION:
        raise ValueError(
            f"{path}: the layout has version {version!r}, this version of topoprune reads up to {LAYOUT_VERSION}; "
            "upgrade topoprune"
        )
    try:
        for entry in layout["sites"].values():
            units_of(entry)
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged entry {KEY!r}: {error!r}") from error
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter beside the model; merge it, or move it and load it with peft")
    return config


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the safetensors files that transformers will read."""
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / INDEX_NAME
    if not index.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix == ".bin" and is_model_file(file.name))
        found = f"only {pickles[0]}, and pickled files can run code" if pickles else "model.safetensors is missing"
        raise ValueError(f"{folder} has no weights in safetensors: {found}; save the model again")
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict):
        raise ValueError(f"{index} has no weight_map; the file is damaged")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: {index.name} names {name!r}, which is not there")
    return names


def _check_plan(folder: Path, manifest: Mapping[str, Any]) -> None:
    if PLAN_NAME not in manifest["files"]:
        return
    plan = Plan.load(folder / PLAN_NAME)
    if plan.structure_digest != manifest["plan"]["structure_digest"]:
        raise ValueError(f"{folder / PLAN_NAME} is not the plan that {MANIFEST_NAME} speaks of; it was replaced")


def _class_named(folder: Path, config: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> type:
    import transformers

    named = (manifest or {}).get("class") or next(iter(config.get("architectures") or ()), None)
    stock = getattr(transformers, str(named).removeprefix("Compact"), None)
    if not str(named).startswith("Compact") or not (isinstance(stock, type) and issubclass(stock, PreTrainedModel)):
        raise ValueError(
            f"{folder} says its class is {named!r}; expected Compact<class> of a class that transformers "
            f"{transformers.__version__} has. Upgrade transformers, or save the model again"
        )
    expected = getattr(stock.config_class, "model_type", None)
    if expected != config.get("model_type"):
        raise ValueError(
            f"{folder / CONFIG_NAME} has model_type={config.get('model_type')!r}, a {stock.__name__} has {expected!r}"
        )
    return compact_class(stock)


def _build(folder: Path, cls: Any, hashes: Hashes | None, options: Mapping[str, Any]) -> Any:
    from safetensors import SafetensorError

    try:
        with quiet_layers():
            model, info = cls.from_pretrained(
                str(folder),
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with names
                **options,
            )
    except SafetensorError as error:
        if hashes is not None:
            hashes.check()
        raise ValueError(f"{folder}: the weights cannot be read ({error}); the file is damaged or truncated") from error
    wrong = [f"{name} has shape {tuple(found)}, expected {tuple(own)}" for name, found, own in info["mismatched_keys"]]
    wrong += [f"{name} is missing" for name in info["missing_keys"]]
    wrong += [f"{name} is not part of the model" for name in info["unexpected_keys"]]
    wrong += [str(message) for message in info.get("error_msgs") or ()]
    if wrong:
        if hashes is not None:
            hashes.check()
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{folder}: weights and {CONFIG_NAME} do not fit: {'; '.join(sorted(wrong)[:3])}{more}. Files of different "
            "models were mixed; save the model again"
        )
    return model

"""`save` and `push_to_hub`: compacted models as folders that are whole, checked and free of pickle."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from topoprune.compaction.card import check_speed, model_card
from topoprune.compaction.compacting import compact
from topoprune.compaction.facts import base_model, per_layer, sizes
from topoprune.compaction.folders import atomic_folder, check_target, flushing
from topoprune.compaction.layout import layout_of, relative_name
from topoprune.compaction.manifest import (
    CONFIG_NAME,
    INDEX_NAME,
    PLAN_NAME,
    is_model_file,
    json_ready,
    read_json,
    write_manifest,
)
from topoprune.compaction.modeling_topoprune import (
    FILE_NAME,
    KEY,
    auto_map,
    stock_class,
)
from topoprune.masks import fit_sites, unwrap
from topoprune.planning import Plan

__all__ = ["push_to_hub", "save"]


def save(
    model: nn.Module,
    plan: Plan | None,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str | None = None,
    card: bool = True,
    speed: Mapping[str, float] | None = None,
) -> Path:
    """Write a compacted model as a folder that `load`, `AutoModel` and the hub read.

    A model that is dense or masked, or a compacted one that the plan fits as it is now, is compacted by the
    plan first (a copy: yours stays as it is). With a model that the plan has made already, the plan is put on
    record. The folder holds what ``save_pretrained`` writes, the code that builds the model, the plan, a
    manifest with hashes and certificates, and a model card. It is replaced as a whole: a kill at any moment
    leaves the old folder or the new one.

    Args:
        model: a transformers model, see above.
        plan: what was pruned; None if that is not known any more, or for all units without effect.
        path: the folder: new, empty, or with an earlier model. Other files in it stay (logs, a tokenizer).
        tokenizer: tokenizer or processor to save with it.
        max_shard_size: largest weights file, in bytes or as text (``"5GB"``); None is transformers' default.
        card: whether to write ``README.md``; False leaves one that is there.
        speed: measured, for the card: setting -> times as fast as the dense model.

    Returns:
        The path.

    Raises:
        ValueError: not a transformers class, a plan of another model, a folder with something else in it.
        OSError: the path is a file, no permission, no space. Nothing is changed and nothing half-written.

    Complexity: O(parameters): written once, hashed once.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from topoprune import extract, load, solve
        >>> config = BertConfig(
        ...     vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        ... )
        >>> model = BertModel(config).eval()
        >>> plan = solve(extract(model, include=("neurons",)), budget=5, problem="neurons")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     smaller = load(save(model, plan, f"{folder}/small"))
        >>> smaller.encoder.layer[0].intermediate.dense
        Linear(in_features=8, out_features=5, bias=True)
    """
    target = check_target(path, CONFIG_NAME)
    quick = check_speed(speed)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise ValueError(f"tokenizer is a {type(tokenizer).__name__} without save_pretrained; pass a tokenizer")
    ready = _ready(model, plan)
    _check_space(ready, target)
    with atomic_folder(target, is_model_file) as folder:
        _write_model(ready, folder, {} if max_shard_size is None else {"max_shard_size": max_shard_size})
        with flushing(folder):
            facts = _facts(ready, plan, quick)
            _complete_config(ready, folder / CONFIG_NAME, facts["base_model"])
            if plan is not None:
                plan.save(folder / PLAN_NAME)
            checked = sorted(file.name for file in folder.iterdir())
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
            if card:
                (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
            write_manifest(folder, facts, checked)
    return Path(path)


def _ready(model: nn.Module, plan: Plan | None) -> Any:
    """Return the compacted model to write; checks that it can be read again."""
    model = unwrap(model)
    stock = stock_class(type(model))
    import transformers

    if not isinstance(model, PreTrainedModel) or getattr(transformers, stock.__name__, None) is not stock:
        raise ValueError(
            f"save writes models whose class transformers itself provides, since a reader builds them by name; "
            f"{stock.__module__}.{stock.__name__} is not one. Keep its state_dict() with safetensors instead"
        )
    if layout_of(model) is None:
        return compact(model, plan)
    if plan is None:
        return model
    try:
        fit_sites(model, plan.sites)
    except ValueError:
        _check_record(model, plan)
        return model
    return compact(model, plan)


def _check_record(model: Any, plan: Plan) -> None:
    """Raise ValueError unless the model can be what compaction by the plan left.

    `compact(rounding=…)` keeps more than the plan, and input dimensions may stay as zeros; so shapes lie
    between what the plan leaves and what it found.
    """
    shapes = {relative_name(model, name): tuple(p.shape) for name, p in model.named_parameters()}
    gone: dict[tuple[str, int], int] = {}
    found: dict[tuple[str, int], int] = {}
    for name, solution in plan.unit_solutions().items():
        for piece in plan.site(name).slices:
            key = relative_name(model, piece.param), piece.axis
            found[key] = piece.shape[piece.axis]
            gone[key] = gone.get(key, 0) + int((~solution.keep).sum()) * piece.width
    for (param, axis), before in found.items():
        now = shapes.get(param, ())
        least = before - gone[param, axis]
        if axis >= len(now) or not least <= now[axis] <= before:
            raise ValueError(
                f"the plan is not the one this model was compacted by: it leaves {least} of {before} along axis {axis} "
                f"of {param!r}, here it has shape {now or 'none: there is no such parameter'}. Pass the plan that was "
                "used, or None"
            )


def _check_space(model: Any, target: Path) -> None:
    import shutil

    need = sum(p.numel() * p.element_size() for p in model.parameters())
    above = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(above).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"cannot save to {target}: the weights have {need:,} bytes, {above} has {free:,} left; nothing was changed",
        )


def _write_model(model: Any, folder: Path, sharding: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder, **sharding)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    # A model from AutoModel writes the copy of the folder it came from.
    from topoprune.compaction import modeling_topoprune

    (folder / FILE_NAME).write_bytes(Path(modeling_topoprune.__file__).read_bytes())
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():  # safetensors makes its files private
        file.chmod(0o666 & ~umask)


def _complete_config(model: Any, path: Path, base: str | None) -> None:
    config = read_json(path)
    # A path of this machine is nobody else's business.
    config.pop("_name_or_path", None)
    if base is not None:
        config[KEY]["base_model"] = base
    config |= per_layer(model)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _facts(model: Any, plan: Plan | None, speed: Mapping[str, float]) -> dict[str, Any]:
    name = f"Compact{stock_class(type(model)).__name__}"
    facts: dict[str, Any] = {
        "class": name,
        "model_type": model.config.model_type,
        "auto_class": _auto_class(model, name),
        "base_model": base_model(model),
        **sizes(model),
        "plan": None,
        "certificates": [],
        "joint": [],
        "speed": dict(speed),
    }
    if plan is not None:
        facts["plan"] = {
            "request": plan.request,
            "structure_digest": plan.structure_digest,
            "weights_digest": plan.weights_digest,
        }
        facts["certificates"] = plan.table()
        for joint in plan.joint:
            row = joint.to_dict()
            bound = row.pop("bound") or (None, None)
            facts["joint"].append({**row, "bound": bound[0], "bound_source": bound[1], "gap": joint.gap})
    ready: dict[str, Any] = json_ready(facts)
    return ready


def _auto_class(model: Any, name: str) -> str:
    """Return the auto class that builds this class, e.g. ``AutoModelForCausalLM``."""
    fits = [auto for auto, target in auto_map(model.config).items() if target.endswith(f".{name}")]
    exact = [auto for auto in fits if auto.startswith("AutoModelFor") and auto != "AutoModelForPreTraining"]
    return next(iter(exact or fits), "AutoModel")


def push_to_hub(
    model: nn.Module,
    plan: Plan | None,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    **options: Any,
) -> str:
    """Save a model to a temporary folder and upload it in one commit, model card included.

    Args:
        model, plan: as in `save`. repo_id: ``"name/model"`` on the hub; made if it does not exist.
        private: whether a new repository is private. token: of the hub; default: the one of ``hf auth login``.
        commit_message: of the upload. options: keyword arguments of `save`.

    Returns:
        The address of the repository.

    Raises:
        ValueError: as `save`; nothing is made on the hub then.
        OSError: the hub cannot be reached or refuses.

    Complexity: as `save`, and the upload.
    """
    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id):
        raise ValueError(f"repo_id is {repo_id!r}; expected a name on the hub such as 'me/bert-half'")
    import huggingface_hub

    with tempfile.TemporaryDirectory() as parent:
        folder = save(model, plan, Path(parent) / repo_id.rpartition("/")[2], **options)
        try:
            hub = huggingface_hub.HfApi(token=token)
            address = hub.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
            hub.upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                repo_type="model",
                commit_message=commit_message or "Upload a model compacted with topoprune",
                # shards of an earlier upload
                delete_patterns=["model*.safetensors", "pytorch_model*.bin", INDEX_NAME, PLAN_NAME],
            )
        except Exception as error:  # network, rights and names fail in many types
            raise OSError(
                f"could not push to {repo_id!r}: {error}. Offline, or not logged in (hf auth login)? Nothing is lost: "
                "topoprune.save writes the same folder here"
            ) from error
    return str(address)

"""Damaged, altered, newer and foreign folders are refused with a message; refused saves write nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.compaction.filetools import content, same_state, small, tampered_json
from tests.tiny import build
from topoprune import load, save
from topoprune.compaction import folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, to be copied."""
    model, plan = small("bert")
    return save(model, plan, tmp_path_factory.mktemp("saved") / "model", max_shard_size="6KB")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def _flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _truncate(path: Path, missing: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-missing])


def _pickled(folder: Path) -> None:
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _replace(path: Path, old: str, new: str) -> None:
    """Edit a text without changing its size."""
    text = path.read_text()
    assert old in text and len(old) == len(new)
    path.write_text(text.replace(old, new, 1))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda f: _shard(f).unlink(), "incomplete.*which is not there"),
    "the index is missing": (lambda f: (f / "model.safetensors.index.json").unlink(), "model.safetensors is missing"),
    "the plan is missing": (lambda f: (f / "topoprune_plan.npz").unlink(), "topoprune_plan.npz is missing"),
    "the code is missing": (lambda f: (f / "modeling_topoprune.py").unlink(), "modeling_topoprune.py is missing"),
    "the config is missing": (lambda f: (f / "config.json").unlink(), "holds no model"),
    "only pickled weights": (_pickled, "only pytorch_model.bin.*can run code"),
    "a shard is truncated": (lambda f: _truncate(_shard(f)), "truncated"),
    "a shard is empty": (lambda f: _shard(f).write_bytes(b""), "truncated"),
    "the config is truncated": (lambda f: _truncate(f / "config.json", 30), "JSON"),
    "the manifest is truncated": (lambda f: _truncate(f / "topoprune.json", 30), "JSON"),
    "a bit of the weights flipped": (lambda f: _flip(_shard(f)), "not the file that was saved"),
    "a bit of a header flipped": (lambda f: _flip(_shard(f), 12), "not the file that was saved"),
    "a bit of the plan flipped": (lambda f: _flip(f / "topoprune_plan.npz", 100), "not the file that was saved"),
    "a size in the config": (
        lambda f: _replace(f / "config.json", '"intermediate_size": 40', '"intermediate_size": 41'),
        "config.json is not the file that was saved",
    ),
    "a kept unit in the config": (
        lambda f: tampered_json(f / "config.json", "topoprune", "sites", "encoder.0.ffn", "kept", value=7),
        "7 units are kept and names 20",
    ),
    "no layout in the config": (lambda f: tampered_json(f / "config.json", "topoprune", value=None), "was replaced"),
    "the manifest says fewer parameters": (
        lambda f: tampered_json(f / "topoprune.json", "parameters", "after", value=1),
        "edited or damaged",
    ),
    "another manifest": (lambda f: tampered_json(f / "topoprune.json", "format", value="else"), "holds a 'else'"),
    "a newer manifest": (
        lambda f: tampered_json(f / "topoprune.json", "schema_version", value=99),
        "schema version 99.*upgrade topoprune",
    ),
    "a newer layout": (
        lambda f: tampered_json(f / "config.json", "topoprune", "version", value=99),
        "version 99.*upgrade topoprune",
    ),
    "an adapter beside it": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge it"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused(damage: str, folder: Path) -> None:
    edit, message = DAMAGE[damage]
    edit(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """In any file that `load` reads, at any place."""
    names = [path.name for path in sorted(saved.iterdir()) if path.name != "README.md"]
    name = data.draw(st.sampled_from(names))
    raw = (saved / name).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    folder = tmp_path / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    (folder / name).write_bytes(changed)
    if name == "topoprune.json" and _same_json(raw, bytes(changed)):
        return  # white space became other white space
    with pytest.raises(ValueError, match=r"."):
        load(folder)


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_without_hashes_sizes_and_shapes_are_still_checked(folder: Path) -> None:
    _flip(_shard(folder))
    load(folder, verify=False)
    _truncate(_shard(folder))
    with pytest.raises(ValueError, match="truncated"):
        load(folder, verify=False)


@pytest.mark.parametrize("lacking", ["missing", "left over", "another shape"])
def test_weights_that_do_not_fit_the_config(lacking: str, tmp_path: Path) -> None:
    """Without a manifest, which save_pretrained does not write, the model itself is the check."""
    from safetensors.torch import load_file, save_file

    model, _ = small("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "bert.encoder.layer.0.intermediate.dense.bias"
    if lacking == "missing":
        del tensors[name]
    elif lacking == "left over":
        tensors["bert.more"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="without verification"), pytest.raises(ValueError, match="do not fit") as seen:
        load(tmp_path)
    assert ("bert.more" if lacking == "left over" else name) in str(seen.value)


def test_auto_classes_do_not_make_up_weights_of_cut_layers(tmp_path: Path) -> None:
    """transformers only warns about weights that are missing, and draws them at random."""
    from safetensors.torch import load_file, save_file

    model, _ = small("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["classifier.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    type(model).from_pretrained(tmp_path)  # a new task head is nobody's mistake
    del tensors["bert.encoder.layer.0.intermediate.dense.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for 'bert\.encoder\.layer\.0\.intermediate"):
        type(model).from_pretrained(tmp_path)


def test_what_is_no_compacted_model(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"dense model.*AutoModel"):
        load(tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="the hub gave no such model"):
        load("nobody/there-is-no-such-model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        load(tmp_path / "file")
    with pytest.raises(ValueError, match=r"decides on config, trust_remote_code"):
        load(tmp_path / "dense", trust_remote_code=True, config=None)


def test_code_in_the_folder_is_never_run(folder: Path) -> None:
    """Neither with the manifest, which notices, nor without."""
    mark = folder.parent / "ran"
    (folder / "modeling_topoprune.py").write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(ValueError, match=r"modeling_topoprune\.py"):
        load(folder)
    (folder / "topoprune.json").unlink()
    with pytest.warns(UserWarning, match="without verification"):
        load(folder)
    assert not mark.exists()


# -- saving ----------------------------------------------------------------------------------------


def _entries(parent: Path) -> dict[str, bytes]:
    return content(parent)


def test_other_files_stay_and_old_shards_go(folder: Path) -> None:
    (folder / "training.log").write_text("loss 1")
    (folder / "runs" / "one").mkdir(parents=True)
    (folder / "runs" / "one" / "events").write_text("kept")
    (folder / "latest").symlink_to("training.log")
    model, _ = small("roberta", seed=1)
    save(model, None, folder)
    same_state(load(folder), model)
    names = {path.name for path in folder.iterdir()}
    assert not [name for name in names if name.startswith("model-") or name in ("topoprune_plan.npz",)]
    assert (folder / "runs" / "one" / "events").read_text() == "kept" and (folder / "latest").is_symlink()
    assert (folder / "latest").read_text() == "loss 1"
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_save_through_a_link_replaces_what_it_points_to(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder, target_is_directory=True)
    model, plan = small("distilbert")
    save(model, plan, link)
    assert link.is_symlink()
    same_state(load(folder), model)


def _file(target: Path, _: pytest.MonkeyPatch) -> Path:
    target.write_text("precious")
    return target


def _below_a_file(target: Path, _: pytest.MonkeyPatch) -> Path:
    target.write_text("precious")
    return target / "model"


def _foreign(target: Path, _: pytest.MonkeyPatch) -> Path:
    target.mkdir()
    (target / "thesis.tex").write_text("precious")
    return target


def _current(target: Path, patch: pytest.MonkeyPatch) -> Path:
    target.mkdir()
    patch.chdir(target)
    return Path()


def _forbidden(target: Path, patch: pytest.MonkeyPatch) -> Path:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    patch.setattr(folders.tempfile, "mkdtemp", refuse)
    return target


def _full(target: Path, patch: pytest.MonkeyPatch) -> Path:
    usage = shutil.disk_usage("/")
    patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    return target


def _unswappable(target: Path, patch: pytest.MonkeyPatch) -> Path:
    def busy(*_: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    patch.setattr(folders.os, "rename", busy)
    return target


REFUSED: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], Path], type[Exception], str]] = {
    "the path is a file": (_file, NotADirectoryError, "is a file"),
    "a file is above it": (_below_a_file, NotADirectoryError, "is a file"),
    "a folder with something else": (_foreign, ValueError, "holds no model"),
    "no permission": (_forbidden, PermissionError, "no permission to write"),
    "no space, known before": (_full, OSError, "the weights have .* has 100 left"),
    "the current folder": (_current, ValueError, "this process stands in it"),
    "a mount point": (_unswappable, OSError, "mount point"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_saves_write_nothing(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, error, message = REFUSED[case]
    model, plan = small("bert")
    with monkeypatch.context() as patch:
        target = prepare(tmp_path / "model", patch)
        before = _entries(tmp_path)
        with pytest.raises(error, match=message):
            save(model, plan, target)
    assert _entries(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to write more than 8 KB into a file: weights stop in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_the_old_folder(folder: Path, request: pytest.FixtureRequest) -> None:
    before = content(folder)
    model, plan = small("bert", seed=1)
    request.getfixturevalue("small_files")
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        save(model, plan, folder)
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("case", ["module", "class", "tokenizer", "speed", "path"])
def test_bad_arguments_are_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    model, plan = small("bert")
    given: dict[str, Any] = {}
    if case == "module":
        model = nn.Linear(2, 2)
    elif case == "class":
        from transformers import BertModel

        own = type("MyBert", (BertModel,), {})
        model, plan = own(model.config), None
    elif case == "tokenizer":
        given["tokenizer"] = "bert-base-uncased"
    elif case == "speed":
        given["speed"] = {"batch 8": float("nan")}
    message = {
        "module": "Linear is not one",
        "class": "MyBert is not one",
        "tokenizer": "without save_pretrained",
        "speed": "how many times as fast",
        "path": "is empty",
    }[case]
    with pytest.raises(ValueError, match=message):
        save(model, plan, "" if case == "path" else tmp_path / "model", **given)
    assert not list(tmp_path.iterdir())

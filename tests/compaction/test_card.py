"""The manifest and the model card say what happened; the hub gets a whole folder or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import xxhash
import yaml

import topoprune
from tests.compaction.cases import EMPTY, empty_plan, structure_plan
from tests.compaction.filetools import same_state, small
from tests.tiny import FAMILIES, build
from topoprune import compact, extract, kept_units, load, push_to_hub, save, solve
from topoprune.compaction.manifest import Hashes


def _card(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "topoprune.json").read_text())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_manifest_counts_what_is_there(family: str, tmp_path: Path) -> None:
    dense = build(family)
    model, plan = small(family, empty_plan(dense, EMPTY["no heads in the last layer"]))
    folder = save(model, plan, tmp_path / "model")
    facts = _manifest(folder)
    assert facts["class"] == type(model).__name__ == model.config.architectures[0]
    assert facts["versions"] == {
        "topoprune": topoprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for name, entry in facts["files"].items():
        raw = (folder / name).read_bytes()
        assert entry == {"bytes": len(raw), "xxh3_128": xxhash.xxh3_128_hexdigest(raw)}
    assert facts["parameters"] == {
        "before": sum(p.numel() for p in dense.parameters()),
        "after": sum(p.numel() for p in model.parameters()),
    }
    sites = facts["sites"].values()
    gone = facts["parameters"]["before"] - facts["parameters"]["after"]
    assert gone == sum(site["parameters"]["before"] - site["parameters"]["after"] for site in sites)
    kept = kept_units(model)
    for name, site in facts["sites"].items():
        assert site["kept"] == len(kept[name]) and site["kept"] <= site["of"]
    # The sparsity is the one that masks are measured by.
    with topoprune.apply(dense, plan):
        measured = topoprune.measure_sparsity(dense, topoprune.find_sites(dense))
    assert facts["removed"] == pytest.approx(measured.removable)
    assert [row["site"] for row in facts["certificates"]] == list(plan.solutions)


def test_a_card_with_everything(tmp_path: Path) -> None:
    model = build("llama")
    plan = solve(extract(model, include=("heads", "neurons")), budget=0.5, problem="neurons", solver="greedy")
    plan |= solve(extract(model, include=("heads", "neurons")), budget=1, problem="heads")
    model.config._name_or_path = "org/tiny-llama"
    folder = save(model, plan, tmp_path / "model", speed={"batch 8 | 128 tokens\non 2 cores": 4.5})
    front, body = _card(folder)
    assert front["base_model"] == "org/tiny-llama" and front["library_name"] == "transformers"
    assert "topoprune" in front["tags"]
    removed = _manifest(folder)["removed"]
    assert f"{removed:.1%}" in body
    assert "| decoder 0 | 2 of 4 (1 KV) | 20 of 40 |" in body
    assert "| batch 8 / 128 tokens on 2 cores | 4.50 |" in body
    for row in plan.table():
        assert f"| {row['site']} | {row['kept']} of {row['units']} | {row['solver']} |" in body
    assert "0.00%" in body  # heads are solved exactly: a proven gap of zero
    assert "topoprune.load(" in body and "AutoModelForCausalLM.from_pretrained" in body and "## Limits" in body
    assert _manifest(folder)["speed"] == {"batch 8 / 128 tokens on 2 cores": 4.5}
    # The origin outlives both ways to load and save again.
    again = load(folder)
    assert _card(save(again, structure_plan(again, 0.25), tmp_path / "next"))[0]["base_model"] == "org/tiny-llama"


def test_the_code_on_the_card_works(tmp_path: Path) -> None:
    model, plan = small("opt")
    folder = save(model, plan, tmp_path / "model")
    body = _card(folder)[1]
    blocks = [block.split("```")[0] for block in body.split("```python\n")[1:]]
    assert len(blocks) == 2 and "trust_remote_code=True" in blocks[1]
    scope: dict[str, Any] = {"PATH_OR_ID": str(folder)}
    exec(blocks[0], scope)
    same_state(scope["model"], model)


@pytest.mark.parametrize(
    "name", ["/home/someone/model", "./model", "../model", "C:\\models\\bert", "a/b/c", "", "x y/z"]
)
def test_paths_are_no_base_model(name: str, tmp_path: Path) -> None:
    model, plan = small("bert")
    model.config._name_or_path = name
    folder = save(model, plan, tmp_path / "model")
    assert "base_model" not in _card(folder)[0] and _manifest(folder)["base_model"] is None
    assert not name or all(json.dumps(name).strip('"').encode() not in p.read_bytes() for p in folder.glob("*.json"))


def test_a_folder_that_looks_like_an_id_is_no_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model, plan = small("bert")
    model.config._name_or_path = "runs/bert"
    assert "base_model" not in _card(save(model, plan, "model"))[0]


def test_a_card_of_ones_own_stays(tmp_path: Path) -> None:
    model, plan = small("bert")
    folder = save(model, plan, tmp_path / "model", card=False)
    assert not (folder / "README.md").exists()
    (folder / "README.md").write_text("mine")
    save(model, plan, folder, card=False)
    assert (folder / "README.md").read_text() == "mine"
    load(folder)


def test_a_joint_certificate_is_on_the_card(tmp_path: Path) -> None:
    model = build("bert")
    plan = solve(extract(model, include=("neurons",)), budget=0.5, problem="neurons", scope="model", objective="soft")
    folder = save(compact(model, plan), plan, tmp_path / "model")
    assert _manifest(folder)["joint"][0]["sites"] == list(plan.joint[0].sites)
    assert f"| {len(plan.joint[0].sites)} sites under one budget |" in _card(folder)[1]


def test_hashes_of_any_size(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(1000)
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "empty").write_bytes(b"")
    with Hashes(tmp_path, ["file", "empty"]) as hashes:
        assert hashes.result("file") == xxhash.xxh3_128_hexdigest(data)
        assert hashes.result("empty") == xxhash.xxh3_128_hexdigest(b"")


# -- hub -------------------------------------------------------------------------------------------


class _Hub:
    """Takes what the real one would, into a folder."""

    root: Path
    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("token", {"token": token}))

    def create_repo(self, repo_id: str, **given: Any) -> str:
        self.calls.append(("create", {"repo_id": repo_id, **given}))
        return f"https://hub.invalid/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, **given: Any) -> None:
        self.calls.append(("upload", {"repo_id": repo_id, **given}))
        shutil.copytree(folder_path, self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[_Hub]:
    import huggingface_hub

    _Hub.root, _Hub.calls = tmp_path, []
    monkeypatch.setattr(huggingface_hub, "HfApi", _Hub)
    return _Hub


def test_push_and_load_by_id(hub: type[_Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model, plan = small("gpt2")
    address = push_to_hub(
        model, plan, "me/small", private=True, token="secret", commit_message="hello", max_shard_size="6KB"
    )
    assert address == "https://hub.invalid/me/small"
    assert [name for name, _ in hub.calls] == ["token", "create", "upload"]
    calls = dict(hub.calls)
    assert calls["token"]["token"] == "secret" and calls["create"]["private"] is True
    assert calls["upload"]["commit_message"] == "hello"
    assert len(list((tmp_path / "me" / "small").glob("model-*.safetensors"))) > 1

    asked = {}

    def download(repo_id: str, **given: Any) -> str:
        asked.update(given, repo_id=repo_id)
        return str(tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path / "me")  # where no folder has that name
    same_state(load("me/small", revision="main", token="secret"), model)
    assert asked["repo_id"] == "me/small" and asked["revision"] == "main" and "*.bin" in asked["ignore_patterns"]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is set in the tests."""
    model, plan = small("bert")
    with pytest.raises(OSError, match=r"could not push to 'me/small'.*topoprune\.save"):
        push_to_hub(model, plan, "me/small")


def test_what_save_refuses_makes_no_repository(hub: type[_Hub]) -> None:
    model, plan = small("bert")
    with pytest.raises(ValueError, match="how many times as fast"):
        push_to_hub(model, plan, "me/small", speed={"batch": -1.0})
    with pytest.raises(ValueError, match="expected a name on the hub"):
        push_to_hub(model, plan, "a/b/c")
    assert not hub.calls

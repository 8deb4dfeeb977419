"""Auto classes of transformers read saved folders where topoprune is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compaction.cases import EMPTY, empty_plan, structure_plan
from tests.compaction.filetools import outputs, same_state, small
from tests.tiny import FAMILIES, build, inputs
from topoprune import compact, load, save
from topoprune.compaction.layout import relative_name

# topoprune cannot be imported here, and no network is asked.
_ALONE = """
import json, sys
sys.modules["topoprune"] = sys.modules["topoprune_solvers"] = None
import torch, transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
root, found = sys.argv[1], {}
for family in sys.argv[2:]:
    folder = f"{root}/{family}"
    auto = getattr(transformers, json.load(open(f"{folder}/topoprune.json"))["auto_class"])
    given = load_file(f"{root}/{family}.inputs.safetensors")
    report = found[family] = {}
    for name, cls in (("head", auto), ("base", transformers.AutoModel)):
        model = cls.from_pretrained(folder, trust_remote_code=True)
        report[name] = type(model).__name__
        save_file({k: v.clone() for k, v in model.state_dict().items()}, f"{root}/{family}.{name}.safetensors")
        if name == "head":
            try:
                cls.from_pretrained(folder)
                report["without trust"] = "loaded"
            except Exception as error:
                report["without trust"] = type(error).__name__
            with torch.no_grad():
                save_file({"logits": model(**given).logits.contiguous()}, f"{root}/{family}.logits.safetensors")
            # Written again by a class of the folder's own copy, and read again.
            model.save_pretrained(f"{root}/again/{family}")
            again = auto.from_pretrained(f"{root}/again/{family}", trust_remote_code=True)
            with torch.no_grad():
                report["again"] = torch.equal(again(**given).logits, model(**given).logits)
json.dump(found, open(f"{root}/report.json", "w"))
"""


def _alone(tmp: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HOME": str(tmp / "home"), "HF_MODULES_CACHE": str(tmp / "code"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", _ALONE, *arguments], env=env, cwd=tmp, text=True, capture_output=True, check=False
    )


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All families saved, and read by one fresh process."""
    from safetensors.torch import save_file

    tmp = tmp_path_factory.mktemp("auto")
    for index, family in enumerate(FAMILIES):
        # Every other family with a layer that lost all its heads.
        plan = empty_plan(build(family)) if index % 2 else None
        model, plan = small(family, plan)
        save(model, plan, tmp / family)
        save_file(inputs(model), tmp / f"{family}.inputs.safetensors")
    done = _alone(tmp, str(tmp), *FAMILIES)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp, json.loads((tmp / "report.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_give_the_same_model(family: str, read: tuple[Path, dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    tmp, report = read
    model = load(tmp / family)
    assert report[family]["head"] == type(model).__name__
    expected = model.state_dict()
    head = load_file(tmp / f"{family}.head.safetensors")
    assert head.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in head.items())
    expected = {relative_name(model, name): tensor for name, tensor in expected.items()}
    base = load_file(tmp / f"{family}.base.safetensors")
    # A pooler that the classifier lacks is new, as with every checkpoint of transformers.
    known = {name for name in base if not name.startswith("pooler.") or name in expected}
    assert len(known) >= 20 and known <= expected.keys()
    assert all(torch.equal(base[name], expected[name]) for name in known)
    assert torch.equal(load_file(tmp / f"{family}.logits.safetensors")["logits"], outputs(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_trust_it_is_an_error_never_another_model(family: str, read: tuple[Path, dict[str, Any]]) -> None:
    # RuntimeError: what transformers raises where weights and its own class have different shapes.
    assert read[1][family]["without trust"] == "RuntimeError"


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_again_from_there(family: str, read: tuple[Path, dict[str, Any]]) -> None:
    tmp, report = read
    assert report[family]["again"]
    with pytest.warns(UserWarning, match="without verification"):
        same_state(load(tmp / "again" / family), load(tmp / family))


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_a_model_from_auto_classes_is_pruned_and_saved_again(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes are those of the folder's copy of the code; what compaction returns is ours again."""
    import transformers
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "code")])
    model, plan = small(family, empty_plan(build(family), EMPTY["no heads in the first layer"]))
    folder = save(model, plan, tmp_path / "model 0.5")
    auto = getattr(transformers, json.loads((folder / "topoprune.json").read_text())["auto_class"])
    foreign = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(foreign) is not type(model) and type(foreign).__name__ == type(model).__name__
    same_state(load(save(foreign, plan, tmp_path / "same")), model)
    second = structure_plan(foreign, share=0.25, seed=2)
    smaller = compact(foreign, second)
    assert type(smaller) is type(model)
    expected = compact(model, second)
    same_state(smaller, expected)
    same_state(load(save(foreign, second, tmp_path / "second")), expected)

"""Pruned on one task, fine-tuned on another with other labels: as commands, with masks and with what was cut out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from tests.masktools import naive_masks
from tests.tiny import build
from tests.tinytask import rows, save_model, write_task
from topoprune import Plan, compact, find_sites, kept_units, load, save
from topoprune.cli import app
from topoprune.tasks.models import load_full
from topoprune.tasks.transfer import is_compacted, kept_masks, load_under
from topoprune.train.fixed import zero_units

CLASSES = ("no", "perhaps", "yes")


def call(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def trained(model: Path, task: tuple[Path, Path], out: Path, *words: object) -> dict[str, Any]:
    short = ("--epochs", 1, "--batch-size", 16, "--learning-rate", 1e-3, "--max-length", 32)
    files = ("--train-file", task[0], "--validation-file", task[1])
    code, said = call("train", "--model", model, *files, *words, *short, "--output-dir", out)
    assert code == 0, said
    return dict(json.loads((out / "result.json").read_text()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model pruned on two classes, compacted too, and a task of three."""
    folder = tmp_path_factory.mktemp("transfer")
    two = write_task(folder / "two", train=64, validation=16)
    three = folder / "three.jsonl", folder / "three-dev.jsonl"
    for path, count, seed in zip(three, (48, 12), (5, 6), strict=True):
        told = [{**row, "label": CLASSES[i % 3]} for i, row in enumerate(rows(count, seed))]
        path.write_text("".join(json.dumps(row) + "\n" for row in told))
    run = folder / "run"
    trained(save_model(folder / "model"), two, run, "--sparsity", 0.5)
    code, said = call("compact", run, "--plan", run / "plan.npz", "--out", folder / "small")
    assert code == 0, said
    return {"run": run, "small": folder / "small", "three": three, "model": folder / "model", "folder": folder}


@pytest.mark.parametrize("flag", [["--keep-masks"], ["--plan"]])
def test_masks_stay_on_another_task(made: dict[str, Any], tmp_path: Path, flag: list[object]) -> None:
    plan = Plan.load(made["run"] / "plan.npz")
    words = [*flag, made["run"] / "plan.npz"] if flag == ["--plan"] else flag
    result = trained(made["run"], made["three"], tmp_path / "out", *words)
    assert result["method"] == "fixed" and result["removable"] == pytest.approx(0.5, abs=0.02)
    model = load_full(tmp_path / "out")
    assert model.config.num_labels == 3
    for name, keep in naive_masks(model, plan).items():
        assert not model.get_parameter(name)[~keep].count_nonzero(), name
    saved = Plan.load(tmp_path / "out" / "plan.npz")
    for site in find_sites(model, ("heads", "neurons")):
        assert np.array_equal(zero_units(model, site), ~plan.keep(site.name))
        assert np.array_equal(saved.keep(site.name), plan.keep(site.name))
    # Trained, not only copied.
    before = load_full(made["run"]).get_parameter("bert.encoder.layer.0.output.dense.weight")
    assert not torch.equal(model.get_parameter("bert.encoder.layer.0.output.dense.weight"), before)
    # And again: what it leaves can be held on.
    assert kept_masks(tmp_path / "out").digest == kept_masks(made["run"]).digest  # type: ignore[union-attr]


def test_a_compacted_model_keeps_the_same_units(made: dict[str, Any], tmp_path: Path) -> None:
    plan = Plan.load(made["run"] / "plan.npz")
    assert kept_masks(made["small"]) is None and is_compacted(made["small"]) and not is_compacted(made["run"])
    result = trained(made["small"], made["three"], tmp_path / "out", "--keep-masks")
    assert result["method"] == "dense"
    model = load(tmp_path / "out")
    assert model.config.num_labels == 3 and type(model).__name__ == "CompactBertForSequenceClassification"
    assert {name: list(units) for name, units in kept_units(model).items()} == {
        name: list(np.flatnonzero(s.keep)) for name, s in plan.unit_solutions().items()
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep-masks", "--sparsity", 0.5], "--sparsity has no effect with --keep-masks"),
        (["--plan", "none.npz"], "none.npz"),
    ],
)
def test_flags_that_do_not_go_together(made: dict[str, Any], words: list[object], message: str) -> None:
    files = ("--train-file", made["three"][0], "--validation-file", made["three"][1])
    code, said = call("train", "--model", made["run"], *files, *words)
    assert code == 2 and message in said


def test_folders_without_masks_to_keep(made: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no plan\.npz, which training with a recipe writes"):
        kept_masks(made["model"])
    with pytest.raises(ValueError, match="is compacted: what was pruned is cut out"):
        kept_masks(made["small"], made["run"] / "plan.npz")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        kept_masks(tmp_path / "none")
    files = ("--train-file", made["three"][0], "--validation-file", made["three"][1])
    plan = ("--plan", made["run"] / "plan.npz", "--output-dir", tmp_path / "out")
    code, said = call("train", "--model", made["model"], *files, *plan)
    assert code == 2 and "this model is not one that the plan has pruned" in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_only_a_head_may_be_new(tmp_path: Path) -> None:
    for family, auto in (("bert", AutoModelForSequenceClassification), ("t5", AutoModelForSeq2SeqLM)):
        model = build(family)
        sites = find_sites(model, ("neurons",))
        model.save_pretrained(tmp_path / family)
        again, new = load_under(tmp_path / family, auto)
        assert type(again) is type(model) and new == []
        smaller = compact(model, _halved(sites))
        save(smaller, None, tmp_path / f"small-{family}")
        loaded, new = load_under(tmp_path / f"small-{family}", auto)
        assert type(loaded).__name__ == f"Compact{type(model).__name__}" and new == []
        assert loaded.num_parameters() == smaller.num_parameters()
    other, new = load_under(tmp_path / "small-bert", AutoModelForSequenceClassification, num_labels=5)
    assert new == ["classifier.bias", "classifier.weight"] and other.classifier.out_features == 5
    with pytest.raises(ValueError, match="has no class for T5Config"):
        from transformers import AutoModelForImageClassification

        load_under(tmp_path / "small-t5", AutoModelForImageClassification)
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lack 16 weights of a BertForSequenceClassification's body"):
        load_under(tmp_path / "bert", AutoModelForSequenceClassification)


def _halved(sites: Any) -> Plan:
    from topoprune_solvers import Solution, Status

    keep = {site.name: np.arange(site.n_units) % 2 == 0 for site in sites}
    return Plan(sites, {name: Solution(k, 0.0, "min", Status.FEASIBLE, "test") for name, k in keep.items()})

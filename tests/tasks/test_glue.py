"""All GLUE tasks: their columns, classes and metrics, from local files and from the hub's tables."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datafiles import save_rows
from tests.tinytask import rows, save_model
from topoprune import Recipe
from topoprune.tasks import Columns, Training, load_glue, load_hub_task, train
from topoprune.tasks.classification import ClassificationTask
from topoprune.tasks.glue import GLUE
from topoprune.tasks.metrics import METRICS, score, simplest_scores

Rows = list[dict[str, object]]
MAIN = {"cola": "matthews", "mrpc": "combined_score", "qqp": "combined_score", "stsb": "combined_score"}


def glue_rows(name: str, count: int = 12, seed: int = 0) -> Rows:
    """Return rows with a task's columns; the label depends on the text, so that it can be learnt."""
    task = GLUE[name]
    found: Rows = []
    for i, row in enumerate(rows(count, seed)):
        label = float(5 * int(str(row["label"]))) if name == "stsb" else i % len(task.classes)
        texts = dict(zip(task.columns, (row["sentence"], "fine w1"), strict=False))
        found.append({"idx": i, **texts, "label": label})
    return found


def glue_files(folder: Path, name: str, count: int = 12) -> tuple[Path, Path]:
    parts = (("train", count, 1), ("dev", count // 2, 2))
    train_file, dev_file = (save_rows(folder / f"{part}.jsonl", glue_rows(name, n, seed)) for part, n, seed in parts)
    return train_file, dev_file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("glue") / "model")


# -- metrics ----------------------------------------------------------------------------------

classes = st.integers(2, 4).flatmap(
    lambda k: st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=40)
)


@settings(max_examples=60, deadline=None)
@given(classes)
def test_metrics_of_classes_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, truth = np.array(pairs).T
    found = score(("accuracy", "f1", "matthews"), predicted, truth)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert found["f1"] == pytest.approx(metrics.f1_score(truth == 1, predicted == 1, zero_division=0))
    assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(truth, predicted))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=30), st.integers(1, 9))
def test_correlations_ignore_scale_and_a_constant_has_none(pairs: list[tuple[int, int]], scale: int) -> None:
    predicted, truth = np.array(pairs, dtype=float).T
    for name in ("pearson", "spearman"):
        value = METRICS[name](predicted, truth)
        assert -1 - 1e-9 <= value <= 1 + 1e-9
        assert METRICS[name](scale * predicted + 3, truth) == pytest.approx(value, abs=1e-9)
        assert METRICS[name](np.full_like(truth, 2.0), truth) == 0
        if np.ptp(truth):
            assert METRICS[name](truth, truth) == pytest.approx(1)


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_answer_is_perfect_and_beats_the_simplest(name: str) -> None:
    truth = np.array([0, 1, 1, 0, 1])
    best = METRICS[name](truth, truth)
    simplest = simplest_scores((name,), truth, truth, regression=name in ("pearson", "spearman", "mse"))[name]
    assert best == pytest.approx(0 if name == "mse" else 1)
    assert simplest > best if name == "mse" else simplest < best


# -- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GLUE)
def test_every_task_reads_its_own_columns_from_files(tmp_path: Path, name: str) -> None:
    task = load_glue(f"glue/{name}", *glue_files(tmp_path, name))
    assert (task.name, task.n_train, task.n_validation) == (f"glue/{name}", 12, 6)
    assert task.data.labels == GLUE[name].classes
    assert (task.data.train[0].pair is None) == (len(GLUE[name].columns) == 1)
    assert task.kind == ("regression" if name == "stsb" else "classification")
    assert task.main_metric == MAIN.get(name, "accuracy")
    assert task.floors[task.main_metric] <= 1
    assert task.limit(4, 2).n_train == 4 and task.limit(4, 2).metrics == GLUE[name].metrics


def test_classes_may_be_named(tmp_path: Path) -> None:
    named = [dict(row, label=GLUE["rte"].classes[int(str(row["label"]))]) for row in glue_rows("rte")]
    by_name = load_glue("glue/rte", *(save_rows(tmp_path / f"{part}.csv", named) for part in ("a", "b")))
    by_number = load_glue("glue/rte", *(save_rows(tmp_path / f"{p}.jsonl", glue_rows("rte")) for p in ("a", "b")))
    assert by_name.digest == by_number.digest


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    renamed = [{"left": r["sentence1"], "right": r["sentence2"], "gold": r["label"]} for r in glue_rows("mrpc")]
    files = [save_rows(tmp_path / f"{part}.jsonl", renamed) for part in ("a", "b")]
    with pytest.raises(ValueError, match=r"no column 'sentence1'; its columns are: left, right, gold"):
        load_glue("glue/mrpc", *files)
    task = load_glue("glue/mrpc", *files, columns=Columns("left", "right", "gold"))
    assert task.data.train[0].pair == "fine w1"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mrpc", {"label": 2}, r"line 3: label 2 in column 'label' is out of range.*0 \(not_equivalent\), 1"),
        ("rte", {"label": "neutral"}, r"line 3: label 'neutral' .* out of range.*0 \(entailment\)"),
        ("cola", {"label": -1}, "line 3: label -1 .* negative"),
        ("stsb", {"label": float("nan")}, "line 3: label nan .* not a finite number"),
        ("stsb", {"label": None}, "line 3: label None .* is no number"),
        ("stsb", {"label": "high"}, "line 3: label 'high' .* is no number"),
        ("stsb", {"label": 5.5}, "line 3: label 5.5 .* out of range; expected a number from 0 to 5"),
        ("qnli", {"sentence": None}, "line 3: column 'sentence' holds None, expected a text"),
        ("mnli", {"hypothesis": " "}, "line 3: column 'hypothesis' holds ' ', expected a text"),
    ],
)
def test_wrong_rows_name_file_and_line(tmp_path: Path, name: str, change: dict[str, object], message: str) -> None:
    bad = glue_rows(name)
    bad[2] = bad[2] | change
    good, wrong = save_rows(tmp_path / "good.jsonl", glue_rows(name)), save_rows(tmp_path / "wrong.jsonl", bad)
    for files in ((wrong, good), (good, wrong)):
        with pytest.raises(ValueError, match=r"wrong\.jsonl, " + message):
            load_glue(f"glue/{name}", *files)


def test_unknown_tasks_and_half_the_files_are_refused(tmp_path: Path) -> None:
    train_file, dev_file = glue_files(tmp_path, "rte")
    with pytest.raises(ValueError, match="unknown task 'glue/sst3'; known GLUE tasks: glue/cola"):
        load_glue("glue/sst3", train_file, dev_file)
    with pytest.raises(ValueError, match="validation_file is missing"):
        load_glue("glue/rte", train_file)
    with pytest.raises(ValueError, match="mismatched validation file is for glue/mnli"):
        load_glue("glue/rte", train_file, dev_file, mismatched_file=dev_file)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        load_glue("glue/rte", train_file, tmp_path / "empty.jsonl")


class Split(list[dict[str, object]]):
    """A split as the package datasets has it."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0]) if self else ["premise"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Split]:
    """Put a data set in the hub's place."""
    names = ("train", "validation_matched", "validation_mismatched")
    splits = {name: Split(glue_rows("mnli", 6 + i, i)) for i, name in enumerate(names)}
    fake = SimpleNamespace(load_dataset=lambda path, config: splits)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return splits


def test_mnli_from_the_hub_has_both_validation_sets(hub: dict[str, Split]) -> None:
    task = load_glue("glue/mnli")
    assert (len(task.data.validation), len(task.data.extra["validation_mismatched"])) == (7, 8)
    assert set(task.floors) == {"accuracy", "accuracy_mismatched", "combined_score"}
    assert load_hub_task("glue/mnli").digest == task.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation_matched": None}, r"has splits train, validation_mismatched; expected train and validation"),
        ({"validation_mismatched": None}, "expected validation_mismatched among them"),
        ({"train": Split()}, "split train holds no rows"),
    ],
)
def test_missing_and_empty_splits_are_refused(
    hub: dict[str, Split], change: dict[str, Split | None], message: str
) -> None:
    for name, split in change.items():
        hub.pop(name)
        if split is not None:
            hub[name] = split
    with pytest.raises(ValueError, match=message):
        load_glue("glue/mnli")


# -- training ---------------------------------------------------------------------------------


def test_mnli_is_scored_on_both_validation_sets(tmp_path: Path, model: Path) -> None:
    files = glue_files(tmp_path, "mnli")
    other = save_rows(tmp_path / "other.jsonl", glue_rows("mnli", 9, 7))
    task = load_glue("glue/mnli", *files, mismatched_file=other)
    result = train(model, task, output_dir=tmp_path / "run", training=Training(epochs=1, batch_size=6, max_length=16))
    assert result.metric == "combined_score"
    assert result.score == pytest.approx((result.metrics["accuracy"] + result.metrics["accuracy_mismatched"]) / 2)
    assert round(9 * result.metrics["accuracy_mismatched"]) == pytest.approx(9 * result.metrics["accuracy_mismatched"])


@pytest.mark.parametrize(
    "recipe", [None, Recipe.budget(0.4), Recipe.neuroprune(2.0, 2.0, "auto:0.2")], ids=["dense", "budget", "neuroprune"]
)
def test_a_regression_trains_and_prunes(tmp_path: Path, model: Path, recipe: object) -> None:
    task = load_glue("glue/stsb", *glue_files(tmp_path, "stsb", 96))
    settings = Training(epochs=8 if recipe is None else 1, batch_size=16, learning_rate=5e-3, max_length=16)
    result = train(model, task, recipe, output_dir=tmp_path / "run", training=settings)  # type: ignore[arg-type]
    assert (result.metric, result.kind, result.floor) == ("combined_score", "regression", 0)
    assert result.score == pytest.approx((result.metrics["pearson"] + result.metrics["spearman"]) / 2)
    if recipe is None:
        assert result.score > 0.5
    elif isinstance(recipe, type(Recipe.budget(0.4))):
        assert abs(result.removable - 0.4) < 0.02


def test_numbers_from_files_are_a_regression(tmp_path: Path, model: Path) -> None:
    from topoprune.tasks import Labels, load_files

    table = [{"text": str(row["sentence"]), "label": 0.25 + i} for i, row in enumerate(rows(24, 1))]
    files = [save_rows(tmp_path / f"{part}.csv", table) for part in ("a", "b")]
    with pytest.raises(ValueError, match=r"line 2: label '0\.25' .*not a whole number.*--regression"):
        load_files(*files)
    task = ClassificationTask(load_files(*files, labels=Labels(regression=True)))
    result = train(model, task, output_dir=tmp_path / "run", training=Training(epochs=1, batch_size=8, max_length=16))
    assert result.metric == "pearson" and set(result.metrics) == {"pearson", "spearman", "mse"}


def test_a_head_of_another_size_is_made_anew(tmp_path: Path, model: Path) -> None:
    brief = Training(epochs=1, batch_size=6, max_length=16)
    first = load_glue("glue/mnli", *glue_files(tmp_path, "mnli"))
    pruned = train(model, first, Recipe.budget(0.5), output_dir=tmp_path / "first", training=brief, compact=True)
    second = load_glue("glue/rte", *glue_files(tmp_path, "rte"))
    with pytest.warns(UserWarning, match="trained for 3 classes, this task has 2: its head is made anew"):
        result = train(tmp_path / "first", second, output_dir=tmp_path / "second", training=brief)
    assert result.heads == pruned.heads != (4, 4) and result.neurons == pruned.neurons
    assert result.metrics.keys() == {"accuracy"}

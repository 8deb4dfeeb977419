"""Translation: data, what is refused, and training of encoder-decoders, dense and pruned."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import topoprune
from tests.tasks.texttools import (
    BUDGET,
    PAPER,
    SEQ2SEQ,
    SHORT,
    assert_equal_weights,
    assert_goes_on_exactly,
    assert_pruned,
    make_translations,
    run,
    tiny,
    write_jsonl,
)
from topoprune import Recipe
from topoprune.tasks import Training, load_translation, train
from topoprune.tasks.tables import Table

PAIR = dict(source_lang="de", target_lang="en", max_target_length=16)
ROWS: list[dict[str, Any]] = [{"de": "Ein Hund.", "en": "A dog."}, {"de": "Eine Katze.", "en": "A cat."}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_translations(tmp_path_factory.mktemp("words"))


# -- data -------------------------------------------------------------------------------------


def test_flat_and_nested_rows_say_the_same(tmp_path: Path) -> None:
    flat = write_jsonl(tmp_path / "flat.jsonl", ROWS)
    nested = write_jsonl(tmp_path / "nested.jsonl", [{"id": 1, "translation": row} for row in ROWS])
    tasks = [load_translation(path, path, **PAIR) for path in (flat, nested)]
    assert tasks[0].train == tasks[1].train and tasks[0].digest == tasks[1].digest
    assert [pair.targets for pair in tasks[0].train] == [("A dog.",), ("A cat.",)]
    back = load_translation(flat, flat, source_lang="en", target_lang="de")
    assert back.train[0].source == "A dog." and back.digest != tasks[0].digest


def test_several_references_count_and_the_first_is_learnt(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "many.jsonl", [{"de": "Hallo Welt da draußen", "en": ["", "hello", "hi world out there"]}]
    )
    task = load_translation(path, path, **PAIR)
    assert task.train[0].targets == ("hello", "hi world out there")
    assert task.scores(["hi world out there"])["bleu"] == pytest.approx(100)


@pytest.mark.parametrize("row", [{"de": "a", "en": "b"}, {"translation": {"de": "a", "en": "b"}}])
def test_a_wrong_language_names_those_there_are(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=r"has no language 'fr'; found: de, en"):
        load_translation(path, path, source_lang="de", target_lang="fr")
    with pytest.raises(ValueError, match="source and target language are both 'de'"):
        load_translation(path, path, source_lang="de", target_lang="de")
    with pytest.raises(ValueError, match="--target-lang is missing"):
        load_translation(path, path, source_lang="de")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], {"de": "x", "en": ""}], "line 2: column 'en' holds '', expected a text"),
        ([ROWS[0], {"de": 3, "en": "x"}], "line 2: column 'de' holds 3, expected a text"),
        ([ROWS[0], {"de": "x"}], "line 2: column 'en' holds None, expected a text"),
        ([{"translation": "x"}], "line 1: column 'translation' holds 'x', expected an object"),
        ([{"translation": ROWS[0]}, {"translation": {"en": "x"}}], "line 2 has no language 'de'; found: en"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_translation(write_jsonl(tmp_path / "rows.jsonl", rows), write_jsonl(tmp_path / "v.jsonl", ROWS), **PAIR)


def test_files_that_are_missing_or_empty(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="holds no rows"):
        load_translation(path, write_jsonl(tmp_path / "empty.jsonl", []), **PAIR)
    with pytest.raises(FileNotFoundError, match="no data file"):
        load_translation(path, tmp_path / "nowhere.jsonl", **PAIR)
    with pytest.raises(ValueError, match="--validation-file missing"):
        load_translation(path, **PAIR)
    with pytest.raises(ValueError, match="either the data set 'some/set' or --train-file"):
        load_translation(path, dataset_name="some/set", **PAIR)
    with pytest.raises(ValueError, match=r"no-such/set.*--train-file and --validation-file"):
        load_translation(dataset_name="no-such/set", **PAIR)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_splits(name: str, config: str | None, **options: Any) -> dict[str, Table]:
        assert (name, config) == ("some/set", "de-en")
        rows = tuple((i, {"translation": row}) for i, row in enumerate(ROWS, start=1))
        return {split: Table(f"{name} [{split}]", ("translation",), rows) for split in ("train", "validation")}

    monkeypatch.setattr("topoprune.tasks.hub.load_splits", load_splits)
    task = load_translation(dataset_name="some/set", dataset_config="de-en", **PAIR)
    assert task.train[1].targets == ("A cat.",) and "some/set de-en, de to en" in task.source


@pytest.mark.parametrize(("name", "value"), [("num_beams", 0), ("max_target_length", 1)])
def test_settings_out_of_range(files: tuple[Path, Path], name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        load_translation(*files, **(PAIR | {name: value}))


def test_everything_that_shapes_a_run_is_in_the_digest(files: tuple[Path, Path]) -> None:
    task = load_translation(*files, **PAIR)
    others = [load_translation(*files, **(PAIR | change)) for change in ({"num_beams": 2}, {"prefix": "x: "})]
    digests = {task.digest, *(other.digest for other in others), task.limit(8, None).digest}
    assert len(digests) == 4
    assert task.limit(8, 3).n_train == 8 and task.limit(8, 3).train == task.limit(8, 3).train


# -- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SEQ2SEQ)
@pytest.mark.parametrize("compact", [False, True])
def test_a_budget_is_met(files: tuple[Path, Path], tmp_path: Path, model_type: str, compact: bool) -> None:
    task = load_translation(*files, **PAIR)
    result = run(model_type, task, BUDGET, tmp_path, compact=compact)
    assert_pruned(result, 0.5)
    assert 0 <= result.metrics["bleu"] <= 100 and 0 <= result.metrics["chrf"] <= 100
    assert result.kind == "translation" and result.metric == "bleu"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    saved = topoprune.load(tmp_path) if compact else type_of(tmp_path).from_pretrained(tmp_path)
    batch = tokenizer(["wort1 wort2."], return_tensors="pt")
    assert saved.generate(**batch, max_new_tokens=4).shape[0] == 1


@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_the_papers_method_runs(files: tuple[Path, Path], tmp_path: Path, model_type: str) -> None:
    assert_pruned(run(model_type, load_translation(*files, **PAIR), PAPER, tmp_path), None)


def type_of(folder: Path) -> Any:
    import transformers

    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def test_words_are_learnt_then_pruned_with_beams(tmp_path: Path) -> None:
    task = load_translation(*make_translations(tmp_path, train=96, validation=8), **PAIR)
    settings = Training(epochs=8, batch_size=16, learning_rate=1e-2, max_length=24)
    dense = run("t5", task, None, tmp_path / "dense", training=settings)
    assert dense.metrics["perplexity"] < 16  # 12 words, their pieces and the end; before training about 300
    # The paper's order: dense first, then what was trained is pruned.
    beams = load_translation(*make_translations(tmp_path), **(PAIR | {"num_beams": 2}))
    recipe = Recipe.budget(0.3, solves=2)
    pruned = train(tmp_path / "dense", beams, recipe, output_dir=tmp_path / "pruned", training=SHORT)
    assert_pruned(pruned, 0.3)
    assert pruned.metrics["perplexity"] < 30


def test_equal_seeds_give_equal_results(files: tuple[Path, Path], tmp_path: Path) -> None:
    task = load_translation(*files, **PAIR)
    results = [run("marian", task, BUDGET, tmp_path / name) for name in ("one", "two")]
    assert results[0].metrics == results[1].metrics
    assert_equal_weights(tmp_path / "one", tmp_path / "two")


def test_a_run_goes_on_exactly(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_translation(*files, **PAIR)
    assert_goes_on_exactly(
        lambda folder, resume: run("t5", task, BUDGET, folder, resume=resume), tmp_path, monkeypatch, 3
    )


def test_a_model_of_another_kind_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    task = load_translation(*files, **PAIR)
    with pytest.raises(ValueError, match=r"'gpt2' is a gpt2, which is no encoder-decoder; .* such as t5"):
        train(tiny("gpt2"), task, output_dir=tmp_path, training=SHORT)
    with pytest.raises(ValueError, match=r"max_target_length is 65, but this bart has 64 positions"):
        run("bart", load_translation(*files, **(PAIR | {"max_target_length": 65})), None, tmp_path)


def test_what_cannot_generate_is_refused_before_training(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(self: Any, **inputs: Any) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("transformers.T5ForConditionalGeneration.generate", generate)
    with pytest.raises(ValueError, match=r"this t5 fails to generate \(IndexError: list index out of range\); check"):
        run("t5", load_translation(*files, **PAIR), None, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.pretrained
@pytest.mark.skipif("TOPOPRUNE_DATA" not in os.environ, reason="TOPOPRUNE_DATA names no folder with data")
def test_the_floor_of_multi30k() -> None:
    folder = Path(os.environ["TOPOPRUNE_DATA"]) / "data" / "multi30k_de_en"
    task = load_translation(folder / "validation.jsonl.gz", folder / "test.jsonl.gz", **PAIR)
    assert task.n_validation == 1000 and task.floors["bleu"] == pytest.approx(0.48, abs=0.01)

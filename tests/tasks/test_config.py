"""YAML files of runs: what is read, what is refused, and that the one written repeats the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from topoprune import Recipe
from topoprune.cli.train_options import given_options, make_training, recipe_fields
from topoprune.cli.train_recipe import make_recipe
from topoprune.tasks import NewModel, Training
from topoprune.tasks.config import RESOLVED, read_config, write_resolved
from topoprune.tasks.vision import ImageTask

TASK = ImageTask("pixels", "nowhere", ("a", "b"), (), ())


def options(path: Path, text: str, **flags: Any) -> dict[str, Any]:
    path.write_text(text)
    found = given_options({"config": path, **flags})
    assert found.pop("config") == path
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_sections_and_flat_names_and_names_of_transformers_say_the_same(file: Path) -> None:
    nested = options(
        file,
        """
        model: {model_name_or_path: bert}
        data: {task: glue/cola, train-file: a.jsonl, max_eval_samples: 7}
        recipe: {method: budget, sparsity: 0.5, solves: 4}
        training: {num_train_epochs: 2, learning_rate: 5e-5, lr_scheduler_type: cosine, bf16: true, save_steps: 9}
        output: {output_dir: runs/x}
        """,
    )
    flat = options(
        file,
        """
        model: bert
        task: glue/cola
        train_file: a.jsonl
        max_eval_samples: 7
        method: budget
        sparsity: 5e-1
        solves: 4
        epochs: 2.0
        learning_rate: 0.00005
        scheduler: cosine
        bf16: true
        regrow:
        output_dir: runs/x
        save_steps: 9
        """,
    )
    assert nested == flat
    training = make_training(nested)
    assert (training.precision, training.scheduler, training.save_steps) == ("bf16", "cosine", 9)


def test_flags_win(file: Path) -> None:
    text = "{sparsity: 0.5, epochs: 2, precision: bf16}"
    assert options(file, text, sparsity=0.25) == {"sparsity": 0.25, "epochs": 2.0, "precision": "bf16"}
    assert make_training(options(file, text, fp16=True)).precision == "fp16"
    other = options(file, text, method="neuroprune", alpha=1.0, beta=2.0)
    assert make_recipe(other) == Recipe.neuroprune(1.0, 2.0, "auto:0.02")  # the file's sparsity belongs to its method


def test_scalars_are_what_they_look_like(file: Path) -> None:
    text = "{granularity: 2:4, source_lang: no, target_lang: on, source_prefix: 'null', theta: 0.15, ramp: [.1, 0.5]}"
    assert options(file, text) == {
        "granularity": "2:4",
        "source_lang": "no",
        "target_lang": "on",
        "source_prefix": "null",
        "theta": 0.15,
        "ramp": [0.1, 0.5],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty: 0.5", r"unknown setting 'sparsty'; did you mean sparsity\? Known ones: .*alpha.*sections: model"),
        ("training: {epoch: 3}", r"unknown setting 'epoch' in section training; did you mean epochs\?"),
        ("training: {sparsity: 0.5}", "sparsity in section training: it belongs to section recipe"),
        ("training: 3", "section training holds 3, expected settings"),
        ("seed: 1\nseed: 2", "line 2: not valid YAML .*given twice"),
        ("epochs: 1\ntraining: {num_train_epochs: 2}", "epochs is given twice"),
        ("epochs: many", "epochs is 'many', expected a number"),
        ("heads: 1.5", "heads is 1.5, expected a whole number"),
        ("heads: true", "heads is True, expected a whole number"),
        ("compact: 1", "compact is 1, expected true or false"),
        ("method: [budget]", "method is .*, expected a text"),
        ("recipe: {sparsity: [1", "line 1: not valid YAML"),
        ("- sparsity", "found a list, expected settings"),
        ("resume: true", "unknown setting 'resume'"),
    ],
)
def test_wrong_files_are_refused(file: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"run\.yaml.*" + message):
        options(file, text)


def test_a_missing_file_and_an_empty_one(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config file .*run\.yaml"):
        given_options({"config": file})
    assert options(file, "# nothing\n") == {}
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"not UTF-8|not valid YAML"):
        given_options({"config": file})


def test_every_field_of_every_recipe_can_be_set(file: Path) -> None:
    values: dict[str, object] = {"distill": "{logits: 0.5}", "compact": "true"}
    for names in recipe_fields().values():
        for name in names:
            assert name in options(file, f"recipe: {{{name}: {values.get(name, 1)}}}")


recipes = st.one_of(
    st.none(),
    st.builds(
        Recipe.budget,
        st.floats(0, 0.9),
        heads=st.one_of(st.none(), st.integers(0, 99)),
        allocation=st.sampled_from(["uniform", "output-kl"]),
        solves=st.integers(1, 9),
        regrow=st.sampled_from([None, "gradient"]),
        ramp=st.tuples(st.floats(0, 0.4), st.floats(0.5, 1)),
    ),
    st.builds(Recipe.budget, parameters=st.one_of(st.floats(0.1, 1), st.integers(1, 10**9)), shape=st.just((2, 16))),
    st.builds(lambda k: Recipe.budget(1 - k / 4, granularity=f"{k}:4"), st.integers(1, 4)),
    st.builds(lambda s: Recipe.preset("best", s), st.floats(0.1, 0.9)),
    st.builds(
        Recipe.neuroprune,
        st.floats(0, 9),
        st.floats(0, 9),
        st.one_of(st.floats(0, 9), st.just("auto:0.1")),
        eq1=st.sampled_from(["a", "b"]),
    ),
)
trainings = st.builds(
    Training,
    epochs=st.floats(0.1, 9),
    learning_rate=st.floats(1e-9, 1),
    precision=st.sampled_from(["fp32", "bf16"]),
    max_steps=st.one_of(st.none(), st.integers(1, 9)),
    scheduler=st.sampled_from(["linear", "cosine"]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipes, trainings, st.booleans())
def test_what_a_run_writes_gives_the_same_run(tmp_path: Path, recipe: Any, training: Training, compact: bool) -> None:
    compact = compact and recipe is not None and getattr(recipe, "granularity", "unit") == "unit"
    data = {"task": "translation", "source_lang": "no", "train_file": Path("a b.jsonl"), "max_train_samples": 3}
    path = write_resolved(tmp_path, "some/model", TASK, recipe, training, compact=compact, data=data)
    assert path == tmp_path / RESOLVED and path.read_text().startswith("# pixels: nowhere\n")
    found = given_options({"config": path})
    assert make_recipe(found) == recipe and make_training(found) == training
    assert bool(found.get("compact")) == compact
    assert {name: found[name] for name in data} == data
    assert (found["model"], found["output_dir"]) == ("some/model", tmp_path)


def test_a_new_model_is_written_and_read(tmp_path: Path) -> None:
    from topoprune.cli.train_data import model_source

    new = NewModel("gpt2", {"n_layer": 2, "activation_function": "relu"}, "some/tokenizer", 321)
    path = write_resolved(tmp_path, new, TASK, None, Training())
    assert "came from Python" in path.read_text()
    assert model_source(given_options({"config": path})) == new


def test_the_file_is_plain_yaml(tmp_path: Path) -> None:
    path = write_resolved(tmp_path, "m", TASK, Recipe.budget(0.5, granularity="2:4"), Training(), data={})
    content = yaml.safe_load(path.read_text())
    assert content["recipe"]["granularity"] == "2:4" and list(content) == [
        "model",
        "data",
        "recipe",
        "training",
        "output",
    ]
    with pytest.raises(ValueError, match="unknown setting 'data_file'"):
        read_config(_written(tmp_path, "data_file: x"), {"data": ["task"]})


def _written(folder: Path, text: str) -> Path:
    (folder / "x.yaml").write_text(text)
    return folder / "x.yaml"

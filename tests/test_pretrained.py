"""Real pretrained weights on real data: needs TOPOPRUNE_DATA (see CONTRIBUTING.md)."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from topoprune import Plan, Recipe, apply, extract, find_sites, measure_sparsity, solve
from topoprune.tasks import embedded_model_path, load_files, train_classifier
from topoprune.tasks.classification import Training
from topoprune.tasks.models import load_classifier
from topoprune.tasks.tables import read_table

DATA = os.environ.get("TOPOPRUNE_DATA", "")
pytestmark = [
    pytest.mark.pretrained,
    pytest.mark.skipif(not DATA, reason="TOPOPRUNE_DATA is not set: no real data sets and models here"),
]


def existing(*parts: str) -> Path:
    path = Path(DATA, *parts)
    if not path.exists():
        pytest.skip(f"{path} does not exist: TOPOPRUNE_DATA holds no {'/'.join(parts)}")
    return path


# -- MiniLM on GLUE ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "train", "validation", "max_length"),
    [("sst2", 640, 200, 32), ("mrpc", 320, 120, 64)],
)
def test_minilm_learns_under_a_budget_that_is_met(
    task: str, train: int, validation: int, max_length: int, tmp_path: Path
) -> None:
    try:
        embedded_model_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = existing("data", task)
    data = load_files(folder / "train.jsonl.gz", folder / "validation.jsonl.gz").limit(train, validation)
    training = Training(epochs=1, batch_size=16, learning_rate=2e-4, max_length=max_length)
    recipe = Recipe.budget(sparsity=0.3, ramp=(0.2, 0.6), solves=3)
    result = train_classifier("embedded", data, recipe, output_dir=tmp_path, training=training)

    model = load_classifier(tmp_path, data.labels)
    sites = find_sites(model)
    figures = measure_sparsity(model, sites)
    one_unit = 2 * 384 / figures.parameters  # a neuron, the finest unit
    assert abs(figures.removable - 0.3) <= one_unit
    assert figures.zeros == result.zeros >= figures.removable
    plan = Plan.load(result.files["plan"])
    assert {name: counts[0] for name, counts in figures.kept.items()} == {
        name: int(plan.keep(name).sum()) for name in figures.kept
    }
    assert result.heads == (9,) * 6 and result.heads_total == (12,) * 6
    # After so few steps MRPC gets little beyond its majority of two thirds; it must not fall below.
    assert result.score > result.floor if task == "sst2" else result.score >= result.floor - 0.02


# -- stories260k ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(existing("models", "stories260k-llama"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = read_table(existing("data", "tinystories_sample", "test.jsonl.gz"))
    ids = [tokenizer(str(row["text"]), return_tensors="pt").input_ids for _, row in texts.rows]
    return AutoModelForCausalLM.from_pretrained(folder).eval(), ids


@torch.no_grad()
def loss(model: torch.nn.Module, stories: list[torch.Tensor]) -> float:
    """Return the mean negative log-likelihood, nats per predicted token."""
    total, count = 0.0, 0
    for ids in stories:
        ids = ids[:, : model.config.max_position_embeddings]  # type: ignore[union-attr,index]
        predicted = ids.shape[1] - 1
        total += float(model(input_ids=ids, labels=ids).loss) * predicted
        count += predicted
    return total / count


def test_stories_perplexity_answers_to_pruning_and_returns(
    stories: tuple[torch.nn.Module, list[torch.Tensor]],
) -> None:
    model, texts = stories
    dense = loss(model, texts)
    assert dense == pytest.approx(1.264, abs=0.01), f"perplexity {math.exp(dense):.2f}"

    graph = extract(model, measure="circuit-cosine", include=("heads", "neurons"))
    plan = solve(graph, budget=0.7, problem="neurons") | solve(graph, budget=3, problem="heads")
    kept = {name: solution.n_kept for name, solution in plan.solutions.items()}
    assert sorted(set(kept.values())) == [3, 120]  # 3 of 4 KV groups, 70 % of 172 neurons in each layer
    with apply(model, plan) as handle:
        pruned = loss(model, texts)
        figures = measure_sparsity(model, find_sites(model))
        assert figures.removable == pytest.approx(0.28, abs=0.04)
    assert handle.closed
    assert pruned > dense + 0.2, f"perplexity {math.exp(dense):.2f} -> {math.exp(pruned):.2f}"
    assert loss(model, texts) == dense  # bit for bit


def test_repair_on_calibration_data_helps_stories(stories: tuple[torch.nn.Module, list[torch.Tensor]]) -> None:
    """Calibrated on text sampled from the model itself, never on the evaluation stories."""
    model, texts = stories
    torch.manual_seed(0)
    start = torch.full((32, 1), int(model.config.bos_token_id))  # type: ignore[union-attr,arg-type]
    sampled = model.generate(start, do_sample=True, max_new_tokens=96, pad_token_id=2)  # type: ignore[operator]
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in sampled.split(8)]
    graph = extract(model, measure="output-gram", include=("neurons",), calibration=batches)
    plan = solve(graph, budget=0.8, problem="neurons", objective="soft")
    with apply(model, plan):
        dropped = loss(model, texts)
    with apply(model, plan, merge="least-squares", calibration=batches, ridge=1e-4):
        repaired = loss(model, texts)
    assert repaired < dropped

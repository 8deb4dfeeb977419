"""``topoprune prune`` and ``topoprune compact``: from a dense model to a smaller one on disk, in one command."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topoprune.cli.output import (
    Json,
    check_target,
    emit_json,
    guarded,
    progress_bar,
    stderr_console,
    stdout_console,
)
from topoprune.cli.prune_recipe import check_flags, recipe_of
from topoprune.cli.sources import Gqa, Measure, calibration_texts, share_or_count

if TYPE_CHECKING:
    from topoprune.oneshot import PrunedModel

__all__ = ["compact", "prune"]

_BY_RECIPE = "By a recipe (--recipe)"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_COUNTS = ("budget", "heads", "neurons")
_TITLES = ("heads", "KV groups", "cross heads", "cross KV groups", "neurons")
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or 'embedded'.")]
Out = Annotated[Path, typer.Option(help="The folder to write: new, empty, or one with an earlier pruned model.")]
Rounding = Annotated[int | None, typer.Option(help="Keep a multiple of so many features in every layer (8, 16, ...).")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]


@guarded
def prune(
    model: Model,
    out: Out,
    budget: Annotated[
        str | None, typer.Option(help="Share of heads and neurons to KEEP in every layer; default: 0.5.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Keep this of the heads instead: 0.5, or a number, 6. With --recipe: how many in all."),
    ] = None,
    neurons: Annotated[str | None, typer.Option(help="Keep this of the FFN neurons instead: 0.25, or 384.")] = None,
    merge: Annotated[
        str | None, typer.Option(help="What survivors take over: least-squares (the default), scale or none.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="budget, fast, balanced, best (as in training, without it) or neuroprune.", rich_help_panel=_BY_RECIPE
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the weights to REMOVE, in [0, 1).", rich_help_panel=_BY_RECIPE)
    ] = None,
    parameters: Annotated[
        str | None,
        typer.Option(help="Parameters that stay at most: 0.6, or a number, 12000000.", rich_help_panel=_BY_RECIPE),
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="Share of a forward's FLOPs that stays.", rich_help_panel=_BY_RECIPE)
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(help="Share of a forward's seconds, measured here, that stays.", rich_help_panel=_BY_RECIPE),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Of that forward: 8x128 (the default).", rich_help_panel=_BY_RECIPE)
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(help="unit (cut out), edge or n:m, such as 2:4 (zeros).", rich_help_panel=_BY_RECIPE),
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="Over layers: uniform or output-kl.", rich_help_panel=_BY_RECIPE)
    ] = None,
    floor: Annotated[
        float | None, typer.Option(help="Least share of a layer's units that stays.", rich_help_panel=_BY_RECIPE)
    ] = None,
    heads_by: Annotated[str | None, typer.Option(help="soft, hard or quadratic.", rich_help_panel=_BY_RECIPE)] = None,
    neurons_by: Annotated[
        str | None,
        typer.Option(help="attachment, quadratic, repaired or domination.", rich_help_panel=_BY_RECIPE),
    ] = None,
    input_dims: Annotated[
        float | None, typer.Option(help="Share of attention's inputs to zero.", rich_help_panel=_BY_RECIPE)
    ] = None,
    repair: Annotated[
        str | None, typer.Option(help="Refit all (the default), heads or none.", rich_help_panel=_BY_RECIPE)
    ] = None,
    theta: Annotated[
        str | None, typer.Option(help="neuroprune: a distance, or auto:q for a quantile.", rich_help_panel=_BY_RECIPE)
    ] = None,
    stages: Annotated[
        int | None,
        typer.Option(help="Cut in so many steps, measuring between them; default 1.", rich_help_panel=_BY_RECIPE),
    ] = None,
    calibration_file: Annotated[
        Path | None,
        typer.Option(
            "--calibration-file",
            "--calibration",
            "--train-file",
            help="Texts to calibrate on (a file with a text column); default: embedded docstrings.",
        ),
    ] = None,
    calibration_samples: Annotated[
        int, typer.Option(help="Calibration texts; 0: none, distances and importances from the weights alone.")
    ] = 256,
    rounding: Rounding = None,
    measure: Measure = None,
    gqa: Gqa = "groups",
    seed: int = 0,
    dtype: Dtype = "auto",
    json_file: Json = None,
) -> None:
    """Prune a model in one shot, repair it on calibration texts, remove what went, check it and save it."""
    from topoprune.oneshot import prune_once

    target = _check_places(model, out, json_file)
    flags = {
        "budget": budget,
        "heads": heads,
        "neurons": neurons,
        "merge": merge,
        "measure": measure,
        "rounding": rounding,
        "sparsity": sparsity,
        "parameters": parameters,
        "flops": flops,
        "latency": latency,
        "shape": shape,
        "granularity": granularity,
        "allocation": allocation,
        "floor": floor,
        "heads_by": heads_by,
        "neurons_by": neurons_by,
        "input_dims": input_dims,
        "repair": repair,
        "theta": theta,
        "stages": stages,
    }
    given = {name: value for name, value in flags.items() if value is not None}
    check_flags(recipe, given)
    console = stderr_console()
    always = {"gqa": gqa, "seed": seed}
    options, needed = _by_share(given, always) if recipe is None else _by_recipe(recipe, given, always, console)
    texts, origin = _texts(calibration_file, calibration_samples, needed)
    with progress_bar() as show:
        loaded, tokenizer = _load(model, dtype, texts is not None, show)
        console.print(_loaded_text(model, loaded), highlight=False)
        batches = None
        if texts is not None:
            from topoprune.tasks.models import calibration_batches

            console.print(f"calibration: {len(texts)} texts, {origin}", highlight=False)
            batches = calibration_batches(model, loaded, texts)
        result = prune_once(loaded, calibration=batches, progress=show, **options)
        _save(result, target, tokenizer, show)
    _report(result, out, json_file, {"source": model, "calibration": origin})


@guarded
def compact(
    model: Model,
    out: Out,
    plan: Annotated[
        Path | None,
        typer.Option(help="What stays (.npz, from solve or train); default: all that has an effect in the model."),
    ] = None,
    rounding: Rounding = None,
    duplicate_kv: Annotated[
        bool, typer.Option("--duplicate-kv", help="Copy key/value heads where query heads per KV group are unequal.")
    ] = False,
    allow_changed_weights: Annotated[
        bool, typer.Option("--allow-changed-weights", help="Take a plan that was made from other weight values.")
    ] = False,
    dtype: Dtype = "auto",
    json_file: Json = None,
) -> None:
    """Remove from a model what a plan prunes, or what has no effect, without changing its function; save it."""
    from topoprune.budgets import check_rounding
    from topoprune.oneshot import compact_once
    from topoprune.planning import Plan

    target = _check_places(model, out, json_file)
    check_rounding(rounding)
    decided = None if plan is None else Plan.load(plan)
    with progress_bar() as show:
        loaded, tokenizer = _load(model, dtype, False, show)
        stderr_console().print(_loaded_text(model, loaded), highlight=False)
        result = compact_once(
            loaded,
            decided,
            rounding=rounding,
            duplicate_kv=duplicate_kv,
            allow_changed_weights=allow_changed_weights,
            progress=show,
        )
        _save(result, target, tokenizer, show)
    _report(result, out, json_file, {"source": model, "plan": None if plan is None else str(plan)})


def _by_share(given: dict[str, Any], always: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the options of `prune_once`, and whether they need calibration data."""
    from topoprune.oneshot import OneShot

    options: dict[str, Any] = dict(always)
    options |= {name: share_or_count(f"--{name}", v) if name in _COUNTS else v for name, v in given.items()}
    return options, OneShot(**options).needs_data()


def _by_recipe(name: str, given: dict[str, Any], always: dict[str, Any], console: Any) -> tuple[dict[str, Any], bool]:
    """As `_by_share`, for ``--recipe``."""
    from topoprune.oneshot import OneShot

    OneShot(**always)  # checks them
    recipe, left_out = recipe_of(name, given)
    if left_out:
        console.print(left_out, highlight=False)
    stages = {"stages": given["stages"]} if "stages" in given else {}
    return {"recipe": recipe, **stages, **always}, getattr(recipe, "granularity", "edge") == "unit"


def _check_places(model: str, out: Path, json_file: str | None) -> Path:
    """Refuse an output folder that must not be replaced, before anything is loaded; return it, ``~`` expanded."""
    from topoprune.compaction import folders
    from topoprune.compaction.manifest import MANIFEST_NAME

    check_target("--json", json_file)
    out = out.expanduser()
    source = Path(model).expanduser()
    if source.is_dir() and out.is_dir() and os.path.samefile(source, out):
        raise ValueError(f"--out {out} is the model itself; give another folder")
    try:
        folders.check_target(out, MANIFEST_NAME)
    except ValueError:
        raise ValueError(
            f"--out {out} is not empty and was not written by this command ({MANIFEST_NAME} is missing); nothing was "
            "done. Give a new or empty folder"
        ) from None
    return out


def _texts(path: Path | None, samples: int, needed: bool) -> tuple[list[str] | None, str | None]:
    if samples == 0:
        if path is not None:
            raise ValueError(f"--calibration-file {path} is given, but --calibration-samples 0 would not read it")
        if needed:
            raise ValueError(
                "this needs calibration texts, but --calibration-samples is 0; without texts: "
                "--measure circuit-cosine --merge none, or --recipe neuroprune"
            )
        return None, None
    return calibration_texts(path, samples)


def _load(name: str, dtype: str, needs_text: bool, show: Callable[[str, int, int], None]) -> tuple[Any, Any]:
    """Return the model and its tokenizer (None where it has none and needs none)."""
    from topoprune.tasks.models import has_tokenizer, load_full, load_tokenizer, main_input, resolve_model

    if dtype not in _DTYPES:
        raise ValueError(f"--dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    show(f"loading {name}", 0, 0)
    takes = main_input(name)
    hint = (
        "in Python, with batches of what it takes: topoprune.oneshot.prune_once(model, 0.5, calibration=[{"
        f"{takes!r}: ...}}, ...]); or here without data: --calibration-samples 0"
    )
    if needs_text and takes != "input_ids":
        raise ValueError(f"{name} takes {takes}, not texts, so it cannot be calibrated on texts. Prune it {hint}")
    tokenizer = load_tokenizer(name) if has_tokenizer(resolve_model(name)) else None
    if needs_text and tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, so it cannot be calibrated on texts. Prune it {hint}")
    return load_full(name, dtype=dtype), tokenizer


def _loaded_text(name: str, model: Any) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"model: {name}, {type(model).__name__}, {parameters:,} parameters, {str(model.dtype).rpartition('.')[2]}"


def _save(result: PrunedModel, target: Path, tokenizer: Any, show: Callable[[str, int, int], None]) -> None:
    from topoprune.compaction import save
    from topoprune.tasks.monitor import quiet_libraries

    show("saving", 0, 0)
    with quiet_libraries():
        if not result.plan.unit_solutions():
            _save_masked(result, target, tokenizer)
            return
        save(result.model, result.plan, target, tokenizer=tokenizer, speed={_setting(result): result.speed})


def _save_masked(result: PrunedModel, target: Path, tokenizer: Any) -> None:
    """Write an ordinary folder of transformers, with the zeros in the weights and their plan beside them."""
    from topoprune.compaction.folders import atomic_folder
    from topoprune.compaction.manifest import MANIFEST_NAME, is_model_file

    model: Any = result.model
    with atomic_folder(target, lambda name: is_model_file(name) or name == MANIFEST_NAME) as folder:
        model.save_pretrained(folder)
        result.plan.save(folder / "plan.npz")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))


def _setting(result: PrunedModel) -> str:
    import torch

    device = next(result.model.parameters()).device
    threads = torch.get_num_threads()
    where = f"{threads} CPU thread{'s' * (threads > 1)}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    batch, *rest = result.batch_shape
    shape = f"{rest[0]} tokens" if len(rest) == 1 else " x ".join(map(str, rest))
    return f"batch {batch}, {shape}, {where}"


def _report(result: PrunedModel, out: Path, json_file: str | None, more: dict[str, Any]) -> None:
    if emit_json(json_file, {**more, "out": str(out), **result.figures()}):
        return
    show = stdout_console()
    show.print(_table(result))
    for line in _lines(result):
        show.print(line, highlight=False, markup=False, soft_wrap=True)
    for name in filter(None, (str(out), json_file)):
        show.print(f"written: {name}", highlight=False, markup=False, soft_wrap=True)
    cut = bool(result.plan.unit_solutions())
    how = "topoprune.load" if cut else f"transformers.{type(result.model).__name__}.from_pretrained"
    show.print(f'load it: {how}("{out}")', highlight=False, markup=False, soft_wrap=True)


def _lines(result: PrunedModel) -> list[str]:
    (before, after), (dense_seconds, seconds) = result.parameters, result.batch_seconds
    worst = result.equivalence.worst
    if not result.plan.unit_solutions():
        return [f"attention and FFN weights that are zero: {result.zeros:.1%}; nothing was cut out"]
    lines = [
        f"attention and FFN weights removed: {result.sparsity:.1%}; all parameters: {before:,} -> {after:,} "
        f"({after / before:.1%})"
    ]
    if result.damage:
        lines.append(
            f"squared error at the pruned sublayers' outputs, on the calibration data: {_mean(result.damage):.1%} of "
            f"their energy ({_mean(result.dropped):.1%} without repair)"
        )
    lines.append(
        f"masked and compacted model: equal; worst output: {worst.output}, {worst.max_abs:.1e} apart "
        f"({worst.max_rel:.1e} of its scale)"
    )
    lines.append(
        f"one batch ({_setting(result)}): {1e3 * dense_seconds:.1f} ms -> {1e3 * seconds:.1f} ms, "
        f"{result.speed:.2f}x as fast"
    )
    return lines


def _mean(values: Any) -> float:
    return sum(values.values()) / len(values)


def _table(result: PrunedModel) -> Any:
    """Return a table for `rich`, one row a layer."""
    from rich.table import Table

    rows = result.layers()
    titles = [title for title in _TITLES if any(title in row["units"] for row in rows)]
    damaged = bool(result.damage)
    table = Table()
    table.add_column("layer", style="bold", no_wrap=True)
    for title in (*titles, "gap", *(("error", "unrepaired") if damaged else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        counts = ["{} of {}".format(*row["units"][title]) if title in row["units"] else "" for title in titles]
        gap = "-" if row["gap"] is None else f"{row['gap']:.1%}"
        table.add_row(f"{row['stack']} {row['layer']}", *counts, gap, *(_errors(row) if damaged else ()))
    return table


def _errors(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{_mean(row[name]):.1%}" if name in row else "-" for name in ("damage", "dropped"))

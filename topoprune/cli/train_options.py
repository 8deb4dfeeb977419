"""The options of ``topoprune train``: one table for the flags, the YAML file and the checks of what goes with what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from topoprune.cli.output import JSON_HELP
from topoprune.tasks.config import SECTIONS, read_config
from topoprune.tasks.settings import SCHEDULERS, Training

__all__ = [
    "COLUMNS",
    "METHODS",
    "OPTIONS",
    "Option",
    "flag",
    "given_options",
    "make_training",
    "recipe_fields",
    "section_of",
    "with_options",
]

_PANELS = {
    "model": "Model",
    "data": "Data",
    "recipe": "Pruning",
    "training": "Training",
    "output": "Output",
    "call": "Output",
}
METHODS = ("dense", "neuroprune", "budget")
COLUMNS = ("text_column", "text_pair_column", "label_column", "summary_column")
# Kinds of tasks, as `Option.only` names them.
TEXT_CLASSES, SUMMARIES, TRANSLATIONS, LANGUAGE = "classification", "summarization", "translation", "language-modelling"
_SEQ2SEQ = (SUMMARIES, TRANSLATIONS)
_READS = (TEXT_CLASSES, *_SEQ2SEQ)


@dataclass(frozen=True)
class Option:
    """One option.

    Args:
        name: in Python and YAML; the flag has dashes. type: of its value.
        section: of the YAML file; ``"call"``: a flag only. help: one line.
        also: further spellings of the flag. default: as the help shows it.
        only: kinds of tasks that know it; empty for all.
    """

    name: str
    type: Any
    section: str
    help: str
    also: tuple[str, ...] = ()
    default: str = ""
    only: tuple[str, ...] = ()


OPTIONS: tuple[Option, ...] = (
    Option(
        "model",
        str,
        "model",
        "Folder, hub id, or 'embedded'.",
        ("model_name_or_path",),
        "embedded, or made new by task",
    ),
    Option("model_type", str, "model", "Train a new model of this type (t5, gpt2, vit, ...) from scratch."),
    Option("config_overrides", str, "model", "Its configuration: 'num_layers=3,d_model=384'."),
    Option("tokenizer_name", str, "model", "Its tokenizer, folder or hub id.", (), "trained on the training texts"),
    Option("vocab_size", int, "model", "Of a tokenizer that is trained.", (), "8000"),
    Option(
        "task",
        str,
        "data",
        "glue/cola ... glue/wnli; classification, summarization, translation, language-modelling; a hub id; embedded: "
        "stdlib-docs, stdlib-summaries, stdlib-text, digits.",
        (),
        "stdlib-docs, or classification of the files",
    ),
    Option("train_file", Path, "data", ".jsonl, .csv, .tsv (also .gz), .parquet; for language modelling .txt too."),
    Option("validation_file", Path, "data", "As --train-file."),
    Option(
        "validation_mismatched_file", Path, "data", "glue/mnli: the second validation set.", (), "", (TEXT_CLASSES,)
    ),
    Option("dataset_name", str, "data", "Hub id of the data for a --task that is no data set itself."),
    Option("dataset_config_name", str, "data", "Its configuration."),
    Option("text_column", str, "data", "Text.", (), "found by name", (TEXT_CLASSES, SUMMARIES, LANGUAGE)),
    Option("text_pair_column", str, "data", "Second text of a pair.", (), "", (TEXT_CLASSES,)),
    Option("label_column", str, "data", "Class, or number to be predicted.", (), "label", (TEXT_CLASSES,)),
    Option("regression", bool, "data", "Labels are numbers to be predicted.", (), "", (TEXT_CLASSES,)),
    Option("summary_column", str, "data", "Summary.", (), "found by name", (SUMMARIES,)),
    Option("source_lang", str, "data", "Language to translate from.", (), "", (TRANSLATIONS,)),
    Option("target_lang", str, "data", "Language to translate into.", (), "", (TRANSLATIONS,)),
    Option("source_prefix", str, "data", "Put before every text, as T5 wants it.", (), "", _SEQ2SEQ),
    Option("max_target_length", int, "data", "Tokens of the target.", (), "128", _SEQ2SEQ),
    Option("num_beams", int, "data", "Beams of generation; 1 is greedy.", (), "1", _SEQ2SEQ),
    Option("block_size", int, "data", "Tokens of a block.", (), "by model", (LANGUAGE,)),
    Option("max_train_samples", int, "data", "Draw so many."),
    Option("max_eval_samples", int, "data", "Draw so many."),
    Option("method", str, "recipe", "dense, neuroprune (the paper's) or budget (ours).", (), "budget"),
    Option("preset", str, "recipe", "budget: fast, balanced or best; other flags override it."),
    Option("sparsity", float, "recipe", "budget: share of the weights to remove, in [0, 1).", (), "0.5"),
    Option("heads", int, "recipe", "budget: heads that stay in all."),
    Option("parameters", str, "recipe", "budget: parameters that stay, a share (0.5) or a number."),
    Option("flops", float, "recipe", "budget: share of the FLOPs that stays."),
    Option("latency", float, "recipe", "budget: share of the measured seconds that stays."),
    Option("shape", str, "recipe", "budget: batch and length that --flops and --latency mean.", (), "8,128"),
    Option("granularity", str, "recipe", "budget: unit (removable), edge (single weights) or n:m.", (), "unit"),
    Option("allocation", str, "recipe", "budget: uniform or output-kl (over layers)."),
    Option("heads_by", str, "recipe", "budget: soft, hard or quadratic."),
    Option("neurons_by", str, "recipe", "budget: attachment, quadratic, repaired or domination."),
    Option("input_dims", float, "recipe", "budget: share of attention's input dimensions to zero."),
    Option("ramp", str, "recipe", "budget: first and last decision, shares of training.", (), "0.1,0.6"),
    Option("solves", int, "recipe", "budget: decisions along the ramp.", (), "6"),
    Option("regrow", str, "recipe", "budget: score by which units may return: gradient."),
    Option("distill", bool, "recipe", "budget: learn from the dense model as well."),
    Option("teacher", str, "recipe", "budget: the dense model to learn from, folder or id.", (), "--model as it is"),
    Option("solve_lag", int, "recipe", "Steps the solver has, beside training."),
    Option("solver", str, "recipe", "budget: solver of the head problem."),
    Option("rounding", int, "recipe", "budget: keep a multiple of so many features a layer."),
    Option("alpha", float, "recipe", "neuroprune: strength of Eq. 2, attention."),
    Option("beta", float, "recipe", "neuroprune: strength of Eq. 1, feed-forward."),
    Option("theta", str, "recipe", "neuroprune: a distance, or auto:q for a quantile.", (), "auto:0.02"),
    Option("penalty", str, "recipe", "neuroprune: proximal, or loss (the paper's form).", (), "proximal"),
    Option("prox_scale", str, "recipe", "neuroprune: lr or absolute.", (), "lr"),
    Option("eq1", str, "recipe", "Reading of Eq. 1: a or b.", (), "b"),
    Option("keep_masks", bool, "recipe", "Hold what a pruned model's plan.npz pruned, instead of a --method."),
    Option("plan", Path, "recipe", "The same, with the plan of this file."),
    Option("compact", bool, "recipe", "Cut out what is pruned during training: later steps are faster."),
    Option("epochs", float, "training", "Passes over the data.", ("num_train_epochs",), "3"),
    Option("max_steps", int, "training", "Optimizer steps at most."),
    Option("batch_size", int, "training", "Examples per forward.", ("per_device_train_batch_size",), "32"),
    Option("eval_batch_size", int, "training", "When scoring.", ("per_device_eval_batch_size",), "4 x batch size"),
    Option("gradient_accumulation", int, "training", "Batches per step.", ("gradient_accumulation_steps",), "1"),
    Option("learning_rate", float, "training", "Its peak.", (), "5e-5"),
    Option("scheduler", str, "training", f"{', '.join(SCHEDULERS)}.", ("lr_scheduler_type",), "linear"),
    Option("warmup", float, "training", "Share of the steps.", ("warmup_ratio",), "0.06"),
    Option("weight_decay", float, "training", "Of AdamW.", (), "0.01"),
    Option("max_grad_norm", float, "training", "Clip gradients to this norm; 0 does not.", (), "1"),
    Option(
        "max_length",
        int,
        "training",
        "Tokens of a text, or of a source.",
        ("max_seq_length", "max_source_length"),
        "128",
        _READS,
    ),
    Option("precision", str, "training", "fp32, bf16 or fp16.", (), "fp32"),
    Option("bf16", bool, "training", "Short for --precision bf16."),
    Option("fp16", bool, "training", "Short for --precision fp16; needs a GPU."),
    Option("seed", int, "training", "Of everything random.", (), "0"),
    Option("output_dir", Path, "output", "Folder of the run.", (), "runs/train"),
    Option("save_steps", int, "training", "Steps between checkpoints.", (), "only on Ctrl-C"),
    Option("config", Path, "call", "YAML file with these settings; flags override it."),
    Option("resume", bool, "call", "Go on from the newest checkpoint."),
    Option("overwrite", bool, "call", "Discard an interrupted run there."),
    Option("json", str, "call", JSON_HELP),
)
_BY_NAME = {option.name: option for option in OPTIONS}


def flag(name: str) -> str:
    """Return an option as people type it: ``"--text-column"``."""
    return "--" + name.replace("_", "-")


def with_options(command: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """Return a command with all `OPTIONS` as flags; it is called with those that were given."""

    def run(**values: Any) -> None:
        command({name: value for name, value in values.items() if value is not None})

    parameters = []
    for option in OPTIONS:
        spelled = [flag(name) for name in (option.name, *option.also)]
        text = f"{option.help} Default: {option.default}." if option.default else option.help
        metavar = "FILE" if option.name == "json" else None
        described: Any = typer.Option(
            *spelled, help=text, rich_help_panel=_PANELS[option.section], show_default=False, metavar=metavar
        )
        kind: Any = Annotated[option.type | None, described]  # type: ignore[name-defined]  # made at run time
        parameters.append(inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def recipe_fields() -> dict[str, tuple[str, ...]]:
    """Return method -> names of all its recipe's fields."""
    from topoprune.train import BudgetRecipe, NeuroPruneRecipe

    classes = {"dense": None, "neuroprune": NeuroPruneRecipe, "budget": BudgetRecipe}
    return {
        method: () if recipe is None else tuple(f.name for f in fields(recipe) if f.name != "_")
        for method, recipe in classes.items()
    }


def given_options(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given, flags over the file of ``--config``.

    Raises:
        FileNotFoundError: no such file. ValueError: unknown settings, or values of another type.
    """
    if "config" not in flags:
        return dict(flags)
    known = {section: [option.name for option in OPTIONS if option.section == section] for section in SECTIONS}
    for names in recipe_fields().values():
        known["recipe"] += [name for name in names if name not in known["recipe"]]
    known["training"] += [f.name for f in fields(Training) if f.name not in known["training"]]
    aliases = {also: option.name for option in OPTIONS for also in option.also}
    found = read_config(flags["config"], known, aliases)
    for name, value in found.items():
        if name in _BY_NAME:
            found[name] = _typed(Path(flags["config"]), _BY_NAME[name], value)
    if "method" in flags and flags["method"] != found.get("method", "budget"):
        # Another method than the file's: its settings would mean nothing, those of the flags do.
        found = {name: value for name, value in found.items() if name not in known["recipe"] or name == "compact"}
    for short in ("bf16", "fp16"):
        if flags.get(short):
            found.pop("precision", None)
    return found | dict(flags)


# What a file may hold beside the flag's text: `ramp: [0.1, 0.6]`, `distill: {logits: 0.5}`.
_STRUCTURED: dict[str, tuple[type[Any], ...]] = {
    "config_overrides": (dict,),
    "distill": (dict,),
    "parameters": (int, float),
    "ramp": (list,),
    "shape": (list,),
    "theta": (int, float),
}


def _typed(source: Path, option: Option, value: Any) -> Any:
    """Return a value of the file as the flag would have given it."""
    wanted = option.type
    if wanted is Path:
        return Path(str(value))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, _STRUCTURED.get(option.name, ())) and not isinstance(value, bool):
        return value
    if isinstance(value, wanted) and (isinstance(value, bool) == (wanted is bool)):
        return value
    if wanted is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    raise ValueError(f"{source}: {option.name} is {value!r}, expected {names[wanted]}")


def section_of(name: str) -> str:
    """Return the section of an option; fields of recipes that have no flag belong to ``"recipe"``."""
    return _BY_NAME[name].section if name in _BY_NAME else "recipe"


def make_training(given: Mapping[str, Any]) -> Training:
    """Return the settings of training; ValueError for numbers out of range and two precisions at once."""
    settings = {field.name: given[field.name] for field in fields(Training) if field.name in given}
    precisions = {name for name in ("bf16", "fp16") if given.get(name)}
    if "precision" in settings:
        precisions.add(settings["precision"])
    if len(precisions) > 1:
        raise ValueError(f"several precisions at once: {', '.join(sorted(precisions))}; give one")
    if precisions:
        settings["precision"] = precisions.pop()
    return Training(**settings)

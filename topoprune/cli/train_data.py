"""What ``topoprune train`` trains on, and which model: from options to a `Task` and a model source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from topoprune.cli.train_options import COLUMNS, OPTIONS, flag

if TYPE_CHECKING:
    from topoprune.tasks.task import ModelSource, Task

__all__ = ["EMBEDDED", "KINDS", "load_task", "model_source", "task_kind"]

EMBEDDED_DEFAULT = "stdlib-docs"
# Embedded task -> its kind, and the name of its loader in `topoprune.tasks`.
EMBEDDED: dict[str, tuple[str, str]] = {
    EMBEDDED_DEFAULT: ("classification", "load_docstrings"),
    "stdlib-summaries": ("summarization", "load_docstring_summaries"),
    "stdlib-text": ("language-modelling", "load_docstring_text"),
    "digits": ("image-classification", "load_digits"),
}
# What --task may say for data that is named by files or --dataset-name -> kind.
KINDS: dict[str, str] = {
    "classification": "classification",
    "text-classification": "classification",
    "summarization": "summarization",
    "translation": "translation",
    "language-modelling": "language-modelling",
    "language-modeling": "language-modelling",
}
# Option -> keyword of the loaders.
_KEYWORDS = {
    "train_file": "train_file",
    "validation_file": "validation_file",
    "dataset_name": "dataset_name",
    "dataset_config_name": "dataset_config",
    "text_column": "text_column",
    "summary_column": "summary_column",
    "source_lang": "source_lang",
    "target_lang": "target_lang",
    "source_prefix": "prefix",
    "max_target_length": "max_target_length",
    "num_beams": "num_beams",
    "block_size": "block_size",
}


def task_kind(given: Mapping[str, Any]) -> str:
    """Return the kind of task that was asked for; ValueError for options that another kind has."""
    task = given.get("task") or _default_task(given)
    kind = EMBEDDED[task][0] if task in EMBEDDED else KINDS.get(task, "classification")
    for option in OPTIONS:
        if option.name in given and option.only and kind not in option.only:
            raise ValueError(
                f"{flag(option.name)} has no effect with --task {task}; it belongs to {' and '.join(option.only)}"
            )
    return kind


def load_task(given: Mapping[str, Any]) -> Task:
    """Return the task, limited to as many examples as were asked for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: options that exclude each other, a file without its companion, or data that cannot be used.
    """
    kind = task_kind(given)
    task = given.get("task") or _default_task(given)
    _check_sources(task, given)
    loaded = _classification(task, given) if kind == "classification" else _other(task, kind, given)
    return loaded.limit(given.get("max_train_samples"), given.get("max_eval_samples"), given.get("seed", 0))


def _default_task(given: Mapping[str, Any]) -> str:
    named = any(name in given for name in ("train_file", "validation_file", "dataset_name"))
    return "classification" if named else EMBEDDED_DEFAULT


def _check_sources(task: str, given: Mapping[str, Any]) -> None:
    files = [name for name in ("train_file", "validation_file") if name in given]
    fixed = task in EMBEDDED or (task not in KINDS and not task.startswith("glue/"))
    if files and fixed:
        raise ValueError(
            f"give either --task ({task}) or --train-file and --validation-file, not both; a kind of task goes with "
            f"files: {', '.join(KINDS)}, glue/..."
        )
    if "dataset_name" in given and (files or task not in KINDS):
        other = "--train-file and --validation-file" if files else f"--task {task}"
        raise ValueError(f"give either --dataset-name ({given['dataset_name']}) or {other}, not both")
    if "dataset_config_name" in given and "dataset_name" not in given:
        raise ValueError("--dataset-config-name needs --dataset-name")
    if len(files) == 1:
        missing = flag("train_file" if files[0] == "validation_file" else "validation_file")
        raise ValueError(f"{missing} is missing: --train-file and --validation-file go together")
    if task in KINDS and not files and "dataset_name" not in given:
        alternatives = [name for name, (kind, _) in EMBEDDED.items() if kind == KINDS[task]]
        hint = f", or the embedded --task {alternatives[0]}" if alternatives else ""
        raise ValueError(f"--task {task} needs data: --train-file and --validation-file, or --dataset-name{hint}")
    if task in EMBEDDED:
        columns = [name for name in (*COLUMNS, "source_lang", "target_lang", "regression") if name in given]
        if columns:
            raise ValueError(
                f"{flag(columns[0])}: column flags need --train-file or a hub --task; the embedded task has no columns"
            )


def _classification(task: str, given: Mapping[str, Any]) -> Task:
    from topoprune.tasks.classification import ClassificationTask
    from topoprune.tasks.data import Columns, load_files, load_hub_task
    from topoprune.tasks.docstrings import load_docstrings
    from topoprune.tasks.glue import load_glue
    from topoprune.tasks.labels import Labels

    columns = Columns(given.get("text_column"), given.get("text_pair_column"), given.get("label_column"))
    files = given.get("train_file"), given.get("validation_file")
    mismatched = given.get("validation_mismatched_file")
    if task.startswith("glue/"):
        if given.get("regression"):
            raise ValueError(f"--regression has no effect with --task {task}, whose labels are fixed")
        return load_glue(task, *files, mismatched_file=mismatched, columns=columns)
    if mismatched is not None:
        raise ValueError("--validation-mismatched-file belongs to --task glue/mnli")
    if task in EMBEDDED:
        return ClassificationTask(load_docstrings())
    labels = Labels(regression=bool(given.get("regression")))
    if files[0] is not None and files[1] is not None:
        return ClassificationTask(load_files(files[0], files[1], columns, labels=labels))
    name = given.get("dataset_name", task)
    if "dataset_config_name" in given:
        name = f"{name}:{given['dataset_config_name']}"
    return ClassificationTask(load_hub_task(name, columns, labels=labels))


def _other(task: str, kind: str, given: Mapping[str, Any]) -> Task:
    import topoprune.tasks

    loaders = {"summarization": "load_summarization", "translation": "load_translation"}
    name = EMBEDDED[task][1] if task in EMBEDDED else loaders.get(kind, "load_text")
    loader: Callable[..., Task] = getattr(topoprune.tasks, name)
    return loader(**{keyword: given[option] for option, keyword in _KEYWORDS.items() if option in given})


def model_source(given: Mapping[str, Any]) -> ModelSource | None:
    """Return the model that was asked for; None where that is left to the task.

    Raises:
        ValueError: a loaded and a new model at once, or settings of a new one without its type.
    """
    if "model_type" not in given:
        stray = [name for name in ("config_overrides", "tokenizer_name", "vocab_size") if name in given]
        if stray:
            raise ValueError(f"{flag(stray[0])} describes a new model; it needs --model-type")
        model: str | None = given.get("model")
        return model
    if "model" in given:
        raise ValueError(
            f"give either --model ({given['model']}), which is loaded, or --model-type ({given['model_type']}), which "
            "is trained from scratch, not both"
        )
    from topoprune.tasks.scratch import new_model

    vocabulary = {"vocab_size": given["vocab_size"]} if "vocab_size" in given else {}
    return new_model(given["model_type"], given.get("config_overrides", ""), given.get("tokenizer_name"), **vocabulary)

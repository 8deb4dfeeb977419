"""The nine GLUE tasks: columns, classes and metrics, for data from the hub or from local files.

References: Wang et al. 2018, GLUE (arXiv 1804.07461).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from topoprune.tasks.classification import ClassificationTask
from topoprune.tasks.data import Columns, assemble, load_files
from topoprune.tasks.labels import Labels

__all__ = ["GLUE", "GlueTask", "glue_task", "load_glue"]

_ENTAILS = ("entailment", "not_entailment")
MISMATCHED = "validation_mismatched"


@dataclass(frozen=True)
class GlueTask:
    """What is fixed of a GLUE task.

    Args:
        columns: one text, or two. classes: in the order of their numbers; empty for a regression.
        metrics: see `topoprune.tasks.metrics`; several are combined by their mean.
    """

    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def labels(self) -> Labels:
        """How labels are read."""
        return Labels(self.classes) if self.classes else Labels(regression=True, low=0.0, high=5.0)


GLUE: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "mnli": GlueTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qnli": GlueTask(("question", "sentence"), _ENTAILS),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": GlueTask(("sentence1", "sentence2"), _ENTAILS),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "stsb": GlueTask(("sentence1", "sentence2"), (), ("pearson", "spearman")),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def glue_task(task: str) -> tuple[str, GlueTask]:
    """Return a GLUE task's short name and what is fixed of it, by ``"glue/name"``.

    Raises:
        ValueError: an unknown task; lists the known ones.
    """
    name = task.removeprefix("glue/").replace("sts-b", "stsb").replace("sst-2", "sst2")
    if name not in GLUE:
        raise ValueError(f"unknown task {task!r}; known GLUE tasks: {', '.join(f'glue/{n}' for n in GLUE)}")
    return name, GLUE[name]


def load_glue(
    task: str,
    train_file: str | os.PathLike[str] | None = None,
    validation_file: str | os.PathLike[str] | None = None,
    *,
    mismatched_file: str | os.PathLike[str] | None = None,
    columns: Columns | None = None,
) -> ClassificationTask:
    """Load a GLUE task from the hub, or from local files with the task's columns, classes and metrics.

    Args:
        task: ``"glue/cola"`` or another of `GLUE`.
        train_file, validation_file: see `read_table`; None loads both from the hub.
        mismatched_file: for MNLI, its second validation set.
        columns: names of the columns where files have others than GLUE's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown task, one file without the other, or as `load_files` and `load_splits`.
    """
    name, glue = glue_task(task)
    pair = glue.columns[1] if len(glue.columns) > 1 else None
    asked = columns or Columns()
    if asked.text is None:
        asked = Columns(glue.columns[0], asked.pair or pair, asked.label or "label")
    if mismatched_file is not None and name != "mnli":
        raise ValueError(f"a mismatched validation file is for glue/mnli; task {task!r} has one validation set")
    if (train_file is None) != (validation_file is None):
        missing = "train_file" if train_file is None else "validation_file"
        raise ValueError(f"{missing} is missing: training and validation file go together")
    if train_file is not None and validation_file is not None:
        extra = {} if mismatched_file is None else {MISMATCHED: mismatched_file}
        data = load_files(train_file, validation_file, asked, labels=glue.labels, extra=extra, name=f"glue/{name}")
    else:
        from topoprune.tasks.hub import load_splits

        if mismatched_file is not None:
            raise ValueError("a mismatched validation file goes with a training and a validation file")
        tables = load_splits("nyu-mll/glue", name, name=f"glue/{name}", extra=(MISMATCHED,) if name == "mnli" else ())
        source = f"the Hugging Face hub, nyu-mll/glue {name}"
        data = assemble(tables, asked, source, f"glue/{name}", glue.labels)
    return ClassificationTask(data, glue.metrics)

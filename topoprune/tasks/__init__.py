"""The main job: a task, a model and a recipe in; a pruned model, its scores and figures out.

`train` is the entry point from Python; ``topoprune train`` and ``topoprune demo`` call it. Tasks come from the
loaders: `load_glue` and `ClassificationTask` (texts and pairs of them), `load_digits` (images), `load_summarization`,
`load_translation`, `load_text` (language modelling), each from local files or the hub, and ones embedded here that
need no download: `load_docstrings`, `load_docstring_summaries`, `load_docstring_text`, `load_digits`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from topoprune.tasks.data import ClassificationData, Columns, Example, load_files, load_hub_task
from topoprune.tasks.docstrings import load_docstrings
from topoprune.tasks.embedded_model import embedded_model_path
from topoprune.tasks.labels import Labels
from topoprune.tasks.settings import Training
from topoprune.tasks.task import NewModel, Task

if TYPE_CHECKING:
    from topoprune.tasks.classification import ClassificationTask, train_classifier
    from topoprune.tasks.docstring_text import load_docstring_summaries, load_docstring_text
    from topoprune.tasks.glue import load_glue
    from topoprune.tasks.language_modelling import load_text
    from topoprune.tasks.results import Interrupted, RunResult
    from topoprune.tasks.running import train
    from topoprune.tasks.scratch import new_model
    from topoprune.tasks.summarization import load_summarization
    from topoprune.tasks.translation import load_translation
    from topoprune.tasks.vision import load_digits

__all__ = [
    "ClassificationData",
    "ClassificationTask",
    "Columns",
    "Example",
    "Interrupted",
    "Labels",
    "NewModel",
    "RunResult",
    "Task",
    "Training",
    "embedded_model_path",
    "load_digits",
    "load_docstring_summaries",
    "load_docstring_text",
    "load_docstrings",
    "load_files",
    "load_glue",
    "load_hub_task",
    "load_summarization",
    "load_text",
    "load_translation",
    "new_model",
    "train",
    "train_classifier",
]

# Lazy: reading data needs neither torch nor transformers.
_LAZY = {
    "classification": ("ClassificationTask", "train_classifier"),
    "docstring_text": ("load_docstring_summaries", "load_docstring_text"),
    "glue": ("load_glue",),
    "language_modelling": ("load_text",),
    "results": ("Interrupted", "RunResult"),
    "running": ("train",),
    "scratch": ("new_model",),
    "summarization": ("load_summarization",),
    "translation": ("load_translation",),
    "vision": ("load_digits",),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f"topoprune.tasks.{module}"), name)
    raise AttributeError(f"module 'topoprune.tasks' has no attribute {name!r}")

"""The main job: data, a pretrained model and a recipe in; a pruned model, a table and figures out.

`train_classifier` is the entry point from Python; ``topoprune train`` and ``topoprune demo`` call it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from topoprune.tasks.data import ClassificationData, Example, load_files, load_hub_task
from topoprune.tasks.docstrings import load_docstrings
from topoprune.tasks.embedded_model import embedded_model_path

if TYPE_CHECKING:
    from topoprune.tasks.classification import train_classifier
    from topoprune.tasks.results import Interrupted, RunResult

__all__ = [
    "ClassificationData",
    "Example",
    "Interrupted",
    "RunResult",
    "embedded_model_path",
    "load_docstrings",
    "load_files",
    "load_hub_task",
    "train_classifier",
]


def __getattr__(name: str) -> Any:
    # Lazy: reading data needs neither torch nor transformers.
    if name == "train_classifier":
        from topoprune.tasks.classification import train_classifier

        return train_classifier
    if name in ("Interrupted", "RunResult"):
        from topoprune.tasks import results

        return getattr(results, name)
    raise AttributeError(f"module 'topoprune.tasks' has no attribute {name!r}")

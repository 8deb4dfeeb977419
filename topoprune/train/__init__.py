"""Pruning during training: recipes, the pruner for a plain loop, the callback for `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from topoprune.train.pruner import Pruner, SolveEvent
from topoprune.train.recipe import BudgetRecipe, Distillation, NeuroPruneRecipe, Recipe
from topoprune.train.record import RunRecord, StepRecord

if TYPE_CHECKING:
    from topoprune.train.callback import TopoPruneCallback

__all__ = [
    "BudgetRecipe",
    "Distillation",
    "NeuroPruneRecipe",
    "Pruner",
    "Recipe",
    "RunRecord",
    "SolveEvent",
    "StepRecord",
    "TopoPruneCallback",
]


def __getattr__(name: str) -> Any:
    if name == "TopoPruneCallback":  # transformers.Trainer is slow to import and not needed in a plain loop
        from topoprune.train.callback import TopoPruneCallback

        return TopoPruneCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

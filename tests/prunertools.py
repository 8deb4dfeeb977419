"""Short plain training loops through a Pruner, the same batches at every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.tiny import build, inputs
from topoprune import Pruner

__all__ = ["UNDEFINED_PAPER_MERGE", "adamw", "batch_of", "prune", "sgd", "train"]

UNDEFINED_PAPER_MERGE = ("t5", "t5-gated", "qwen3")


def batch_of(model: nn.Module, step: int, batch: int = 4, length: int = 6) -> dict[str, torch.Tensor]:
    """A labelled batch that depends on the step only."""
    given_ = inputs(model, batch, length, seed=1000 + step)
    if "labels" in given_:
        return given_
    if "pixel_values" in given_:
        return given_ | {"labels": torch.arange(batch) % 2}
    if type(model).__name__.endswith("SequenceClassification"):
        return given_ | {"labels": given_["input_ids"][:, 0] % 2}
    return given_ | {"labels": given_["input_ids"].masked_fill(given_["attention_mask"] == 0, -100)}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    each: Callable[[int], None] | None = None,
    **size: int,
) -> None:
    model.train()
    for step in steps:
        optimizer.zero_grad()
        model(**batch_of(model, step, **size)).loss.backward()
        optimizer.step()
        if each is not None:
            each(step)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.01)


def prune(
    family: str, recipe: Any, steps: int = 12, optimizer: Any = adamw, **more: Any
) -> tuple[nn.Module, Pruner, list[Any]]:
    """Train a tiny model through the whole recipe; returns (step, plan, removable share) at every decision too."""
    model = build(family)
    torch.manual_seed(0)
    opt = optimizer(model)
    pruner = Pruner(model, recipe, total_steps=steps, steps_per_epoch=max(1, steps // 3), **more).attach(opt)
    seen: list[Any] = []
    pruner.on_solve = lambda event: seen.append((event, pruner.plan))
    train(model, opt, range(steps))
    return model, pruner, seen

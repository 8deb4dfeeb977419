"""Random plans, optimizers and forced gradients for tests that mask; a slow twin of the masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.tiny import FAMILIES, inputs
from topoprune import Plan, apply, find_sites
from topoprune_solvers import Solution, Status

__all__ = ["ATTENTION", "OPTIMIZERS", "PAPER", "bits", "drive", "logits", "naive_masks", "random_plan", "untouched"]

ATTENTION = ("head", "kv_group")
ALL_KINDS = (*ATTENTION, "neuron", "input_dim")
# NeuroPrune's merge adds FFN input columns: it needs heads * head width = model width.
PAPER = [name for name in FAMILIES if name not in ("t5", "t5-gated", "qwen3")]


class Langevin(torch.optim.Optimizer):
    """Moves every weight at every step, whatever its gradient and state: only enforcement keeps zeros zero."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(torch.randn_like(parameter) - parameter.grad.sign(), alpha=0.05)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    "langevin": Langevin,
    "amsgrad": lambda model: torch.optim.Adam(
        model.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True, foreach=False
    ),
}


def random_plan(model: nn.Module, share: float = 0.5, seed: int = 0, kinds: tuple[str, ...] = ALL_KINDS) -> Plan:
    """Prune that share of the units of every site at random; pruned units have random dominators."""
    rng = np.random.default_rng(seed)
    sites = find_sites(model)
    solutions = {}
    for site in sites:
        if site.kind in kinds:
            n = site.n_units
            keep = np.ones(n, dtype=bool)
            keep[rng.choice(n, min(max(1, round(share * n)), n - 1), replace=False)] = False
            heir = np.where(keep, np.arange(n), rng.choice(np.flatnonzero(keep), n))
            solutions[site.name] = Solution(
                keep,
                float(keep.sum()),
                "min",
                Status.FEASIBLE,
                "test",
                dominator=heir,
                dominator_distance=np.where(keep, 0.0, 0.5),
            )
    return Plan(sites, solutions)


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer as raw bytes, so that 0.0 and -0.0 differ."""
    state = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in state}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def naive_masks(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """Parameter name -> True where a weight stays, one unit and one slice at a time."""
    here = {site.name: site for site in find_sites(model)}
    params = dict(model.named_parameters())
    masks: dict[str, torch.Tensor] = {}
    for name, solution in plan.unit_solutions().items():
        for unit in np.flatnonzero(~solution.keep):
            for piece in here[name].slices:
                keep = masks.setdefault(piece.param, torch.ones_like(params[piece.param], dtype=torch.bool))
                keep.narrow(piece.axis, piece.offset + int(unit) * piece.width, piece.width).fill_(False)
    return masks


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """T9: nothing inside changes the model, and it stays free to be pruned."""
    before, training = bits(model), [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    yield
    assert bits(model) == before
    assert [m.training for m in model.modules()] == training
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_()
    apply(model, random_plan(model)).close()


def drive(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, seed: int = 0) -> Iterator[int]:
    """Steps with forced gradients: every entry non-zero, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 10.0 ** float(step)
            parameter.grad = noise.to(parameter)
        optimizer.step()
        yield step

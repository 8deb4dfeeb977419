"""Plans and models that compaction is tested on; tests of files, export and training share them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np
from torch import nn

from tests.masktools import random_plan
from tests.prunertools import prune
from topoprune import Plan, Recipe, Site
from topoprune_solvers import Solution, Status

__all__ = ["EMPTY", "GENERATING", "STRUCTURES", "empty_plan", "structure_plan", "trained"]

STRUCTURES = ("head", "kv_group", "neuron")
GENERATING = ("t5", "t5-gated", "opt", "llama", "qwen2", "qwen3", "gpt2", "bart", "marian")

# What loses all of its units; two layers a stack in every tiny model.
EMPTY: dict[str, Callable[[Site], bool]] = {
    "no heads in the first layer": lambda site: site.kind != "neuron" and site.layer == 0,
    "no heads in the last layer": lambda site: site.kind != "neuron" and site.layer == 1,
    "no neurons in the first layer": lambda site: site.kind == "neuron" and site.layer == 0,
    "nothing in the last layer": lambda site: site.layer == 1,
    "no heads": lambda site: site.kind != "neuron",
    "no neurons": lambda site: site.kind == "neuron",
    "no cross attention": lambda site: site.block == "cross_attention",
    "nothing in the encoder": lambda site: site.stack == "encoder",
    "nothing": lambda site: True,
}


def structure_plan(model: nn.Module, share: float = 0.5, seed: int = 0) -> Plan:
    """Prune that share of the heads (or KV groups) and neurons of every layer at random; one unit stays at least."""
    return random_plan(model, share, seed, kinds=STRUCTURES)


def empty_plan(
    model: nn.Module,
    sites: Callable[[Site], bool] | Iterable[str] = EMPTY["no heads in the first layer"],
    share: float = 0.25,
    seed: int = 0,
) -> Plan:
    """Prune every unit of some sites, and that share of the others at random.

    Args:
        model: a dense model.
        sites: which are emptied: their names, or a rule such as those in `EMPTY`.
        share: pruned elsewhere; 0 leaves the other sites whole.
        seed: of the random choice.
    """
    names = None if callable(sites) else set(sites)
    plan = structure_plan(model, share or 0.5, seed)
    solutions = dict(plan.solutions) if share else {}
    for site in plan.sites:
        chosen = sites(site) if callable(sites) else site.name in (names or ())
        if chosen and site.kind in STRUCTURES:
            keep = np.zeros(site.n_units, dtype=bool)
            solutions[site.name] = Solution(keep, 0.0, "min", Status.FEASIBLE, "test")
    return Plan(plan.sites, solutions)


def trained(family: str, sparsity: float = 0.5) -> tuple[nn.Module, Plan]:
    """Return a tiny model trained a few steps with ``Recipe.budget``, zeros in its weights, and its plan.

    Every call gives a copy of its own, in eval mode.
    """
    model, plan = _trained(family, sparsity)
    return copy.deepcopy(model), plan


@cache
def _trained(family: str, sparsity: float) -> tuple[nn.Module, Plan]:
    model, pruner, _ = prune(family, Recipe.budget(sparsity, ramp=(0.1, 0.5), solves=3), steps=8)
    plan = pruner.plan
    assert plan is not None
    pruner.close()
    return model.eval(), plan

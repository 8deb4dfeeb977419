"""How many units of every site a budget removes in the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from topoprune.architectures import counted_matrices
from topoprune.budgets import rounding_step
from topoprune.sites import Site
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune.train.schedule import share_out, spread

__all__ = ["uniform_targets"]


def uniform_targets(sites: Sequence[Site], recipe: BudgetRecipe) -> dict[str, int]:
    """Return site name -> number of units to remove in the end, the same share of every site as far as that goes.

    Raises:
        ValueError: the budget cannot be reached.
    """
    steps = {s.name: rounding_step(s, recipe.rounding) if recipe.rounding is not None else 1 for s in sites}
    removed = _head_targets([s for s in sites if s.kind in ("head", "kv_group")], recipe, steps)
    if recipe.sparsity is not None:
        removed |= _neuron_targets(sites, recipe, steps, removed)
    if recipe.input_dims:
        inputs = [s for s in sites if s.kind == "input_dim"]
        removed |= {s.name: round(recipe.input_dims * s.n_units) for s in inputs}
        if recipe.rounding is not None:
            removed |= {s.name: _upto(s, removed[s.name], steps[s.name], up=True) for s in inputs}
    return removed


def _upto(site: Site, removed: int, step: int, *, up: bool) -> int:
    """Return how many units to remove so that a multiple of step stays: about `removed`, at least one step stays."""
    kept = site.n_units - removed
    blocks = kept // step if up else min(-(-kept // step), site.n_units // step)
    return site.n_units - step * max(1, blocks)


def _head_targets(heads: Sequence[Site], recipe: BudgetRecipe, steps: Mapping[str, int]) -> dict[str, int]:
    if recipe.heads is None:
        # Rounded down, so that neurons, the finer units, can make up the rest exactly.
        share = recipe.sparsity or 0.0
        return {s.name: _upto(s, int(share * s.n_units), steps[s.name], up=False) for s in heads}
    everything = sum(s.n_units for s in heads)
    if recipe.heads > everything:
        raise ValueError(f"heads={recipe.heads} asks for more heads than exist: this model has {everything}")
    if recipe.rounding is None:
        gone = spread(everything - recipe.heads, [s.n_units for s in heads])
        return {s.name: g for s, g in zip(heads, gone, strict=True)}
    room = [s.n_units // steps[s.name] for s in heads]
    sizes = sorted({steps[s.name] for s in heads})
    if len(sizes) > 1:
        raise ValueError(
            f"rounding={recipe.rounding} is {' or '.join(map(str, sizes))} heads, depending on the layer: give "
            "sparsity= alone, which rounds every layer on its own, or no rounding"
        )
    step = sizes[0] if sizes else 1
    blocks, left = divmod(recipe.heads, step)
    if left or blocks > sum(room):
        near = [str(b * step) for b in (min(blocks, sum(room)), blocks + 1) if b <= sum(room)]
        raise ValueError(
            f"heads={recipe.heads} cannot be rounded: rounding={recipe.rounding} features are {step} heads of a layer "
            f"here; ask for heads={' or '.join(near)}"
        )
    gone = spread(sum(room) - blocks, room)
    return {s.name: s.n_units - step * (r - g) for s, r, g in zip(heads, room, gone, strict=True)}


def _neuron_targets(
    sites: Sequence[Site], recipe: BudgetRecipe, steps: Mapping[str, int], by_head: Mapping[str, int]
) -> dict[str, int]:
    """Return what neurons have to make up for the sparsity that the heads' share leaves."""
    assert recipe.sparsity is not None
    neurons = [s for s in sites if s.kind == "neuron"]
    units, costs = [s.n_units for s in neurons], [s.matrix_parameters_per_unit for s in neurons]
    own = [steps[s.name] for s in neurons]
    rounded = recipe.rounding is not None
    total = sum(math.prod(shape) for shape in counted_matrices(sites).values())
    by_heads = sum(by_head[s.name] * s.matrix_parameters_per_unit for s in sites if s.name in by_head)
    rest = recipe.sparsity * total - by_heads
    # What does not fill a step goes in any case; without rounding that is nothing.
    least = sum(n % step * cost for n, step, cost in zip(units, own, costs, strict=True))
    block = max((step * cost for step, cost in zip(own, costs, strict=True)), default=0)
    if least - rest > (block if rounded else block / 2):
        what = "rounding every site" if recipe.heads is None else f"keeping {recipe.heads} heads"
        raise ValueError(
            f"{what} already removes {(by_heads + least) / total:.1%}, more than "
            f"sparsity={recipe.sparsity:.1%}; keep more heads or ask for more sparsity"
        )
    try:
        shares = share_out(rest if rounded else max(rest, 0.0), units, costs, own if rounded else None)
    except ValueError:
        most = by_heads + sum((n - step) * cost for n, step, cost in zip(units, own, costs, strict=True))
        left = f"{recipe.rounding} features" if rounded else "one neuron"
        raise ValueError(
            f"sparsity={recipe.sparsity:.1%} cannot be reached: with {recipe.heads or 'these'} heads and {left} "
            f"left in each layer at most {most / total:.1%} of the weights go"
        ) from None
    return {s.name: share for s, share in zip(neurons, shares, strict=True)}

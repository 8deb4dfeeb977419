"""How many units of every site a budget removes in the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from topoprune.architectures import counted_matrices
from topoprune.budgets import rounding_step
from topoprune.sites import Site
from topoprune.train.body import Body
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune.train.costs import Costs, flop_costs, parameter_costs, sparsity_costs
from topoprune.train.distributed import of_first_rank, own_rank
from topoprune.train.latency import LatencyMeter, Measured, latency_costs, meet
from topoprune.train.schedule import share_out, spread

__all__ = ["Targets", "find_targets", "fit_uniform", "uniform_targets"]

ATTENTION = ("head", "kv_group")


@dataclass(frozen=True, eq=False)
class Targets:
    """What a budget asks for in the end.

    Args:
        removed: site name -> units that go when every site loses the same share.
        costs: what units cost, and the budget; None where heads alone are asked for.
        least: site name -> fewest units that may stay, heads and neurons.
        steps: site name -> units that stay or go together in the end.
        measured: what the counts of `removed` take, for a latency budget.
    """

    removed: Mapping[str, int]
    costs: Costs | None
    least: Mapping[str, int]
    steps: Mapping[str, int]
    measured: Measured | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {
            "removed": dict(self.removed),
            "costs": None if self.costs is None else self.costs.to_dict(),
            "least": dict(self.least),
            "steps": dict(self.steps),
            "measured": None if self.measured is None else vars(self.measured),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Targets:
        """Rebuild from `to_dict` output."""
        costs = None if data["costs"] is None else Costs.from_dict(data["costs"])
        measured = None if data["measured"] is None else Measured(**data["measured"])
        return cls(data["removed"], costs, data["least"], data["steps"], measured)


def find_targets(body: Body, recipe: BudgetRecipe) -> Targets:
    """Return what the recipe asks of a model, by every kind of budget.

    `parameters`, `flops` and `latency` are met from below: what stays is at most the budget, and one neuron
    more (with `rounding`: one step of neurons more) would exceed it, by the formula or the measured table.
    `sparsity` is met as near as whole neurons allow (with rounding: at least). FLOPs take one counted forward of a
    single sequence. Latency is measured here, before training, where a copy of the model has room and an
    impossible budget can still be refused: some 8 to 16 s where a forward takes up to 0.2 s, about 50 forwards
    where it takes longer. All ranks take what the first one measured. Where units have been cut out already (a resumed
    run, whose own targets will replace these) nothing is measured, and FLOPs stand in for seconds.

    Raises:
        ValueError: the budget cannot be reached; the message says what can.
    """
    sites = [s for s in body.sites if s.kind != "input_dim"]
    steps = {s.name: rounding_step(s, recipe.rounding) for s in sites}
    # Uniform heads may lose a whole layer where their number is asked for; nothing else does.
    none = recipe.heads is not None and recipe.allocation == "uniform"
    least = {s.name: 0 if none and s.kind in ATTENTION else _least(s, recipe.floor, steps[s.name]) for s in sites}
    fewest = sum(least[s.name] for s in sites if s.kind in ATTENTION)
    if recipe.heads is not None and recipe.heads < fewest:
        raise ValueError(
            f"heads={recipe.heads} cannot be reached: allocation={recipe.allocation!r} with floor={recipe.floor:g} "
            f"leaves at least {fewest} heads in this model"
        )
    if recipe.parameters is recipe.flops is recipe.latency is None:
        removed = uniform_targets(body.sites, recipe)
        costs = None
        if recipe.sparsity is not None:
            costs = sparsity_costs(body.sites, recipe.sparsity, rounded=recipe.rounding is not None)
        targets = Targets(removed, costs, least, steps)
    elif recipe.latency is not None and not body.shrunk:
        targets = _of_first_rank(lambda: _latency_targets(body, recipe, least, steps))
    else:
        share = recipe.flops if recipe.flops is not None else recipe.latency
        if recipe.parameters is not None:
            costs = parameter_costs(body, recipe.parameters)
        else:
            assert share is not None
            costs = flop_costs(body, share, recipe.shape)
        targets = Targets(_from_kept(body.sites, _counts(body.sites, costs, recipe, least, steps), recipe), costs,
                          least, steps)  # fmt: skip
    _check_floor(sites, targets.removed, recipe)
    return targets


def fit_uniform(
    sites: Sequence[Site],
    costs: Costs,
    *,
    least: Mapping[str, int],
    most: Mapping[str, int],
    steps: Mapping[str, int],
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return site name -> units kept: the same share of every site as far as that goes, at most the budget.

    One step more of any site of neurons that has room would exceed the budget.

    Args:
        sites: heads and neurons to prune. costs: with the budget.
        least, most: site name -> bounds on what stays, in whole steps. steps: units that go together.
        fixed: site name -> units that stay, decided before.

    Raises:
        ValueError: not even the least of every site fits.

    Complexity: O(sites) for each of about a hundred shares, and for each of few steps given back.
    """
    kept = dict(fixed or {})
    free = [s for s in sites if s.name not in kept]
    lowest = costs.total({**{s.name: least[s.name] for s in free}, **kept})
    if not _fits(lowest, costs.budget):
        raise ValueError(f"at least {lowest:.12g} {costs.unit} stay, more than the {costs.budget:.12g} asked for")

    def counts(share: float, moving: Sequence[Site]) -> dict[str, int]:
        result = {}
        for s in moving:
            stays = (s.n_units - int(share * s.n_units + 1e-9)) // steps[s.name] * steps[s.name]
            result[s.name] = min(max(stays, least[s.name]), most[s.name])
        return result

    def between(moving: Sequence[Site]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the counts just above the budget and just within it."""
        low, high = 0.0, 1.0
        if _fits(costs.total({**kept, **counts(low, moving)}), costs.budget):
            return counts(low, moving), counts(low, moving)
        for _ in range(50):
            middle = (low + high) / 2
            fits = _fits(costs.total({**kept, **counts(middle, moving)}), costs.budget)
            low, high = (low, middle) if fits else (middle, high)
        return counts(low, moving), counts(high, moving)

    neurons = [s for s in free if s.kind not in ATTENTION]
    if neurons:
        # Heads are coarse: as many as are still above the budget, so that neurons can make up the rest exactly.
        above, within = ({n: c for n, c in found.items() if n not in {s.name for s in neurons}} for found in
                         between(free))  # fmt: skip
        floor = {s.name: least[s.name] for s in neurons}
        kept |= above if _fits(costs.total({**kept, **above, **floor}), costs.budget) else within
    fine = neurons or free
    kept |= between(fine)[1]
    total = costs.total(kept)
    while True:
        # Largest shortfall first, ties to the earlier site.
        for s in sorted(fine, key=lambda s: kept[s.name] / s.n_units):
            more, table = kept[s.name] + steps[s.name], costs.tables[s.name]
            if more <= most[s.name] and _fits(total + table[more] - table[kept[s.name]], costs.budget):
                kept[s.name] = more
                total = costs.total(kept)
                break
        else:
            return kept


def _fits(cost: float, budget: float) -> bool:
    return cost <= budget * (1 + 1e-12)


def _least(site: Site, floor: float, step: int) -> int:
    """Return the fewest units of a site that may stay: its share, one step at least, in whole steps."""
    return min(max(1, math.ceil(floor * site.n_units / step - 1e-9)), site.n_units // step) * step


def _counts(
    sites: Sequence[Site], costs: Costs, recipe: BudgetRecipe, least: Mapping[str, int], steps: Mapping[str, int]
) -> dict[str, int]:
    """Return the counts of a uniform allocation under a budget, in whole steps."""
    own = [s for s in sites if s.kind != "input_dim"]
    most = {s.name: s.n_units // steps[s.name] * steps[s.name] for s in own}
    heads = None
    if recipe.heads is not None:
        gone = _head_targets([s for s in own if s.kind in ATTENTION], recipe, steps)
        heads = {s.name: s.n_units - gone[s.name] for s in own if s.name in gone}
    try:
        return fit_uniform(own, costs, least=least, most=most, steps=steps, fixed=heads)
    except ValueError:
        bottom = costs.total({**least, **(heads or {})})
        dense = costs.dense
        given = recipe.parameters if recipe.parameters is not None else recipe.flops
        stays = f"{recipe.heads} heads" if heads is not None else "the fewest heads"
        raise ValueError(
            f"{costs.name}={given if given is not None else recipe.latency} cannot be reached: with {stays} and the "
            f"fewest neurons that may stay in each layer, {bottom:,.0f} of {dense:,.0f} {costs.unit} are left "
            f"({bottom / dense:.1%}), of which {costs.fixed:,.0f} belong to what is not pruned; ask for at least that"
        ) from None


def _of_first_rank(measure: Callable[[], Targets]) -> Targets:
    """Return what the first rank measured on all ranks; what it raises is raised on all."""
    targets, error = None, None
    if own_rank() == 0:
        try:
            targets = measure()
        except ValueError as raised:
            error = str(raised)
    targets, error = of_first_rank((targets, error))
    if error is not None:
        raise ValueError(error)
    assert targets is not None
    return targets


def _latency_targets(body: Body, recipe: BudgetRecipe, least: Mapping[str, int], steps: Mapping[str, int]) -> Targets:
    assert recipe.latency is not None
    meter = LatencyMeter(body, recipe.shape)
    costs = latency_costs(meter, recipe.latency, body.sites)
    # With a budget that nothing exceeds: heads= alone, for what stays of them at least.
    whole = _counts(body.sites, replace(costs, budget=math.inf), recipe, least, steps)
    bottom = dict(least)
    if recipe.heads is not None:
        bottom |= {s.name: whole[s.name] for s in body.sites if s.kind in ATTENTION}
    kept, costs, measured = meet(costs, meter, lambda c: _counts(body.sites, c, recipe, least, steps), bottom)
    return Targets(_from_kept(body.sites, kept, recipe), costs, least, steps, measured)


def _from_kept(sites: Sequence[Site], kept: Mapping[str, int], recipe: BudgetRecipe) -> dict[str, int]:
    """Return what goes of every site, input dimensions included."""
    steps = {s.name: rounding_step(s, recipe.rounding) for s in sites}
    return {s.name: s.n_units - kept[s.name] for s in sites if s.kind != "input_dim"} | _inputs(sites, recipe, steps)


def _check_floor(sites: Sequence[Site], removed: Mapping[str, int], recipe: BudgetRecipe) -> None:
    for site in sites if recipe.allocation == "uniform" else ():
        kept = site.n_units - removed.get(site.name, 0)
        if kept < math.ceil(recipe.floor * site.n_units - 1e-9):
            raise ValueError(
                f"the budget leaves {kept} of {site.n_units} units in {site.name!r}, fewer than floor={recipe.floor:g} "
                "of them; lower the floor or ask for less"
            )


def uniform_targets(sites: Sequence[Site], recipe: BudgetRecipe) -> dict[str, int]:
    """Return site name -> number of units to remove in the end, the same share of every site as far as that goes.

    Raises:
        ValueError: the budget cannot be reached.
    """
    steps = {s.name: rounding_step(s, recipe.rounding) if recipe.rounding is not None else 1 for s in sites}
    removed = _head_targets([s for s in sites if s.kind in ATTENTION], recipe, steps)
    if recipe.sparsity is not None:
        try:
            removed |= _neuron_targets(sites, recipe, steps, removed)
        except ValueError:
            if recipe.heads is not None:
                raise
            # Too few neurons to make up for heads rounded down: one head more goes where there is one.
            fewer = {
                s.name: _upto(s, math.ceil(recipe.sparsity * s.n_units), steps[s.name], up=True)
                for s in sites
                if s.kind in ATTENTION
            }
            removed = fewer | _neuron_targets(sites, recipe, steps, fewer)
    return removed | _inputs(sites, recipe, steps)


def _inputs(sites: Sequence[Site], recipe: BudgetRecipe, steps: Mapping[str, int]) -> dict[str, int]:
    if not recipe.input_dims:
        return {}
    inputs = [s for s in sites if s.kind == "input_dim"]
    group = recipe.input_group
    removed = {s.name: group * round(recipe.input_dims * s.n_units / group) for s in inputs}
    if recipe.rounding is not None:
        removed |= {s.name: _upto(s, removed[s.name], math.lcm(steps[s.name], group), up=True) for s in inputs}
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

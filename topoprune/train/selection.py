"""Which units of one site stay: the views that a decision takes of a live model, and the choice.

What a unit is worth is its output energy ``g_i = E|W_i o_i|^2`` (the norm of its weights for input dimensions). A unit
that goes is covered by the kept unit j most like it, which leaves ``g_i (1 - cos^2_ij)`` of it: a solution holds
both numbers for every unit (`Solution.importance`, `Solution.dominator_distance`).

=================  ============================================================================================
``soft``           most energy explained by the units that stay (soft domination; heads)
``hard``           smallest threshold whose dominating set fits (k-centre; heads)
``quadratic``      least ``E|sum of what goes|^2`` (quadratic subset on the output Gram; heads and neurons)
``attachment``     most energy, less the degree cost of Eq. 1 (neurons, input dimensions)
``repaired``       least damage that is left after least-squares repair (inverse-Gram elimination; neurons)
``domination``     as ``soft``, on the graph of the nearest neighbours of every neuron
=================  ============================================================================================

Shape legend: n live units, w width of a unit, d outputs of the consumer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.extraction import consumer_blocks, named_tensors, nearest_graph, site_graph, unit_energy
from topoprune.extraction.grammath import gram_tile
from topoprune.graph import Graph, Site
from topoprune.sparsity import row_view
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune_solvers import (
    BudgetedDomination,
    QuadraticSubset,
    RepairedSubset,
    SoftDomination,
    Solution,
    Status,
    get_solver,
)
from topoprune_solvers import solve as solve_problem

__all__ = ["SiteView", "check_selection", "choose", "needs_moment", "rule_of", "view_site"]

NEIGHBOURS = 32  # of every neuron in the similarity graph that `domination` solves on
BLOCK = 1024  # units along one side of a tile of cosines
ENUMERATED = 24  # heads up to which the quadratic subset is solved to the optimum in milliseconds
LEAST_RIDGE = 1e-6  # of `repaired`, whose moment must be definite, where the recipe says less
_HEADS = ("head", "kv_group")
_HEAD_PROBLEMS: dict[str, type] = {"soft": SoftDomination, "hard": BudgetedDomination, "quadratic": QuadraticSubset}


@dataclass(frozen=True, eq=False)
class SiteView:
    """What a decision sees of the live units of one site.

    Args:
        site: as it is today. at: (n,) positions of the live units in it.
        graph: similarity of the live units. importance: (n,) >= 0, what the choice maximises.
        energy: (n,) >= 0, what a unit is worth by itself.
        moment: (features, features) second moment of the consumer's inputs, today's features; None if only its
            diagonal was collected, or nothing.
        weight: (n, w, d) float32, what the live units have in the consumer; None without `moment`.
    """

    site: Site
    at: np.ndarray
    graph: Graph
    importance: np.ndarray
    energy: np.ndarray
    moment: torch.Tensor | None = None
    weight: torch.Tensor | None = None


def rule_of(site: Site, recipe: BudgetRecipe) -> str:
    """Return how the units of a site are chosen: `heads_by`, `neurons_by`, or attachment for input dimensions."""
    if site.kind in _HEADS:
        return recipe.heads_by
    return recipe.neurons_by if site.kind == "neuron" else "attachment"


def needs_moment(site: Site, recipe: BudgetRecipe) -> bool:
    """Whether the choice of units needs the whole second moment of the consumer's inputs, not its diagonal alone."""
    return site.kind != "input_dim" and rule_of(site, recipe) != "attachment"


def check_selection(sites: Sequence[Site], recipe: BudgetRecipe) -> None:
    """Refuse what `choose` could not do at the first decision.

    Raises:
        ValueError: a solver that does not take the problem of ``heads_by``, or blocks of input dimensions that do
            not divide them.
    """
    get_solver(recipe.solver, _HEAD_PROBLEMS[recipe.heads_by])
    if not recipe.input_dims:
        return
    for site in sites:
        if site.kind == "input_dim" and site.n_units % recipe.input_group:
            raise ValueError(
                f"input_group={recipe.input_group} does not divide the {site.n_units} input dimensions of "
                f"{site.name!r}; give a divisor, such as {_divisor(site.n_units, recipe.input_group)}"
            )
        together = math.lcm(recipe.input_group, recipe.rounding or 1)
        if site.kind == "input_dim" and together > site.n_units:
            raise ValueError(
                f"input_group={recipe.input_group} and rounding={recipe.rounding} leave multiples of {together} of the "
                f"{site.n_units} input dimensions of {site.name!r}; give numbers that have one in common"
            )


def view_site(
    model: nn.Module, site: Site, at: np.ndarray, moment: torch.Tensor | None, recipe: BudgetRecipe
) -> SiteView:
    """Return the view of one site.

    Args:
        model: live. site: as it is today. at: (n,) positions of the live units in it.
        moment: of the consumer's inputs, see `SiteView`; (features,) where only the diagonal was collected;
            None for input dimensions.
        recipe: gives the scores.

    Raises:
        ValueError: scores that are not finite.
    """
    if site.kind == "input_dim":
        score = _group_norms(model, site)
        return SiteView(site, at, _no_edges(at.size), _attach(model, site, score, at, recipe), score[at])
    assert moment is not None
    tensors = named_tensors(model)
    blocks = consumer_blocks(tensors, site)
    energy = unit_energy(blocks, moment).double().cpu().numpy()
    _require_finite(site, energy)
    full, own = (moment, _rows(blocks, at)) if moment.ndim == 2 else (None, None)
    rule = rule_of(site, recipe)
    if rule == "attachment":
        graph, importance = _no_edges(at.size), _attach(model, site, energy, at, recipe)
        return SiteView(site, at, graph, importance, energy[at], full, own)
    assert full is not None and own is not None
    if site.kind in _HEADS:
        distance = site_graph(tensors, site, "output-gram", moment).to_dense()[np.ix_(at, at)]
        _require_finite(site, distance)
        graph = Graph.from_dense(distance, normalised=True)
    elif rule == "domination":
        tile = _Cosines(own, _features(full, at, site.unit_width))
        graph = nearest_graph(tile.distance, at.size, NEIGHBOURS, block=BLOCK, normalised=True)
    else:
        graph = _no_edges(at.size)
    return SiteView(site, at, graph, energy[at], energy[at], full, own)


def choose(
    view: SiteView, count: int, recipe: BudgetRecipe, seed: int, *, forced: np.ndarray | None = None
) -> Solution:
    """Return which `count` of the live units stay, with what each is worth and who covers each that goes.

    Args:
        view: of the site. count: how many stay; of input dimensions a multiple of the recipe's `input_group`.
        recipe: says how. seed: for solvers that draw random numbers.
        forced: (n,) bool, units that stay in any case, or None.

    Returns:
        A verified solution. A unit that goes has dominator -1 where the decision knows no similarities: with
        ``attachment`` and no repair only the diagonal of the moment is collected.

    Complexity: the solver's; the cosines of pruned and kept units on the device of the model.
    """
    if count == 0:  # a layer may lose all its heads; no domination problem has an answer then
        none = np.zeros(view.at.size, dtype=bool)
        return Solution(none, 0.0, "max", Status.FEASIBLE, "budget", dominator=none.astype(int) - 1,
                        dominator_distance=np.full(view.at.size, np.inf), importance=view.energy)  # fmt: skip
    rule = rule_of(view.site, recipe)
    if view.site.kind == "input_dim":
        return _choose_groups(view, count, recipe.input_group, seed, forced)
    if rule == "quadratic":
        solution = _quadratic(view, count, recipe, seed, forced)
    elif rule == "repaired":
        solution = _repaired(view, count, recipe, seed, forced)
    else:
        csr = view.graph.indptr, view.graph.indices, view.graph.weight
        kind = BudgetedDomination if rule == "hard" else SoftDomination
        problem: Any = kind(*csr, k=count, importance=view.importance, forced=forced)
        solution = solve_problem(problem, recipe.solver if view.site.kind in _HEADS else "greedy", seed=seed)
    if view.moment is not None and rule not in ("soft", "hard"):
        # A k-NN graph may lack the edge to the nearest unit that is kept, the other rules have no graph at all.
        dominator, distance = _nearest_kept(view, solution.keep)
        solution = replace(solution, dominator=dominator, dominator_distance=distance)
    return replace(solution, importance=view.energy)


def _quadratic(view: SiteView, count: int, recipe: BudgetRecipe, seed: int, forced: np.ndarray | None) -> Solution:
    problem = QuadraticSubset(_gram(view), k=count, forced=forced)
    solver = "greedy"
    if view.site.kind in _HEADS:
        # Beyond, proofs take time that nobody can foresee; with a limit on it runs would not repeat.
        hard = recipe.solver == "exact" and problem.n > ENUMERATED
        solver = "local-search" if hard else recipe.solver
    return solve_problem(problem, solver, seed=seed)


def _repaired(view: SiteView, count: int, recipe: BudgetRecipe, seed: int, forced: np.ndarray | None) -> Solution:
    assert view.moment is not None and view.weight is not None
    width = view.weight.shape[1]
    seen = _features(view.moment, view.at, width).double()
    moment = ((seen + seen.T) / 2).cpu().numpy()
    weight = view.weight.flatten(0, 1).T.double().cpu().numpy()
    ridge = max(recipe.ridge, LEAST_RIDGE)
    for attempt in range(4):
        try:
            problem = RepairedSubset(moment, weight, width, k=count, forced=forced, ridge=ridge * 10**attempt)
            return solve_problem(problem, "greedy", seed=seed)
        except ValueError as error:
            # Few tokens of much the same kind: a float32 moment then has rounding beyond a small ridge.
            if attempt == 3 or "even with ridge" not in str(error):
                raise ValueError(f"neurons_by='repaired' at {view.site.name!r}: {error}") from error
    raise AssertionError("unreachable")


def _choose_groups(view: SiteView, count: int, group: int, seed: int, forced: np.ndarray | None) -> Solution:
    """Decide on blocks of neighbouring units by their summed score; a block stays or goes as a whole."""
    assert view.at.size % group == 0 and count % group == 0, "blocks of input dimensions are whole"
    score = view.importance.reshape(-1, group).sum(axis=1)
    blocks: np.ndarray | None = None if forced is None else forced.reshape(-1, group)[:, 0]
    alone = _no_edges(score.size)
    problem = SoftDomination(
        alone.indptr, alone.indices, alone.weight, k=count // group, importance=score, forced=blocks
    )
    solution = solve_problem(problem, "greedy", seed=seed)
    return replace(
        solution,
        keep=np.repeat(solution.keep, group),
        dominator=None,
        dominator_distance=None,
        importance=view.energy,
    )


class _Cosines:
    """Tiles of ``1 - cos^2`` between what units add to their consumer's output.

    Args:
        weight: (n, w, d) float32. moment: (n w, n w) of the same units.
    """

    def __init__(self, weight: torch.Tensor, moment: torch.Tensor) -> None:
        self.weight, self.moment = weight, moment
        energy = unit_energy(weight, moment)
        self.silent = energy <= 0
        self.scale = torch.rsqrt(energy.masked_fill(self.silent, 1.0))

    def distance(self, a: slice, b: slice) -> torch.Tensor:
        """Return the (a, b) tile; a silent unit is at distance 0 of other silent units and 1 of all others."""
        cosine = gram_tile(self.weight, self.moment, a, b).mul_(self.scale[a, None]).mul_(self.scale[None, b])
        distance = cosine.square_().neg_().add_(1.0).clamp_(0.0, 1.0)
        unlike = (self.silent[a, None] != self.silent[None, b]).float()
        return torch.where(self.silent[a, None] | self.silent[None, b], unlike, distance)


def _nearest_kept(view: SiteView, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each unit the most similar kept one and 1 - cos^2; ties to the lower index. O(n^2 w^2 d) at worst.

    Memory: the moment in another order, and tiles.
    """
    assert view.moment is not None and view.weight is not None
    kept, gone = np.flatnonzero(keep), np.flatnonzero(~keep)
    dominator = np.where(keep, np.arange(keep.size), -1).astype(np.int32)
    distance = np.where(keep, 0.0, np.inf)
    if not kept.size or not gone.size:
        return dominator, distance
    order = np.concatenate([kept, gone])
    tile = _Cosines(_rows(view.weight, order), _features(view.moment, view.at[order], view.weight.shape[1]))
    for start in range(kept.size, keep.size, BLOCK):
        rows = slice(start, min(start + BLOCK, keep.size))
        values = tile.distance(rows, slice(0, kept.size)).double().cpu().numpy()
        nearest = values.argmin(axis=1)
        dominator[order[rows]] = kept[nearest]
        distance[order[rows]] = values[np.arange(nearest.size), nearest]
    return dominator, distance


def _gram(view: SiteView) -> np.ndarray:
    """Return the (n, n) float64 output Gram of the live units, in blocks of rows on the model's device."""
    assert view.moment is not None and view.weight is not None
    n = view.at.size
    moment = _features(view.moment, view.at, view.weight.shape[1])
    gram = np.empty((n, n))
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        gram[rows, start:] = gram_tile(view.weight, moment, rows, slice(start, n)).double().cpu().numpy()
        gram[start:, rows] = gram[rows, start:].T
        own = gram[rows, rows]
        gram[rows, rows] = (own + own.T) / 2
    gram.setflags(write=False)
    return gram


def _rows(tensor: torch.Tensor, at: np.ndarray) -> torch.Tensor:
    if at.size == tensor.shape[0] and np.array_equal(at, np.arange(at.size)):
        return tensor
    return tensor[torch.from_numpy(at).to(tensor.device)]


def _features(moment: torch.Tensor, at: np.ndarray, width: int) -> torch.Tensor:
    """Return the part of a moment that belongs to some units, in their order."""
    features = (at[:, None] * width + np.arange(width)).reshape(-1)
    if np.array_equal(features, np.arange(moment.shape[0])):
        return moment
    index = torch.from_numpy(features).to(moment.device)
    return moment.index_select(0, index).index_select(1, index)


def _divisor(n: int, near: int) -> int:
    return max(d for d in range(1, near + 1) if n % d == 0)


def _attach(model: nn.Module, site: Site, score: np.ndarray, at: np.ndarray, recipe: BudgetRecipe) -> np.ndarray:
    """Return attachment-weighted scores >= 0: relative score minus the slope of Eq. 1's degree cost.

    The degree of a unit is the share of its entries at or above the median of the layer's live units, so
    that differences show before any weight is zero.
    """
    _require_finite(site, score)
    relative = score[at] / max(score[at].mean(), np.finfo(float).tiny)
    degree = _relative_degree(model, site, at)
    slope = 1.0 - degree if recipe.eq1 == "a" else 1.0 / (degree + 0.01)
    weighted = relative - recipe.attachment * slope
    return weighted - weighted.min()


def _no_edges(n: int) -> Graph:
    return Graph(np.zeros(n + 1, dtype=np.int32), np.zeros(0, dtype=np.int32), np.zeros(0), normalised=True)


def _require_finite(site: Site, values: np.ndarray) -> None:
    if not np.all(np.isfinite(values)):
        raise ValueError(f"scores of {site.name!r} are not finite; training has diverged")


def _group_norms(model: nn.Module, site: Site) -> np.ndarray:
    total = torch.zeros(site.n_units, dtype=torch.float64)
    for name, axis in {p.param: p.axis for p in site.reads}.items():
        total += row_view(model.get_parameter(name).detach(), axis).abs().double().sum(dim=1).cpu()
    return total.numpy()


def _relative_degree(model: nn.Module, site: Site, live: np.ndarray) -> np.ndarray:
    """Return (live,) the share of each live unit's matrix entries at or above the median of their tensor.

    Units that are gone count nowhere, so that it makes no difference whether they were zeroed or cut out.
    The median is that of at most 65,536 evenly spaced entries: sorting millions at every decision
    would cost more than all the rest of it.
    """
    linked, entries = torch.zeros(live.size), 0
    if live.size == 0:
        return linked.numpy()
    pieces = {(p.param, p.axis): p for p in site.slices if len(p.shape) == 2}
    for name, axis in pieces:
        tensor = row_view(model.get_parameter(name).detach(), axis)
        tensor = tensor[torch.from_numpy(live).to(tensor.device)].float().abs()
        if site.kind == "input_dim":  # columns of heads that are gone
            tensor = tensor[:, tensor.any(dim=0)]
        flat = tensor.reshape(-1)
        if not flat.numel():
            continue
        middle = flat[:: max(1, flat.numel() // 65536)].median()
        linked += tensor.ge_(middle).sum(dim=1).cpu()
        entries += tensor.shape[1]
    return (linked / max(entries, 1)).double().numpy()

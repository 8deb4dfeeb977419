"""Which units of one site stay: the views that a decision takes of a live model, and the choice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from topoprune.extraction import consumer_blocks, named_tensors, site_graph, unit_energy
from topoprune.graph import Graph, Site
from topoprune.sparsity import row_view
from topoprune.train.budget_recipe import BudgetRecipe
from topoprune_solvers import SoftDomination, Solution, Status
from topoprune_solvers import solve as solve_problem

__all__ = ["SiteView", "choose", "needs_moment", "view_site"]


@dataclass(frozen=True, eq=False)
class SiteView:
    """What a decision sees of the live units of one site.

    Args:
        site: as it is today. at: (live,) positions of the live units in it.
        graph: similarity of the live units. importance: (live,) >= 0.
        moment: (features, features) second moment of the consumer's inputs, today's features; None if only its
            diagonal was collected, or nothing.
    """

    site: Site
    at: np.ndarray
    graph: Graph
    importance: np.ndarray
    moment: torch.Tensor | None = None


def needs_moment(site: Site, recipe: BudgetRecipe) -> bool:
    """Whether the choice of units needs the whole second moment of the consumer's inputs, not its diagonal alone."""
    return site.kind in ("head", "kv_group")


def view_site(
    model: nn.Module, site: Site, at: np.ndarray, moment: torch.Tensor | None, recipe: BudgetRecipe
) -> SiteView:
    """Return the view of one site.

    Args:
        model: live. site: as it is today. at: (live,) positions of the live units in it.
        moment: of the consumer's inputs, see `SiteView`; (features,) where only the diagonal was collected;
            None for input dimensions.
        recipe: gives the scores.

    Raises:
        ValueError: scores that are not finite.
    """
    if site.kind == "input_dim":
        score = _group_norms(model, site)
        return SiteView(site, at, _no_edges(at.size), _attach(model, site, score, at, recipe))
    assert moment is not None
    tensors = named_tensors(model)
    energy = unit_energy(consumer_blocks(tensors, site), moment).double().cpu().numpy()
    full = moment if moment.ndim == 2 else None
    if site.kind == "neuron":
        return SiteView(site, at, _no_edges(at.size), _attach(model, site, energy, at, recipe), full)
    distance = site_graph(tensors, site, "output-gram", moment).to_dense()[np.ix_(at, at)]
    _require_finite(site, distance)
    return SiteView(site, at, Graph.from_dense(distance, normalised=True), energy[at], full)


def choose(view: SiteView, count: int, recipe: BudgetRecipe, seed: int) -> Solution:
    """Return which `count` of the live units stay."""
    graph, importance = view.graph, view.importance
    if count == 0:  # a layer may lose all its heads; no domination problem has an answer then
        none = np.zeros(importance.size, dtype=bool)
        return Solution(none, 0.0, "max", Status.FEASIBLE, "budget", dominator=none.astype(int) - 1,
                        dominator_distance=np.full(importance.size, np.inf))  # fmt: skip
    problem = SoftDomination(graph.indptr, graph.indices, graph.weight, k=count, importance=importance)
    solver = recipe.solver if view.site.kind in ("head", "kv_group") else "greedy"
    return solve_problem(problem, solver, seed=seed)


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

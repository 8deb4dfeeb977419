"""What to do during training, as frozen configuration: `Recipe.neuroprune` and `Recipe.budget`."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Literal

import numpy as np

from topoprune.budgets import check_rounding
from topoprune.graph import Graph
from topoprune.planning import resolve_theta
from topoprune.repair import Merge

__all__ = ["BudgetRecipe", "NeuroPruneRecipe", "Recipe"]


@dataclass(frozen=True)
class NeuroPruneRecipe:
    """NeuroPrune, Alg. 1-3: Eq. 2 on attention, Eq. 1 on FFNs, heads decided after each epoch.

    Args:
        alpha: strength of Eq. 2 (group sparsity over the rows of [Q; K; V]).
        beta: strength of Eq. 1 (attachment-weighted l1 over FFN rows).
        theta: heads closer than this (max |A_i - A_j|) are redundant; a number as in the
            paper, or ``"auto:q"``, the q-quantile of each layer's distances.
        epsilon: an entry below it counts as a missing link in Eq. 1.
        eq1: reading of Eq. 1: ``"a"`` n/d, ``"b"`` 1/(1 - n/d + 0.01).
        penalty: ``"proximal"`` (decoupled steps, exact zeros, any optimizer) or ``"loss"``
            (the paper's form: subgradients join the loss gradient before the step).
        prox_scale: proximal step = lr * strength (``"lr"``) or strength (``"absolute"``).
        merge: ``"paper"`` (FFN input columns of a dominated head join its dominator's) or ``"none"``.

    Raises:
        ValueError: a negative or non-finite number, or an unknown choice.

    References: Dhurandhar et al., NeuroPrune, Findings of ACL 2024, arXiv 2404.01306.
    """

    alpha: float
    beta: float
    theta: float | str
    _: KW_ONLY
    epsilon: float = 1e-4
    eq1: Literal["a", "b"] = "b"
    penalty: Literal["proximal", "loss"] = "proximal"
    prox_scale: Literal["lr", "absolute"] = "lr"
    merge: Merge = "paper"

    def __post_init__(self) -> None:
        _check_strengths(self, "alpha", "beta", "epsilon")
        resolve_theta(self.theta, Graph.from_edges(2, np.array([[0, 1]])))  # form and sign only
        _one_of("eq1", self.eq1, ("a", "b"))
        _one_of("penalty", self.penalty, ("proximal", "loss"))
        _one_of("prox_scale", self.prox_scale, ("lr", "absolute"))
        _one_of("merge", self.merge, ("none", "paper"))

    @property
    def faithful(self) -> bool:
        """True for the paper's own form: penalties in the loss, a numeric theta, its merge."""
        return self.penalty == "loss" and not isinstance(self.theta, str) and self.merge == "paper"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {"method": "neuroprune", **asdict(self)}


@dataclass(frozen=True)
class BudgetRecipe:
    """Ask for what you want and get exactly that at the end of a cubic ramp.

    Args:
        sparsity: share of the attention and FFN matrix parameters to remove, in [0, 1).
            ``unit``: as whole heads (or KV groups) and FFN neurons, met within one unit;
            ``edge``: as single weights, met exactly.
        heads: how many heads (or KV groups) stay in the whole model, met exactly. With
            `sparsity`, neurons make up the rest; alone, only heads go.
        granularity: ``"unit"`` (removable structures) or ``"edge"`` (weight masks from
            attachment-weighted edge selection).
        input_dims: share of each attention's input dimensions to zero besides. They can be
            gathered, not removed, so they do not count towards `sparsity`.
        ramp: first and last decision, as shares of training; between them sparsity rises
            as ``s (1 - (1 - t)^3)``.
        solves: number of decisions along the ramp.
        attachment: strength of preferential attachment in the scores of neurons, input
            dimensions and edges, in units of the mean score.
        eq1: reading of Eq. 1 that gives the degree cost.
        repair: which consumers are refitted by least squares when units go.
        ridge: of the repair, relative to the mean of the moment's diagonal.
        tokens_per_unit: calibration tokens from training forwards, per input feature.
        solver: registry name of the soft-domination solver for heads.
        rounding: in the end keep a number of features (units times their width) in every site that is a
            multiple of this (8, 16, 32, ...), as fast matrix kernels like it. At least `sparsity` is then removed,
            and less than one such multiple more. `heads` must allow for it.

    Raises:
        ValueError: neither sparsity nor heads, numbers out of range, or choices that exclude each other.
    """

    sparsity: float | None = None
    _: KW_ONLY
    heads: int | None = None
    granularity: Literal["unit", "edge"] = "unit"
    input_dims: float = 0.0
    ramp: tuple[float, float] = (0.1, 0.6)
    solves: int = 6
    attachment: float = 0.1
    eq1: Literal["a", "b"] = "b"
    repair: Literal["heads", "all", "none"] = "heads"
    ridge: float = 1e-4
    tokens_per_unit: int = 4
    solver: str = "exact"
    rounding: int | None = None

    def __post_init__(self) -> None:
        check_rounding(self.rounding)
        if self.sparsity is None and self.heads is None:
            raise ValueError("give sparsity= (share to remove, in [0, 1)) or heads= (how many stay), or both")
        if self.sparsity is not None and not (math.isfinite(self.sparsity) and 0 <= self.sparsity < 1):
            raise ValueError(f"sparsity is {self.sparsity!r}; the share to remove must lie in [0, 1)")
        if self.heads is not None and (
            isinstance(self.heads, bool) or not isinstance(self.heads, int) or self.heads < 0
        ):
            raise ValueError(f"heads is {self.heads!r}; expected how many heads (or KV groups) stay, an integer >= 0")
        _one_of("granularity", self.granularity, ("unit", "edge"))
        _one_of("eq1", self.eq1, ("a", "b"))
        _one_of("repair", self.repair, ("heads", "all", "none"))
        if self.granularity == "edge" and (self.heads is not None or self.input_dims or self.sparsity is None):
            raise ValueError("granularity='edge' takes sparsity= alone; heads= and input_dims= need granularity='unit'")
        if self.granularity == "edge" and self.rounding is not None:
            raise ValueError("rounding= counts the features that units keep; it needs granularity='unit'")
        if not 0 <= self.input_dims < 1:
            raise ValueError(f"input_dims is {self.input_dims!r}; the share of input dimensions to zero lies in [0, 1)")
        start, end = self.ramp
        if not 0 <= start <= end <= 1:
            raise ValueError(f"ramp is {self.ramp!r}; expected 0 <= start <= end <= 1, as shares of training")
        object.__setattr__(self, "ramp", (float(start), float(end)))
        for name in ("solves", "tokens_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected at least 1")
        _check_strengths(self, "attachment", "ridge")

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {"method": "budget", **asdict(self), "ramp": list(self.ramp)}


class Recipe:
    """The two ways to prune while training; both give frozen configuration for a `Pruner`.

    Example:
        >>> Recipe.budget(0.5).sparsity
        0.5
        >>> Recipe.neuroprune(alpha=1e-5, beta=1e-5, theta=0.15, penalty="loss").faithful
        True
    """

    neuroprune = NeuroPruneRecipe
    budget = BudgetRecipe

    @staticmethod
    def from_dict(data: dict[str, Any]) -> NeuroPruneRecipe | BudgetRecipe:
        """Rebuild a recipe from its `to_dict`; ValueError for an unknown method."""
        fields = dict(data)
        method = fields.pop("method", None)
        if method == "neuroprune":
            return NeuroPruneRecipe(**fields)
        if method == "budget":
            return BudgetRecipe(**fields)
        raise ValueError(f"unknown method {method!r}; expected 'neuroprune' or 'budget'")


def _check_strengths(recipe: object, *names: str) -> None:
    for name in names:
        value = getattr(recipe, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}; expected a finite number >= 0")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")

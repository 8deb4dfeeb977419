"""What to do during training, as frozen configuration: `Recipe.neuroprune` and `Recipe.budget`."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, Literal

import numpy as np

from topoprune.graph import Graph
from topoprune.planning import resolve_theta
from topoprune.repair import Merge
from topoprune.train.budget_recipe import BudgetRecipe, Distillation
from topoprune.train.checks import check_strengths, one_of
from topoprune.train.fixed import FixedPlanRecipe, fixed_plan
from topoprune.train.presets import balanced, best, fast, preset

__all__ = ["BudgetRecipe", "Distillation", "NeuroPruneRecipe", "Recipe"]


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
        solve_lag: optimizer steps between the end of the epoch that heads are compared at and the step they are
            pruned after; the solver runs beside training meanwhile. Where training would end before, heads are
            pruned at once. Needs ``total_steps``.

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
    solve_lag: int = 0

    def __post_init__(self) -> None:
        check_strengths(self, "alpha", "beta", "epsilon")
        if self.solve_lag < 0:
            raise ValueError(f"solve_lag is {self.solve_lag!r}; expected optimizer steps >= 0")
        resolve_theta(self.theta, Graph.from_edges(2, np.array([[0, 1]])))  # form and sign only
        one_of("eq1", self.eq1, ("a", "b"))
        one_of("penalty", self.penalty, ("proximal", "loss"))
        one_of("prox_scale", self.prox_scale, ("lr", "absolute"))
        one_of("merge", self.merge, ("none", "paper"))

    @property
    def faithful(self) -> bool:
        """True for the paper's own form: penalties in the loss, a numeric theta, its merge."""
        return self.penalty == "loss" and not isinstance(self.theta, str) and self.merge == "paper"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description."""
        return {"method": "neuroprune", **asdict(self)}


class Recipe:
    """The ways to prune while training; all give frozen configuration for a `Pruner`.

    `fixed` holds a plan that was made before: to fine-tune a pruned model further or on another task.

    `fast`, `balanced` and `best` are ready-made budget recipes, in rising cost; `preset` finds them by name.

    Example:
        >>> Recipe.budget(0.5).sparsity
        0.5
        >>> Recipe.balanced(0.5).allocation
        'output-kl'
        >>> Recipe.neuroprune(alpha=1e-5, beta=1e-5, theta=0.15, penalty="loss").faithful
        True
    """

    neuroprune = NeuroPruneRecipe
    budget = BudgetRecipe
    fast = staticmethod(fast)
    balanced = staticmethod(balanced)
    best = staticmethod(best)
    preset = staticmethod(preset)
    fixed = staticmethod(fixed_plan)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> NeuroPruneRecipe | BudgetRecipe | FixedPlanRecipe:
        """Rebuild a recipe from its `to_dict`; ValueError for an unknown method."""
        fields = dict(data)
        method = fields.pop("method", None)
        if method == "neuroprune":
            return NeuroPruneRecipe(**fields)
        if method == "budget":
            return BudgetRecipe(**fields)
        if method == "fixed":
            return FixedPlanRecipe.from_dict(fields)
        raise ValueError(f"unknown method {method!r}; expected 'neuroprune', 'budget' or 'fixed'")

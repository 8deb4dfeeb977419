"""Hold a plan that was made before: fine-tune a pruned model further, on the same task or on another."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from topoprune.architectures import find_sites
from topoprune.architectures.find import compacted_sites
from topoprune.graph import Site
from topoprune.masks import check_edges, edge_masks, fit_sites
from topoprune.planning import Plan
from topoprune.train.body import Body
from topoprune.train.checks import one_of
from topoprune.train.decision import Decision
from topoprune_solvers import Solution, Status

__all__ = ["FixedPlanDriver", "FixedPlanRecipe", "fixed_plan", "plan_on_model", "zero_units"]


@dataclass(frozen=True, eq=False)
class FixedPlanRecipe:
    """Keep the masks of a plan from the first step to the last; nothing is decided any more.

    Args:
        plan: what stays: heads, neurons, input dimensions, single weights.
        on: ``"pruned"``: the model is one that this plan has pruned, so its weights are zero where the plan says
            and nowhere else unit for unit; anything else is refused. ``"dense"``: zero them first.
        path: the file that the plan came from, if that is what a description should name.

    Raises:
        ValueError: not a plan, a plan of bare graphs, or an unknown choice.

    Example:
        >>> from topoprune.planning import Plan
        >>> FixedPlanRecipe(Plan((), {})).to_dict()["on"]
        'pruned'
    """

    plan: Plan
    _: KW_ONLY
    on: Literal["pruned", "dense"] = "pruned"
    path: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.plan, Plan):
            raise ValueError(f"plan is a {type(self.plan).__name__}; expected a Plan, or the path of a saved one")
        one_of("on", self.on, ("pruned", "dense"))
        bare = [site.name for site in self.plan.sites if site.kind == "node"]
        if bare:
            raise ValueError(f"this plan decides on the nodes of a bare graph ({bare[0]!r}), not on units of a model")

    @property
    def digest(self) -> str:
        """Hex digest of the structure the plan is made for and of what stays."""
        told = hashlib.sha256(self.plan.structure_digest.encode())
        for name in sorted(self.plan.solutions):
            told.update(name.encode() + np.packbits(self.plan.keep(name)).tobytes())
        return told.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description: the plan by its path if it has one, else what it keeps."""
        plan = str(self.path) if self.path is not None else _embedded(self.plan)
        return {"method": "fixed", "on": self.on, "plan": plan, "digest": self.digest}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FixedPlanRecipe:
        """Rebuild a recipe from its `to_dict`.

        Raises:
            FileNotFoundError: the plan's file is gone.
            ValueError: the file holds another plan by now.
        """
        plan, on = data["plan"], data.get("on", "pruned")
        recipe = fixed_plan(plan, on=on) if isinstance(plan, str) else cls(_extracted(plan), on=on)
        wanted = data.get("digest", recipe.digest)
        if wanted != recipe.digest:
            raise ValueError(f"{plan if isinstance(plan, str) else 'the plan'} is not the plan that was meant (digests "
                             f"{recipe.digest[:12]} and {wanted[:12]}); give the one the run began with")  # fmt: skip
        return recipe

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FixedPlanRecipe) and (self.digest, self.on) == (other.digest, other.on)

    def __hash__(self) -> int:
        return hash((self.digest, self.on))


def fixed_plan(plan: Plan | str | os.PathLike[str], *, on: Literal["pruned", "dense"] = "pruned") -> FixedPlanRecipe:
    """Return the recipe that holds a plan, given as such or as the file `Plan.save` wrote."""
    if isinstance(plan, (str, os.PathLike)):
        path = Path(plan).expanduser().resolve()
        return FixedPlanRecipe(Plan.load(path), on=on, path=str(path))
    return FixedPlanRecipe(plan, on=on)


def plan_on_model(model: nn.Module, recipe: FixedPlanRecipe, sites: tuple[Site, ...] | None = None) -> Plan:
    """Return the recipe's plan over all sites of a live model, in the model's own parameter names.

    Args:
        model: unwrapped. sites: its sites, where they were given by hand.

    Raises:
        ValueError: the plan is of another model, or with ``on="pruned"`` the model's zeros are not the plan's.
    """
    plan = recipe.plan
    if sites is not None:
        given = {site.name: site for site in sites}
        missing = [site.name for site in plan.sites if site.name not in given]
        if missing:
            raise ValueError(f"the plan decides on {missing[:3]}, which are not among the given sites")
        fitted = tuple(given[site.name] for site in plan.sites)
    else:
        fitted = _fitted(model, plan)
        sites = _all_sites(model, fitted)
    check_edges(model, fitted, plan)
    masks = {name: np.array(keep) for name, keep in edge_masks(fitted, plan).items()}  # plans are read-only
    if recipe.on == "pruned":
        _check_units(model, fitted, plan)
        _check_edges_zero(model, masks)
    renamed = dict(zip(plan.edge_axes, masks, strict=True))
    solutions = {renamed.get(name, name): solution for name, solution in plan.solutions.items()}
    axes = {renamed[name]: axis for name, axis in plan.edge_axes.items()}
    return Plan(sites, solutions, axes, {**plan.request, "held": recipe.digest}, joint=plan.joint)


class FixedPlanDriver:
    """Decides nothing, on behalf of a `Pruner` that holds a plan."""

    def __init__(
        self,
        body: Body,
        recipe: FixedPlanRecipe,
        total_steps: int,
        steps_per_epoch: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.body, self.recipe = body, recipe

    def close(self) -> None:
        """Nothing to remove."""

    def follow(self, before: Mapping[str, np.ndarray]) -> None:
        """Nothing to adapt."""

    def collected_seconds(self) -> float:
        """Nothing is collected in the forwards."""
        return 0.0

    def last_decision(self) -> int:
        """Return 0: there is none."""
        return 0

    def due(self, step: int) -> bool:
        """Never."""
        return False

    def watch(self, step: int) -> None:
        """Nothing to collect."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """No penalties."""

    def after_step(self, learning_rates: Mapping[nn.Parameter, float]) -> None:
        """No proximal steps."""

    def decide(self, step: int, plan: Plan, seed: int) -> Decision:
        """Return the plan that is in force."""
        return Decision(plan)

    def state_dict(self) -> dict[str, Any]:
        """Nothing beyond the plan and the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def zero_units(model: nn.Module, site: Site) -> np.ndarray:
    """Return (n_units,) bool: True where every weight a unit reads or writes with is exactly 0.0.

    Complexity: one pass over the site's tensors.
    """
    params = dict(model.named_parameters())
    zero = torch.ones(site.n_units, dtype=torch.bool)
    for piece in site.slices:
        own = params[piece.param].detach().narrow(piece.axis, piece.offset, site.n_units * piece.width)
        rows = own.movedim(piece.axis, 0).reshape(site.n_units, -1)
        zero &= ~rows.ne(0).any(dim=1).cpu()
    return zero.numpy()


def _fitted(model: nn.Module, plan: Plan) -> tuple[Site, ...]:
    try:
        return fit_sites(model, plan.sites)
    except ValueError as error:
        if compacted_sites(model):
            raise ValueError(
                "this model is compacted: what its plan pruned was cut out of it, so no mask is left to keep. Train it "
                "as it is, without a plan: what is gone stays gone"
            ) from error
        raise


def _all_sites(model: nn.Module, fitted: tuple[Site, ...]) -> tuple[Site, ...]:
    """Return all sites of the model, so that shares count the whole of it; the plan's where they are others."""
    if not hasattr(model, "config"):
        return fitted
    found = {site.name: site for site in find_sites(model)}
    return tuple(found.values()) if all(found.get(site.name) == site for site in fitted) else fitted


def _check_units(model: nn.Module, sites: tuple[Site, ...], plan: Plan) -> None:
    for site in sites:
        if site.name not in plan.solutions or site.name in plan.edge_axes:
            continue
        keep, zero = plan.keep(site.name), zero_units(model, site)
        alive = int((~zero & ~keep).sum())
        if alive:
            raise ValueError(
                f"this model is not one that the plan has pruned: {alive} of the {int((~keep).sum())} units it prunes "
                f"in {site.name!r} have weights here. Give the model that was saved with the plan, or zero them first "
                "with Recipe.fixed(plan, on='dense')"
            )
        # All inputs of an attention without heads are zeros, whatever was decided on them.
        surplus = int((zero & keep).sum()) if site.kind != "input_dim" else 0
        if surplus:
            raise ValueError(
                f"this model has been pruned beyond this plan: {surplus} of the {int(keep.sum())} units it keeps in "
                f"{site.name!r} are zero here. Give the plan of the run that wrote the model"
            )


def _check_edges_zero(model: nn.Module, masks: Mapping[str, np.ndarray]) -> None:
    for name, keep in masks.items():
        weight = model.get_parameter(name).detach()
        alive = int((weight.ne(0) & ~torch.from_numpy(keep).to(weight.device)).sum())
        if alive:
            raise ValueError(
                f"this model is not one that the plan has pruned: {alive} of the {int((~keep).sum())} weights it "
                f"prunes in {name!r} are not zero here. Give the model that was saved with the plan, or zero them "
                "first with Recipe.fixed(plan, on='dense')"
            )


def _embedded(plan: Plan) -> dict[str, Any]:
    bits = {name: base64.b64encode(np.packbits(plan.keep(name)).tobytes()).decode() for name in plan.solutions}
    return {
        "sites": json.loads(json.dumps([site.to_dict() for site in plan.sites])),
        "keep": {name: [int(plan.keep(name).size), text] for name, text in bits.items()},
        "edge_axes": {name: [axis, list(shape)] for name, (axis, shape) in plan.edge_axes.items()},
    }


def _extracted(data: Mapping[str, Any]) -> Plan:
    solutions = {}
    for name, (size, text) in data["keep"].items():
        packed = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
        keep = np.unpackbits(packed, count=size).astype(bool)
        solutions[name] = Solution(keep, float(keep.sum()), "min", Status.FEASIBLE, "given")
    axes = {name: (axis, (shape[0], shape[1])) for name, (axis, shape) in data["edge_axes"].items()}
    return Plan(tuple(Site.from_dict(site) for site in data["sites"]), solutions, axes)

"""How ``topoprune train`` prunes: from options to a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from topoprune.cli.train_options import METHODS, flag, recipe_fields

if TYPE_CHECKING:
    from topoprune.train import BudgetRecipe, NeuroPruneRecipe
    from topoprune.train.fixed import FixedPlanRecipe

__all__ = ["make_recipe"]

_BUDGETS = ("sparsity", "heads", "parameters", "flops", "latency")


def make_recipe(given: Mapping[str, Any]) -> NeuroPruneRecipe | BudgetRecipe | FixedPlanRecipe | None:
    """Return the recipe that was asked for; None trains densely.

    Raises:
        FileNotFoundError: no such plan.
        ValueError: an unknown method, options that belong to another one, or numbers out of range.
    """
    fields = recipe_fields()
    settings = {name: given[name] for names in fields.values() for name in names if name in given}
    if given.get("keep_masks") or "plan" in given:
        return _kept(given, settings)
    method = given.get("method", "budget")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; available: {', '.join(METHODS)}")
    if "preset" in given and method != "budget":
        raise ValueError(f"--preset has no effect with --method {method}; it belongs to budget")
    foreign = [name for name in settings if name not in fields[method]]
    if foreign:
        owners = [other for other, names in fields.items() if foreign[0] in names]
        raise ValueError(
            f"{flag(foreign[0])} has no effect with --method {method}; it belongs to {' and '.join(owners)}"
        )
    if given.get("compact") and (method == "dense" or settings.get("granularity", "unit") != "unit"):
        raise ValueError("--compact has nothing to cut out with --method dense or a --granularity other than unit")
    if method == "dense":
        return None
    return _budget(settings, given.get("preset")) if method == "budget" else _neuroprune(settings)


def _budget(settings: dict[str, Any], preset: str | None) -> BudgetRecipe:
    from topoprune.train import BudgetRecipe, Distillation

    if not any(name in settings for name in _BUDGETS):
        settings["sparsity"] = 0.5
    if "parameters" in settings:
        settings["parameters"] = _number("parameters", settings["parameters"])
    for name, kind in (("ramp", float), ("shape", int)):
        if name in settings:
            settings[name] = _pair(name, settings[name], kind)
    if isinstance(settings.get("distill"), bool):
        settings["distill"] = Distillation() if settings["distill"] else None
    if "solver" in settings:
        from topoprune_solvers import SoftDomination, get_solver

        get_solver(settings["solver"], SoftDomination)  # a wrong name fails here, not at the first decision
    if preset is None:
        return BudgetRecipe(**settings)
    from topoprune import Recipe

    if settings.get("distill", True) is True:
        settings.pop("distill", None)
    return Recipe.preset(preset, **settings)


def _neuroprune(settings: dict[str, Any]) -> NeuroPruneRecipe:
    from topoprune.train import NeuroPruneRecipe

    missing = [flag(name) for name in ("alpha", "beta") if name not in settings]
    if missing:
        raise ValueError(
            f"--method neuroprune needs {' and '.join(missing)}: penalty strengths without a universal value (the demo "
            "uses --alpha 20 --beta 1.5 at a learning rate of 2e-4; more steps need less)"
        )
    theta = settings.pop("theta", "auto:0.02")
    with suppress(ValueError):  # auto:q; the recipe says if it is neither
        theta = float(theta)
    return NeuroPruneRecipe(theta=theta, **settings)


def _kept(given: Mapping[str, Any], settings: Mapping[str, Any]) -> FixedPlanRecipe | None:
    """Return the recipe that holds an earlier plan; None for a compacted model, from which the units are gone."""
    stray = [name for name in ("method", "preset", "compact") if given.get(name)] + list(settings)
    if stray:
        raise ValueError(f"{flag(stray[0])} has no effect with --keep-masks or --plan, which decide nothing anew")
    if "model" not in given:
        raise ValueError("--keep-masks needs --model: the folder of a run that has pruned")
    from topoprune.tasks.transfer import kept_masks

    return kept_masks(given["model"], given.get("plan"))


def _number(name: str, value: Any) -> float | int:
    """Return a share as a float, a number as an int."""
    try:
        return int(value) if isinstance(value, int) or str(value).isdecimal() else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{flag(name)} is {value!r}; expected a share in (0, 1] or a whole number") from None


def _pair(name: str, value: Any, kind: type[Any]) -> tuple[Any, Any]:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        first, second = (kind(part) for part in parts)
    except (TypeError, ValueError):
        raise ValueError(f"{flag(name)} is {value!r}; expected two numbers such as {_EXAMPLES[name]}") from None
    return first, second


_EXAMPLES = {"ramp": "0.1,0.6", "shape": "8,128"}

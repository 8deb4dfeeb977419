"""``topoprune prune --recipe``: from its flags to a recipe that runs without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from topoprune.cli.sources import share_or_count

if TYPE_CHECKING:
    from topoprune.train import BudgetRecipe, NeuroPruneRecipe

__all__ = ["RECIPES", "check_flags", "recipe_of"]

PRESETS = ("fast", "balanced", "best")
RECIPES = ("budget", *PRESETS, "neuroprune")
_BUDGET = (
    "sparsity",
    "heads",
    "parameters",
    "flops",
    "latency",
    "shape",
    "granularity",
    "allocation",
    "floor",
    "heads_by",
    "neurons_by",
    "input_dims",
    "repair",
    "rounding",
    "stages",
)
_NEUROPRUNE = ("theta",)
_SHARES = ("budget", "heads", "neurons", "merge", "measure", "rounding")  # without --recipe


def check_flags(name: str | None, given: dict[str, Any]) -> None:
    """Raise ValueError for an unknown recipe, or for flags that have no effect with it.

    Args:
        name: of the recipe, None without one. given: flag (as a Python name) -> value, those that were given.
    """
    if name is not None and name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; available: {', '.join(RECIPES)}")
    allowed = _SHARES if name is None else _NEUROPRUNE if name == "neuroprune" else _BUDGET
    for flag in given:
        if flag in allowed:
            continue
        if name is None:
            owner = "--recipe neuroprune" if flag in _NEUROPRUNE else f"--recipe ({', '.join(RECIPES[:-1])})"
        elif flag in _NEUROPRUNE:
            owner = "--recipe neuroprune"
        else:
            owner = "the other recipes" if flag in _BUDGET else "pruning by a share of every layer, without --recipe"
        where = "without --recipe" if name is None else f"with --recipe {name}"
        raise ValueError(f"--{flag.replace('_', '-')} has no effect {where}; it belongs to {owner}")


def recipe_of(name: str, given: dict[str, Any]) -> tuple[BudgetRecipe | NeuroPruneRecipe, str]:
    """Return a recipe for calibration data alone, and a sentence on what was left out of a preset ("" for nothing).

    Args:
        name: one of `RECIPES`. given: as for `check_flags`, which must have passed.

    Raises:
        ValueError: values that mean nothing.
    """
    from topoprune import Recipe
    from topoprune.oneshot_recipe import calibration_only, training_fields

    if name == "neuroprune":
        theta = given.get("theta", "auto:0.02")
        return Recipe.neuroprune(0.0, 0.0, _number_or_text(theta)), ""
    fields: dict[str, Any] = {key: value for key, value in given.items() if key != "stages"}
    for key in ("parameters", "heads"):
        if key in fields:
            fields[key] = share_or_count(f"--{key}", fields[key])
    if "shape" in fields:
        fields["shape"] = _shape(fields["shape"])
    if not any(key in fields for key in ("sparsity", "heads", "parameters", "flops", "latency")):
        raise ValueError(
            f"--recipe {name} needs a budget: --sparsity, --heads, --parameters, --flops or --latency (or --heads "
            "beside another)"
        )
    if name == "budget":
        # No training takes over what is cut, so all that can be refitted is.
        return Recipe.budget(**{"repair": "all", **fields}), ""
    repair = {"repair": fields.pop("repair"), "final_repair": None} if "repair" in fields else {}
    preset = Recipe.preset(name, **fields, **repair)
    left_out = training_fields(preset)
    text = f"--recipe {name} without training: {', '.join(left_out)} left out" if left_out else ""
    return calibration_only(preset), text


def _number_or_text(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def _shape(text: str) -> tuple[int, ...]:
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--shape is {text!r}; expected batch size and length, such as 8x128")
    return tuple(int(part) for part in parts)

"""Three ready-made budget recipes: `fast`, `balanced`, `best`.

All three meet the same budgets exactly; they differ in what they spend on choosing units and on healing the model.
What they set can be overridden field by field, and none has a penalty strength or a distance to sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from topoprune.train.budget_recipe import BudgetRecipe, Distillation
from topoprune.train.checks import one_of

__all__ = ["PRESETS", "balanced", "best", "fast", "preset"]


def fast(sparsity: float | None = None, **fields: Any) -> BudgetRecipe:
    """Return a recipe that costs next to nothing beside training: for trials, and where steps are few.

    Every layer loses the same share, in three decisions; neurons by energy and attachment (a diagonal is collected,
    no Gram matrix), heads by soft domination; the last decision refits the attention outputs.

    Cost: at each decision one Gram matrix for each attention layer, one vector for each FFN; no extra forward, no
    second model. Weak where layers differ a lot in what they can lose.

    Args:
        sparsity: share of the weights to remove; or another budget by name (``heads=``, ``parameters=``,
            ``flops=``, ``latency=``).
        fields: any field of `BudgetRecipe`; they win over the preset's.

    Raises:
        ValueError: no budget, an unknown field, or what `BudgetRecipe` refuses.

    Example:
        >>> fast(0.5).solves, fast(0.5, solves=5).solves, fast(heads=100).allocation
        (3, 5, 'uniform')
    """
    return _made("fast", sparsity, fields, {"solves": 3, "repair": "none", "final_repair": "heads"})


def balanced(sparsity: float | None = None, **fields: Any) -> BudgetRecipe:
    """Return a recipe for everyday use: layers are measured, and the last decision repairs everything.

    Layers give up what hurts the output least: the divergence of the output when one site is cut is measured at the
    first decision and once more on the way, and a knapsack shares the budget out. Six decisions; attention outputs
    are refitted at each, FFN outputs too at the last, from where the rest of training recovers.

    Cost: twice, a few forwards of one batch for every site; before the last decision a Gram matrix for each FFN
    (4 bytes times the square of its neurons). Between decisions a step costs what it costs with `fast`.

    Args: as `fast`. Raises: as `fast`.

    Example:
        >>> recipe = balanced(0.5)
        >>> recipe.allocation, recipe.remeasure, recipe.final_repair
        ('output-kl', 2, 'all')
    """
    return _made(
        "balanced",
        sparsity,
        fields,
        {"allocation": "output-kl", "remeasure": 2, "solves": 6, "repair": "heads", "final_repair": "all"},
    )


def best(sparsity: float | None = None, **fields: Any) -> BudgetRecipe:
    """Return a recipe that spends what it takes: for a model that will be used, and where much goes.

    As `balanced`, with ten decisions of which five measure the layers afresh; neurons by the damage that is left
    after repair (inverse-Gram elimination), every decision repairs everything, and the model learns from the dense
    one as well, from its output and its layers.

    Cost: besides what `balanced` costs, the dense model's weights in memory and its forward at every step (about
    1.4 times the time of a step), and a Gram matrix for each FFN at every decision. The teacher is the model as the
    `Pruner` gets it: fine-tune it on the task first, or pass ``teacher=``, or say ``distill=None``.

    Args: as `fast`. Raises: as `fast`.

    Example:
        >>> recipe = best(0.8, solves=12)
        >>> recipe.solves, recipe.neurons_by, recipe.distill.logits
        (12, 'repaired', 0.5)
    """
    return _made(
        "best",
        sparsity,
        fields,
        {
            "allocation": "output-kl",
            "remeasure": 5,
            "solves": 10,
            "neurons_by": "repaired",
            "repair": "all",
            "final_repair": "all",
            "distill": Distillation(logits=0.5, temperature=2.0, hidden=0.1),
        },
    )


PRESETS: dict[str, Callable[..., BudgetRecipe]] = {"fast": fast, "balanced": balanced, "best": best}


def preset(name: str, sparsity: float | None = None, **fields: Any) -> BudgetRecipe:
    """Return the preset of a name: ``"fast"``, ``"balanced"`` or ``"best"``.

    Raises:
        ValueError: an unknown name, or what the preset refuses.
    """
    one_of("preset", name, tuple(PRESETS))
    return PRESETS[name](sparsity, **fields)


def _made(name: str, sparsity: float | None, given: dict[str, Any], own: dict[str, Any]) -> BudgetRecipe:
    known = BudgetRecipe.names()
    unknown = [field for field in given if field not in known]
    if unknown:
        raise ValueError(f"the preset {name!r} has no field {unknown[0]!r}; known: {', '.join(known)}")
    if given.get("granularity", "unit") != "unit":  # single weights: layers and units are not what is chosen
        own = {field: value for field, value in own.items() if field not in ("allocation", "remeasure", "neurons_by")}
    return BudgetRecipe(**{**own, "sparsity": sparsity, **given})

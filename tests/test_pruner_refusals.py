"""T4 and T9: what a pruner refuses before anything happens, and where training that diverges stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.masktools import random_plan, untouched
from tests.prunertools import UNDEFINED_PAPER_MERGE, adamw, train
from tests.tiny import build
from topoprune import Pruner, Recipe, apply

BAD_RECIPES: dict[str, tuple[Callable[[], Any], str]] = {
    "neither": (lambda: Recipe.budget(), "give sparsity="),
    "sparsity 1": (lambda: Recipe.budget(1.0), "1.0"),
    "sparsity < 0": (lambda: Recipe.budget(-0.1), "-0.1"),
    "sparsity nan": (lambda: Recipe.budget(math.nan), "nan"),
    "heads < 0": (lambda: Recipe.budget(heads=-1), "-1"),
    "heads 2.5": (lambda: Recipe.budget(heads=2.5), "2.5"),  # type: ignore[arg-type]
    "heads True": (lambda: Recipe.budget(heads=True), "True"),
    "granularity": (lambda: Recipe.budget(0.5, granularity="row"), "'row'.*unit, edge"),  # type: ignore[arg-type]
    "edge with heads": (lambda: Recipe.budget(0.5, heads=3, granularity="edge"), "takes sparsity= alone"),
    "input_dims": (lambda: Recipe.budget(0.5, input_dims=1.0), "1.0"),
    "ramp": (lambda: Recipe.budget(0.5, ramp=(0.6, 0.1)), r"\(0\.6, 0\.1\)"),
    "solves": (lambda: Recipe.budget(0.5, solves=0), "solves"),
    "attachment": (lambda: Recipe.budget(0.5, attachment=-1.0), "attachment is -1.0"),
    "ridge": (lambda: Recipe.budget(0.5, ridge=math.inf), "ridge is inf"),
    "repair": (lambda: Recipe.budget(0.5, repair="some"), "'some'.*heads, all, none"),  # type: ignore[arg-type]
    "alpha": (lambda: Recipe.neuroprune(-1.0, 0.0, 0.1), "alpha is -1.0"),
    "beta": (lambda: Recipe.neuroprune(0.0, math.nan, 0.1), "beta is nan"),
    "theta": (lambda: Recipe.neuroprune(0.0, 0.0, -0.1), "-0.1"),
    "theta auto": (lambda: Recipe.neuroprune(0.0, 0.0, "auto:2"), "auto:2"),
    "eq1": (lambda: Recipe.neuroprune(0.0, 0.0, 0.1, eq1="c"), "'c'.*a, b"),  # type: ignore[arg-type]
    "penalty": (lambda: Recipe.neuroprune(0.0, 0.0, 0.1, penalty="l2"), "'l2'"),  # type: ignore[arg-type]
    "merge": (lambda: Recipe.neuroprune(0.0, 0.0, 0.1, merge="scale"), "'scale'"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_names_the_value(case: str) -> None:
    make, message = BAD_RECIPES[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        (Recipe.budget(0.5), {}, "BudgetRecipe needs total_steps="),
        (Recipe.budget(0.5), {"steps_per_epoch": 5}, "needs total_steps="),
        (Recipe.neuroprune(0.1, 0.1, 0.1), {"total_steps": 5}, "NeuroPruneRecipe needs steps_per_epoch="),
        (Recipe.budget(0.5), {"total_steps": 0}, "total_steps is 0"),
        (Recipe.budget(0.5), {"total_steps": 2.5}, r"total_steps is 2\.5"),
        (Recipe.budget(0.5), {"total_steps": True}, "total_steps is True"),
        (Recipe.budget(0.5), {"total_steps": 9, "steps_per_epoch": -1}, "steps_per_epoch is -1"),
        (Recipe.budget(0.995), {"total_steps": 9}, r"sparsity=99\.5% cannot be reached.*at most \d+"),
        (Recipe.budget(0.1, heads=0), {"total_steps": 9}, "keeping 0 heads already removes"),
        (Recipe.budget(0.9, heads=8), {"total_steps": 9}, "cannot be reached: with 8 heads"),
        (Recipe.budget(heads=9), {"total_steps": 9}, "heads=9 asks for more heads than exist: this model has 8"),
        ("budget", {"total_steps": 9}, r"recipe is 'budget'; use Recipe\.budget"),
    ],
)
def test_what_cannot_work_is_refused_before_training(recipe: Any, more: dict[str, Any], message: str) -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match=message):
        Pruner(model, recipe, **more)


def test_an_unknown_solver_is_refused_before_training() -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match="unknown solver 'gredy'"):
        Pruner(model, Recipe.budget(0.5, solver="gredy"), total_steps=9)


@pytest.mark.parametrize("family", UNDEFINED_PAPER_MERGE)
def test_an_undefined_merge_is_refused_before_training(family: str) -> None:
    model = build(family)
    with untouched(model), pytest.raises(ValueError, match="undefined"):
        Pruner(model, Recipe.neuroprune(0.1, 0.1, 0.1), steps_per_epoch=3)


@pytest.mark.parametrize("recipe", [Recipe.budget(0.5), Recipe.neuroprune(0.1, 0.1, 0.1)])
def test_a_broken_model_is_refused_by_the_name_of_its_tensor(recipe: Any) -> None:
    model = build("bert")
    name = "bert.encoder.layer.1.attention.self.value.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = torch.nan
    with untouched(model), pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Pruner(model, recipe, total_steps=9, steps_per_epoch=3)


def test_foreign_second_and_repeated_attachments_are_refused() -> None:
    model, other = build("bert"), build("bert", seed=1)
    pruner = Pruner(model, Recipe.budget(0.5), total_steps=9)
    with pytest.raises(ValueError, match="none of this model's parameters"):
        pruner.attach(adamw(other))
    optimizer = adamw(model)
    assert pruner.attach(optimizer) is pruner
    with pytest.raises(ValueError, match="attached to an optimizer already"):
        pruner.attach(optimizer)
    with pytest.raises(ValueError, match="already pruned"):
        Pruner(model, Recipe.budget(0.5), total_steps=9)
    with pytest.raises(ValueError, match="already pruned"):
        apply(model, random_plan(model))
    pruner.close()
    with apply(model, random_plan(model)), pytest.raises(ValueError, match="already pruned"):
        Pruner(model, Recipe.budget(0.5), total_steps=9)
    Pruner(model, Recipe.budget(0.5), total_steps=9).close()


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.budget(0.5, ramp=(0.5, 1.0)),
        Recipe.budget(0.5, granularity="edge", ramp=(0.5, 1.0)),
        Recipe.neuroprune(0, 0, 0.1),
    ],
    ids=["unit", "edge", "neuroprune"],
)
def test_training_that_diverges_stops_at_the_decision_with_the_tensors_name(recipe: Any) -> None:
    model = build("bert")
    optimizer = adamw(model)
    pruner = Pruner(model, recipe, total_steps=8, steps_per_epoch=4).attach(optimizer)
    name = "bert.encoder.layer.1.output.dense.weight"

    def poison(step: int) -> None:
        if step == 2:
            with torch.no_grad():
                model.get_parameter(name)[1, 1] = torch.nan
                for parameter in model.parameters():  # only this tensor: the others take no step
                    parameter.requires_grad_(False)
                model.classifier.weight.requires_grad_()

    with pytest.raises(ValueError, match=r"parameter 'bert\.encoder\.layer\.1\.output\.dense\.weight'.*non-finite"):
        train(model, optimizer, range(8), poison)
    assert pruner.history == []


def test_activations_that_overflow_stop_at_the_decision() -> None:
    model = build("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.inf)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    Pruner(model, Recipe.budget(0.5, ramp=(0.2, 1.0)), total_steps=5).attach(optimizer)
    with pytest.raises(ValueError, match=r"not finite|non-finite"):
        train(model, optimizer, range(5))

"""Presets meet their budgets; final repair and recovery: who is refitted when, and never for the worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.masktools import ATTENTION
from tests.prunertools import adamw, batch_of, train
from tests.tiny import FAMILIES, build
from tests.training.steady import still
from topoprune import Pruner, Recipe, find_sites
from topoprune.extraction import GramCollector
from topoprune.repair import repair_damage
from topoprune.train import BudgetRecipe, Distillation
from topoprune.train import budget as driver
from topoprune.train.presets import PRESETS


def run(family: str, recipe: Any, steps: int = 12, **more: Any) -> tuple[nn.Module, Pruner]:
    model = still(build(family))
    optimizer = adamw(model)
    pruner = Pruner(model, recipe, total_steps=steps, **more).attach(optimizer)
    train(model, optimizer, range(steps))
    return model, pruner


def biggest_unit(model: nn.Module) -> float:
    sites = [site for site in find_sites(model) if site.kind == "neuron"]
    total = sum(
        p.numel()
        for n, p in model.named_parameters()
        if n in {x.param for s in find_sites(model) for x in s.tensors} and p.ndim == 2
    )
    return max(site.matrix_parameters_per_unit for site in sites) / total


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", ["bert", "t5", "opt", "llama", "vit", "marian"])
def test_every_preset_meets_its_budget_exactly(family: str, name: str) -> None:
    model = build(family)
    unit = biggest_unit(model)
    heads = sum(site.n_units for site in find_sites(model) if site.kind in ATTENTION) // 2
    recipe = Recipe.preset(name, 0.5, heads=heads, solves=3, floor=0.0)
    _, pruner = run(family, recipe)
    assert abs(pruner.sparsity().removable - 0.5) <= unit
    assert sum(int(pruner.plan.keep(s.name).sum()) for s in pruner.sites if s.kind in ATTENTION) == heads
    assert len(pruner.history) == 3
    assert bool(pruner.distilled) == (name == "best")


def test_presets_differ_in_what_they_spend_and_all_can_be_overridden() -> None:
    fast, balanced, best = Recipe.fast(0.5), Recipe.balanced(0.5), Recipe.best(0.5)
    assert fast.solves < balanced.solves < best.solves
    assert (fast.allocation, balanced.allocation, best.allocation) == ("uniform", "output-kl", "output-kl")
    assert fast.remeasure <= balanced.remeasure < best.remeasure
    assert (fast.final_repair, balanced.final_repair, best.final_repair) == ("heads", "all", "all")
    assert (fast.distill, balanced.distill) == (None, None) and isinstance(best.distill, Distillation)
    assert best.neurons_by == "repaired" and balanced.heads_by == "soft"
    for name in PRESETS:
        recipe = Recipe.preset(name, heads=3, solves=4, allocation="uniform", distill=None)
        assert isinstance(recipe, BudgetRecipe)
        assert (recipe.sparsity, recipe.heads, recipe.solves, recipe.allocation) == (None, 3, 4, "uniform")
        assert Recipe.from_dict(Recipe.preset(name, 0.3).to_dict()) == Recipe.preset(name, 0.3)
        assert not {"alpha", "beta", "theta"} & set(recipe.to_dict())
        assert Recipe.preset(name, 0.5, granularity="edge").granularity == "edge"


def test_what_a_preset_does_not_know_is_named() -> None:
    with pytest.raises(ValueError, match="preset is 'quick'; expected one of fast, balanced, best"):
        Recipe.preset("quick", 0.5)
    with pytest.raises(ValueError, match="the preset 'best' has no field 'alpha'; known: sparsity, heads"):
        Recipe.best(0.5, alpha=1e-5)
    with pytest.raises(ValueError, match="give sparsity="):
        Recipe.fast()


class Spy:
    """Watches the refits of a run and the collectors that its decisions used."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refits: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.diagonal: list[tuple[int, frozenset[str], set[str]]] = []
        refit, opened = driver.least_squares, GramCollector.__init__

        def least_squares(weight: torch.Tensor, moment: torch.Tensor, keep: torch.Tensor, **more: Any) -> torch.Tensor:
            new = refit(weight, moment, keep, **more)
            self.refits.append((weight.clone(), moment.clone(), keep.clone(), new))
            return new

        def init(collector: GramCollector, *args: Any, **more: Any) -> None:
            opened(collector, *args, **more)
            self.diagonal.append((len(self.diagonal), collector.diagonal, set(collector.sites)))

        monkeypatch.setattr(driver, "least_squares", least_squares)
        monkeypatch.setattr(GramCollector, "__init__", init)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_decision_repairs_everything_and_never_for_the_worse(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the tokens collected, a ridge-free refit does not do worse than dropping; only the last one takes FFNs."""
    spy = Spy(monkeypatch)
    model = still(build(family))
    optimizer = adamw(model)
    recipe = Recipe.budget(0.5, solves=3, ramp=(0.2, 0.6), repair="heads", final_repair="all", ridge=0.0)
    pruner = Pruner(model, recipe, total_steps=10).attach(optimizer)
    refitted: list[int] = []
    pruner.on_solve = lambda event: refitted.append(len(spy.refits))
    train(model, optimizer, range(10))
    for weight, moment, keep, new in spy.refits:
        dropped = weight * keep
        best, worst = repair_damage(weight, new, moment), repair_damage(weight, dropped, moment)
        assert best <= worst * (1 + 1e-6) + 1e-9
        assert not new[:, ~keep].any()
    heads = {s.n_units * s.unit_width for s in pruner.sites if s.kind in ATTENTION}
    neurons = {s.n_units for s in pruner.sites if s.kind == "neuron"}
    early = [w.shape[1] for w, *_ in spy.refits[: refitted[-2]]]
    last = [w.shape[1] for w, *_ in spy.refits[refitted[-2] :]]
    assert set(early) <= heads and neurons <= set(last)
    # Whole moments of FFNs are collected for the decision that refits them, and for no other.
    names = {s.name for s in pruner.sites if s.kind == "neuron"}
    seen = [sites & names == diagonal & names for _, diagonal, sites in spy.diagonal]
    assert not seen[-1] and all(seen[:2])


@pytest.mark.parametrize("final", ["none", "heads", "all"])
def test_final_repair_stands_for_itself(final: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    run("bert", Recipe.budget(0.5, solves=2, repair="none", final_repair=final))
    widths = sorted({weight.shape[1] for weight, *_ in spy.refits})
    assert widths == {"none": [], "heads": [24], "all": [24, 40]}[final]


@pytest.mark.parametrize("compact", [False, True])
def test_what_is_left_of_training_is_recovery(compact: bool) -> None:
    """After the ramp nothing is decided, the plan holds, and training on heals what the last decision broke."""
    model = still(build("bert"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    recipe = Recipe.balanced(0.6, ramp=(0.1, 0.4), solves=2, allocation="uniform")
    pruner = Pruner(model, recipe, total_steps=40, compact=compact).attach(optimizer)
    batch, losses, plans = batch_of(model, 0), [], []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
        plans.append(pruner.plan)
    assert [event.step for event in pruner.history] == [4, 16]
    assert all(plan is plans[16] for plan in plans[16:])
    assert losses[-1] < losses[17]
    assert pruner.sparsity().removable == pytest.approx(0.6, abs=0.01)

"""A recipe without training: its budget is met on calibration data alone, and the model it was made from is unhurt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.masktools import PAPER, bits, logits, random_plan, untouched
from tests.prunertools import UNDEFINED_PAPER_MERGE
from tests.tiny import FAMILIES, build, inputs
from topoprune import Recipe, apply, extract, find_sites, kept_units, load, measure_sparsity, save, solve
from topoprune.architectures import matrix_parameters
from topoprune.oneshot import prune_once
from topoprune.oneshot_recipe import calibration_only, training_fields
from topoprune.train import BudgetRecipe

every_family = pytest.mark.parametrize("family", FAMILIES)
ATTENTION = ("head", "kv_group")


def batches(model: nn.Module, count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [inputs(model, batch=4, length=9, seed=seed) for seed in range(count)]


def largest_unit(model: nn.Module) -> float:
    sites = find_sites(model, ("heads", "neurons"))
    return max(s.matrix_parameters_per_unit for s in sites) / matrix_parameters(find_sites(model))


@every_family
def test_the_budget_is_met_and_the_model_is_as_before(family: str) -> None:
    stages = 3
    model = build(family)
    model.train()
    before = bits(model)
    with untouched(model):
        done = prune_once(
            model, recipe=Recipe.budget(0.5, repair="all"), calibration=batches(model), stages=stages, seed=1
        )
    assert bits(model) == before and model.training
    assert done.equivalence.equal and not done.model.training
    assert done.sparsity == pytest.approx(0.5, abs=largest_unit(model))
    assert done.plan.request["stages"] == stages and done.plan.request["method"] == "budget"
    sites = {site.name: site for site in find_sites(model)}
    for name, solution in done.plan.unit_solutions().items():
        assert solution.n_kept == done.kept[name]
        assert solution.dominator is None or (solution.keep[solution.dominator[solution.dominator >= 0]]).all()
        if sites[name].consumer and not solution.keep.all():
            assert done.damage[name] >= 0 and name in done.dropped
    if family == "llama":
        recipe = Recipe.budget(0.5, repair="all")
        again = prune_once(model, recipe=recipe, calibration=batches(model), stages=stages, seed=1)
        assert bits(again.model) == bits(done.model)  # runs repeat exactly


@every_family
def test_repair_in_one_stage_is_the_least_squares_of_masks(family: str) -> None:
    """The driver's refit and `apply(merge="least-squares")`, two ways in, give the same weights."""
    model = build(family)
    recipe = Recipe.budget(0.4, repair="all", ridge=1e-4)
    done = prune_once(model, recipe=recipe, calibration=batches(model))
    with apply(model, done.plan, merge="least-squares", calibration=batches(model), ridge=1e-4):
        assert torch.allclose(logits(done.model), logits(model), atol=1e-3)
    for name, damage in done.damage.items():
        assert damage <= done.dropped[name] + 1e-6


@every_family
def test_so_many_heads_stay_in_all_and_without_repair_with_their_own_weights(family: str) -> None:
    model = build(family)
    everything = sum(s.n_units for s in find_sites(model, ("heads",)))
    recipe = Recipe.budget(heads=everything // 2, repair="none")
    done = prune_once(model, recipe=recipe, calibration=batches(model))
    kept = [done.plan.keep(s.name).sum() for s in find_sites(model, ("heads",))]
    assert sum(kept) == everything // 2
    assert all(done.plan.keep(s.name).all() for s in find_sites(model, ("neurons",)))
    assert done.damage == pytest.approx(done.dropped)
    with apply(model, done.plan):
        assert torch.allclose(logits(done.model), logits(model), atol=1e-4)


@pytest.mark.parametrize("granularity", ["edge", "2:4"])
def test_single_weights_become_zeros_in_a_copy(granularity: str) -> None:
    for family in ("bert", "gpt2", "t5"):
        model = build(family)
        before = bits(model)
        done = prune_once(model, recipe=Recipe.budget(0.5, granularity=granularity), calibration=batches(model))
        assert bits(model) == before and bits(done.model) != before
        assert type(done.model) is type(model) and done.sparsity == 0.0
        assert done.zeros == pytest.approx(0.5, abs=1e-2) == measure_sparsity(done.model, find_sites(done.model)).zeros
        assert done.figures()["zeros"] == done.zeros


@pytest.mark.parametrize("family", PAPER)
def test_neuroprune_merges_by_theta_without_data(family: str) -> None:
    model = build(family)
    done = prune_once(model, recipe=Recipe.neuroprune(0.0, 0.0, "auto:0.5"))
    assert done.equivalence.equal and done.damage == {}
    heads = extract(model, measure="weights-linf", include=("heads",))
    plain = solve(heads, theta="auto:0.5", solver="neuroprune")
    for site in find_sites(model, ("heads",)):
        assert np.array_equal(done.plan.keep(site.name), plan_keep(plain, site.name))
    with apply(model, plain, merge="paper"):
        assert torch.allclose(logits(done.model), logits(model), atol=1e-4)


def plan_keep(plan: Any, name: str) -> np.ndarray:
    return np.asarray(plan.solutions[name].keep)


@pytest.mark.parametrize("family", UNDEFINED_PAPER_MERGE)
def test_neuroprune_refuses_its_merge_where_it_is_not_defined(family: str) -> None:
    model = build(family)
    before = bits(model)
    with pytest.raises(ValueError, match="merge"):
        prune_once(model, recipe=Recipe.neuroprune(0.0, 0.0, "auto:0.5"))
    assert bits(model) == before
    assert prune_once(model, recipe=Recipe.neuroprune(0.0, 0.0, "auto:0.5", merge="none")).equivalence.equal


def test_later_stages_see_what_earlier_ones_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from topoprune.extraction import GramCollector

    model, seen = build("bert"), []
    moment = GramCollector.moment

    def spy(self: Any, name: str) -> torch.Tensor:
        found = moment(self, name)
        seen.append((name, found.clone()))
        return found

    monkeypatch.setattr(GramCollector, "moment", spy)
    recipe = Recipe.budget(0.5, repair="all", ramp_shape="stepwise")
    data = batches(model)
    done = prune_once(model, recipe=recipe, calibration=data, stages=2)
    sites = len({name for name, _ in seen})
    assert len(seen) == 3 * sites  # two decisions, and the measure of the damage
    first, later = dict(seen[:sites]), dict(seen[sites : 2 * sites])
    name = "encoder.1.ffn"
    assert not torch.allclose(first[name], later[name])  # another input than in the dense model
    assert (later[name].diagonal() == 0).any()  # units that were cut before feed nothing
    assert done.plan.request["ramp_progress"] == 1.0


def test_calibration_only_takes_away_what_belongs_to_training() -> None:
    recipe = Recipe.budget(
        0.5, ramp=(0.2, 0.5), solves=3, final_repair="all", tokens_per_unit=8, neurons_by="quadratic"
    )
    assert set(training_fields(recipe)) == {"ramp", "solves", "tokens_per_unit"}
    plain = calibration_only(recipe)
    assert training_fields(plain) == () and plain.repair == "all" and plain.neurons_by == "quadratic"
    model = build("opt")
    assert prune_once(model, recipe=plain, calibration=batches(model)).equivalence.equal


def test_the_result_is_saved_and_pruned_again(tmp_path: Any) -> None:
    model = build("llama")
    first = prune_once(model, recipe=Recipe.budget(0.3), calibration=batches(model))
    loaded = load(save(first.model, first.plan, tmp_path / "first"))
    assert bits(loaded) == bits(first.model)
    second = prune_once(loaded, recipe=Recipe.budget(0.3), calibration=batches(model), stages=2)
    assert second.equivalence.equal and second.parameters[0] == first.parameters[1]
    for name, units in kept_units(second.model).items():
        assert set(units) <= set(kept_units(first.model)[name])


def test_stages_are_told() -> None:
    model, told = build("bert"), []
    prune_once(
        model, recipe=Recipe.budget(0.5), calibration=batches(model), stages=2, progress=lambda *t: told.append(t)
    )
    assert [name for name, _, _ in told][:4] == [
        "collecting 1 of 2", "deciding 1 of 2", "collecting 2 of 2", "deciding 2 of 2"
    ]  # fmt: skip
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told) and told[-1][1] == told[-1][2]


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (Recipe.budget(0.5), {}, r"give calibration=\[batch"),
        (Recipe.budget(0.5), {"calibration": []}, "calibration set is empty"),
        (Recipe.budget(0.5), {"calibration": ["text"]}, "calibration batch 0 is a str"),
        (Recipe.budget(0.5, ramp=(0.2, 0.5)), {}, "ramp of the recipe belong to training"),
        (Recipe.budget(0.5, solves=3, solve_lag=2), {}, "solves, solve_lag of the recipe belong"),
        (Recipe.budget(0.5, regrow="gradient"), {}, "regrow of the recipe"),
        (BudgetRecipe(0.5, distill={"logits": 0.5}), {}, "distill of the recipe"),  # type: ignore[arg-type]
        (Recipe.neuroprune(1e-3, 0.0, 0.1), {}, "penalties of training steps"),
        (Recipe.neuroprune(0.0, 0.0, 0.1), {"stages": 2}, "a threshold theta cuts at once"),
        (Recipe.budget(0.5), {"stages": 0}, "stages is 0; expected"),
        (Recipe.budget(0.5), {"stages": True}, "stages is True; expected"),
        (Recipe.budget(0.5), {"seed": -1}, "seed is -1"),
        (Recipe.budget(0.5), {"heads": 3, "merge": "none"}, "heads, merge cannot be given beside recipe="),
        (Recipe.budget(0.5), {"budget": 0.5}, "budget cannot be given beside recipe="),
        (Recipe.budget(heads=99), {"data": True}, "heads=99 asks for more heads than exist"),
        ("budget", {}, "recipe is 'budget'; use Recipe.budget"),
        (None, {"stages": 2}, "stages= goes with recipe="),
    ],
)
def test_wrong_requests_change_nothing(recipe: Any, options: dict[str, Any], message: str) -> None:
    model = build("bert")
    if options.pop("data", False):
        options["calibration"] = batches(model)
    with untouched(model), pytest.raises(ValueError, match=message):
        prune_once(model, recipe=recipe, **options)


def test_a_masked_model_is_refused_and_a_failure_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    with apply(model, random_plan(model)), pytest.raises(ValueError, match="already pruned by an open MaskHandle"):
        prune_once(model, recipe=Recipe.budget(0.5), calibration=batches(model))

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no space")

    monkeypatch.setattr("topoprune.pruned_model.compact", broken)
    with untouched(model), pytest.raises(RuntimeError, match="no space"):
        prune_once(model, recipe=Recipe.budget(0.5, repair="all"), calibration=batches(model), stages=2)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.output.dense.weight")[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.0\.output\.dense\.weight"):
        prune_once(model, recipe=Recipe.budget(0.5), calibration=batches(model))

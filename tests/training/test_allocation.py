"""Layer allocation by damage curves: never worse than uniform by them, exact, floored, repeatable, resumable."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.masktools import bits
from tests.prunertools import adamw, batch_of, train
from tests.tiny import FAMILIES, build, inputs
from topoprune import Pruner, Recipe, apply, compact, find_sites
from topoprune.planning import Plan
from topoprune.sites import Site
from topoprune.train.allocation import CurveAllocation, allocate, measuring_steps, predicted
from topoprune.train.body import Body
from topoprune.train.checkpoint import load_state, save_state
from topoprune.train.costs import Costs, count_flops, make_inputs
from topoprune.train.curves import Curve, InputSampler, OutputMeter, curve_of, option_counts
from topoprune.train.targets import find_targets
from topoprune_solvers import Solution, Status

STEPS = 6
RECIPE: dict[str, Any] = dict(sparsity=0.5, allocation="output-kl", solves=3, tokens_per_unit=1)
UNITS = ("head", "kv_group", "neuron")
MODELS = {name: build(name) for name in ("bert", "llama")}


def run(family: str, **fields: Any) -> tuple[nn.Module, Pruner]:
    model = build(family)
    torch.manual_seed(0)
    optimizer = adamw(model)
    pruner = Pruner(model, Recipe.budget(**{**RECIPE, **fields}), total_steps=STEPS, steps_per_epoch=3)
    pruner.attach(optimizer)
    train(model, optimizer, range(STEPS))
    pruner.close()
    return model, pruner


def counts(plan: Plan) -> dict[str, int]:
    return {s.name: int(plan.keep(s.name).sum()) for s in plan.sites if s.kind in UNITS}


def made_up_sites(heads: int, neurons: int, layers: int = 3) -> list[Site]:
    return [Site(f"{i}.a", "head", heads, 2, ()) for i in range(layers)] + [
        Site(f"{i}.f", "neuron", neurons, 1, ()) for i in range(layers)
    ]


# Curves


@given(st.dictionaries(st.integers(1, 39), st.floats(0, 1e6), max_size=8))
def test_curves_never_rise_with_more_units_and_lie_above_what_was_measured(points: dict[int, float]) -> None:
    curve = curve_of(points, 40)
    values = curve.at(np.arange(41))
    assert np.all(np.diff(values) <= 1e-9 * values.max(initial=1.0)) and values[40] == 0.0
    assert all(values[kept] >= damage for kept, damage in points.items())
    assert np.array_equal(curve.at(curve.kept), curve.damage)


def test_a_curve_of_something_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="the output with 3 units kept is not finite"):
        curve_of({3: math.nan, 5: 1.0}, 8)


@pytest.mark.parametrize(("least", "live", "step"), [(1, 12, 1), (1, 1, 1), (1, 2, 1), (8, 3072, 8), (2, 8, 2)])
def test_options_are_few_and_within_bounds(least: int, live: int, step: int) -> None:
    found = option_counts(least, live, step)
    assert found == sorted(set(found)) and len(found) <= 9
    assert all(least <= count < live and (count - least) % step == 0 for count in found)


def test_curves_are_measured_at_evenly_spread_decisions() -> None:
    assert measuring_steps([3, 6, 9, 12], 1) == {3}
    assert measuring_steps([3, 6, 9, 12], 2) == {3, 9}
    assert measuring_steps([3, 6, 9, 12], 9) == {3, 6, 9, 12}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_divergence_is_that_of_the_masked_model_and_leaves_no_trace(family: str) -> None:
    model = build(family)
    model.train()
    sites = find_sites(model, ("heads", "neurons"))
    batches = [{k: v for k, v in inputs(model, seed=seed).items()} for seed in (1, 2)]
    before, state = bits(model), torch.get_rng_state()
    meter = OutputMeter(model, sites, batches)
    found = {}
    for site in sites:
        keep = np.arange(site.n_units) % 3 > 0
        found[site.name] = meter.divergence(site, keep)
        assert meter.divergence(site, np.ones(site.n_units, dtype=bool)) == pytest.approx(0.0, abs=1e-5)
    assert bits(model) == before and torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    model.eval()
    for site in sites:
        solution = Solution(np.arange(site.n_units) % 3 > 0, 0.0, "min", Status.FEASIBLE, "test")
        total = number = 0.0
        for batch in batches:
            with torch.no_grad():
                dense = model(**batch).logits
                with apply(model, Plan(sites, {site.name: solution})):
                    cut = model(**batch).logits
            kl = (dense.softmax(-1) * (dense.log_softmax(-1) - cut.log_softmax(-1))).sum(-1)
            mask = torch.ones_like(kl)
            if kl.ndim == 2:
                mask = (batch["labels"] != -100) if "labels" in batch else batch["attention_mask"]
            total += float((kl * mask).sum())
            number += float(mask.sum())
        assert found[site.name] == pytest.approx(total / number, rel=1e-3, abs=1e-5), site.name


def test_a_bare_encoder_is_compared_by_its_hidden_states() -> None:
    model: Any = build("bert")
    encoder = model.bert
    site = find_sites(encoder, ("neurons",))[0]
    batch = inputs(model)
    found = OutputMeter(encoder, [site], [batch]).divergence(site, np.arange(site.n_units) > 0)
    assert 0 < found < 10


def test_models_without_logits_are_refused_by_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"score": self.layer(x)}

    with pytest.raises(ValueError, match="returns logits or last_hidden_state; use 'uniform'"):
        OutputMeter(Odd(), [], [{"x": torch.ones(1, 2)}])


def test_the_sample_is_capped_and_taken_from_training_only() -> None:
    model = build("bert")
    sampler = InputSampler(model, rows=6)
    sampler.watch()
    with torch.no_grad():
        model(**inputs(model))
    assert sampler.batches == []
    for step in range(4):
        model(**batch_of(model, step))
    assert [len(batch["input_ids"]) for batch in sampler.batches] == [4, 2] and not sampler.open
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in sampler.batches)
    again = InputSampler(model, rows=6)
    again.load_state_dict(sampler.state_dict())
    assert torch.equal(again.batches[1]["input_ids"], sampler.batches[1]["input_ids"])


# Sharing out


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**31), st.floats(0.05, 0.8), st.sampled_from(["bert", "llama"]))
def test_any_curves_are_shared_out_exactly_in_stages_and_no_worse_than_equal_shares(
    seed: int, sparsity: float, family: str
) -> None:
    rng = np.random.default_rng(seed)
    body = Body(MODELS[family], find_sites(MODELS[family]))
    recipe = Recipe.budget(sparsity, allocation="output-kl")
    allocation = CurveAllocation(body, recipe, find_targets(body, recipe), (1, 2, 3, 4))
    for site in allocation.sites:
        kept = np.unique(rng.integers(1, site.n_units, 5))
        points = dict(zip(kept.tolist(), rng.random(kept.size).tolist(), strict=True))
        allocation.curves[site.name] = curve_of(points, site.n_units)
    plan, costs = Plan(body.sites, {}), allocation.targets.costs
    assert costs is not None

    def measured_before(*_: Any) -> dict[int, float]:
        raise AssertionError("these decisions measure nothing")

    for step, done in ((2, 0.4), (3, 0.8), (4, 1.0)):
        live = counts(plan)
        gone, told = allocation.goals(step, done, plan, measured_before)
        assert told["predicted"]["chosen"] <= told["predicted"]["uniform"]
        kept_now = {s.name: s.n_units - gone[s.name] for s in allocation.sites}
        assert all(1 <= count <= live[name] for name, count in kept_now.items())
        assert costs.total(kept_now) <= costs.at(done).budget * (1 + 1e-12)
        plan = Plan(
            body.sites,
            {
                name: Solution(np.arange(len(plan.keep(name))) < count, 0.0, "min", Status.FEASIBLE, "test")
                for name, count in kept_now.items()
            },
        )
    neuron = max(s.matrix_parameters_per_unit for s in body.sites if s.kind == "neuron")
    assert costs.budget - costs.total(counts(plan)) < neuron
    assert abs(costs.dense * (1 - sparsity) - costs.total(counts(plan))) <= neuron / 2


def test_what_hurts_most_stays() -> None:
    sites = made_up_sites(4, 40, layers=2)[2:]
    curves = {
        "0.f": Curve(np.array([1, 40]), np.array([9.0, 0.0])),
        "1.f": Curve(np.array([1, 40]), np.array([0.1, 0])),
    }
    tables = {s.name: np.arange(41.0) for s in sites}
    bounds: dict[str, Any] = {
        "least": {"0.f": 1, "1.f": 5},
        "most": {"0.f": 40, "1.f": 40},
        "steps": {"0.f": 1, "1.f": 1},
    }
    kept = allocate(sites, curves, Costs("parameters", "parameters", 0.0, tables, 45.0), **bounds)
    assert kept == {"0.f": 40, "1.f": 5}


# In training


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "gpt2", "vit", "bart"])
def test_training_ends_at_the_budget_and_reports_what_it_predicted(family: str) -> None:
    _, pruner = run(family)
    unit = max(s.matrix_parameters_per_unit for s in pruner.sites if s.kind == "neuron")
    figures = pruner.sparsity()
    assert abs(figures.removable - 0.5) * figures.parameters <= unit
    told = [event.predicted for event in pruner.history]
    assert len(told) == 3 and all(entry["chosen"] <= entry["uniform"] for entry in told)
    assert told[0]["curve_forwards"] > 0 and all(entry["curve_forwards"] == 0 for entry in told[1:])
    assert pruner.history[0].seconds["extract"] >= told[0]["curve_seconds"] > 0
    assert pruner.plan.request["allocated"] == counts(pruner.plan)
    assert all(count >= 1 for count in counts(pruner.plan).values())
    assert isinstance(pruner._driver._allocation, CurveAllocation)
    curves = pruner._driver._allocation.curves
    assert predicted(curves, counts(pruner.plan)) == pytest.approx(told[-1]["chosen"])


@pytest.mark.parametrize("fields", [{"heads": 5, "sparsity": None}, {"heads": 6, "flops": 0.7, "sparsity": None}])
def test_heads_are_counted_exactly(fields: dict[str, Any]) -> None:
    model, pruner = run("bert", shape=(2, 8), **fields)
    kept = counts(pruner.plan)
    assert sum(kept[s.name] for s in pruner.sites if s.kind == "head") == fields["heads"]
    if "flops" in fields:
        small, dense = compact(model, pruner.plan), build("bert")
        found, whole = (count_flops(m, make_inputs(m, (2, 8))) for m in (small, dense))
        neuron = whole - count_flops(compact(dense, _one_neuron(dense)), make_inputs(dense, (2, 8)))
        assert 0.7 * whole - neuron < found <= 0.7 * whole


def _one_neuron(model: nn.Module) -> Plan:
    sites = find_sites(model)
    name = next(s.name for s in sites if s.kind == "neuron")
    return Plan(sites, {name: Solution(np.arange(40) > 0, 0.0, "min", Status.FEASIBLE, "test")})


def test_a_floor_holds_everywhere() -> None:
    _, pruner = run("bert", floor=0.4)
    kept = counts(pruner.plan)
    assert all(kept[s.name] >= math.ceil(0.4 * s.n_units) for s in pruner.sites if s.kind in UNITS)


def test_units_never_return_and_curves_are_measured_as_often_as_asked() -> None:
    model = build("opt")
    optimizer = adamw(model)
    pruner = Pruner(model, Recipe.budget(**{**RECIPE, "remeasure": 3}), total_steps=STEPS).attach(optimizer)
    plans: list[Plan] = []
    pruner.on_solve = lambda event: plans.append(pruner.plan)
    train(model, optimizer, range(STEPS))
    assert all(event.predicted["curve_forwards"] > 0 for event in pruner.history)
    for earlier, later in pairwise(plans):
        for name in later.solutions:
            assert not np.any(later.keep(name) & ~earlier.keep(name))


def test_the_same_run_twice_is_the_same_to_the_bit() -> None:
    one, first = run("bert", remeasure=2)
    two, second = run("bert", remeasure=2)
    assert bits(one) == bits(two)
    assert [e.predicted["chosen"] for e in first.history] == [e.predicted["chosen"] for e in second.history]


def test_compact_training_ends_at_the_same_counts() -> None:
    model = build("bert")
    optimizer = adamw(model)
    pruner = Pruner(model, Recipe.budget(**{**RECIPE, "remeasure": 2}), total_steps=STEPS, compact=True)
    pruner.attach(optimizer)
    train(model, optimizer, range(STEPS))
    unit = max(s.matrix_parameters_per_unit for s in pruner.sites if s.kind == "neuron")
    figures = pruner.sparsity()
    assert abs(figures.removable - 0.5) * figures.parameters <= unit


@pytest.mark.parametrize("done", [0, 1, 2, 4])
def test_a_resumed_run_is_the_uninterrupted_one(done: int, tmp_path: Path) -> None:
    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = build("bert", seed)
        optimizer = adamw(model)
        recipe = Recipe.budget(**{**RECIPE, "remeasure": 2, "ramp": (0.4, 1.0)})
        return model, optimizer, Pruner(model, recipe, total_steps=STEPS, steps_per_epoch=3).attach(optimizer)

    torch.manual_seed(3)
    model, optimizer, pruner = start(0)
    saved: list[Any] = []

    def save(step: int) -> None:
        if step == done:
            save_state(pruner.state_dict(), tmp_path / "state")
            saved.extend(copy.deepcopy([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()]))

    train(model, optimizer, range(STEPS), save)
    other, second, resumed = start(7)
    other.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    resumed.load_state_dict(load_state(tmp_path / "state"))
    torch.set_rng_state(saved[2])
    train(other, second, range(done + 1, STEPS))
    assert bits(other) == bits(model)
    assert counts(resumed.plan) == counts(pruner.plan)


def test_no_forward_before_the_first_decision_says_so() -> None:
    model = build("bert")
    optimizer = adamw(model)
    pruner = Pruner(model, Recipe.budget(**RECIPE), total_steps=1).attach(optimizer)
    with pytest.raises(RuntimeError, match="no training forward was seen before the curves"):
        optimizer.step()
    pruner.close()

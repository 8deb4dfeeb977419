"""T8: parameters, FLOPs, latency, sparsity and heads, each met for every family, or refused before training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from tests.masktools import bits, random_plan, untouched
from tests.prunertools import adamw, train
from tests.tiny import FAMILIES, build
from topoprune import Pruner, Recipe, compact, find_sites
from topoprune.train import latency
from topoprune.train.body import Body
from topoprune.train.costs import Costs, count_flops, evaluating, flop_costs, make_inputs, parameter_costs
from topoprune.train.targets import Targets, find_targets, fit_uniform

SHAPE = (2, 8)
WIDE = BertConfig(  # layers that take long enough to be timed
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024
)
UNITS = ("head", "kv_group", "neuron")
RECIPES: dict[str, dict[str, Any]] = {
    "parameters": {"parameters": 0.8},
    "flops": {"flops": 0.65, "shape": SHAPE},
    "latency": {"latency": 0.7, "shape": SHAPE},
    "sparsity": {"sparsity": 0.5},
}


def attention_units(model: nn.Module) -> int:
    return sum(site.n_units for site in find_sites(model) if site.kind in ("head", "kv_group"))


def kept_of(targets: Targets, body: Body) -> dict[str, int]:
    return {s.name: s.n_units - targets.removed[s.name] for s in body.sites if s.kind != "input_dim"}


def cut(body: Body, kept: Mapping[str, int]) -> nn.Module:
    return latency.LatencyMeter(body, SHAPE).cut(kept)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_tight(costs: Costs, kept: Mapping[str, int], body: Body, step: int = 1) -> None:
    """At most the budget, and one step of neurons more, in any site, would exceed it."""
    total = costs.total(kept)
    assert total <= costs.budget * (1 + 1e-12)
    for site in body.sites:
        if site.kind == "neuron" and kept[site.name] + step <= site.n_units:
            assert costs.total({**kept, site.name: kept[site.name] + step}) > costs.budget, site.name
    prices = [float(costs.tables[s.name][-1]) / s.n_units * step for s in body.sites if s.kind == "neuron"]
    whole = all(kept[s.name] == s.n_units for s in body.sites if s.kind == "neuron")  # heads= alone was enough
    assert whole or costs.name == "latency" or costs.budget - total < max(prices)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clock that does not depend on the machine: FLOPs, and a charge for every call that no unit takes away."""

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        seconds = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = str(func)
            if "mm" in name or "attention" in name:
                sizes = [a.numel() for a in args if torch.is_tensor(a)]
                out = result[0] if isinstance(result, tuple) else result
                self.seconds += 1e-9 * (math.sqrt(math.prod(sorted(sizes)[-2:]) * out.numel()) + 100)
            return result

    def seconds_of(call: Any, device: torch.device) -> float:
        with Counter() as counter:
            call()
        return counter.seconds

    monkeypatch.setattr(latency, "seconds_of", seconds_of)
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "FEWEST", 1)
    yield


# The formulas


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formulas_are_what_a_compacted_model_has(family: str) -> None:
    model = build(family)
    body = Body(model, find_sites(model))
    plan = random_plan(model, share=0.4, seed=3, kinds=UNITS)
    kept = {name: solution.n_kept for name, solution in plan.solutions.items()}
    small, batch = compact(model, plan), make_inputs(model, SHAPE)
    by_flops, by_parameters = flop_costs(body, 0.5, SHAPE), parameter_costs(body, 0.5)
    assert by_flops.dense == count_flops(model, batch) and by_flops.total(kept) == count_flops(small, batch)
    assert by_parameters.dense == parameters(model) and by_parameters.total(kept) == parameters(small)
    # What was cut out of the model already counts as before.
    again = Body(model, body.sites)
    again.shrink(plan)
    assert flop_costs(again, 0.5, SHAPE).to_dict() == by_flops.to_dict()
    assert parameter_costs(again, 0.5).to_dict() == by_parameters.to_dict()


def test_torch_counts_the_same_where_it_counts_attention() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = build("bert")
    model.set_attn_implementation("eager")  # type: ignore[operator]
    batch = make_inputs(model, SHAPE)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    assert counter.get_total_flops() == count_flops(model, batch) == count_flops(build("bert"), batch)


# What the targets come to


@pytest.mark.parametrize("kind", ["parameters", "flops"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_is_met_within_one_neuron(family: str, kind: str) -> None:
    model = build(family)
    body = Body(model, find_sites(model))
    measure = parameters if kind == "parameters" else lambda m: count_flops(m, make_inputs(m, SHAPE))
    for share in (0.9, 0.75, 0.6):
        try:
            targets = find_targets(body, Recipe.budget(**{**RECIPES[kind], kind: share}))
        except ValueError as error:
            assert "cannot be reached" in str(error)
            continue
        kept = kept_of(targets, body)
        assert targets.costs is not None
        assert_tight(targets.costs, kept, body)
        found, dense = measure(cut(body, kept)), measure(model)
        assert found == targets.costs.total(kept) <= share * dense
        assert all(kept[name] >= 1 for name in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_number_of_heads_goes_with_each(family: str) -> None:
    model = build(family)
    body, heads = Body(model, find_sites(model)), attention_units(model) * 3 // 4
    for fields in ({"parameters": 0.85}, {"flops": 0.75, "shape": SHAPE}):
        targets = find_targets(body, Recipe.budget(**fields, heads=heads))  # type: ignore[arg-type]
        kept = kept_of(targets, body)
        assert sum(kept[s.name] for s in body.sites if s.kind in ("head", "kv_group")) == heads
        assert targets.costs is not None
        assert_tight(targets.costs, kept, body)


@pytest.mark.parametrize("family", ["bert", "t5-gated", "llama", "vit"])
def test_rounding_keeps_multiples_under_the_budget(family: str) -> None:
    model = build(family)
    body = Body(model, find_sites(model))
    targets = find_targets(body, Recipe.budget(flops=0.8, shape=SHAPE, rounding=8))
    kept = kept_of(targets, body)
    assert all(kept[s.name] * s.unit_width % 8 == 0 for s in body.sites if s.kind != "input_dim")
    assert targets.costs is not None
    assert_tight(targets.costs, kept, body, step=8)


def test_parameters_may_be_a_number() -> None:
    model = build("opt")
    body = Body(model, find_sites(model))
    share, number = (find_targets(body, Recipe.budget(parameters=p)) for p in (0.75, int(0.75 * parameters(model))))
    assert share.removed == number.removed
    assert not any(find_targets(body, Recipe.budget(parameters=1.0)).removed.values())
    assert not any(find_targets(body, Recipe.budget(parameters=parameters(model))).removed.values())


def test_every_site_loses_the_same_share() -> None:
    model = build("bert")
    body = Body(model, find_sites(model))
    kept = kept_of(find_targets(body, Recipe.budget(flops=0.6, shape=SHAPE)), body)
    neurons = [kept[s.name] for s in body.sites if s.kind == "neuron"]
    heads = [kept[s.name] for s in body.sites if s.kind == "head"]
    assert max(neurons) - min(neurons) <= 1 and max(heads) - min(heads) == 0


def test_any_cost_table_is_met_from_below() -> None:
    sites = find_sites(build("bert"), ("heads", "neurons"))
    rng = np.random.default_rng(0)
    for case in range(20):
        tables = {s.name: np.cumsum(np.r_[0.0, rng.random(s.n_units)]) for s in sites}
        costs = Costs("latency", "s", 1.0, tables, 0.0)
        least, most = dict.fromkeys(tables, 1), {s.name: s.n_units for s in sites}
        lowest = costs.total(least)
        costs = Costs("latency", "s", 1.0, tables, lowest + rng.random() * (costs.dense - lowest))
        kept = fit_uniform(sites, costs, least=least, most=most, steps=dict.fromkeys(tables, 1))
        assert_tight(costs, kept, Body(build("bert"), sites)), case


# Latency


@pytest.mark.parametrize("family", FAMILIES)
def test_latency_is_met_on_a_compacted_copy_and_verified(family: str, simulated: None) -> None:
    model = build(family)
    body = Body(model, find_sites(model))
    with untouched(model):
        targets = find_targets(body, Recipe.budget(latency=0.75, shape=SHAPE))
    assert targets.measured is not None and targets.measured.noise == 0.0
    again = latency.LatencyMeter(body, SHAPE).measure(kept_of(targets, body))
    assert again.ratio == targets.measured.ratio <= 0.75
    assert again.ratio > 0.6  # heads are coarse in models this small
    assert Targets.from_dict(targets.to_dict()).to_dict() == targets.to_dict()


def test_latency_goes_with_heads_and_rounding(simulated: None) -> None:
    model = build("bert")
    body = Body(model, find_sites(model))
    targets = find_targets(body, Recipe.budget(latency=0.75, heads=6, rounding=6, shape=SHAPE))
    kept = kept_of(targets, body)
    assert sum(kept[s.name] for s in body.sites if s.kind == "head") == 6
    assert all(kept[s.name] % 6 == 0 for s in body.sites if s.kind == "neuron")
    assert targets.measured is not None and targets.measured.ratio <= 0.75


def test_a_table_that_is_wrong_is_corrected() -> None:
    """The loop of choosing, measuring and correcting, on a device twice as slow with units gone as the table says."""
    sites = find_sites(build("bert"), ("heads", "neurons"))
    body = Body(build("bert"), sites)
    tables = {s.name: np.arange(s.n_units + 1.0) / s.n_units / len(sites) for s in sites}
    costs = Costs("latency", "of the dense forward", 0.0, tables, 0.7)
    bounds: dict[str, Any] = {
        "least": {s.name: 1 for s in sites},
        "most": {s.name: s.n_units for s in sites},
        "steps": {s.name: 1 for s in sites},
    }

    class Meter:
        device = torch.device("cpu")
        calls = 0

        def measure(self, kept: Mapping[str, int]) -> latency.Measured:
            self.calls += 1
            return latency.Measured(1.0 - 0.5 * (1.0 - costs.total(kept)), 0.0, 0.1)

    meter: Any = Meter()
    kept, corrected, measured = latency.meet(costs, meter, lambda c: fit_uniform(sites, c, **bounds), bounds["least"])
    assert 0.97 * 0.7 <= measured.ratio <= 0.7 and meter.calls <= latency.TRIES
    assert corrected.total(kept) == pytest.approx(measured.ratio, abs=0.02) and corrected.dense == pytest.approx(1.0)
    assert body.sites == sites
    with pytest.raises(ValueError, match=r"latency=0\.7 cannot be reached on cpu: .* still takes 90"):

        class Slow(Meter):
            def measure(self, kept: Mapping[str, int]) -> latency.Measured:
                return latency.Measured(0.9, 0.01, 0.1)

        slow: Any = Slow()
        latency.meet(costs, slow, lambda c: fit_uniform(sites, c, **bounds), bounds["least"])


def test_latency_is_measured_with_a_real_clock_too() -> None:
    model = BertModel(WIDE).eval()
    with untouched(model):
        targets = find_targets(Body(model, find_sites(model)), Recipe.budget(latency=0.9, shape=(8, 64)))
    assert targets.measured is not None and targets.measured.ratio <= 0.9 and targets.measured.dense > 0


def test_a_resumed_run_takes_the_targets_that_were_measured_before(simulated: None) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = build("bert")
        pruner = Pruner(model, Recipe.budget(latency=0.75, shape=SHAPE, solves=3, tokens_per_unit=1), total_steps=8)
        optimizer = adamw(model)
        return model, optimizer, pruner.attach(optimizer)

    torch.manual_seed(0)
    model, optimizer, pruner = fresh()
    train(model, optimizer, range(3))
    saved = copy.deepcopy([pruner.state_dict(), model.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    train(model, optimizer, range(3, 8))
    other, second, resumed = fresh()
    resumed._driver.removed = dict.fromkeys(resumed._driver.removed, 0)  # another device measured something else
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    resumed.load_state_dict(saved[0])
    torch.set_rng_state(saved[3])
    train(other, second, range(3, 8))
    assert bits(other) == bits(model)


# In training


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("family", ["bert", "t5", "llama", "vit"])
def test_training_ends_at_the_budget(family: str, kind: str, simulated: None) -> None:
    model = build(family)
    dense = copy.deepcopy(model)
    optimizer = adamw(model)
    recipe = Recipe.budget(**RECIPES[kind], solves=2, tokens_per_unit=1)
    with Pruner(model, recipe, total_steps=4).attach(optimizer) as pruner:
        train(model, optimizer, range(4))
        plan = pruner.plan
        removable = pruner.sparsity().removable
    small = compact(model, plan)
    if kind == "sparsity":
        unit = max(s.matrix_parameters_per_unit for s in plan.sites if s.kind == "neuron")
        whole = pruner.sparsity().parameters
        assert abs(removable - 0.5) * whole <= unit
    elif kind == "parameters":
        assert parameters(small) <= 0.8 * parameters(dense)
    elif kind == "flops":
        assert count_flops(small, make_inputs(small, SHAPE)) <= 0.65 * count_flops(dense, make_inputs(dense, SHAPE))
    else:
        took = []
        for measured in (small, dense):
            with evaluating(measured):
                batch = make_inputs(measured, SHAPE)
                took.append(latency.seconds_of(lambda m=measured, b=batch: m(**b), torch.device("cpu")))
        assert took[0] <= 0.7 * took[1]


# Refusals


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("bert", {"parameters": 0.1}, r"parameters=0\.1 cannot be reached: .* are left \(\d+\.\d%\), of which"),
        ("bert", {"parameters": 50}, r"parameters=50 cannot be reached"),
        ("bert", {"parameters": 10**9}, "parameters=1000000000 asks for more than there are"),
        ("opt", {"flops": 0.01, "shape": SHAPE}, r"flops=0\.01 cannot be reached"),
        ("bert", {"flops": 0.5, "shape": (2, 65)}, "asks for a length of 65, the model takes 64 tokens"),
        (
            "bert",
            {"flops": 0.5, "heads": 8, "shape": SHAPE, "floor": 0.9},
            r"flops=0\.5 cannot be reached: with 8 heads",
        ),
        ("bert", {"sparsity": 0.5, "floor": 0.8}, r"fewer than floor=0\.8"),
        ("bert", {"parameters": 0.8, "heads": 9}, "more heads than exist"),
        ("t5", {"heads": 5, "allocation": "output-kl"}, "leaves at least 6 heads"),
    ],
)
def test_what_cannot_be_reached_is_refused_before_training(family: str, fields: dict[str, Any], message: str) -> None:
    model = build(family)
    with untouched(model), pytest.raises(ValueError, match=message):
        Pruner(model, Recipe.budget(**fields), total_steps=8)


def test_what_is_said_to_be_reachable_is() -> None:
    model = build("bert")
    body = Body(model, find_sites(model))
    with pytest.raises(ValueError) as told:
        find_targets(body, Recipe.budget(parameters=10))
    fewest = int(str(told.value).split(" in each layer, ")[1].split(" of ")[0].replace(",", ""))
    assert parameters(cut(body, kept_of(find_targets(body, Recipe.budget(parameters=fewest)), body))) == fewest
    with pytest.raises(ValueError, match="cannot be reached"):
        find_targets(body, Recipe.budget(parameters=fewest - 1))


def test_a_ramp_longer_than_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ramp is \(0\.1, 1\.5\); expected 0 <= start <= end <= 1, as shares"):
        Recipe.budget(parameters=0.8, ramp=(0.1, 1.5))

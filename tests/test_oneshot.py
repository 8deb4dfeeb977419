"""One call from a dense model to a smaller one: what it keeps, what it proves, what it leaves as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.masktools import bits, logits, random_plan
from tests.tiny import FAMILIES, LAYERS, build, inputs
from topoprune import apply, extract, find_sites, kept_units, load, save, solve
from topoprune.architectures import matrix_parameters
from topoprune.budgets import budget_count
from topoprune.compaction import compacting
from topoprune.oneshot import OneShot, compact_once, prune_once
from topoprune.speed import compare_speed, probe
from topoprune.tasks.results import json_ready

every_family = pytest.mark.parametrize("family", FAMILIES)


def batches(model: nn.Module, count: int = 2) -> list[dict[str, torch.Tensor]]:
    return [inputs(model, batch=4, length=9, seed=seed) for seed in range(count)]


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@every_family
def test_the_result_is_half_as_large_and_proven_and_the_model_is_as_before(family: str) -> None:
    model = build(family)
    model.train()
    next(model.children()).eval()
    before, flags = bits(model), modes(model)
    pruned = prune_once(model, 0.5, calibration=batches(model), ridge=0.0)
    assert bits(model) == before and modes(model) == flags
    apply(model, random_plan(model)).close()  # nothing holds the model any more
    assert pruned.equivalence.equal and not any(modes(pruned.model))

    gone = 0
    for site in find_sites(model, ("heads", "neurons")):
        kept = int(pruned.plan.keep(site.name).sum())
        assert kept == budget_count(0.5, site) == pruned.kept[site.name]
        gone += (site.n_units - kept) * site.matrix_parameters_per_unit
        # least squares without ridge is never worse than dropping (DESIGN.md, repair)
        assert -1e-9 <= pruned.damage[site.name] <= pruned.dropped[site.name] + 1e-6
    assert pruned.sparsity == pytest.approx(gone / matrix_parameters(find_sites(model)))
    assert pruned.parameters == (count(model), count(pruned.model))
    assert len(pruned.layers()) == len({(s.stack, s.layer) for s in find_sites(model)})
    figures = json.loads(json.dumps(json_ready(pruned.figures())))
    assert figures["speed"] == pytest.approx(pruned.batch_seconds[0] / pruned.batch_seconds[1])
    assert figures["equivalence"]["equal"] is True and figures["sparsity"] == pruned.sparsity


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@every_family
def test_without_data_the_weights_alone_decide(family: str) -> None:
    model = build(family)
    pruned = prune_once(model, 0.5, seed=3)
    assert pruned.equivalence.equal and pruned.damage == {} == pruned.dropped
    # No repair: what stays are the dense model's own weights.
    with apply(model, pruned.plan):
        assert torch.allclose(logits(pruned.model), logits(model), atol=1e-4)
    assert set(pruned.plan.request["combined"][0]) >= {"budget", "solver", "objective"}


def test_shares_and_numbers_of_each_kind_and_rounding() -> None:
    model = build("bert")
    data = batches(model)
    rows = prune_once(model, 0.5, calibration=data, heads=3, neurons=0.25).layers()
    assert [row["units"] for row in rows] == [{"heads": (3, 4), "neurons": (10, 40)}] * LAYERS
    rows = prune_once(model, 0.5, calibration=data, heads=1.0).layers()
    assert [row["units"] for row in rows] == [{"neurons": (20, 40)}] * LAYERS
    pruned = prune_once(model, 0.7, calibration=data, rounding=12)
    assert [row["units"] for row in pruned.layers()] == [{"heads": (2, 4), "neurons": (24, 40)}] * LAYERS
    again = prune_once(model, 0.7, calibration=data, rounding=12)
    assert bits(again.model) == bits(pruned.model)  # runs repeat exactly


@pytest.mark.parametrize("merge", ["none", "scale"])
def test_other_merges_and_measures(merge: str) -> None:
    model = build("llama")
    for gqa in ("query-heads", "any-query-heads"):
        pruned = prune_once(model, 0.5, calibration=batches(model), merge=merge, measure="circuit-cosine", gqa=gqa)
        assert pruned.equivalence.equal
        if merge == "none":
            assert pruned.damage == pytest.approx(pruned.dropped)
    linf = prune_once(model, 0.5, measure="weights-linf")  # no similarity: the covering distance decides
    assert {request["objective"] for request in linf.plan.request["combined"]} == {"k-centre"}


def test_a_pruned_model_can_be_saved_loaded_and_pruned_again(tmp_path: Path) -> None:
    model = build("opt")
    first = prune_once(model, 0.75, calibration=batches(model))
    loaded = load(save(first.model, first.plan, tmp_path / "first"))
    assert bits(loaded) == bits(first.model)
    second = prune_once(loaded, 0.5, calibration=batches(model))
    assert second.equivalence.equal and second.parameters[0] == first.parameters[1]
    for name, units in kept_units(second.model).items():
        assert set(units) < set(kept_units(first.model)[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, r"budget is 0\.0; as a share of units to keep it must lie in \(0, 1\]"),
        ({"budget": 1.5}, r"budget is 1\.5"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget": 1}, "numbers of units go to heads= and neurons="),
        ({"budget": "half"}, "budget is 'half'"),
        ({"budget": 1.0}, "nothing would be pruned"),
        ({"heads": 0}, "heads is 0; expected a share"),
        ({"neurons": -0.5}, r"neurons is -0\.5"),
        ({"neurons": 41}, "budget asks to keep 41 units of 'encoder.0.ffn', which has 40"),
        ({"heads": 5}, "budget asks to keep 5 units of 'encoder.0.attention', which has 4"),
        ({"rounding": 32}, "rounding=32 cannot be met in 'encoder.0.attention'"),
        ({"rounding": 0}, "rounding is 0"),
        ({"merge": "average"}, "unknown merge 'average'; available: none, scale, least-squares, paper"),
        ({"merge": "scale"}, "'scale' needs calibration="),
        ({"measure": "output-gram"}, "'output-gram' needs calibration="),
        ({"measure": "cosine"}, "unknown measure 'cosine'; available"),
        ({"gqa": "heads"}, "unknown gqa 'heads'"),
        ({"ridge": -1.0}, r"ridge is -1\.0"),
        ({"seed": -1}, "seed is -1"),
        ({"time_limit": -1.0}, r"time_limit is -1\.0"),
    ],
)
def test_wrong_requests_change_nothing(options: dict[str, Any], message: str) -> None:
    model = build("bert")
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        prune_once(model, **options)
    assert bits(model) == before


def test_a_compaction_that_is_not_the_same_function_is_an_error_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **options: Any) -> nn.Module:
        smaller = compacting.compact(*args, **options)
        with torch.no_grad():
            next(smaller.parameters()).mul_(2)
        return smaller

    model = build("bert")
    before = bits(model)
    monkeypatch.setattr("topoprune.pruned_model.compact", wrong)
    with pytest.raises(ValueError, match="CompactBertForSequenceClassification is not the same function"):
        prune_once(model, 0.5, calibration=batches(model))
    assert bits(model) == before
    apply(model, random_plan(model)).close()


# compact_once


def test_stages_are_told_in_order_and_timed() -> None:
    model, told = build("bert"), []
    pruned = prune_once(model, calibration=batches(model), progress=lambda *now: told.append(now))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][0] == "done" and told[-1][1] == told[-1][2]
    assert set(pruned.seconds) == {stage for stage, _, _ in told} - {"done"}


@every_family
def test_a_plan_is_carried_out_without_changing_a_weight(family: str) -> None:
    model = build(family)
    plan = random_plan(model, kinds=("head", "kv_group", "neuron"))
    before = bits(model)
    done = compact_once(model, plan)
    assert bits(model) == before and done.equivalence.equal
    with apply(model, plan):
        assert torch.allclose(logits(done.model), logits(model), atol=1e-4)
        # What has no effect goes without a plan: here, what the masks in force have set to zero.
        masked = compact_once(model)
    ours, theirs = kept_units(masked.model), kept_units(done.model)
    assert {name: list(units) for name, units in ours.items()} == {n: list(units) for n, units in theirs.items()}
    assert masked.sparsity == pytest.approx(done.sparsity)


def test_compaction_refuses_plans_of_other_weights_and_models_without_dead_units() -> None:
    model = build("bert")
    plan = solve(extract(model, include=("neurons",)), budget=0.5, problem="neurons")
    other = build("bert", seed=1)
    before = bits(other)
    with pytest.raises(ValueError, match="the model's weights have changed since the plan was made"):
        compact_once(other, plan)
    with pytest.raises(ValueError, match="every head and neuron of this model has an effect"):
        compact_once(other)
    with pytest.raises(ValueError, match="plan is of another model"):
        compact_once(build("opt"), plan)
    assert bits(other) == before
    allowed = compact_once(other, plan, allow_changed_weights=True, rounding=16)
    assert set(allowed.kept.values()) == {32}  # 20 of 40 stay, 12 more as zeros


# speed


class Counting(nn.Module):
    def __init__(self, log: list[int], number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.log, self.number = log, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        self.log.append(self.number)
        return x


def test_speed_is_measured_interleaved_without_gradients_and_modes_return() -> None:
    log: list[int] = []
    dense, smaller = Counting(log, 0).train(), Counting(log, 1).eval()
    seconds = compare_speed(dense, smaller, {"x": torch.zeros(2)}, rounds=3)
    assert log == [0, 1] * 4  # one warm-up each
    assert min(seconds) > 0 and dense.training and not smaller.training


@every_family
def test_a_probe_is_what_the_model_takes_and_repeats(family: str) -> None:
    model = build(family)
    batch = probe(model, seed=1)
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
    again = probe(model, seed=1)
    assert all(torch.equal(value, again[key]) for key, value in batch.items())
    with pytest.raises(ValueError, match="cannot make up inputs for a Linear"):
        probe(nn.Linear(2, 2))


def test_a_request_says_what_it_prunes_and_needs() -> None:
    assert OneShot(heads=1.0).include == ("neurons",) and OneShot().include == ("heads", "neurons")
    assert OneShot(neurons=1).kept == {"heads": 0.5, "neurons": 1}
    assert OneShot(merge="least-squares").needs_data() and not OneShot(merge="none").needs_data()
    assert isinstance(OneShot(np.float64(0.5)).budget, float)

"""A compacted model is a model: it is measured, solved, trained and compacted again like any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.compaction.cases import EMPTY, GENERATING, empty_plan, structure_plan
from tests.compaction.laws import assert_same_function, assert_sizes_fit
from tests.masktools import bits, logits
from tests.prunertools import adamw, train
from tests.tiny import FAMILIES, build, inputs
from topoprune import (
    Plan,
    Pruner,
    Recipe,
    Site,
    apply,
    compact,
    extract,
    find_sites,
    kept_units,
    measure_sparsity,
    solve,
)

SHARES = {"head": 0.6, "kv_group": 0.6, "neuron": 0.6}


def _again(model: nn.Module, share: float = 0.6, measure: str = "circuit-cosine") -> Plan:
    calibration = [inputs(model)] if measure == "output-gram" else None
    graph = extract(model, measure=measure, calibration=calibration, include=("heads", "neurons"))
    plan = solve(graph, budget=share, problem="neurons")
    if graph.of_kind("head", "kv_group"):
        plan = plan | solve(graph, budget=share)
    return plan


def _dense_units(site: Site, keep: np.ndarray, before: dict[str, np.ndarray]) -> list[int]:
    """What the units that stay are called in the dense model; `before` is what was left of it."""
    per_unit = site.unit_width // site.head_width if site.kind == "kv_group" else 1
    stays = np.repeat(keep, per_unit)
    names = before.get(site.name, np.arange(stays.size))
    return names[stays].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["everywhere", "no heads in the first layer", "no neurons in the first layer"])
def test_twice_over_the_whole_path(family: str, case: str) -> None:
    model = build(family)
    dense = {site.name: site for site in find_sites(model, ("heads", "neurons"))}
    plan = structure_plan(model, 0.25) if case == "everywhere" else empty_plan(model, EMPTY[case], share=0.25)
    current = compact(model, plan)
    for _ in range(2):
        before = kept_units(current)
        plan = _again(current)
        with apply(current, plan):
            expected = logits(current)
            following = compact(current, plan)
        assert_same_function(following, expected)
        assert_sizes_fit(following)
        assert type(following) is type(current)
        kept = kept_units(following)
        for site in plan.sites:
            assert kept[site.name].tolist() == _dense_units(site, plan.keep(site.name), before)
        for name, units in kept.items():
            # The entries are the dense model's own, so names can be trusted.
            piece = dense[name].writes[0]
            per_unit = piece.width if dense[name].kind == "neuron" else dense[name].head_width
            rows = (
                model.get_parameter(piece.param)
                .movedim(piece.axis, 0)
                .reshape(-1, per_unit, piece.shape[1 - piece.axis])
            )
            here = following.get_parameter(piece.param).movedim(piece.axis, 0)
            assert torch.equal(here, rows[torch.from_numpy(units)].flatten(0, 1)), name
        current = following
    found = find_sites(current)
    assert all(site.n_units for site in found)
    emptied = {name for name, units in kept_units(current).items() if not len(units)}
    assert not emptied & {site.name for site in found}
    assert (case == "everywhere") is not bool(emptied)
    assert not any(site.name.startswith(f"{name}.") for name in emptied for site in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_lost_everything_has_no_sites_and_still_runs(family: str) -> None:
    model = build(family)
    smaller = compact(model, empty_plan(model, EMPTY["nothing"]))
    assert find_sites(smaller) == ()
    assert logits(smaller).isfinite().all()
    figures = measure_sparsity(smaller, find_sites(smaller))
    assert (figures.parameters, figures.removable) == (0, 0.0)
    again = compact(smaller)
    assert bits(again) == bits(smaller)
    if family in GENERATING:
        batch = {key: value for key, value in inputs(model).items() if key != "labels"}
        tokens = smaller.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens, smaller.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("use", [apply, compact])
@pytest.mark.parametrize("case", ["everywhere", "no heads in the first layer"])
def test_the_plan_that_was_carried_out_is_refused(case: str, use: object) -> None:
    model = build("bert")
    plan = structure_plan(model) if case == "everywhere" else empty_plan(model, EMPTY[case])
    smaller = compact(model, plan)
    before = bits(smaller)
    left = "it has 2 head units" if case == "everywhere" else "nothing is left of it"
    with pytest.raises(
        ValueError, match=f"compacted already: .* 4 head units of site 'encoder.0.attention', here {left}"
    ):
        use(smaller, plan)  # type: ignore[operator]
    assert bits(smaller) == before


def test_a_plan_on_sites_that_were_not_cut_still_fits() -> None:
    model = build("bert")
    heads = solve(extract(model, include=("heads",)), budget=2)
    neurons = solve(extract(model, include=("neurons",)), budget=10, problem="neurons")
    one, other = compact(compact(model, heads), neurons), compact(compact(model, neurons), heads)
    assert bits(one) == bits(other)
    assert one.config.to_dict() == other.config.to_dict()
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_counts_what_is_there(family: str) -> None:
    model = build(family)
    smaller = compact(model, empty_plan(model, EMPTY["no heads in the first layer"]))
    dense, figures = measure_sparsity(model, find_sites(model)), measure_sparsity(smaller, find_sites(smaller))
    assert (figures.zeros, figures.removable, figures.gatherable) == (0, 0, 0)
    assert 0 < figures.parameters < dense.parameters
    plan = structure_plan(smaller)
    with apply(smaller, plan):
        masked = measure_sparsity(smaller, find_sites(smaller))
    final = compact(smaller, plan)
    gone = figures.parameters - measure_sparsity(final, find_sites(final)).parameters
    assert masked.removable == pytest.approx(gone / figures.parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibrated_graphs_and_repair_of_compacted_models(family: str) -> None:
    model = build(family)
    smaller = compact(model, structure_plan(model, 0.25)).double()
    plan = _again(smaller, 0.5, "output-gram")
    with apply(smaller, plan, merge="least-squares", calibration=[inputs(smaller)]):
        expected = logits(smaller)
        final = compact(smaller, plan)
    assert_same_function(final, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruner_trains_a_compacted_model_on(family: str) -> None:
    model = build(family)
    smaller = compact(model, empty_plan(model, EMPTY["no heads in the last layer"], share=0.25))
    before = measure_sparsity(smaller, find_sites(smaller))
    optimizer = adamw(smaller)
    pruner = Pruner(smaller, Recipe.budget(0.4, ramp=(0.1, 0.5), solves=2), total_steps=6, steps_per_epoch=2)
    pruner.attach(optimizer)
    train(smaller, optimizer, range(6))
    pruner.close()
    smaller.eval()
    assert measure_sparsity(smaller, find_sites(smaller)).removable == pytest.approx(0.4, abs=0.06)
    final = compact(smaller)
    assert_same_function(final, logits(smaller))
    after = measure_sparsity(final, find_sites(final))
    assert after.removable == 0
    assert after.parameters <= 0.66 * before.parameters

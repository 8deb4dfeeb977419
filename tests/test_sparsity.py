"""Zeros, removable and gatherable shares against counting one entry at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.masktools import ATTENTION, random_plan
from tests.tiny import FAMILIES, HEADS, LAYERS, NEURONS, build
from topoprune import apply, connectivity_sd, find_sites, measure_sparsity
from topoprune.architectures import counted_matrices, matrix_parameters
from topoprune.sparsity import degrees, row_view

every_family = pytest.mark.parametrize("family", FAMILIES)


def naive_zeros(model: nn.Module) -> float:
    params = dict(model.named_parameters())
    entries = [v for name in counted_matrices(find_sites(model)) for v in params[name].detach().flatten().tolist()]
    return sum(v == 0 for v in entries) / len(entries)


@every_family
def test_a_dense_model_has_no_sparsity(family: str) -> None:
    model = build(family)
    sites = find_sites(model)
    figures = measure_sparsity(model, sites)
    assert (figures.zeros, figures.removable, figures.gatherable) == (0, 0, 0)
    assert figures.parameters == matrix_parameters(sites)
    assert all(kept == units for kept, units in figures.kept.values())


@every_family
def test_removable_is_what_the_plan_prunes_and_zeros_count_it_once(family: str) -> None:
    model = build(family)
    sites = find_sites(model)
    plan = random_plan(model, kinds=(*ATTENTION, "neuron"))
    with apply(model, plan):
        figures = measure_sparsity(model, sites)
        assert figures.zeros == pytest.approx(naive_zeros(model))
    by_hand = sum(int((~plan.keep(s.name)).sum()) * s.matrix_parameters_per_unit for s in sites)
    assert figures.removable == pytest.approx(by_hand / matrix_parameters(sites))
    # Units of different sites share no matrix entry here (rows against columns of other matrices).
    assert figures.zeros == pytest.approx(figures.removable)
    assert figures.gatherable == 0
    for name, (kept, units) in figures.kept.items():
        assert (kept, units) == (int(plan.keep(name).sum()), plan.keep(name).size)


@every_family
def test_input_dimensions_are_gatherable_not_removable(family: str) -> None:
    model = build(family)
    sites = find_sites(model)
    plan = random_plan(model, share=0.25, kinds=("input_dim",))
    with apply(model, plan):
        figures = measure_sparsity(model, sites)
        assert figures.zeros == pytest.approx(naive_zeros(model))
    assert figures.removable == 0
    assert figures.gatherable == pytest.approx(figures.zeros)


@every_family
def test_the_three_figures_never_count_an_entry_twice(family: str) -> None:
    """Heads and input dimensions cross in [Q; K; V]: the crossing belongs to the head."""
    model = build(family)
    with apply(model, random_plan(model)):
        figures = measure_sparsity(model, find_sites(model))
        assert figures.zeros == pytest.approx(naive_zeros(model))
    assert figures.removable + figures.gatherable == pytest.approx(
        figures.zeros, abs=1 / figures.parameters * LAYERS * 8
    )


@every_family
def test_scattered_zeros_are_not_removable(family: str) -> None:
    model = build(family)
    sites = find_sites(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in counted_matrices(sites):
            parameter = model.get_parameter(name)
            parameter[torch.rand(parameter.shape, generator=generator) < 0.3] = 0.0
    figures = measure_sparsity(model, sites)
    assert figures.zeros == pytest.approx(naive_zeros(model))
    assert 0.25 < figures.zeros < 0.35 and figures.removable == figures.gatherable == 0


@every_family
def test_a_unit_is_removable_exactly_if_cutting_it_changes_nothing(family: str) -> None:
    """Either all it writes is zero, or its value (or input) side is, biases included."""
    model = build(family)
    for site in find_sites(model, ("heads", "neurons")):
        fresh = build(family)
        last = site.n_units - 1
        with torch.no_grad():
            for piece in site.writes:
                fresh.get_parameter(piece.param).narrow(
                    piece.axis, piece.offset + last * piece.width, piece.width
                ).zero_()
        assert measure_sparsity(fresh, find_sites(fresh)).kept[site.name] == (last, site.n_units)
        fresh = build(family)
        carriers = [p for p in site.reads if p.role.removesuffix("_bias") in ("v", "in", "up")]
        for done, piece in enumerate(carriers):
            assert measure_sparsity(fresh, find_sites(fresh)).kept[site.name] == (site.n_units, site.n_units), done
            with torch.no_grad():
                fresh.get_parameter(piece.param).narrow(
                    piece.axis, piece.offset + last * piece.width, piece.width
                ).zero_()
        assert measure_sparsity(fresh, find_sites(fresh)).kept[site.name] == (last, site.n_units)


def test_the_texts_say_what_is_left() -> None:
    model = build("bert")
    with apply(model, random_plan(model)):
        figures = measure_sparsity(model, find_sites(model))
    assert figures.heads() == " ".join([str(HEADS // 2)] * LAYERS)
    assert f"zeros {figures.zeros:.1%}" in str(figures) and f"{figures.parameters:,}" in str(figures)


# Connectivity, the paper's signature


@every_family
def test_degrees_against_counting(family: str) -> None:
    model = build(family)
    sites = find_sites(model)
    epsilon = 0.1
    found = degrees(model, sites, epsilon)
    assert list(found) == [site.name for site in sites if site.kind == "neuron"]
    for site in sites:
        if site.kind != "neuron":
            continue
        inward = [row_view(model.get_parameter(p.param).detach(), p.axis) for p in site.reads if len(p.shape) == 2]
        joined = torch.cat(inward, dim=1)  # [gate_i, up_i] is one row
        outward = row_view(model.get_parameter(site.writes[0].param).detach(), 1 - site.writes[0].axis)
        assert joined.shape[0] == NEURONS and outward.shape[1] == NEURONS
        expected = [100 * float((row.abs() >= epsilon).float().mean()) for row in [*joined, *outward]]
        np.testing.assert_allclose(found[site.name].numpy(), expected, rtol=1e-5)


def test_connectivity_sd_is_pooled_over_layers() -> None:
    model = build("bert")
    sites = find_sites(model)
    assert connectivity_sd(model, sites) < 1  # hardly a random weight is below 1e-4
    with torch.no_grad():
        for name in (
            "bert.encoder.layer.0.intermediate.dense.weight",
            "bert.encoder.layer.1.intermediate.dense.weight",
        ):
            model.get_parameter(name)[: NEURONS // 2].zero_()
    rows = torch.cat(list(degrees(model, sites).values()))
    assert connectivity_sd(model, sites) == pytest.approx(float(rows.double().std(unbiased=False)), rel=1e-5)
    assert connectivity_sd(model, sites) > 20
    assert math.isnan(connectivity_sd(model, find_sites(model, ("heads",))))

"""What a graph holds besides its measure: neighbours, importance, cost, edges, digest; sites by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import topoprune.extraction.measures as measures_module
from tests.naive_measures import CUSTOM, custom_model, edge_set, naive_circuit_cosine, naive_nearest, perturbed
from tests.tiny import FAMILIES, HIDDEN, NEURONS, build, inputs
from topoprune.architectures import find_sites
from topoprune.extraction import (
    Measure,
    complete_graph,
    extract,
    measure_names,
    named_tensors,
    nearest_graph,
    register_measure,
    threshold_graph,
    unit_blocks,
    weights_digest,
)
from topoprune.graph import Site, TensorSlice

every_family = pytest.mark.parametrize("family", FAMILIES)


def tile_of(distance: np.ndarray) -> Callable[[slice, slice], torch.Tensor]:
    matrix = torch.from_numpy(distance).float()
    return lambda rows, columns: matrix[rows, columns].clone()


# Graph builders


@given(
    n=st.integers(2, 40),
    k=st.integers(1, 12),
    block=st.integers(1, 45),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_nearest_graph_equals_its_twin_with_ties(n: int, k: int, block: int, levels: int, seed: int) -> None:
    distance = np.random.default_rng(seed).integers(-1, levels, (n, n)) / np.float32(8)
    distance = np.triu(distance, 1) + np.triu(distance, 1).T
    graph = nearest_graph(tile_of(distance), n, k, block=block, normalised=False)
    assert edge_set(graph) == naive_nearest(distance, k)
    edges, weight = graph.edge_list()
    np.testing.assert_array_equal(weight, np.maximum(distance[edges[:, 0], edges[:, 1]], 0).astype(np.float32))


@given(n=st.integers(1, 30), block=st.integers(1, 35), theta=st.sampled_from([0.0, 0.5, 9.0]), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_threshold_graph_is_the_cut_complete_graph(n: int, block: int, theta: float, seed: int) -> None:
    distance = np.random.default_rng(seed).integers(0, 9, (n, n)) / np.float32(8)
    distance = np.triu(distance, 1) + np.triu(distance, 1).T
    complete = complete_graph(tile_of(distance), n, block=block, normalised=False)
    np.testing.assert_array_equal(complete.to_dense(), distance)
    cut = threshold_graph(tile_of(distance), n, theta, block=block, normalised=False, max_edges=10**6)
    wanted = complete.at_most(theta)
    assert edge_set(cut) == edge_set(wanted)
    np.testing.assert_array_equal(cut.weight, wanted.weight)


def test_every_neuron_has_its_neighbours() -> None:
    graph = extract(build("bert"), neighbours=4).redundancy["encoder.0.ffn"]
    assert graph.degree().min() >= 4
    assert graph.n_edges <= NEURONS * 4
    assert np.all(graph.weight <= 1)


def test_theta_replaces_neighbours() -> None:
    model = build("bert")
    full = extract(model, neighbours=NEURONS)
    cut = extract(model, theta=0.9)
    name = "encoder.1.ffn"
    assert edge_set(cut.redundancy[name]) == edge_set(full.redundancy[name].at_most(0.9))
    assert cut.redundancy["encoder.1.attention"].n_edges == full.redundancy["encoder.1.attention"].n_edges


def test_theta_that_keeps_too_much_says_so() -> None:
    with pytest.raises(ValueError, match=r"site 'encoder\.0\.ffn': theta=2 keeps more than 16 edges"):
        extract(build("bert"), theta=2.0, max_bytes=1024)


def test_non_finite_distance_is_refused() -> None:
    distance = np.ones((4, 4))
    distance[1, 2] = np.nan
    for builder in (
        lambda tile: nearest_graph(tile, 4, 2, block=2, normalised=True),
        lambda tile: complete_graph(tile, 4, block=4, normalised=True),
    ):
        with pytest.raises(ValueError, match="not finite"):
            builder(tile_of(distance))


# Importance, cost, edges, digest


@every_family
def test_magnitude_and_cost(family: str) -> None:
    model = FAMILIES[family]()
    tensors = named_tensors(model)
    graph = extract(model)
    for site in graph.sites:
        assert np.all(graph.cost[site.name] == site.parameters_per_unit)
        u = site.n_units - 1
        if site.kind == "input_dim":
            expected = sum(float(tensors[s.param].select(s.axis, u).abs().sum()) for s in site.reads)
        elif site.kind == "neuron":
            expected = float(
                np.prod([float(tensors[s.param].select(s.axis, u).norm()) for s in site.slices if len(s.shape) == 2])
            )
        else:
            expected = float(unit_blocks(tensors, site, site.one("o"))[u].abs().sum())
        assert graph.importance[site.name][u] == pytest.approx(expected, rel=1e-5)


def test_importance_is_what_was_asked_for() -> None:
    model = build("bert")
    batch = [inputs(model)]
    plain = extract(model)
    energy = extract(model, importance="gram-diagonal", calibration=batch)
    gram = extract(model, measure="output-gram", calibration=batch)
    mixed = extract(model, measure={"heads": "output-gram", "neurons": "circuit-cosine"}, calibration=batch)
    forced = extract(model, measure="output-gram", calibration=batch, importance="magnitude")
    for site in plain.sites:
        magnitude = plain.importance[site.name]
        np.testing.assert_array_equal(forced.importance[site.name], magnitude)
        if site.kind == "input_dim":
            np.testing.assert_array_equal(energy.importance[site.name], magnitude)
            assert site.name not in plain.measures
            continue
        np.testing.assert_allclose(energy.importance[site.name], gram.importance[site.name], rtol=1e-5)
        np.testing.assert_array_equal(energy.redundancy[site.name].weight, plain.redundancy[site.name].weight)
        expected = gram if site.kind == "head" else plain
        np.testing.assert_allclose(mixed.importance[site.name], expected.importance[site.name], rtol=1e-5)
        assert mixed.measures[site.name] == expected.measures[site.name]


@every_family
def test_weight_edges_have_the_rows_of_the_paper(family: str) -> None:
    """Rows: neurons in L_in, input dimensions in Q, K, V, residual dimensions in both outputs."""
    model = FAMILIES[family]()
    tensors = named_tensors(model)
    graph = extract(model, include=("edges",))
    assert graph.sites == find_sites(model)  # a plan on edges must recognise its model
    sites = find_sites(model)
    for site in sites:
        for piece in site.slices:
            if len(piece.shape) == 2:
                wires = graph.connectivity[piece.param]
                is_neuron_row = site.kind == "neuron" and piece in site.reads
                assert wires.shape[0] == (NEURONS if is_neuron_row else HIDDEN)
                magnitude = tensors[piece.param].abs().numpy()
                np.testing.assert_array_equal(wires.weight, magnitude if wires.row_axis == 0 else magnitude.T)


def test_weights_digest_sees_every_weight_and_no_name() -> None:
    model = build("bert")
    sites = find_sites(model)
    digest = weights_digest(model, sites)
    assert digest == weights_digest(copy.deepcopy(model), sites)
    assert digest == weights_digest(model.base_model, find_sites(model.base_model))
    assert extract(model).weights_digest == digest
    assert extract(model, digest_weights=False).weights_digest == ""
    for name in {piece.param for site in sites for piece in site.slices}:
        index = (1,) * dict(model.named_parameters())[name].ndim
        assert weights_digest(perturbed(model, name, 9.0, index), sites) != digest
    half = copy.deepcopy(model).bfloat16()
    assert weights_digest(half, sites) != digest
    assert weights_digest(perturbed(model, "classifier.weight", 9.0), sites) == digest


# Hand-made sites and plugged-in measures


@pytest.mark.parametrize("measure", measure_names())
def test_sites_by_hand_on_any_module(measure: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = custom_model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    model = Named()
    site = replace(
        CUSTOM,
        reads=tuple(replace(piece, param=f"net.{piece.param}") for piece in CUSTOM.reads),
        writes=tuple(replace(piece, param=f"net.{piece.param}") for piece in CUSTOM.writes),
        consumer="net.2",
    )
    batch = [{"x": torch.randn(9, 3)}] if measure == "output-gram" else None
    graph = extract(model, sites=[site], measure=measure, calibration=batch, neighbours=2)
    assert graph.model_type == "custom"
    assert graph.sites == (site,)
    assert graph.redundancy["ffn"].degree().min() >= 2
    with pytest.raises(ValueError, match="no adapter"):
        extract(model)


def test_value_only_attention_site() -> None:
    site = Site(
        "mix", "head", 3, 2, (TensorSlice("0.weight", 0, "v", (6, 3), width=2),),
        (TensorSlice("2.weight", 1, "o", (4, 6), width=2),), "2", head_width=2,
    )  # fmt: skip
    model = custom_model()
    graph = extract(model, sites=[site], include=("heads",))
    expected = naive_circuit_cosine(named_tensors(model), replace(site, rotary=True))
    np.testing.assert_allclose(graph.redundancy["mix"].to_dense(), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"'mix'.*needs 'v' and 'o'"):
        extract(model, sites=[replace(site, reads=(replace(site.reads[0], role="w"),))], include=("heads",))


def test_a_registered_measure_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures_module, "_MEASURES", dict(measures_module._MEASURES))

    def prepare(tensors: Any, site: Site, moment: torch.Tensor | None) -> Any:
        return lambda a, b: torch.full((a.stop - a.start, b.stop - b.start), 0.25)

    register_measure(Measure("constant", True, False, prepare))
    assert "constant" in measure_names()
    graph = extract(build("bert"), measure="constant", neighbours=3)
    assert np.all(graph.redundancy["encoder.0.ffn"].weight == 0.25)
    # All equal: everyone's three nearest are the lowest indices.
    assert edge_set(graph.redundancy["encoder.0.ffn"]) == naive_nearest(np.full((NEURONS, NEURONS), 0.25), 3)

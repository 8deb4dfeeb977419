"""Data-free measures against their slow twins, and what no measure may do to a model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.naive_measures import DATA_FREE, edge_set, naive_circuit_cosine, naive_linf
from tests.tiny import FAMILIES, NEURONS, build, inputs
from topoprune.architectures import find_sites
from topoprune.extraction import extract, get_measure, measure_names, named_tensors, site_graph

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@pytest.mark.parametrize("measure", DATA_FREE)
def test_data_free_distances_equal_their_twin(family: str, measure: str) -> None:
    model = FAMILIES[family]()
    tensors = named_tensors(model)
    twin = naive_linf if measure == "weights-linf" else naive_circuit_cosine
    graph = extract(model, measure=measure, include=("heads", "neurons"), neighbours=NEURONS)
    for site in graph.sites[:3]:
        found = graph.redundancy[site.name]
        assert found.n_edges == site.n_units * (site.n_units - 1) // 2
        assert found.normalised == (measure == "circuit-cosine")
        np.testing.assert_allclose(found.to_dense(), twin(tensors, site), atol=2e-5)


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_cross_attention_equals_the_twin(family: str) -> None:
    model = build(family)
    tensors = named_tensors(model)
    site = extract(model, include=("heads",)).site("decoder.1.cross_attention")
    np.testing.assert_allclose(
        site_graph(tensors, site, "circuit-cosine").to_dense(), naive_circuit_cosine(tensors, site), atol=2e-5
    )


@every_family
@pytest.mark.parametrize("measure", measure_names())
def test_blocked_equals_unblocked(family: str, measure: str) -> None:
    model = FAMILIES[family]()
    kwargs: dict[str, Any] = dict(measure=measure, include=("heads", "neurons"), neighbours=5, digest_weights=False)
    if get_measure(measure).calibrated:
        kwargs["calibration"] = [inputs(model)]
    whole = extract(model, block=1000, **kwargs)
    for block in (1, 7, 16) if family == "bert" else (13,):
        parts = extract(model, block=block, **kwargs)
        for name, graph in whole.redundancy.items():
            assert edge_set(parts.redundancy[name]) == edge_set(graph)
            np.testing.assert_allclose(parts.redundancy[name].weight, graph.weight, atol=3e-6)


@pytest.mark.parametrize("family", ["bert", "t5", "opt", "gpt2", "llama", "vit", "bart"])
def test_circuit_cosine_ignores_the_basis_of_a_head(family: str) -> None:
    """Q -> QM, K -> KM^-T, V -> VM, O -> M^-1 O leave the function alone, and this distance (not linf)."""
    model = FAMILIES[family]()
    before = {name: extract(model, include=("heads",), measure=name) for name in DATA_FREE}
    tensors = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in before["circuit-cosine"].sites:
            for unit in range(site.n_units):
                shape = (site.head_width, site.head_width)
                # Rotations with unequal stretching: far from orthogonal, well conditioned.
                first, second = (
                    torch.linalg.qr(torch.randn(shape, generator=generator)).Q
                    * (0.5 + 1.5 * torch.rand(shape[0], generator=generator))
                    for _ in "qv"
                )
                for role, matrix in (("q", first), ("k", first.inverse().T), ("v", second), ("o", second.inverse().T)):
                    if role in "qk" and site.rotary:
                        continue
                    for bias in ("", "_bias"):
                        for piece in site.slices:
                            if piece.role == role + bias:
                                index = torch.from_numpy(piece.indices(np.array([unit])))
                                own = tensors[piece.param].index_select(piece.axis, index).movedim(piece.axis, 0)
                                # Every head of a KV group shares V, so each one's O changes alike.
                                moved = (
                                    matrix.T @ own.reshape(-1, site.head_width, *own.shape[1:]).flatten(2)
                                    if own.ndim > 1
                                    else own.reshape(-1, site.head_width) @ matrix
                                )
                                moved = moved.reshape(own.shape).movedim(0, piece.axis)
                                tensors[piece.param].index_copy_(piece.axis, index, moved)
    after = {name: extract(model, include=("heads",), measure=name) for name in DATA_FREE}
    change = {
        measure: max(
            float(np.abs(own.weight - after[measure].redundancy[name].weight).max())
            for name, own in before[measure].redundancy.items()
        )
        for measure in DATA_FREE
    }
    assert change["circuit-cosine"] < 1e-4
    assert change["weights-linf"] > 1e-3
    batch = inputs(model)
    with torch.no_grad():  # the change of basis really left the function alone
        torch.testing.assert_close(model(**batch).logits, build(family)(**batch).logits, rtol=1e-3, atol=1e-3)


def test_identical_units_are_at_distance_zero() -> None:
    model = build("llama")
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for site in find_sites(model, ("heads", "neurons"))[:2]:
            for piece in site.slices:
                own = tensors[piece.param].index_select(piece.axis, torch.from_numpy(piece.indices(np.array([0]))))
                tensors[piece.param].index_copy_(piece.axis, torch.from_numpy(piece.indices(np.array([1]))), own)
    for measure in DATA_FREE:
        graph = extract(model, measure=measure, neighbours=3)
        for name in ("decoder.0.attention", "decoder.0.ffn"):
            assert graph.redundancy[name].to_dense()[0, 1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("measure", ["circuit-cosine", "output-gram"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_dead_units_are_alike_and_unlike_all_others(family: str, measure: str) -> None:
    model = FAMILIES[family]()
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for site in find_sites(model, ("heads", "neurons"))[:2]:
            for piece in site.slices:
                dead = np.array([0]) if site.kind == "kv_group" else np.array([0, 2])
                tensors[piece.param].index_fill_(piece.axis, torch.from_numpy(piece.indices(dead)), 0.0)
    batch = [inputs(model)] if measure == "output-gram" else None
    graph = extract(model, measure=measure, neighbours=NEURONS, calibration=batch)
    for site in graph.sites[:2]:
        if site.name not in graph.redundancy:
            continue
        distance = graph.redundancy[site.name].to_dense()
        if site.kind != "kv_group":
            assert distance[0, 2] == 0
        others = [unit for unit in range(site.n_units) if unit not in (0, 2)]
        np.testing.assert_array_equal(distance[0, others], 1.0)


def test_extraction_leaves_the_model_alone() -> None:
    model = build("t5").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.encoder.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    for measure in measure_names():
        extract(model, measure=measure, calibration=[inputs(model)] if measure == "output-gram" else None)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("measure", measure_names())
def test_other_dtypes(dtype: torch.dtype, measure: str) -> None:
    model = build("llama").to(dtype)
    batch = [inputs(model)] if measure == "output-gram" else None
    graph = extract(model, measure=measure, calibration=batch, include=("heads", "neurons", "edges"))
    twin = extract(copy.deepcopy(model).float(), measure=measure, calibration=batch)
    for name, own in graph.redundancy.items():
        # Weights are compared after upcasting; activations differ by the rounding of the forward.
        tolerance = 0.15 if (measure, dtype) == ("output-gram", torch.bfloat16) else 1e-5
        if own.n_nodes == 2:
            np.testing.assert_allclose(own.weight, twin.redundancy[name].weight, atol=tolerance)

"""Extraction against slow twins: every fast path has an obvious loop beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

import topoprune.extraction.measures as measures_module
from tests.tiny import FAMILIES, HIDDEN, NEURONS, build, inputs
from topoprune.architectures import find_sites
from topoprune.extraction import (
    GramCollector,
    Measure,
    check_finite,
    collect_gram,
    complete_graph,
    consumer_blocks,
    extract,
    get_measure,
    measure_names,
    named_tensors,
    nearest_graph,
    register_measure,
    site_graph,
    threshold_graph,
    unit_blocks,
    unit_gram,
    unit_rows,
    weights_digest,
)
from topoprune.graph import Graph, Site, TensorSlice

every_family = pytest.mark.parametrize("family", FAMILIES)
DATA_FREE = ("circuit-cosine", "weights-linf")


# Slow twins


def naive_linf(tensors: dict[str, torch.Tensor], site: Site) -> np.ndarray:
    rows = [
        torch.cat([unit_rows(tensors, site, s)[u] for s in site.reads if len(s.shape) == 2])
        for u in range(site.n_units)
    ]
    return np.array([[float((a - b).abs().max()) for b in rows] for a in rows])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def naive_circuit_cosine(tensors: dict[str, torch.Tensor], site: Site) -> np.ndarray:
    """Build every operator in full (d x d for heads) and compare."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    n = site.n_units
    result = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if site.kind == "neuron":
                similarity = 1.0
                for piece in site.slices:
                    if len(piece.shape) == 2:
                        rows = unit_rows(tensors, site, piece)
                        similarity *= cosine(rows[i], rows[j])
            else:
                pairs = [("v", "o")] if site.rotary else [("v", "o"), ("q", "k")]
                similarity = 0.0
                for left, right in pairs:
                    operators = []
                    for unit in (i, j):
                        a, b = (
                            sum(unit_blocks(tensors, site, site.one(role))[unit].split(site.head_width))  # type: ignore[arg-type]
                            for role in (left, right)
                        )
                        operators.append(a.T @ b)
                    similarity += cosine(*operators) / len(pairs)
            result[i, j] = min(1.0, max(0.0, 1 - similarity))
    np.fill_diagonal(result, 0.0)
    return result


def consumer_inputs(
    model: nn.Module, sites: list[Site], batches: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """All non-padding rows that reach each consumer, collected token by token."""
    rows: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    for batch in batches:
        seen: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(site.consumer).register_forward_pre_hook(  # type: ignore[arg-type]
                lambda module, args, name=site.name, seen=seen: seen.__setitem__(name, args[0])
            )
            for site in sites
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
        for site in sites:
            real = batch["attention_mask"] == 1
            if site.stack == "decoder" and "labels" in batch:
                real = batch["labels"] != -100
            values = seen[site.name].reshape(*real.shape, -1)
            rows[site.name] += [values[b, t] for b in range(len(real)) for t in range(real.shape[1]) if real[b, t]]
    return {name: torch.stack(found) for name, found in rows.items()}


def naive_output_gram(tensors: dict[str, torch.Tensor], site: Site, rows: torch.Tensor) -> np.ndarray:
    """Mean over tokens of the inner products of what each unit adds."""
    blocks = consumer_blocks(tensors, site).double()
    total = torch.zeros(site.n_units, site.n_units, dtype=torch.float64)
    for row in rows.double():
        parts = row.reshape(site.n_units, site.unit_width)
        added = torch.stack([parts[u] @ blocks[u] for u in range(site.n_units)])
        total += added @ added.T
    return (total / len(rows)).numpy()


def naive_nearest(distance: np.ndarray, k: int) -> set[tuple[int, int]]:
    edges = set()
    for i, row in enumerate(distance):
        order = sorted((float(d), j) for j, d in enumerate(row) if j != i)
        edges |= {(min(i, j), max(i, j)) for _, j in order[:k]}
    return edges


def edge_set(graph: Graph) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in graph.edge_list()[0]}


def tile_of(distance: np.ndarray) -> Callable[[slice, slice], torch.Tensor]:
    matrix = torch.from_numpy(distance).float()
    return lambda rows, columns: matrix[rows, columns].clone()


def perturbed(model: nn.Module, name: str, value: float, index: tuple[int, ...] = (0, 0)) -> nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        dict(model.named_parameters())[name][index] = value
    return model


# Data-free measures


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


def test_t5_cross_attention_equals_the_twin() -> None:
    model = build("t5")
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


@pytest.mark.parametrize("family", ["bert", "t5", "opt", "gpt2", "llama"])
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


# Output Gram


@every_family
def test_output_gram_equals_the_per_token_loop(family: str) -> None:
    model = FAMILIES[family]()
    batches = [inputs(model, seed=1), inputs(model, batch=2, length=5, seed=2)]
    sites = list(find_sites(model, ("heads", "neurons")))
    tensors = named_tensors(model)
    rows = consumer_inputs(model, sites, batches)
    graph = extract(model, measure="output-gram", calibration=batches, neighbours=NEURONS)
    moments = dict(collect_gram(model, sites, batches))
    for site in sites[:6]:
        expected = naive_output_gram(tensors, site, rows[site.name])
        found = unit_gram(site, tensors[site.writes[0].param], moments[site.name]).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4 * expected.max())
        energy = np.diag(expected)
        np.testing.assert_allclose(graph.importance[site.name], energy, rtol=1e-3, atol=1e-6)
        silent = energy == 0  # ReLU neurons that never fire
        scale = np.outer(energy, energy)
        similarity = np.divide(expected**2, scale, out=np.outer(silent, silent).astype(float), where=scale > 0)
        wanted = 1 - similarity
        np.fill_diagonal(wanted, 0)
        np.testing.assert_allclose(graph.redundancy[site.name].to_dense(), wanted, atol=2e-3)
        assert graph.redundancy[site.name].normalised


@every_family
def test_dropping_units_costs_exactly_their_gram_sum(family: str) -> None:
    """Law: the mean squared change at the projection's output is 1_P^T G 1_P."""
    model = FAMILIES[family]()
    batches = [inputs(model, seed=3)]
    sites = [site for site in find_sites(model, ("heads", "neurons"))]
    tensors = named_tensors(model)
    rows = consumer_inputs(model, sites, batches)
    rng = np.random.default_rng(0)
    for name, moment in collect_gram(model, sites, batches):
        site = next(site for site in sites if site.name == name)
        gram = unit_gram(site, consumer_blocks(tensors, site), moment).double().numpy()
        assert np.linalg.eigvalsh(gram).min() > -1e-4 * gram.trace()
        projection = model.get_submodule(site.consumer)
        for _ in range(3):
            dropped = rng.random(site.n_units) < 0.5
            mask = torch.from_numpy(np.repeat(~dropped, site.unit_width)).float()
            with torch.no_grad():
                change = projection(rows[name]) - projection(rows[name] * mask)
            assert float(change.square().sum(-1).mean()) == pytest.approx(dropped @ gram @ dropped, rel=1e-3, abs=1e-6)


@every_family
def test_padding_is_ignored(family: str) -> None:
    """Other tokens in the padding, and more padding, do not change the moments."""
    model = FAMILIES[family]()
    batch = inputs(model, seed=4)
    moved = {name: tensor.clone() for name, tensor in batch.items()}
    padding = moved["attention_mask"] == 0
    if family != "roberta":  # its positions are counted from the ids
        moved["input_ids"][padding] = 7
    sites = find_sites(model, ("heads", "neurons"))
    with GramCollector(model, sites) as first, torch.no_grad():
        model(**batch)
    with GramCollector(model, sites) as second, torch.no_grad():
        model(**moved)
    assert first.tokens == second.tokens
    real = {"encoder": int(batch["attention_mask"].sum())}
    real["decoder"] = int((batch["labels"] != -100).sum()) if "labels" in batch else real["encoder"]
    for site in sites:
        assert first.tokens[site.name] == real[site.stack] < batch["input_ids"].numel() + 3
        torch.testing.assert_close(first.moment(site.name), second.moment(site.name), rtol=1e-4, atol=1e-5)


def test_decoder_mask_and_positional_arguments() -> None:
    model = build("t5")
    batch = inputs(model)
    mask = torch.ones(3, 4, dtype=torch.long)
    mask[0, 2:] = 0
    sites = find_sites(model, ("heads",))
    with GramCollector(model, sites) as collector, torch.no_grad():
        model(batch["input_ids"], batch["attention_mask"], batch["labels"][:, :4].clamp_min(0), mask)
    assert collector.tokens["decoder.0.cross_attention"] == 10
    assert collector.tokens["encoder.0.attention"] == int(batch["attention_mask"].sum())
    with GramCollector(model, sites) as collector, torch.no_grad():
        model(input_ids=batch["input_ids"], decoder_input_ids=batch["input_ids"][:, :4])
    assert collector.tokens["decoder.0.attention"] == 12
    assert collector.tokens["encoder.0.attention"] == 21


def test_max_tokens_is_exact_and_the_first_tokens_count() -> None:
    model = build("bert")
    batches = [inputs(model, seed=seed) for seed in range(3)]
    sites = list(find_sites(model, ("heads", "neurons")))
    rows = consumer_inputs(model, sites, batches)
    with GramCollector(model, sites, max_tokens=20) as collector, torch.no_grad():
        assert not collector.done
        for batch in batches:
            model(**batch)
        assert collector.done
    for site in sites:
        assert collector.tokens[site.name] == 20
        first = rows[site.name][:20]
        torch.testing.assert_close(collector.moment(site.name), first.T @ first / 20, rtol=1e-4, atol=1e-5)
    some = dict(collect_gram(model, sites, batches, max_tokens=20))
    torch.testing.assert_close(some[sites[0].name], collector.moment(sites[0].name))


def test_panels_add_up() -> None:
    """Accumulators wider than one panel, including a ragged last panel."""
    width = 1700
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 3))
    site = replace(
        CUSTOM,
        n_units=width,
        reads=(TensorSlice("0.weight", 0, "in", (width, 3)),),
        writes=(TensorSlice("2.weight", 1, "out", (3, width)),),
    )
    x = torch.randn(50, 3)
    with GramCollector(model, [site]) as collector, torch.no_grad():
        model(x[:30])
        model(x[30:])
        hidden = model[1](model[0](x))
    moment = collector.moment("ffn")
    assert torch.equal(moment, moment.T)
    torch.testing.assert_close(moment, hidden.T @ hidden / 50, rtol=1e-4, atol=1e-5)


def test_diagonal_sites_hold_a_vector() -> None:
    model = build("bert")
    sites = find_sites(model, ("neurons",))
    name = sites[0].name
    batch = inputs(model)
    with GramCollector(model, sites, diagonal={name}) as collector, torch.no_grad():
        model(**batch)
        model(**batch)
    full = dict(collect_gram(model, sites, [batch, batch]))
    assert collector.moment(name).shape == (NEURONS,)
    torch.testing.assert_close(collector.moment(name), full[name].diagonal(), rtol=1e-4, atol=1e-6)
    assert collector.moment(sites[1].name).shape == (NEURONS, NEURONS)


def test_groups_that_fit_max_bytes_give_the_same_moments() -> None:
    model = build("bert")
    sites = find_sites(model, ("heads", "neurons"))
    batches = [inputs(model, seed=5)]
    whole = dict(collect_gram(model, sites, batches))
    passes = []

    class Counted(list):
        def __iter__(self) -> Iterator[Any]:
            passes.append(1)
            return super().__iter__()

    split = dict(collect_gram(model, sites, Counted(batches), max_bytes=4 * NEURONS**2))
    assert len(passes) == 4  # 24² and 40² do not fit together
    assert list(split) == [site.name for site in sites]
    assert all(torch.equal(split[name], moment) for name, moment in whole.items())
    with pytest.raises(ValueError, match=r"'encoder\.0\.ffn' needs an accumulator of 6400 bytes, max_bytes is 6399"):
        collect_gram(model, sites, batches, max_bytes=4 * NEURONS**2 - 1)


def test_a_generator_survives_several_passes() -> None:
    model = build("bert")
    sites = find_sites(model, ("heads", "neurons"))
    batches = [inputs(model, seed=seed) for seed in range(2)]
    once = dict(collect_gram(model, sites, (batch for batch in batches), max_bytes=4 * NEURONS**2))
    again = dict(collect_gram(model, sites, batches))
    assert all(torch.equal(once[name], moment) for name, moment in again.items())


def test_batch_encoding_and_a_single_batch_are_accepted() -> None:
    model = build("bert")
    sites = find_sites(model, ("heads",))
    batch = inputs(model)
    plain = dict(collect_gram(model, sites, [batch]))
    for calibration in ([BatchEncoding(batch)], BatchEncoding(batch), batch):
        other = dict(collect_gram(model, sites, calibration))  # type: ignore[arg-type]
        assert all(torch.equal(other[name], moment) for name, moment in plain.items())


def test_resume_from_state_dict_is_exact() -> None:
    model = build("t5")
    sites = find_sites(model, ("heads", "neurons"))
    first, second = inputs(model, seed=1), inputs(model, seed=2)
    diagonal = {sites[1].name}
    with GramCollector(model, sites, diagonal=diagonal) as whole, torch.no_grad():
        model(**first)
        state = whole.state_dict()
        model(**second)
    with GramCollector(model, sites, diagonal=diagonal) as resumed, torch.no_grad():
        resumed.load_state_dict(state)
        model(**second)
    assert resumed.tokens == whole.tokens
    assert all(torch.equal(resumed.moment(site.name), whole.moment(site.name)) for site in sites)
    resumed.reset()
    assert set(resumed.tokens.values()) == {0}
    with pytest.raises(ValueError, match="expected \\["):
        GramCollector(model, sites[:1]).load_state_dict(state)
    with pytest.raises(ValueError, match="has shape"):
        GramCollector(model, sites).load_state_dict(state)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_collecting_during_training_forwards(checkpointing: bool) -> None:
    model = build("bert").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    sites = find_sites(model, ("heads", "neurons"))
    batch = inputs(model)
    with GramCollector(model, sites) as collector:
        torch.manual_seed(0)
        model(**batch, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    assert set(collector.tokens.values()) == {int(batch["attention_mask"].sum())}  # recomputation does not count
    assert not collector.moment(sites[0].name).requires_grad
    gradient = model.classifier.weight.grad.clone()
    model.zero_grad()
    torch.manual_seed(0)
    model(**batch, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
    assert torch.equal(model.classifier.weight.grad, gradient)


def test_autocast_and_inference_mode_do_not_leak_into_the_sums() -> None:
    model = build("bert")
    sites = find_sites(model, ("neurons",))
    batch = inputs(model)
    with GramCollector(model, sites) as collector:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(**batch)
        with torch.inference_mode():
            model(**batch)
        with torch.no_grad():
            model(**batch)
    moment = collector.moment(sites[0].name)
    assert moment.dtype == torch.float32 and not moment.is_inference()


def test_hooks_are_removed_on_close() -> None:
    model = build("bert")
    collector = GramCollector(model, find_sites(model))
    assert any(module._forward_pre_hooks for module in model.modules())
    collector.close()
    collector.close()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


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

CUSTOM = Site(
    name="ffn",
    kind="neuron",
    n_units=6,
    unit_width=1,
    reads=(TensorSlice("0.weight", 0, "in", (6, 3)), TensorSlice("0.bias", 0, "in_bias", (6,))),
    writes=(TensorSlice("2.weight", 1, "out", (4, 6)),),
    consumer="2",
    block="ffn",
)


def custom_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))


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


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(measure="cosin"), r"unknown measure 'cosin'; available: circuit-cosine, output-gram, weights-linf"),
        (dict(measure={"head": "circuit-cosine"}), "expected a name or"),
        (dict(importance="size"), "unknown importance 'size'; available: auto, magnitude, gram-diagonal"),
        (dict(include=("head",)), "choose from heads, neurons, input_dims, edges"),
        (dict(include="heads"), "choose from"),
        (dict(neighbours=0), "neighbours must be at least 1, found 0"),
        (dict(neighbours=None), "give one of them"),
        (dict(theta=-0.1), "theta must be a finite number >= 0, found -0.1"),
        (dict(theta=float("nan")), "theta must be"),
        (dict(block=0), "block must be at least 1"),
        (dict(measure="output-gram"), "needs calibration="),
        (dict(importance="gram-diagonal"), "needs calibration="),
        (dict(measure="output-gram", calibration=[]), "calibration set is empty"),
        (dict(measure="output-gram", calibration=iter([])), "calibration set is empty"),
        (dict(measure="output-gram", calibration=(x for x in ())), "calibration set is empty"),
        (dict(measure="output-gram", calibration=3), "calibration is a int, expected an iterable"),
        (dict(measure="output-gram", calibration=["text"]), "batch 0 is a str, expected a dict of tensors"),
        (dict(measure="output-gram", calibration=[{"input_ids": [[1]]}]), "input_ids=list, expected a tensor"),
        (dict(measure="output-gram", calibration=[{}], max_tokens=0), "max_tokens must be at least 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(build("bert"), **arguments)


def test_unused_calibration_warns() -> None:
    with pytest.warns(UserWarning, match="calibration is not used"):
        extract(build("bert"), calibration=[{}])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_named(value: float) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    model = perturbed(build("bert"), name, value, (2, 5))
    for measure in DATA_FREE:
        with pytest.raises(ValueError, match=rf"'{name}' has 1 non-finite values, the first at \(2, 5\)"):
            extract(model, measure=measure)


def test_huge_finite_weights_are_not_mistaken_for_infinity() -> None:
    model = custom_model()
    with torch.no_grad():
        model[2].weight.fill_(3e38)
    assert not torch.isfinite(model[2].weight.sum())
    check_finite(named_tensors(model), [CUSTOM])


def test_non_finite_activations_are_named() -> None:
    model = build("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"activations at 'bert\.encoder\.layer\.0\.attention\.output\.dense'.*not finite"
    ):
        extract(model, measure="output-gram", calibration=[inputs(model)])


def test_weights_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = custom_model()
    with pytest.raises(ValueError, match="no data"):
        extract(model, sites=[CUSTOM])


def test_a_failing_batch_restores_the_training_flags() -> None:
    model = build("bert").train()
    with pytest.raises(ValueError, match="input_ids"):
        extract(model, measure="output-gram", calibration=[{"attention_mask": torch.ones(1, 1)}])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_collector_errors() -> None:
    model = build("bert")
    sites = find_sites(model, ("heads",))
    collector = GramCollector(model, sites)
    with pytest.raises(ValueError, match="no tokens seen"):
        collector.moment(sites[0].name)
    with pytest.raises(KeyError, match="known: encoder"):
        collector.moment("nothing")
    with pytest.raises(ValueError, match=r"attention_mask has shape \(7,\)"):
        model(input_ids=torch.ones(1, 7, dtype=torch.long), attention_mask=torch.ones(7))
    collector.close()
    with pytest.raises(ValueError, match="unknown sites"):
        GramCollector(model, sites, diagonal={"nothing"})
    with pytest.raises(ValueError, match="no single output projection"):
        consumer_blocks(named_tensors(model), find_sites(model, ("input_dims",))[0])
    with pytest.raises(ValueError, match="expected"):
        unit_gram(sites[0], named_tensors(model)[sites[0].writes[0].param], torch.zeros(3, 3))

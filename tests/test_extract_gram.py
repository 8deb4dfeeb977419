"""Second moments of activations: equal to the per-token loop, however they are collected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from tests.naive_measures import CUSTOM, consumer_inputs, naive_output_gram
from tests.tiny import FAMILIES, NEURONS, build, inputs
from topoprune.architectures import find_sites
from topoprune.extraction import GramCollector, collect_gram, consumer_blocks, extract, named_tensors, unit_gram
from topoprune.graph import TensorSlice

every_family = pytest.mark.parametrize("family", FAMILIES)


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


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "vit"])
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


def test_every_patch_and_the_class_token_of_an_image_count() -> None:
    model = build("vit")
    sites = find_sites(model, ("heads", "neurons"))
    images = inputs(model, batch=4)["pixel_values"]
    tokens = 1 + (model.config.image_size // model.config.patch_size) ** 2
    with GramCollector(model, sites) as whole, torch.no_grad():
        model(pixel_values=images, labels=torch.arange(4) % 2)
    with GramCollector(model, sites) as single, torch.no_grad():
        for image in images:
            model(image[None])
    assert whole.tokens == single.tokens == {site.name: 4 * tokens for site in sites}
    for site in sites:
        torch.testing.assert_close(whole.moment(site.name), single.moment(site.name), rtol=1e-4, atol=1e-5)


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

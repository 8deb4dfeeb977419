"""What an extraction refuses, and that it names the argument, tensor or module at fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.naive_measures import CUSTOM, DATA_FREE, custom_model, perturbed
from tests.tiny import build, inputs
from topoprune.architectures import find_sites
from topoprune.extraction import GramCollector, check_finite, consumer_blocks, extract, named_tensors, unit_gram


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

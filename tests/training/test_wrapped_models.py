"""Adapters (PEFT) and FSDP1: refused with what to do; merged models train. Out of memory: smaller blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.masktools import bits
from tests.prunertools import adamw, train
from tests.tiny import build, inputs
from topoprune import Pruner, Recipe, extract, find_sites
from topoprune.extraction import collect_gram, complete_graph, gram, nearest_graph, threshold_graph
from topoprune.extraction.memory import is_out_of_memory, with_smaller_blocks

BUDGET = Recipe.budget(0.5, solves=2, ramp=(0.3, 0.8), tokens_per_unit=2)


class StandIn(nn.Module):
    """What PEFT puts in the place of a linear layer, as far as anybody can tell."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.base_layer = inner

    def merge(self) -> None: ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize(
    "ask", [find_sites, lambda m: Pruner(m, BUDGET, total_steps=6), extract], ids=["find_sites", "Pruner", "extract"]
)
def test_adapters_are_refused_with_what_to_do(ask: Callable[[nn.Module], Any]) -> None:
    model = build("bert")
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = StandIn(attention.query)
    before = bits(model)
    with pytest.raises(ValueError, match=r"PEFT adapters \('bert\.encoder.*query' has one\).*merge_and_unload\(\)"):
        ask(model)
    assert bits(model) == before


@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_lora_is_refused_and_trains_once_merged(family: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["query", "value"] if family == "bert" else ["q_proj", "v_proj"]
    wrapped = peft.get_peft_model(build(family), peft.LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ValueError, match=r"has PEFT adapters .*; merge them first: model = model.merge_and_unload\(\)"):
        Pruner(wrapped, BUDGET, total_steps=6)
    model = wrapped.merge_and_unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = adamw(model)
    pruner = Pruner(model, BUDGET, total_steps=6).attach(optimizer)
    train(model, optimizer, range(6))
    assert pruner.sparsity().removable == pytest.approx(0.5, abs=0.02)


def test_fsdp1_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.config = module, module.config

    with pytest.raises(ValueError, match=r"FSDP1 flattens parameters.*use FSDP2"):
        Pruner(FullyShardedDataParallel(build("bert")), BUDGET, total_steps=6)


# -- out of memory ------------------------------------------------------------------------------


FAILURES = [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), RuntimeError("not enough memory: x")]


def test_what_counts_as_out_of_memory() -> None:
    assert all(is_out_of_memory(error) for error in FAILURES)
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["complete", "nearest", "threshold"])
def test_graphs_fall_back_to_smaller_tiles_with_the_same_result(kind: str, error: Exception) -> None:
    n = 90
    points = torch.from_numpy(np.random.default_rng(0).random((n, 5), dtype=np.float32))

    def tile(a: slice, b: slice) -> torch.Tensor:
        return torch.cdist(points[a], points[b], p=torch.inf)

    def small(a: slice, b: slice) -> torch.Tensor:
        if a.stop - a.start > 24:
            raise error
        return tile(a, b)

    build_graph: dict[str, Callable[[Any], Any]] = {
        "complete": lambda t: complete_graph(t, n, block=90, normalised=False),
        "nearest": lambda t: nearest_graph(t, n, 4, block=90, normalised=False),
        "threshold": lambda t: threshold_graph(t, n, 0.3, block=90, normalised=False, max_edges=10**6),
    }
    expected = build_graph[kind](tile)
    with pytest.warns(UserWarning, match=rf"out of memory while building .* of {n} units .*blocks of 22: the same"):
        found = build_graph[kind](small)
    assert np.array_equal(found.indptr, expected.indptr) and np.array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.weight, expected.weight, atol=1e-6)


def test_memory_that_never_suffices_is_an_error_and_other_errors_are_not_hidden() -> None:
    def never(side: int) -> int:
        raise MemoryError("none at all")

    def wrong(side: int) -> int:
        raise RuntimeError("a mistake")

    with pytest.warns(UserWarning, match="blocks of 1:"), pytest.raises(MemoryError, match="none at all"):
        with_smaller_blocks(never, 4, "it")
    with pytest.raises(RuntimeError, match="a mistake"):
        with_smaller_blocks(wrong, 4, "it")


@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_are_collected_in_smaller_parts_with_the_same_result(
    diagonal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("bert")
    sites = list(find_sites(model, ("heads", "neurons")))
    names = {site.name for site in sites} if diagonal else set()
    batches = [inputs(model, seed=1), inputs(model, seed=2)]
    expected = dict(collect_gram(model, sites, batches, diagonal=names))
    for name in ("_wide", "_squares"):
        fast = getattr(gram, name)

        def small(x: torch.Tensor, _fast: Any = fast) -> torch.Tensor:
            if len(x) > 12:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return _fast(x)

        monkeypatch.setattr(gram, name, small)
    with pytest.warns(UserWarning, match="out of memory while collecting .* half as many at a time"):
        found = dict(collect_gram(model, sites, batches, diagonal=names))
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, atol=1e-5, rtol=1e-5)


def test_accumulators_that_do_not_fit_together_take_more_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    sites = list(find_sites(model, ("heads", "neurons")))
    batches = [inputs(model, seed=1)]
    expected = dict(collect_gram(model, sites, batches))
    run_all, groups = gram._run, []

    def crowded(model: nn.Module, collector: Any, batches: Any) -> None:
        groups.append(len(collector.sites))
        if len(collector.sites) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run_all(model, collector, batches)

    monkeypatch.setattr(gram, "_run", crowded)
    with pytest.warns(UserWarning, match="out of memory with the accumulators of 4 sites; going on with 2 at a time"):
        found = dict(collect_gram(model, sites, batches))
    assert groups == [4, 2, 1, 1, 2, 1, 1]
    assert list(found) == list(expected)
    for name, moment in expected.items():
        assert torch.equal(found[name], moment)

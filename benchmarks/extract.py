"""Similarity graphs against the bare matrix products they need, side by side in one run.

- ``neurons_ratio``: k-NN neuron graphs (``circuit-cosine``) of a BERT-base shape over the full Gram
  products of the same sizes (in-rows and out-columns, each n x d x n).
- ``gram_ratio``: heads and neurons by ``output-gram`` over a forward pass plus the bare covariance
  product at every consumer.
- ``linf_heads_ms``: the paper's head distances, all layers.
- ``..._peak_mib``: peak extra memory of each extraction.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Figure, Options, Outcome
from topoprune import extract, find_sites

BASE = dict(hidden_size=768, num_attention_heads=12, intermediate_size=3072, vocab_size=30522)
NEURONS, GRAM = 1.3, 1.2
BATCH, LENGTH, BATCHES = 8, 128, 8  # 8,192 tokens: below some 4,000 fixed costs dominate


def run(options: Options) -> Outcome:
    """Measure on random weights; correctness first, on a small slice."""
    from transformers import BertConfig, BertModel

    layers, repeats = (2, 3) if options.quick else (12, 5)
    torch.manual_seed(options.seed)
    model = BertModel(BertConfig(**BASE, num_hidden_layers=layers)).to(options.device).eval()
    generator = torch.Generator().manual_seed(options.seed)
    batches = []
    for _ in range(2 if options.quick else BATCHES):
        ids = torch.randint(1000, 30000, (BATCH, LENGTH), generator=generator).to(options.device)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    sync = torch.cuda.synchronize if options.device.startswith("cuda") else (lambda: None)

    correct, note = _gate(model)
    neurons = _side_by_side(
        lambda: extract(model, measure="circuit-cosine", include=("neurons",), digest_weights=False),
        lambda: _bare_grams(model),
        repeats,
        sync,
    )
    gram = _side_by_side(
        lambda: extract(
            model, measure="output-gram", include=("heads", "neurons"), calibration=batches, digest_weights=False
        ),
        lambda: _forward_and_covariances(model, batches),
        max(3, repeats - 2),
        sync,
    )
    heads = _times(
        lambda: extract(model, measure="weights-linf", include=("heads",), digest_weights=False), repeats, sync
    )
    peaks = {
        "neurons": _peak(
            lambda: extract(model, measure="circuit-cosine", include=("neurons",), digest_weights=False), options
        ),
        "gram": _peak(
            lambda: extract(
                model, measure="output-gram", include=("heads", "neurons"), calibration=batches, digest_weights=False
            ),
            options,
        ),
        "heads": _peak(
            lambda: extract(model, measure="weights-linf", include=("heads",), digest_weights=False), options
        ),
    }
    rows: list[dict[str, Any]] = [
        {"what": "neurons", "layers": layers, "ours_s": neurons[0], "bare_s": neurons[1]},
        {
            "what": "gram",
            "layers": layers,
            "tokens": BATCH * LENGTH * len(batches),
            "ours_s": gram[0],
            "bare_s": gram[1],
        },
        {"what": "linf heads", "layers": layers, "ours_s": heads},
    ]
    figures = {
        "neurons_ratio": Figure(_median_ratio(*neurons), "ratio", NEURONS),
        "neurons_s": Figure(float(np.median(neurons[0])), "s"),
        "gram_ratio": Figure(_median_ratio(*gram), "ratio", GRAM),
        "gram_s": Figure(float(np.median(gram[0])), "s"),
        "linf_heads_ms": Figure(1e3 * float(np.median(heads)), "ms"),
        **{f"{name}_peak_mib": Figure(peak, "MiB") for name, peak in peaks.items()},
    }
    return Outcome(
        correct, figures, rows, [note, f"BERT-base shape, {layers} layers, {repeats} interleaved repeats, medians"]
    )


def _gate(model: nn.Module) -> tuple[bool, str]:
    """The k-NN graph holds each unit's true nearest neighbours, checked by brute force on one layer."""
    graph = extract(model, measure="circuit-cosine", include=("neurons",), digest_weights=False)
    site = graph.of_kind("neuron")[0]
    params = dict(model.named_parameters())
    rows = params[site.one("in").param].detach().double().cpu()
    cols = params[site.one("out").param].detach().double().cpu().t()
    rows, cols = nn.functional.normalize(rows, dim=1), nn.functional.normalize(cols, dim=1)
    probe = torch.arange(0, site.n_units, 97)
    distance = 1 - (rows[probe] @ rows.t()) * (cols[probe] @ cols.t())
    distance[torch.arange(len(probe)), probe] = torch.inf
    found = graph.redundancy[site.name]
    missing = 0
    for i, unit in enumerate(probe.tolist()):
        nearest = set(torch.topk(-distance[i], 24).indices.tolist())  # the last few of 32 may differ by rounding
        here = set(found.indices[found.indptr[unit] : found.indptr[unit + 1]].tolist())
        missing += len(nearest - here)
    return missing == 0, f"gate: {len(probe)} neurons checked by brute force, {missing} true neighbours missing"


def _bare_grams(model: nn.Module) -> None:
    params = dict(model.named_parameters())
    with torch.no_grad():
        for site in find_sites(model, include=("neurons",)):
            inward, outward = params[site.one("in").param], params[site.one("out").param]
            _ = inward @ inward.t()
            _ = outward.t() @ outward


def _forward_and_covariances(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            if name not in sums:
                sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            sums[name].addmm_(x.t(), x)

        return collect

    hooks = [
        model.get_submodule(site.consumer).register_forward_pre_hook(hook(site.name))
        for site in find_sites(model, include=("heads", "neurons"))
        if site.consumer is not None
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in hooks:
            handle.remove()


def _times(work: Callable[[], Any], repeats: int, sync: Callable[[], None]) -> list[float]:
    seconds = []
    for _ in range(repeats + 1):
        sync()
        started = time.perf_counter()
        work()
        sync()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _side_by_side(
    ours: Callable[[], Any], bare: Callable[[], Any], repeats: int, sync: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Time both in turn, so that a change of the machine's speed hits both."""
    first, second = [], []
    for _ in range(repeats + 1):
        for work, into in ((ours, first), (bare, second)):
            sync()
            started = time.perf_counter()
            work()
            sync()
            into.append(time.perf_counter() - started)
    return first[1:], second[1:]


def _median_ratio(ours: list[float], bare: list[float]) -> float:
    return float(np.median([a / b for a, b in zip(ours, bare, strict=True)]))


def _peak(work: Callable[[], Any], options: Options) -> float:
    """Return the peak extra memory of a call in MiB: allocator on CUDA, resident set on CPU."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else the call reuses freed pages and seems to need none
    if options.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with _resident_peak() as peak:
        work()
    return peak[0]


@contextmanager
def _resident_peak() -> Iterator[list[float]]:
    def read() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    start, result, stop = read(), [0.0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.002):
            result[0] = max(result[0], read() - start)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()
        result[0] = max(result[0], read() - start)

"""Saving and loading a compacted model against ``save_pretrained`` and ``from_pretrained`` of the dense one.

BERT-base and OPT-125m shapes, random weights, half of attention and FFN removed. In turn in one run, page cache warm,
medians. Keys, after ``<model>_``:

- ``save_ratio``, ``load_ratio``: our seconds per byte over the dense model's. `save` also hashes what it wrote and
  waits until it lies on the disk (fsync), which ``save_pretrained`` does not; `load` also checks the hashes.
- ``save_same_bytes_ratio``, ``load_same_bytes_ratio``: the same against a stock model with as many bytes
  (narrower FFNs), its save with the fsync. What building modules costs does not shrink with their bytes, so seconds
  per byte of any smaller stock model are more than the dense one's too; this says what our format adds.
- ``save_synced_ratio``: as ``save_ratio`` with an fsync after ``save_pretrained``, timed.
- ``load_unverified_ratio``: as ``load_ratio`` with ``verify=False``.
- ``size_share``: bytes of our folder over the dense one's. ``save_s``, ``load_s`` and ``dense_…``: seconds.
- ``fixed_save_s``, ``fixed_load_s``: the dense model's with a hundredth of the bytes in the same modules: what does not
  depend on bytes. ``from_pretrained`` maps the file and copies nothing, so that is nearly all it takes.

Gate: loaded weights are bit for bit those saved, and the logits are equal.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Figure, Options, Outcome, percentile_interval
from benchmarks.inference_shapes import SHAPES, Shape, build, inputs, plan_of
from topoprune import compact
from topoprune.compaction import load, save

TARGET = 1.2
_SMALL = {"hidden_size": 96, "vocab_size": 1000}
MINIATURES = {
    "bert": {**_SMALL, "intermediate_size": 384},
    "opt": {**_SMALL, "ffn_dim": 384, "word_embed_proj_dim": 96},
}


@dataclass(frozen=True)
class Spec:
    """What to run.

    Args:
        shapes: keys of `SHAPES`. sparsity: per cent removed. repeats: rounds that count, after one that does not.
    """

    shapes: tuple[str, ...] = ("bert_base", "opt_125m")
    sparsity: int = 50
    repeats: int = 9


QUICK = Spec(shapes=("bert_base",), repeats=3)
Seconds = dict[str, list[float]]


@torch.no_grad()
def run(options: Options) -> Outcome:
    """Measure every shape; models are built and compared on the CPU, where files are written from and read to."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    spec = QUICK if options.quick else Spec()
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    correct = True
    for shape in (shape for shape in SHAPES if shape.key in spec.shapes):
        print(f"{shape.key}: {spec.repeats} rounds", flush=True)
        row, wrong = _measure(shape, spec, options)
        correct &= not wrong
        notes.extend(f"gate: {shape.key}: {sentence}" for sentence in wrong)
        notes.append(_note(row))
        rows.append(row)
        figures |= _figures(row)
    return Outcome(correct, figures, rows, notes)


def _measure(shape: Shape, spec: Spec, options: Options) -> tuple[dict[str, Any], list[str]]:
    dense = build(shape, options.seed)
    plan = plan_of(dense, shape.counts(spec.sparsity), options.seed)
    small = compact(dense, plan)
    twin = _stock_of_as_many_bytes(shape, dense, small, options.seed)
    tiny = build(shape, options.seed, **MINIATURES[shape.family])
    example = inputs(shape, 2, options.seed, "cpu")
    seconds: Seconds = {}
    with tempfile.TemporaryDirectory() as parent:
        theirs, ours, stock, fixed = (Path(parent) / name for name in ("dense", "ours", "stock", "fixed"))
        first_of = {"dense_save": theirs, "save": ours, "stock_save": stock}
        steps: list[tuple[str, Callable[[], Any]]] = [
            ("dense_save", lambda: dense.save_pretrained(theirs)),
            ("dense_sync", lambda: _sync(theirs)),  # at once, else it would be written while others are timed
            ("save", lambda: save(small, plan, ours)),
            ("dense_load", lambda: type(dense).from_pretrained(theirs)),
            ("load", lambda: load(ours)),
            ("load_unverified", lambda: load(ours, verify=False)),
            ("stock_save", lambda: twin.save_pretrained(stock)),
            ("stock_sync", lambda: _sync(stock)),
            ("stock_load", lambda: type(twin).from_pretrained(stock)),
            ("fixed_save", lambda: tiny.save_pretrained(fixed)),
            ("fixed_load", lambda: type(tiny).from_pretrained(fixed)),
        ]
        for _ in range(spec.repeats + 1):
            for name, step in steps:
                # Each writes where its own last files were: memory that the page cache has never had is slow.
                if name in first_of:
                    shutil.rmtree(first_of[name], ignore_errors=True)
                seconds.setdefault(name, []).append(_timed(step))
        sizes = {folder.name: sum(file.stat().st_size for file in folder.iterdir()) for folder in first_of.values()}
        # torch picks another kernel for weights that could have gradients, with other roundings
        wrong = _faults(small, load(ours).requires_grad_(False), example)
    seconds = {name: values[1:] for name, values in seconds.items()}
    row = {"shape": shape.key, "sparsity": spec.sparsity, "repeats": spec.repeats, "bytes": sizes, "seconds": seconds}
    return row | _ratios(seconds, sizes, options.seed), wrong


def _stock_of_as_many_bytes(shape: Shape, dense: Any, small: Any, seed: int) -> Any:
    """Return a stock model of the same depth with about as many parameters as the compacted one."""
    width = "ffn_dim" if hasattr(dense.config, "ffn_dim") else "intermediate_size"
    surplus = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in small.parameters())
    a_neuron = dense.config.num_hidden_layers * (2 * dense.config.hidden_size + 1)
    return build(shape, seed, **{width: getattr(dense.config, width) - round(surplus / a_neuron)})


def _timed(step: Callable[[], Any]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        step()
        return time.perf_counter() - started


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _faults(saved: Any, loaded: Any, example: dict[str, Any]) -> list[str]:
    """Return what differs between the model that was saved and the one that was loaded."""
    faults = []
    before, after = saved.state_dict(), loaded.state_dict()
    if list(before) != list(after):
        faults.append(f"other tensors: {sorted(set(before) ^ set(after))[:5]}")
    changed = [name for name in before if name in after and not torch.equal(_bytes(before[name]), _bytes(after[name]))]
    if changed:
        faults.append(f"{len(changed)} tensors changed on the way, {changed[0]} for one")
    if not torch.equal(saved(**example).logits, loaded(**example).logits):
        faults.append("the logits of the loaded model differ")
    return faults


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _ratios(seconds: Seconds, sizes: dict[str, int], seed: int) -> dict[str, Any]:
    """Return seconds per byte, ours over theirs: medians over the rounds and their intervals."""
    durable = [write + sync for write, sync in zip(seconds["dense_save"], seconds["dense_sync"], strict=True)]
    durable_stock = [write + sync for write, sync in zip(seconds["stock_save"], seconds["stock_sync"], strict=True)]
    share, of_stock = sizes["ours"] / sizes["dense"], sizes["ours"] / sizes["stock"]
    pairs = {
        "save_ratio": (seconds["save"], seconds["dense_save"], share),
        "save_synced_ratio": (seconds["save"], durable, share),
        "save_same_bytes_ratio": (seconds["save"], durable_stock, of_stock),
        "load_ratio": (seconds["load"], seconds["dense_load"], share),
        "load_unverified_ratio": (seconds["load_unverified"], seconds["dense_load"], share),
        "load_same_bytes_ratio": (seconds["load"], seconds["stock_load"], of_stock),
    }
    result: dict[str, Any] = {"size_share": share, "stock_size_share": of_stock}
    for name, (ours, theirs, per) in pairs.items():
        ratios = [a / b / per for a, b in zip(ours, theirs, strict=True)]
        result[name] = float(np.median(ratios))
        result[f"{name}_interval"] = percentile_interval(ratios, seed=seed)
    return result


def _figures(row: dict[str, Any]) -> dict[str, Figure]:
    key, seconds = row["shape"], row["seconds"]
    figures = {
        f"{key}_save_ratio": Figure(row["save_ratio"], "ratio", TARGET),
        f"{key}_load_ratio": Figure(row["load_ratio"], "ratio", TARGET),
        f"{key}_save_same_bytes_ratio": Figure(row["save_same_bytes_ratio"], "ratio", TARGET),
        f"{key}_load_same_bytes_ratio": Figure(row["load_same_bytes_ratio"], "ratio", TARGET),
        f"{key}_save_synced_ratio": Figure(row["save_synced_ratio"], "ratio"),
        f"{key}_load_unverified_ratio": Figure(row["load_unverified_ratio"], "ratio"),
        f"{key}_size_share": Figure(row["size_share"], "ratio"),
    }
    for name in (
        "save",
        "load",
        "dense_save",
        "dense_sync",
        "dense_load",
        "stock_save",
        "stock_load",
        "fixed_save",
        "fixed_load",
    ):
        figures[f"{key}_{name}_s"] = Figure(float(np.median(seconds[name])), "s")
    return figures


def _note(row: dict[str, Any]) -> str:
    sizes = row["bytes"]
    save_low, save_high = row["save_ratio_interval"]
    load_low, load_high = row["load_ratio_interval"]
    return (
        f"{row['shape']}: {sizes['ours'] / 1e6:.0f} MB of {sizes['dense'] / 1e6:.0f} MB, {row['repeats']} rounds, 95 % "
        f"intervals: save {save_low:.2f}..{save_high:.2f}, load {load_low:.2f}..{load_high:.2f} per byte"
    )

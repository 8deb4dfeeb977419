"""What compaction is worth at inference: seconds of one forward pass against the dense model.

For each shape, share removed and batch size, four models run in turn in one run: the dense one, ours (`compact`), a
*natively built* one of the same per-layer sizes and, for BERT, Torch-Pruning's result on the same units. Keys, after
``<model>_<sparsity>_b<batch>_`` (``bert_base_95_dropped``: whole sublayers gone, the same share removed):

Seconds are lower quartiles over all passes of interleaved rounds: other work on the machine only adds to them.

- ``speedup``: seconds of the dense model over ours.
- ``native_ratio``: our seconds over the native model's. ``torch_pruning_ratio``: over Torch-Pruning's.
- ``flops_share``: our FLOPs over the dense model's. Whole models are counted (vocabulary projection, pooler and
  classifier too) by ``torch.utils.flop_counter``: matrix products and attention, not norms, activations, embeddings.
- ``flops_ratio_reached``: speedup * flops_share; 1 if time fell as FLOPs did.

Random weights, 128 tokens, eval mode, no gradients, sdpa attention; on CUDA in bfloat16. Gate first: the masked dense
model, ours and Torch-Pruning's give the same logits, and the native model has the FLOPs of ours.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import torch_pruning_peer
from benchmarks.harness import Figure, Options, Outcome, clock_for
from benchmarks.inference_shapes import DROPPED, SHAPES, Counts, Shape, build, inputs, native, plan_of
from topoprune import Plan, apply, compact, measure_sparsity

NATIVE, REACHED, TENFOLD = 1.03, 0.85, 10.0
TOLERANCE = 1e-4  # of logits in float32, relative to the largest


@dataclass(frozen=True)
class Spec:
    """What to run.

    Args:
        shapes: keys of `SHAPES`. sparsities: per cent removed. batches: sizes.
        seconds: time to measure each shape at each batch size. rounds: at least so many, whatever they take.
        dtype: of weights and activations while timing.
    """

    shapes: tuple[str, ...] = tuple(shape.key for shape in SHAPES)
    sparsities: tuple[int, ...] = (50, 80, 95)
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 60.0
    rounds: int = 7
    dtype: torch.dtype = torch.float32


QUICK = Spec(shapes=("bert_base",), sparsities=(50, 95), batches=(8,), seconds=20.0, rounds=3)
CUDA = Spec(batches=(32,), seconds=15.0, dtype=torch.bfloat16)
CUDA_QUICK = Spec(shapes=("bert_base",), sparsities=(50, 95), batches=(32,), seconds=5.0, dtype=torch.bfloat16)


@dataclass
class Case:
    """One plan carried out by everybody.

    Args:
        name: e.g. ``"95_dropped"``. models: ``ours``, ``native`` and where it can, ``torch_pruning``.
        removable: share of attention and FFN weights removed. flops_share: ours over dense.
    """

    name: str
    models: dict[str, Any]
    removable: float
    flops_share: float


def spec_of(options: Options) -> Spec:
    """Return what the command line asks for."""
    if options.device.startswith("cuda"):
        return CUDA_QUICK if options.quick else CUDA
    return QUICK if options.quick else Spec()


@torch.no_grad()
def run(options: Options) -> Outcome:
    """Measure every shape: gate, then rounds."""
    spec = spec_of(options)
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    notes = [_note(spec)]
    if "bert_base" in spec.shapes and not torch_pruning_peer.available():
        notes.append("torch-pruning is not installed (extra `bench`): measured without its model")
    correct = True
    for shape in (shape for shape in SHAPES if shape.key in spec.shapes):
        print(f"{shape.key}: building, gate", flush=True)
        dense = build(shape, options.seed).to(options.device)
        cases, wrong = _cases(shape, spec, dense, options)
        correct &= not wrong
        notes.extend(f"gate: {sentence}" for sentence in wrong)
        notes.append(
            f"{shape.key} removes {', '.join(f'{case.removable:.1%} at {case.name}' for case in cases)} of the "
            "attention and FFN weights"
        )
        for model in (dense, *(model for case in cases for model in case.models.values())):
            model.to(spec.dtype)
        for batch in spec.batches:
            print(f"{shape.key}: batch {batch}", flush=True)
            seconds = _rounds(dense, cases, inputs(shape, batch, options.seed, options.device), spec, options)
            found = [_row(shape, case, batch, seconds, options.seed) for case in cases]
            notes.append(_spread(found))
            rows += found
            for row in found:
                figures |= _figures(row)
    return Outcome(correct, figures, rows, notes)


def _note(spec: Spec) -> str:
    return (
        f"128 tokens, {str(spec.dtype).removeprefix('torch.')}; the causal models give the logits of the last position "
        "(a prompt's), T5 of all 128 of its decoder; FLOPs by torch.utils.flop_counter"
    )


def _spread(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the 95 % intervals of the rows of one shape at one batch size."""
    first = rows[0]
    spans = []
    for row in rows:
        (low, high), (least, most) = row["speedup_interval"], row["native_interval"]
        spans.append(f"{row['case']} speedup {low:.2f}..{high:.2f}, native_ratio {least:.3f}..{most:.3f}")
    return (
        f"{first['shape']}_b{first['batch']}: {first['rounds']} rounds, dense {first['dense_seconds']:.3f} s; 95 % "
        f"intervals: {'; '.join(spans)}"
    )


# -- models and gate ---------------------------------------------------------------------------------


def _cases(shape: Shape, spec: Spec, dense: Any, options: Options) -> tuple[list[Case], list[str]]:
    """Make every small model and check it; return the cases and what is wrong with them."""
    example = inputs(shape, 2, options.seed, options.device)
    unpruned = dense(**example).logits
    dense_flops = _flops(dense, example)
    wrong: list[str] = []
    cases = []
    for name, counts in _plans(shape, spec):
        plan = plan_of(dense, counts, options.seed)
        with apply(dense, plan):
            masked = dense(**example).logits
            removable = measure_sparsity(dense, plan.sites).removable
        models = _models(shape, counts, dense, plan, example, options)
        flops = {key: _flops(model, example) for key, model in models.items()}
        wrong += [f"{shape.key} {name}: {fault}" for fault in _faults(models, example, masked, unpruned, flops)]
        cases.append(Case(name, models, removable, flops["ours"] / dense_flops))
    return cases, wrong


def _plans(shape: Shape, spec: Spec) -> list[tuple[str, Counts]]:
    plans = [(str(sparsity), shape.counts(sparsity)) for sparsity in spec.sparsities]
    if shape.key == "bert_base" and 95 in spec.sparsities:
        plans.append(("95_dropped", DROPPED))
    return plans


def _models(
    shape: Shape, counts: Counts, dense: Any, plan: Plan, example: Mapping[str, Any], options: Options
) -> dict[str, Any]:
    models = {
        "ours": compact(dense, plan),
        "native": native(shape, counts, dense, options.seed + 1).to(options.device),
    }
    # Torch-Pruning cannot remove the last head or neuron of a layer.
    if shape.family == "bert" and all(min(pair) > 0 for pair in counts) and torch_pruning_peer.available():
        models["torch_pruning"] = torch_pruning_peer.prune_bert(dense, plan, example)
    return models


def _faults(
    models: Mapping[str, Any],
    example: Mapping[str, Any],
    masked: torch.Tensor,
    unpruned: torch.Tensor,
    flops: Mapping[str, int],
) -> list[str]:
    """Return what is wrong: logits that differ, a plan without effect, a native model of other sizes."""
    allowed = TOLERANCE * float(masked.abs().max())
    faults = []
    for name in sorted(set(models) - {"native"}):
        worst = float((models[name](**example).logits - masked).abs().max())
        if not worst <= allowed:
            faults.append(f"logits of {name} differ by {worst:.1e} from the masked model's, {allowed:.1e} is allowed")
    if float((masked - unpruned).abs().max()) < 100 * allowed:
        faults.append("the plan hardly changes the logits, so equal ones say nothing")
    if flops["native"] != flops["ours"]:
        faults.append(f"the native model has {flops['native']:,} FLOPs, ours {flops['ours']:,}")
    return faults


def _flops(model: nn.Module, example: Mapping[str, Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # torch counts the attention kernels of CUDA, not the one of the CPU.
    here = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=here) as counter:
        model(**example)
    return int(counter.get_total_flops())


# -- time --------------------------------------------------------------------------------------------


def _rounds(
    dense: Any, cases: Sequence[Case], batch: Mapping[str, Any], spec: Spec, options: Options
) -> dict[tuple[str, str], list[list[float]]]:
    """Run all models in turn until the time is up.

    Returns:
        (case, model) -> one list a round of the seconds of its passes; the dense model is ``("dense", "dense")``.
    """
    clock = clock_for(options.device)

    def timed(model: Any) -> float:
        started = clock()
        model(**batch)
        return clock() - started

    def warm(model: Any) -> float:
        return min(timed(model) for _ in range(2))

    base = warm(dense)
    # Small models run several times a round: their ratios to each other need more passes than those to the dense one.
    passes = [int(np.clip(base / (4 * max(map(warm, case.models.values()))), 1, 6)) for case in cases]
    seconds: dict[tuple[str, str], list[list[float]]] = {("dense", "dense"): []}
    seconds |= {(case.name, name): [] for case in cases for name in case.models}
    started, turn = time.perf_counter(), 0
    while turn < spec.rounds or time.perf_counter() - started < spec.seconds:
        seconds["dense", "dense"].append([timed(dense)])
        for case, repeats in zip(cases, passes, strict=True):
            found: dict[str, list[float]] = {name: [] for name in case.models}
            for repeat in range(repeats):
                names = list(case.models)
                first = (turn + repeat) % len(names)  # nobody always follows the same neighbour
                for name in names[first:] + names[:first]:
                    found[name].append(timed(case.models[name]))
            for name, values in found.items():
                seconds[case.name, name].append(values)
        turn += 1
    return seconds


def _row(
    shape: Shape, case: Case, batch: int, seconds: Mapping[tuple[str, str], list[list[float]]], seed: int
) -> dict[str, Any]:
    dense, ours = seconds["dense", "dense"], seconds[case.name, "ours"]
    speedup, spread = _ratio(dense, ours, seed)
    row: dict[str, Any] = {
        "shape": shape.key,
        "case": case.name,
        "batch": batch,
        "removable": case.removable,
        "flops_share": case.flops_share,
        "rounds": len(dense),
        "passes": len(ours) * len(ours[0]),
        "dense_seconds": _quartile(dense),
        "speedup": speedup,
        "speedup_interval": spread,
    }
    for name in case.models:
        row[f"{name}_seconds"] = _quartile(seconds[case.name, name])
        if name != "ours":
            row[f"{name}_ratio"], row[f"{name}_interval"] = _ratio(ours, seconds[case.name, name], seed)
    return row


def _quartile(rounds: Sequence[Sequence[float]]) -> float:
    return float(np.percentile([value for values in rounds for value in values], 25))


def _ratio(
    above: Sequence[Sequence[float]], below: Sequence[Sequence[float]], seed: int, draws: int = 500
) -> tuple[float, tuple[float, float]]:
    """Return the ratio of two quartiles of seconds, and its 95 % interval by drawing rounds with replacement."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        picked = rng.integers(0, len(above), len(above))
        drawn.append(_quartile([above[i] for i in picked]) / _quartile([below[i] for i in picked]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return _quartile(above) / _quartile(below), (float(low), float(high))


def _figures(row: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of one row, with the targets that the issue of compaction sets."""
    key = f"{row['shape']}_{row['case']}_b{row['batch']}"
    tenfold = row["shape"] == "bert_base" and row["batch"] == 8 and row["case"].startswith("95")
    reached = row["batch"] == 8 and row["case"] in ("50", "80")
    figures = {
        f"{key}_speedup": Figure(row["speedup"], "ratio", TENFOLD if tenfold else None, "higher"),
        f"{key}_native_ratio": Figure(row["native_ratio"], "ratio", NATIVE),
        f"{key}_flops_share": Figure(row["flops_share"], "ratio"),
        f"{key}_flops_ratio_reached": Figure(
            row["speedup"] * row["flops_share"], "ratio", REACHED if reached else None, "higher"
        ),
    }
    if "torch_pruning_ratio" in row:
        figures[f"{key}_torch_pruning_ratio"] = Figure(row["torch_pruning_ratio"], "ratio")
    return figures

"""Fine-tuning to 80 % sparsity against dense fine-tuning: seconds, score and memory for the same examples.

Three copies of a pretrained MiniLM see the same batches in the same order, one step each in turn, so
that a busy machine slows all of them alike: dense, pruned with masks, pruned with progressive compaction.
Seconds are those of the training steps, with everything pruning does in them: collecting, extraction,
solving, repair, masks, cutting. A ratio counts if its model keeps 95 % of the dense score.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Figure, Options, Outcome, clock_for, data_folder
from topoprune import Pruner, Recipe
from topoprune.tasks.data import ClassificationData, Example
from topoprune.tasks.docstrings import load_docstrings
from topoprune.tasks.embedded_model import embedded_model_path

MASKED, PROGRESSIVE, SCORE = 1.05, 0.70, 0.95
SPARSITY = 0.8


@dataclass(frozen=True)
class Spec:
    """One run: examples seen, how they are batched, the optimizer's peak rate, the recipe."""

    examples: int = 12_800
    batch: int = 32
    max_length: int = 64
    rate: float = 3e-4
    warmup: float = 0.06
    ramp: tuple[float, float] = (0.05, 0.35)
    solves: int = 6


FULL = Spec()
QUICK = Spec(examples=800, solves=3)
METHODS = ("dense", "masked", "progressive")


def run(options: Options) -> Outcome:
    """Train the three copies side by side."""
    try:
        folder = embedded_model_path()
    except FileNotFoundError as error:
        return Outcome(True, {}, notes=[f"train_time was skipped, nothing was measured: {error}"])
    spec = QUICK if options.quick else FULL
    data = _data(spec, options)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(data.labels)).to(options.device)
    runs = {method: _Run(method, copy.deepcopy(base), spec, options) for method in METHODS}
    order = _order(len(data.train), spec, options.seed)
    orders = list(itertools.permutations(METHODS))
    for step in range(_steps(spec)):
        picked = [data.train[i] for i in order[step * spec.batch : (step + 1) * spec.batch]]
        batch = _encode(tokenizer, picked, spec, options.device)
        # In all orders in turn: what one leaves in caches and in the allocator helps or hurts none of them more.
        for method in orders[step % len(orders)]:
            runs[method].step(batch)
        if step % 50 == 0:
            print(
                f"step {step}/{_steps(spec)}: " + ", ".join(f"{m} {r.seconds:.1f} s" for m, r in runs.items()),
                flush=True,
            )
    for method, each in runs.items():
        each.score = _accuracy(each.model, tokenizer, data.validation, spec, options.device)
        print(f"{method}: {each.seconds:.1f} s, accuracy {each.score:.4f}", flush=True)
    return _outcome(spec, runs, data, options)


def _steps(spec: Spec) -> int:
    return spec.examples // spec.batch


def _data(spec: Spec, options: Options) -> ClassificationData:
    folder = data_folder()
    if folder is not None and (folder / "data" / "sst2").is_dir():
        from topoprune.tasks.data import load_files

        train, validation = (folder / "data" / "sst2" / f"{split}.jsonl.gz" for split in ("train", "validation"))
        return load_files(train, validation).limit(spec.examples, 200 if options.quick else None, options.seed)
    return load_docstrings().limit(spec.examples, 200 if options.quick else None, options.seed)


def _order(n: int, spec: Spec, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    passes = math.ceil(spec.examples / n)
    return np.concatenate([rng.permutation(n) for _ in range(passes)])[: spec.examples]


def _encode(tokenizer: Any, examples: Sequence[Example], spec: Spec, device: str) -> dict[str, torch.Tensor]:
    texts = [example.text for example in examples]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=spec.max_length, return_tensors="pt")
    labels = torch.tensor([example.label for example in examples])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return {name: tensor.to(device) for name, tensor in {**inputs, "labels": labels}.items()}


class _Run:
    """One copy of the model, its optimizer and its clock."""

    def __init__(self, method: str, model: nn.Module, spec: Spec, options: Options) -> None:
        self.model, self.method = model.train(), method
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=spec.rate, weight_decay=0.01)
        steps, warm = _steps(spec), max(1, round(spec.warmup * _steps(spec)))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: min(1.0, (s + 1) / warm, (steps - s) / max(1, steps - warm))
        )
        self.clock = clock_for(options.device)
        self.seconds, self.score = 0.0, math.nan
        self.each: list[float] = []
        self.bytes: list[int] = []
        self.pruner: Pruner | None = None
        if method != "dense":
            started = self.clock()
            recipe = Recipe.budget(sparsity=SPARSITY, ramp=spec.ramp, solves=spec.solves, final_repair="all")
            self.pruner = Pruner(
                model, recipe, total_steps=steps, seed=options.seed, compact=method == "progressive"
            ).attach(self.optimizer)
            self.seconds += self.clock() - started

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """One training step, timed with everything that happens in it."""
        torch.manual_seed(len(self.each))  # dropout of its own would make the three runs drift apart for no reason
        started = self.clock()
        self.optimizer.zero_grad()
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        taken = self.clock() - started
        self.seconds += taken
        self.each.append(taken)
        self.bytes.append(_held(self.model, self.optimizer))


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of parameters, gradients and optimizer state."""
    tensors = [p for p in model.parameters()]
    tensors += [p.grad for p in tensors if p.grad is not None]
    tensors += [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def _accuracy(model: nn.Module, tokenizer: Any, examples: Sequence[Example], spec: Spec, device: str) -> float:
    model.eval()
    right = 0
    for start in range(0, len(examples), 64):
        batch = _encode(tokenizer, examples[start : start + 64], spec, device)
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(dim=-1) == labels).sum())
    return right / len(examples)


def _gate(runs: dict[str, _Run]) -> bool:
    """The budget is met within one unit, masked weights are exactly zero, and what was cut out is gone."""
    fine = True
    for method in ("masked", "progressive"):
        pruner = runs[method].pruner
        assert pruner is not None
        figures = pruner.sparsity()
        unit = max(site.matrix_parameters_per_unit for site in pruner.sites if site.kind == "neuron")
        fine &= abs(figures.removable - SPARSITY) * figures.parameters <= unit
        params = dict(pruner.model.named_parameters())
        fine &= all(bool((params[name][~keep] == 0).all()) for name, keep in pruner.handle.masks().items())
    sizes = {method: sum(p.numel() for p in each.model.parameters()) for method, each in runs.items()}
    return fine and sizes["progressive"] < sizes["masked"] == sizes["dense"]


def _outcome(spec: Spec, runs: dict[str, _Run], data: ClassificationData, options: Options) -> Outcome:
    dense = runs["dense"]
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    task = "SST-2" if "sst2" in data.source else data.source  # never a path of this machine
    notes = [f"{task}: {spec.examples:,} examples in {_steps(spec)} steps of {spec.batch}, {SPARSITY:.0%} asked"]
    for method, target in (("progressive", PROGRESSIVE), ("masked", MASKED)):
        each = runs[method]
        share = each.score / dense.score
        figures[f"{method}_ratio"] = Figure(each.seconds / dense.seconds, "ratio", target)
        figures[f"{method}_score_share"] = Figure(share, "ratio", None if options.quick else SCORE, "higher")
        figures[f"{method}_memory_end_share"] = Figure(each.bytes[-1] / dense.bytes[-1], "ratio")
        figures[f"{method}_memory_mean_share"] = Figure(sum(each.bytes) / sum(dense.bytes), "ratio")
        if share < SCORE:
            notes.append(f"{method}: {share:.1%} of the dense score, so its ratio does not count")
    for method, each in runs.items():
        figures[f"{method}_score"] = Figure(each.score, "accuracy", better="higher")
        figures[f"{method}_s"] = Figure(each.seconds, "s")
        tail = each.each[len(each.each) // 2 :]
        row = {
            "method": method,
            "seconds": each.seconds,
            "score": each.score,
            "median_step_second_half": float(np.median(tail)),
            "bytes_end": each.bytes[-1],
            "bytes_mean": float(np.mean(each.bytes)),
        }
        if each.pruner is not None:
            row |= {
                "pruner_seconds": dict(each.pruner.seconds),
                "removable": each.pruner.sparsity().removable,
                "decided_at": [event.step for event in each.pruner.history],
            }
        rows.append(row)
    notes.append("memory: bytes of parameters, gradients and optimizer state")
    if options.quick:
        notes.append(
            "--quick: a few steps carry as many decisions as a long run, so ratios are too high, scores too low"
        )
    return Outcome(_gate(runs), figures, rows, notes)

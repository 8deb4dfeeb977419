"""What pruning adds to a training step.

Ratio = 1 + (seconds in hooks, collection, extraction, solving, repair) / (seconds of plain forward,
backward and AdamW step). The plain steps run on an untouched copy of the model, interleaved with
the pruned ones; a wall-clock ratio of the pairs stands beside it. Keys, after ``<shape>_<recipe>_``:

- ``hooks_ratio``: hooks alone. ``frozen_ratio``: hooks behind the last decision.
- ``amortised_ratio``: everything, over the steps of this run, which has a decision every few steps.
- ``run_ratio``: everything, at a thousand steps with as many decisions as the recipe takes: for the presets, whose
  decisions cost more and come as rarely as in a real run.
- ``decision_steps``: what a decision takes, in plain steps.
- ``peak_memory_ratio`` (CUDA): peak memory of steps and decisions over that of plain steps.

`Recipe.best` runs without its distillation, whose second model is no hook; ``best_distilled_wall_ratio`` has it.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Figure, Options, Outcome, clock_for, percentile_interval
from topoprune import Pruner, Recipe

HOOKS, FROZEN, AMORTISED, MEMORY = 1.03, 1.02, 1.05, 1.1
DECISIONS, RUN = 5, 1000


@dataclass(frozen=True)
class Spec:
    """One shape: configuration of a BERT or OPT, batch, length, steps, recipes, dtype of weights."""

    key: str
    config: dict[str, Any]
    batch: int
    length: int
    steps: int
    recipes: tuple[str, ...] = ("neuroprune", "budget")
    family: str = "bert"
    dtype: torch.dtype = torch.float32


MINILM: dict[str, Any] = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
BASE: dict[str, Any] = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
OPT_1B: dict[str, Any] = dict(
    hidden_size=2048, num_hidden_layers=24, num_attention_heads=32, ffn_dim=8192, word_embed_proj_dim=2048
)
PRESETS = ("fast", "balanced", "best")
ALL = ("neuroprune", "budget", *PRESETS)


def specs(options: Options) -> list[Spec]:
    """Return the shapes to run."""
    if options.device.startswith("cuda"):
        if options.quick:
            return [Spec("minilm", MINILM, 32, 64, 20)]
        return [
            Spec("bert_base", BASE, 32, 128, 300, ALL),
            Spec("opt_1.3b", OPT_1B, 4, 256, 60, ("neuroprune", "budget", "balanced"), "opt", torch.bfloat16),
        ]
    if options.quick:
        return [Spec("minilm", MINILM, 32, 64, 8)]
    return [Spec("minilm", MINILM, 32, 64, 60, ALL), Spec("bert_base", BASE, 8, 128, 40)]


def run(options: Options) -> Outcome:
    """Train each shape with each recipe beside a plain copy."""
    figures: dict[str, Figure] = {}
    rows: list[dict[str, Any]] = []
    notes = []
    correct = True
    for spec in specs(options):
        for name in (*spec.recipes, *(("best_distilled",) if "best" in spec.recipes else ())):
            print(f"{spec.key} {name}: {spec.steps} pairs of steps", flush=True)
            row, fine = _measure(spec, name, options)
            correct &= fine
            rows.append(row)
            prefix = f"{spec.key}_{name}"
            if name != "best_distilled":
                figures |= _figures(prefix, name, row)
            figures[f"{prefix}_wall_ratio"] = Figure(row["wall_ratio"], "ratio")
            figures[f"{prefix}_plain_step_s"] = Figure(row["plain_seconds"] / row["steps"], "s")
            low, high = row["wall_interval"]
            notes.append(
                f"{prefix}: {row['steps']} steps, {row['decisions']} decisions; wall-clock ratio of pairs without a "
                f"decision {row['wall_ratio']:.3f} (95 % interval {low:.3f}..{high:.3f}); {row['state']}"
            )
        if options.device.startswith("cuda"):
            for name in spec.recipes:
                peak = _peak(spec, name, options) / _peak(spec, None, options)
                figures[f"{spec.key}_{name}_peak_memory_ratio"] = Figure(peak, "ratio", MEMORY)
    if options.quick:
        notes.append(
            "--quick: few steps carry as many decisions as a long run, so the amortised ratios are far too high"
        )
    return Outcome(correct, figures, rows, notes)


def _figures(prefix: str, recipe: str, row: dict[str, Any]) -> dict[str, Figure]:
    own = {"decision_steps": Figure(row["decision_steps"], "steps")}
    own["hooks_ratio"] = Figure(row["hooks_ratio"], "ratio", HOOKS)
    own["run_ratio"] = Figure(row["run_ratio"], "ratio", AMORTISED)
    # Decisions of the presets come as often as nowhere else in so short a run.
    own["amortised_ratio"] = Figure(row["amortised_ratio"], "ratio", None if recipe in PRESETS else AMORTISED)
    if recipe != "neuroprune":
        own["frozen_ratio"] = Figure(row["frozen_ratio"], "ratio", FROZEN)
    return {f"{prefix}_{name}": figure for name, figure in own.items()}


def _build(spec: Spec, options: Options) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, OPTConfig, OPTForCausalLM

    torch.manual_seed(options.seed)
    if spec.family == "opt":
        model: Any = OPTForCausalLM(OPTConfig(**spec.config, vocab_size=50272))
    else:
        model = BertForSequenceClassification(BertConfig(**spec.config, vocab_size=30522))
    return model.to(spec.dtype).to(options.device).train()


def _recipe(name: str) -> Any:
    if name == "neuroprune":
        # Strengths at which about a tenth of the weights go to zero in this run; heads by quantile.
        return Recipe.neuroprune(alpha=5.0, beta=5.0, theta="auto:0.05")
    if name == "budget":
        return Recipe.budget(sparsity=0.5, solves=DECISIONS)
    if name == "best_distilled":
        return Recipe.best(sparsity=0.5)
    return Recipe.preset(name, 0.5, **({"distill": None} if name == "best" else {}))


def _peak(spec: Spec, recipe_name: str | None, options: Options) -> int:
    """Return the peak of allocated device memory over a few steps, with as many decisions as fit."""
    model = _build(spec, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    steps = 2 * DECISIONS
    if recipe_name is not None:
        Pruner(model, _recipe(recipe_name), total_steps=steps, steps_per_epoch=2).attach(optimizer)
    generator = torch.Generator().manual_seed(options.seed)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(options.device)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**_batch(spec, generator, options.device)).loss.backward()
        optimizer.step()
    return int(torch.cuda.max_memory_allocated(options.device))


def _measure(spec: Spec, recipe_name: str, options: Options) -> tuple[dict[str, Any], bool]:
    plain = _build(spec, options)
    pruned = copy.deepcopy(plain)
    clock = clock_for(options.device)
    per_epoch = max(1, spec.steps // DECISIONS)
    recipe = _recipe(recipe_name)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=2e-5) for model in (plain, pruned)]
    pruner = Pruner(pruned, recipe, total_steps=spec.steps, steps_per_epoch=per_epoch, clock=clock).attach(
        optimizers[1]
    )
    generator = torch.Generator().manual_seed(options.seed)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
        started = clock()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        return clock() - started

    plain_seconds, pruned_seconds, hooks, decided = [], [], [], []
    step(plain, optimizers[0], _batch(spec, generator, options.device))  # warm-up: allocator, thread pool
    for _ in range(spec.steps):
        batch = _batch(spec, generator, options.device)
        before, events = dict(pruner.seconds), len(pruner.history)
        plain_seconds.append(step(plain, optimizers[0], batch))
        pruned_seconds.append(step(pruned, optimizers[1], batch))
        hooks.append({part: pruner.seconds[part] - before[part] for part in before})
        decided.append(len(pruner.history) > events)
    figures = pruner.sparsity()
    correct = _gate(pruner, recipe_name, spec)
    base = np.array(plain_seconds)
    ratios = [q / p for p, q, d in zip(plain_seconds, pruned_seconds, decided, strict=True) if not d]
    last = max(i for i, d in enumerate(decided) if d)
    frozen = hooks[last + 1 :]
    total = {part: sum(h[part] for h in hooks) for part in hooks[0]}
    row = {
        "shape": spec.key,
        "recipe": recipe_name,
        "batch": spec.batch,
        "length": spec.length,
        "steps": spec.steps,
        "decisions": len(pruner.history),
        "plain_seconds": float(base.sum()),
        "seconds": total,
        "hooks_ratio": 1 + total["hooks"] / base.sum(),
        "frozen_ratio": 1 + sum(h["hooks"] for h in frozen) / base[last + 1 :].sum() if frozen else math.nan,
        "amortised_ratio": 1 + sum(total.values()) / base.sum(),
        "decision_steps": (sum(total.values()) - total["hooks"]) / len(pruner.history) / float(np.median(base)),
        "run_ratio": 1
        + total["hooks"] / base.sum()
        + (sum(total.values()) - total["hooks"]) / (RUN * float(np.median(base))),
        "wall_ratio": float(np.median(ratios)),
        "wall_interval": percentile_interval(ratios, seed=options.seed),
        "wall_total_ratio": sum(pruned_seconds) / base.sum(),
        "state": str(figures),
    }
    pruner.close()
    return row, correct


def _batch(spec: Spec, generator: torch.Generator, device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 30000, (spec.batch, spec.length), generator=generator)
    labels = ids if spec.family == "opt" else torch.randint(0, 2, (spec.batch,), generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device), "labels": labels.to(device)}


def _gate(pruner: Pruner, recipe_name: str, spec: Spec) -> bool:
    """Masked weights are exactly zero; as many decisions as asked for; the budget is met within one unit."""
    masked = pruner.handle.masks()
    params = dict(pruner.model.named_parameters())
    zero = all(bool((params[name][~keep] == 0).all()) for name, keep in masked.items())
    figures = pruner.sparsity()
    enough = len(pruner.history) >= (DECISIONS if recipe_name == "neuroprune" else pruner.recipe.solves)  # type: ignore[union-attr]
    if recipe_name == "neuroprune":
        return zero and enough and figures.zeros > 0
    unit = max(site.matrix_parameters_per_unit for site in pruner.sites if site.kind == "neuron")
    return zero and enough and abs(figures.removable - 0.5) * figures.parameters <= unit

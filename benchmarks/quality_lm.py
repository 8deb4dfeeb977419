"""stories260k: the loss of a real language model after one-shot pruning, ours against baselines.

Units are FFN neurons (10, 30, 50 % of each layer go) and KV groups (1 and 2 of 4 go), nothing is
trained. All data the methods see is text sampled from the dense model itself; the loss is read on
stories they never see. Needs the environment variable TOPOPRUNE_DATA.

``ours`` is soft domination on the output Gram with least-squares repair of the consumer, fixed
in advance. The ``*_repaired`` methods are ablations: somebody else's choice of
units with our repair, so that the gain of the choice and of the repair can be told apart.
"""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.harness import Figure, Options, Outcome, data_folder
from topoprune import ModelGraph, Plan, apply, extract, find_sites, solve
from topoprune_solvers import SoftDomination, solve_many

DENSE_LOSS, DENSE_TOLERANCE = 1.264, 0.01
MODEL, STORIES = "models/stories260k-llama", "data/tinystories_sample/test.jsonl.gz"
KINDS = {"neurons": "neuron", "heads": "kv_group"}
BASELINES = ("random", "magnitude", "gram_diagonal", "linf_k_centre")


@dataclass(frozen=True)
class Spec:
    """What is removed and what the methods may look at.

    Args:
        neurons: shares of each layer's FFN neurons to remove. groups: KV groups of each layer to remove.
        seeds: of the random choice. sequences, length: calibration text sampled from the dense model.
        ridge: of the least-squares repair, relative to the mean of the moment's diagonal.
    """

    neurons: tuple[float, ...] = (0.1, 0.3, 0.5)
    groups: tuple[int, ...] = (1, 2)
    seeds: int = 5
    sequences: int = 128
    length: int = 256
    ridge: float = 1e-4


def run(options: Options) -> Outcome:
    """Prune the model with every method at every level and read the loss."""
    folder = data_folder()
    if folder is None:
        note = (
            f"quality_lm was skipped: it needs {MODEL} and {STORIES}. Set TOPOPRUNE_DATA to the folder that holds "
            "them and run it again; nothing was measured."
        )
        return Outcome(True, {}, notes=[note])
    missing = [name for name in (MODEL, STORIES) if not (folder / name).exists()]
    if missing:
        return Outcome(False, {}, notes=[f"TOPOPRUNE_DATA={folder} has no {' and no '.join(missing)}"])
    spec = Spec(neurons=(0.3,), groups=(1,), seeds=2, sequences=32) if options.quick else Spec()
    bench = Bench.load(folder, spec, options)
    dense = bench.loss()
    gate = abs(dense - DENSE_LOSS) <= DENSE_TOLERANCE
    figures = {"dense_loss": Figure(dense, "nats")}
    notes = [
        f"dense loss {dense:.4f} nats per token ({bench.tokens} tokens of {len(bench.lengths)} stories, each behind "
        f"the start token); the gate asks for {DENSE_LOSS} +- {DENSE_TOLERANCE}",
        f"calibrated on {spec.sequences} x {spec.length} tokens sampled from the dense model (temperature 1, seed "
        f"{options.seed})",
    ]
    if not gate:
        return Outcome(False, figures, notes=notes)
    rows: list[dict[str, Any]] = []
    for problem, level, removed in _levels(spec):
        results = bench.measure(problem, removed)
        for row in results.values():
            rows.append({"level": level, "removed": removed, **row})
            figures[f"{level}_{row['method']}_loss"] = Figure(row["loss"], "nats")
        ours = results["ours"]
        best = min((results[name] for name in BASELINES if name in results), key=lambda row: row["loss"])
        figures[f"{level}_margin"] = Figure(best["loss"] - ours["loss"], "nats", 0.0, "higher")
        notes.append(f"{level}: best baseline is {best['method']}, its loss minus ours {_difference(best, ours)}")
        rival = min((row for row in results.values() if row["ablation"]), key=lambda row: row["loss"])
        figures[f"{level}_choice_margin"] = Figure(rival["loss"] - ours["loss"], "nats", better="higher")
        notes.append(f"{level}: with our repair {rival['method']}, its loss minus ours {_difference(rival, ours)}")
    restored = bench.loss()
    gate = restored == dense
    notes.append(f"after all runs the dense loss is {'the same bit for bit' if gate else f'{restored}, not {dense}'}")
    notes.append("margins: best baseline without our repair minus ours; +- is the standard error over tokens, paired")
    for row in rows:
        row.pop("token_losses")
    return Outcome(gate, figures, rows, [*notes, *_table(rows, dense)])


def _levels(spec: Spec) -> Iterator[tuple[str, str, float]]:
    for share in spec.neurons:
        yield "neurons", f"ffn{round(100 * share)}", share
    for count in spec.groups:
        yield "heads", f"kv{count}of4", count


def _difference(other: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    gain = other["token_losses"] - ours["token_losses"]
    return f"{gain.mean():+.4f} +- {gain.std() / math.sqrt(gain.size):.4f}"


@dataclass
class Bench:
    """The model, its calibration text, its graphs, and the stories."""

    model: Any
    stories: torch.Tensor
    lengths: list[int]
    calibration: list[dict[str, torch.Tensor]]
    gram: ModelGraph
    free: ModelGraph
    linf: ModelGraph
    spec: Spec
    seed: int

    @classmethod
    def load(cls, folder: Path, spec: Spec, options: Options) -> Bench:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        model: Any = AutoModelForCausalLM.from_pretrained(folder / MODEL)
        model = model.to(options.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
        with gzip.open(folder / STORIES, "rt", encoding="utf-8") as lines:
            ids = [tokenizer(json.loads(line)["text"]).input_ids for line in lines]
        if any(story[0] != model.config.bos_token_id for story in ids):
            raise ValueError("the tokenizer does not put the start token before a story; the dense loss would differ")
        stories = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
        for row, story in zip(stories, ids, strict=True):
            row[: len(story)] = torch.tensor(story)
        calibration = [{"input_ids": batch} for batch in sample(model, spec, options.seed).split(32)]
        include = ("heads", "neurons")
        return cls(
            model,
            stories.to(options.device),
            [len(story) for story in ids],
            calibration,
            # Complete neuron graphs: every distance is at most 1, and 172 units are few.
            extract(model, measure="output-gram", calibration=calibration, include=include, theta=1.0),
            extract(model, measure="circuit-cosine", include=include),
            extract(model, measure="weights-linf", include=("heads",)),
            spec,
            options.seed,
        )

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(self.lengths) - len(self.lengths)

    def loss(self) -> float:
        """Return the mean loss over all tokens of all stories, in nats."""
        return float(self.token_losses().mean())

    @torch.no_grad()
    def token_losses(self) -> np.ndarray:
        """Return the (tokens,) float64 losses, in nats."""
        logits = self.model(self.stories).logits[:, :-1].double()
        losses = cross_entropy(logits.flatten(0, 1), self.stories[:, 1:].flatten(), reduction="none")
        table = losses.view(len(self.lengths), -1).cpu().numpy()
        # Padding lies behind the text, so causal attention never sees it.
        return np.concatenate([row[: n - 1] for row, n in zip(table, self.lengths, strict=True)])

    def measure(self, problem: str, removed: float) -> dict[str, dict[str, Any]]:
        """Return method -> row (loss, spread, seconds) at one level."""
        plans = self._plans(problem, removed)
        rows: dict[str, dict[str, Any]] = {}
        for name, choices in plans.items():
            rows[name] = self._row(name, [self._with(plan) for plan in choices])
            rows[f"{name}_repaired"] = self._row(f"{name}_repaired", [self._repaired(plan) for plan in choices])
        rows["ours"] = self._row("ours", [self._repaired(self._soft(problem, removed))])
        rows["ours_unrepaired"] = self._row("ours_unrepaired", [self._with(self._soft(problem, removed))])
        rows["ours_sequential"] = self._row("ours_sequential", [self._sequential(problem, removed)])
        return rows

    def _plans(self, problem: str, removed: float) -> dict[str, list[Plan]]:
        """Return baseline -> plans; several for the random choice."""
        names = [site.name for site in self.gram.of_kind(KINDS[problem])]  # type: ignore[arg-type]
        draws = []
        for seed in range(self.seed, self.seed + self.spec.seeds):
            rng = np.random.default_rng(seed)
            draws.append(_top(self.gram, {name: rng.random(self.gram.site(name).n_units) for name in names}, removed))
        plans = {
            "random": draws,
            "magnitude": [_top(self.free, {name: self.free.importance[name] for name in names}, removed)],
            "gram_diagonal": [_top(self.gram, {name: self.gram.importance[name] for name in names}, removed)],
        }
        if problem == "heads":
            budget = _kept(self.linf.site(names[0]).n_units, removed)
            plans["linf_k_centre"] = [solve(self.linf, budget=budget)]
        return plans

    def _soft(self, problem: str, removed: float) -> Plan:
        units = self.gram.of_kind(KINDS[problem])[0].n_units  # type: ignore[arg-type]
        return solve(self.gram, budget=_kept(units, removed), problem=problem, objective="soft")  # type: ignore[arg-type]

    def _with(self, plan: Plan) -> tuple[np.ndarray, float]:
        started = time.perf_counter()
        with apply(self.model, plan):
            return self.token_losses(), time.perf_counter() - started

    def _repaired(self, plan: Plan) -> tuple[np.ndarray, float]:
        started = time.perf_counter()
        with apply(self.model, plan, merge="least-squares", calibration=self.calibration, ridge=self.spec.ridge):
            return self.token_losses(), time.perf_counter() - started

    def _sequential(self, problem: str, removed: float) -> tuple[np.ndarray, float]:
        """Prune and repair layer by layer; later layers are measured behind the pruned earlier ones."""
        started = time.perf_counter()
        with _restoring(self.model):
            for site in find_sites(self.model, include=(problem,)):
                graph = extract(
                    self.model, measure="output-gram", calibration=self.calibration, sites=(site,), theta=1.0
                )
                budget = _kept(site.n_units, removed)
                plan = solve(graph, budget=budget, problem=problem, objective="soft")  # type: ignore[arg-type]
                handle = apply(
                    self.model, plan, merge="least-squares", calibration=self.calibration, ridge=self.spec.ridge
                )
                handle.close(restore=False)
            return self.token_losses(), time.perf_counter() - started

    @staticmethod
    def _row(name: str, runs: Sequence[tuple[np.ndarray, float]]) -> dict[str, Any]:
        losses = [float(tokens.mean()) for tokens, _ in runs]
        return {
            "method": name,
            "ablation": name.endswith("_repaired"),
            "loss": float(np.mean(losses)),
            "sd": float(np.std(losses, ddof=1)) if len(losses) > 1 else 0.0,
            "losses": losses,
            "seconds": float(np.mean([seconds for _, seconds in runs])),
            "token_losses": np.mean([tokens for tokens, _ in runs], axis=0),
        }


def _kept(units: int, removed: float) -> int:
    return units - (round(removed * units) if removed < 1 else int(removed))


def _top(graph: ModelGraph, importance: Mapping[str, np.ndarray], removed: float) -> Plan:
    """Return the plan that keeps each site's most important units: soft domination without edges."""
    problems = []
    for worth in importance.values():
        bare = np.zeros(worth.size + 1, dtype=np.int32), np.zeros(0, dtype=np.int32)
        problems.append(SoftDomination(*bare, k=_kept(worth.size, removed), importance=worth))
    solutions = solve_many(problems, "greedy")
    return Plan(graph.sites, dict(zip(importance, solutions, strict=True)))


def sample(model: Any, spec: Spec, seed: int) -> torch.Tensor:
    """Return (sequences, length) tokens drawn from the model's own distribution, behind the start token."""
    start = torch.full((spec.sequences, 1), model.config.bos_token_id, device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            # In this model a story ends with a new start token, so equal lengths cost nothing.
            min_new_tokens=spec.length - 1,
            max_new_tokens=spec.length - 1,
            pad_token_id=model.config.eos_token_id,
        )


@contextmanager
def _restoring(model: torch.nn.Module) -> Iterator[None]:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)


def _table(rows: Sequence[Mapping[str, Any]], dense: float) -> list[str]:
    """Return the losses as text, one line a method."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cell = {(row["method"], row["level"]): _loss_text(row) for row in rows}
    lines = [f"{'loss, nats per token':26}" + "".join(f"{level:>16}" for level in levels)]
    lines.append(f"{'dense':26}" + "".join(f"{dense:16.3f}" for _ in levels))
    for method in methods:
        lines.append(f"{method:26}" + "".join(f"{cell.get((method, level), '-'):>16}" for level in levels))
    return lines


def _loss_text(row: Mapping[str, Any]) -> str:
    return f"{row['loss']:.3f}" + (f" ({row['sd']:.3f})" if len(row["losses"]) > 1 else "")

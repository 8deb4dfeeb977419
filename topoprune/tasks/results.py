"""What a run returns, and how it reads: a frozen record, its JSON, and a table of several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topoprune.files import atomic_path

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Interrupted", "RunResult", "figure", "heads_text", "json_ready", "results_table", "write_json"]


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after a step; a resumable checkpoint lies in `checkpoint`."""

    def __init__(self, checkpoint: str, step: int, total_steps: int) -> None:
        super().__init__(f"stopped after step {step} of {total_steps}; checkpoint: {checkpoint}")
        self.checkpoint, self.step, self.total_steps = checkpoint, step, total_steps


@dataclass(frozen=True)
class RunResult:
    """One finished training run.

    Args:
        method: ``"dense"``, ``"neuroprune"`` or ``"budget"``.
        score: the main metric on validation. floor: that of the simplest answer, such as the commonest class.
        f1: F1 of class 1 for binary tasks, else None.
        zeros, removable, gatherable: shares of the attention and FFN weights, see `Sparsity`.
        heads: heads (or KV groups) that stay, by attention layer. heads_total: as built.
        neurons: FFN neurons that stay, by layer. neurons_total: as built.
        connectivity_sd: standard deviation of MLP connectivity, percentage points.
        seconds: of training, without loading, evaluation and saving.
        solver: registry names used in the last decision, or "". decisions: how many were made.
        gap: worst relative gap of the last decision; None without decision or bound.
        solver_seconds: of extraction, solving and repair, in all.
        alpha, beta: penalty strengths (neuroprune). thetas: layer -> resolved threshold of the last decision.
        recipe: the whole recipe, or None. steps: optimizer steps.
        train_examples, validation_examples: how many.
        model, data: what was trained, on what. output_dir: where everything lies.
        seed: of everything random. device: where it ran. resumed: continued from a checkpoint.
        files: what was written, by kind.
        task: name of the task. kind: ``"classification"``, ``"regression"``, ``"translation"``, ...
        metric: name of the main metric. higher_is_better: of the main metric.
        metrics: all of them. floors: those of the simplest answer.
    """

    method: str
    score: float
    floor: float
    f1: float | None
    zeros: float
    removable: float
    gatherable: float
    heads: tuple[int, ...]
    heads_total: tuple[int, ...]
    neurons: tuple[int, ...]
    neurons_total: tuple[int, ...]
    connectivity_sd: float
    seconds: float
    steps: int
    train_examples: int
    validation_examples: int
    model: str
    data: str
    output_dir: str
    seed: int
    device: str
    resumed: bool = False
    solver: str = ""
    decisions: int = 0
    gap: float | None = None
    solver_seconds: float = 0.0
    alpha: float | None = None
    beta: float | None = None
    thetas: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    task: str = ""
    kind: str = "classification"
    metric: str = "accuracy"
    higher_is_better: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)
    floors: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready description (nan becomes null)."""
        return dict(json_ready(asdict(self)))


def json_ready(value: Any) -> Any:
    """Return a value with mappings as dicts, tuples as lists, and nan and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | Path, value: Any) -> Path:
    """Write a JSON file, atomically; return the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(json_ready(value), indent=2) + "\n", encoding="utf-8")
    return Path(path)


def results_table(results: Sequence[RunResult], title: str | None = None) -> Table:
    """Return a table for `rich`, one row a run; seconds are relative to the dense run if there is one.

    The column of scores bears the name of the main metric, where all runs have the same.
    """
    from rich.table import Table

    names = {result.metric for result in results}
    metric = names.pop() if len(names) == 1 else "score"

    dense = next((result for result in results if result.method == "dense"), None)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("method", style="bold", no_wrap=True)
    for name in (
        metric.replace("_", " "),
        "zeros",
        "removable",
        "heads kept by layer",
        "MLP sd",
        "time",
        "solver",
        "gap",
    ):
        left = name in ("heads kept by layer", "solver")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "solver")
    for result in results:
        relative = f"{result.seconds:.0f} s"
        if dense is not None and dense.seconds > 0:
            relative += f" ({result.seconds / dense.seconds:.2f}x)"
        table.add_row(
            result.method,
            figure(result.score),
            f"{result.zeros:.1%}",
            f"{result.removable:.1%}",
            heads_text(result),
            f"{result.connectivity_sd:.2f}",
            relative,
            result.solver or "-",
            "-" if result.gap is None else f"{result.gap:.1%}",
        )
    return table


def figure(value: float) -> str:
    """Return a metric with as many digits as it is worth: shares with three, perplexities and BLEU with one or two.

    >>> figure(0.8312), figure(31.2041), figure(1234.5)
    ('0.831', '31.20', '1234.5')
    """
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 100 else f"{value:.1f}"


def heads_text(result: RunResult) -> str:
    """Return e.g. ``"12 10 9 (31 of 36)"``, or ``"all 72"`` where nothing was removed."""
    kept, total = sum(result.heads), sum(result.heads_total)
    return f"all {total}" if kept == total else f"{' '.join(map(str, result.heads))} ({kept} of {total})"

"""What every benchmark shares: options, figures with targets, the result file, timing."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

__all__ = [
    "Figure",
    "Options",
    "Outcome",
    "clock_for",
    "data_folder",
    "environment",
    "percentile_interval",
    "table",
    "write_json",
]

PACKAGES = (
    "topoprune",
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "ortools",
    "igraph",
    "numba",
    "python-sat",
    "torch-pruning",
)


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    quick: bool = False
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Figure:
    """One number with its unit and the target it is held against (None: reported only)."""

    value: float
    unit: str
    target: float | None = None
    better: Literal["lower", "higher"] = "lower"

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if self.target is None or math.isnan(self.value):
            return None if self.target is None else False
        return bool(self.value <= self.target if self.better == "lower" else self.value >= self.target)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


@dataclass(frozen=True)
class Outcome:
    """What a benchmark returns.

    Args:
        correct: the correctness gate; speeds mean nothing when it is False.
        figures: key -> Figure.
        rows: the measurements behind them, one dict a row.
        notes: sentences for the reader (what was skipped and why, what a gate found).
    """

    correct: bool
    figures: Mapping[str, Figure]
    rows: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def data_folder() -> Path | None:
    """Return the folder named by TOPOPRUNE_DATA, or None where it is unset or missing."""
    name = os.environ.get("TOPOPRUNE_DATA")
    return Path(name) if name and Path(name).is_dir() else None


def environment(options: Options) -> dict[str, Any]:
    """Return commit, versions, device, threads and seed."""
    import torch

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    status = [
        *git,
        "status",
        "--porcelain",
        "--",
        ":/",
        ":(exclude,top)benchmarks/results",
    ]  # results do not change code
    dirty = subprocess.run(status, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "cpu"
    return {
        "commit": (commit or "unknown") + ("+changes" if dirty else ""),
        "versions": found,
        "python": platform.python_version(),
        "device": f"{options.device}: {device}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seed": options.seed,
    }


def clock_for(device: str) -> Callable[[], float]:
    """Return a wall clock in seconds that waits for the device before it is read."""
    if not device.startswith("cuda"):
        return time.perf_counter
    import torch

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def percentile_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return a bootstrap confidence interval of the median."""
    data = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).choice(data, size=(2000, data.size))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def table(figures: Mapping[str, Figure]) -> str:
    """Return the figures as text, one line each."""
    lines = [f"{'figure':44} {'value':>12} {'unit':8} {'target':>10}  met"]
    for key, figure in figures.items():
        target = "-" if figure.target is None else f"{'≤' if figure.better == 'lower' else '≥'} {figure.target:g}"
        met = {True: "yes", False: "NO", None: ""}[figure.met]
        lines.append(f"{key:44} {figure.value:12.4f} {figure.unit:8} {target:>10}  {met}")
    return "\n".join(lines)


def write_json(path: str | os.PathLike[str], name: str, options: Options, outcome: Outcome) -> None:
    """Write the result file."""
    from topoprune.files import atomic_path

    command = f"python -m benchmarks {' '.join(sys.argv[1:])}"
    result = {
        "benchmark": name,
        "command": command,
        "correct": outcome.correct,
        "figures": {key: figure.to_dict() for key, figure in outcome.figures.items()},
        "rows": list(outcome.rows),
        "notes": list(outcome.notes),
        "environment": environment(options),
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """Return JSON values only: numpy numbers as floats, nan and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    return float(value) if math.isfinite(float(value)) else None

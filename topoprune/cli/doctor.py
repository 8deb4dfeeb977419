"""``topoprune doctor``: what is installed, what works, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from topoprune.cli.output import Json, check_target, emit_json, guarded

__all__ = ["doctor"]

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "numpy",
    "scipy",
    "ortools",
    "igraph",
    "networkx",
    "numba",
    "pyarrow",
    "python-sat",
)


@guarded
def doctor(json_file: Json = None) -> None:
    """Show versions, devices, solvers and the embedded model."""
    check_target("--json", json_file)
    report = _report()
    if emit_json(json_file, report):
        return
    for name, value in report.items():
        if isinstance(value, dict):
            typer.echo(f"{name}:")
            for key, item in value.items():
                typer.echo(f"  {key:24} {item}")
        else:
            typer.echo(f"{name}: {value}")


def _report() -> dict[str, Any]:
    import torch

    import topoprune_solvers as solvers
    from topoprune import __version__
    from topoprune.tasks.cache import cache_folder
    from topoprune.tasks.embedded_model import embedded_model_path
    from topoprune_solvers.table import problem_types

    try:
        embedded = str(embedded_model_path())
    except (OSError, ValueError) as error:
        embedded = f"no: {error}"
    devices = [f"cpu ({os.cpu_count()} cores, {torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    available = {}
    for problem in problem_types():
        name = problem.__name__
        here = solvers.available_solvers(problem)
        missing = [solver for solver in solvers.solver_names(problem) if solver not in here]
        available[name] = ", ".join(here) + (f" (not installed: {', '.join(missing)})" if missing else "")
    online = os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0")
    return {
        "topoprune": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": ", ".join(devices),
        "solvers": available,
        "embedded model": embedded,
        "cache": str(cache_folder()),
        "hub": "may be asked" if online else "switched off by HF_HUB_OFFLINE",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

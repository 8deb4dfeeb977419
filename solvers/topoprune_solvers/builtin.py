"""Import every module of the problem packages; each registers its solvers when imported."""

from __future__ import annotations

import pkgutil
from importlib import import_module

__all__ = ["PACKAGES", "import_all"]

PACKAGES = ("domination", "budgeted", "quadratic", "edges", "knapsack")


def import_all() -> None:
    """Import all algorithm modules. Heavy libraries stay unloaded: the modules import them inside functions."""
    for package in PACKAGES:
        home = import_module(f"topoprune_solvers.{package}")
        for module in pkgutil.iter_modules(home.__path__):
            if not module.name.endswith("_kernels"):
                import_module(f"{home.__name__}.{module.name}")

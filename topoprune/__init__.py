"""Graph-algorithm-centric pruning of transformers: extract, solve, apply, with certificates.

graph = extract(model)                       # units, distances, worth: an explicit graph
plan = solve(graph, budget=0.5)              # what stays, and how good that choice is
with apply(model, plan): ...                 # masks in the live model
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topoprune.architectures import find_sites, register_family
    from topoprune.compaction import (
        Equivalence,
        check_equivalence,
        compact,
        export,
        kept_units,
        load,
        push_to_hub,
        save,
    )
    from topoprune.comparison import Comparison, compare
    from topoprune.extraction import extract
    from topoprune.graph import BipartiteGraph, Graph, ModelGraph, Site, TensorSlice
    from topoprune.graph_files import read_graph, write_graph
    from topoprune.masks import MaskHandle, apply
    from topoprune.planning import Plan, solve
    from topoprune.sparsity import Sparsity, connectivity_sd, measure_sparsity
    from topoprune.train import Pruner, Recipe, TopoPruneCallback

__version__ = "0.1.0"

_HOME = {
    "BipartiteGraph": "graph",
    "Comparison": "comparison",
    "Equivalence": "compaction",
    "Graph": "graph",
    "MaskHandle": "masks",
    "ModelGraph": "graph",
    "Plan": "planning",
    "Pruner": "train",
    "Recipe": "train",
    "Site": "graph",
    "Sparsity": "sparsity",
    "TensorSlice": "graph",
    "TopoPruneCallback": "train",
    "apply": "masks",
    "check_equivalence": "compaction",
    "compact": "compaction",
    "compare": "comparison",
    "connectivity_sd": "sparsity",
    "export": "compaction",
    "extract": "extraction",
    "find_sites": "architectures",
    "kept_units": "compaction",
    "load": "compaction",
    "measure_sparsity": "sparsity",
    "push_to_hub": "compaction",
    "read_graph": "graph_files",
    "register_family": "architectures",
    "save": "compaction",
    "solve": "planning",
    "write_graph": "graph_files",
}

__all__ = [
    "BipartiteGraph",
    "Comparison",
    "Equivalence",
    "Graph",
    "MaskHandle",
    "ModelGraph",
    "Plan",
    "Pruner",
    "Recipe",
    "Site",
    "Sparsity",
    "TensorSlice",
    "TopoPruneCallback",
    "apply",
    "check_equivalence",
    "compact",
    "compare",
    "connectivity_sd",
    "export",
    "extract",
    "find_sites",
    "kept_units",
    "load",
    "measure_sparsity",
    "push_to_hub",
    "read_graph",
    "register_family",
    "save",
    "solve",
    "write_graph",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import topoprune` is quick and loads neither torch nor transformers.
    if name in _HOME:
        value = getattr(import_module(f"topoprune.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'topoprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

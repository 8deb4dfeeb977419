"""Physical compaction: what a plan prunes leaves the model; the rest computes the same function."""

from topoprune.compaction.compacting import compact
from topoprune.compaction.equivalence import Equivalence, check_equivalence
from topoprune.compaction.exporting import export
from topoprune.compaction.layout import kept_units
from topoprune.compaction.loading import load
from topoprune.compaction.storage import push_to_hub, save
from topoprune.compaction.uniform import UniformShape, uniform_shape

__all__ = [
    "Equivalence",
    "UniformShape",
    "check_equivalence",
    "compact",
    "export",
    "kept_units",
    "load",
    "push_to_hub",
    "save",
    "uniform_shape",
]

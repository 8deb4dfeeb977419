"""Physical compaction: what a plan prunes leaves the model; the rest computes the same function."""

from topoprune.compaction.compacting import compact
from topoprune.compaction.layout import kept_units

__all__ = ["compact", "kept_units"]

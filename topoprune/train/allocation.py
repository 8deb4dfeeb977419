"""How much of every site has gone at each decision: a budget shared out over layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["UniformAllocation"]


@dataclass(frozen=True)
class UniformAllocation:
    """All sites move towards their final counts side by side.

    Args:
        removed: site name -> units to remove in the end.
    """

    removed: Mapping[str, int]

    def goals(self, done: float) -> dict[str, int]:
        """Return site name -> units that are gone when the ramp is at `done`, in [0, 1]."""
        return {name: goal if done == 1.0 else math.floor(goal * done) for name, goal in self.removed.items()}

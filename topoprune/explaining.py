"""Why a unit stays or goes: what it is worth, who stands for it, and what that leaves."""

from __future__ import annotations

import math
from typing import Any

from topoprune_solvers import Solution

__all__ = ["unit_rows"]


def unit_rows(solution: Solution) -> list[dict[str, Any]]:
    """Return one JSON-ready row a unit; see `Plan.explain`.

    Args:
        solution: on units, with what it knows of dominators, distances and importances.

    Complexity: O(n).
    """
    rows = []
    for unit in range(solution.n_units):
        kept = bool(solution.keep[unit])
        dominator, distance = (unit, 0.0) if kept else (-1, math.inf)
        if not kept and solution.dominator is not None and solution.dominator_distance is not None:
            dominator, distance = int(solution.dominator[unit]), float(solution.dominator_distance[unit])
        worth = None if solution.importance is None else float(solution.importance[unit])
        rows.append(
            {
                "unit": unit,
                "kept": kept,
                "dominator": None if dominator < 0 else dominator,
                "distance": distance if math.isfinite(distance) else None,
                "importance": worth,
                "residual": None if worth is None else worth * min(distance, 1.0),
            }
        )
    return rows

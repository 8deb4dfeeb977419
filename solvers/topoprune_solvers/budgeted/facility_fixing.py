"""What a Lagrangian bound decides: units that every better selection keeps, and units that none keeps."""

from __future__ import annotations

import numpy as np

from topoprune_solvers.budgeted.facility_location import Prepared
from topoprune_solvers.budgeted.service import ROUNDING, path_bound

__all__ = ["fix_units"]


def fix_units(case: Prepared, price: np.ndarray, value: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the forced and the forbidden units, with those added that prices decide.

    With prices u the bound is attained by a selection T of largest gains. Keeping a unit outside T, or
    pruning one inside, costs at least the difference to the best unit it can be exchanged with; where that brings
    the bound below `value`, no selection better than `value` does it.

    Args:
        case: the problem. price: (n,) float64 >= 0. value: objective of a known selection.

    Returns:
        Two (n,) bool masks. Selections that are no better than `value` may be excluded by them.

    Complexity: O(n log n + m).
    """
    problem, groups = case.problem, case.groups
    assert problem.forced is not None and problem.forbidden is not None
    gains = case.service.priced(price)
    bound, chosen = path_bound(groups, problem, price, gains)
    limit = bound * (1 + ROUNDING) - value  # what an exchange may cost at most
    count = groups.count(chosen)
    can_lose, can_win = count > groups.low, count < groups.high
    inside = chosen & ~problem.forced
    outside = ~chosen & ~problem.forbidden

    def extreme(mask: np.ndarray, sign: float) -> np.ndarray:
        # (g,) the smallest gain inside (sign 1) or the largest outside (sign -1), inf or -inf without any.
        best = np.full(groups.low.size, np.inf)
        np.minimum.at(best, groups.label[mask], sign * gains[mask])
        return sign * best

    # Adding a unit pushes out one of its group, or one of a group that can spare it if its own has room.
    least = extreme(inside, 1.0)
    anywhere = np.where(can_lose, least, np.inf).min(initial=np.inf)
    partner = np.minimum(least, np.where(can_win, anywhere, np.inf))[groups.label]
    never = outside & (partner - gains > limit)
    # Pruning a unit lets one of its group in, or one of a group with room if its own can spare it.
    most = extreme(outside, -1.0)
    anywhere = np.where(can_win, most, -np.inf).max(initial=-np.inf)
    partner = np.maximum(most, np.where(can_lose, anywhere, -np.inf))[groups.label]
    always = inside & (gains - partner > limit)
    return problem.forced | always, problem.forbidden | never

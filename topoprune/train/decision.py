"""What a training method decides at one step, and how decisions on live units become a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from topoprune.planning import Plan
from topoprune_solvers import Solution

__all__ = ["Decision", "expand", "heirs"]


@dataclass(frozen=True)
class Decision:
    """A new plan and what goes with it.

    Args:
        plan: over all units, those gone before included.
        changed: parameter name -> tensor to write before the masks (merge or repair).
        thetas: site name -> resolved distance threshold.
        seconds: ``extract``, ``solve``, ``repair`` in seconds.
    """

    plan: Plan
    changed: Mapping[str, torch.Tensor] = field(default_factory=dict)
    thetas: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def heirs(dominator: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Follow dominators that have been pruned since to one that is kept; -1 where the chain breaks.

    >>> heirs(np.array([1, 2, 2]), np.array([False, False, True])).tolist()
    [2, 2, 2]
    """
    result = np.array(dominator, dtype=np.int32)
    for _ in range(result.size):
        stale = (result >= 0) & ~keep[np.maximum(result, 0)]
        if not stale.any():
            break
        result[stale] = np.where(result[result[stale]] == result[stale], -1, result[result[stale]])
    return result


def expand(solution: Solution, live: np.ndarray, n_units: int, previous: Solution | None) -> Solution:
    """Lift a solution on the live units of a site to all its units.

    Args:
        solution: on ``len(live)`` units.
        live: indices of the live units.
        n_units: number of units of the site.
        previous: the last full solution; units not live are pruned as there and keep their
            dominator (or its heir). None: they count as kept (only new removals show).
    """
    keep = np.full(n_units, previous is None)
    keep[live] = solution.keep
    dominator = np.arange(n_units, dtype=np.int32)
    distance = np.zeros(n_units)
    if previous is not None:
        gone = np.setdiff1d(np.arange(n_units), live)
        dominator[gone] = -1 if previous.dominator is None else previous.dominator[gone]
        distance[gone] = np.inf if previous.dominator_distance is None else previous.dominator_distance[gone]
    if solution.dominator is None or solution.dominator_distance is None:
        dominator[live] = np.where(solution.keep, live, -1)
        distance[live] = np.where(solution.keep, 0.0, np.inf)
    else:
        dominator[live] = np.where(solution.dominator >= 0, live[solution.dominator], -1)
        distance[live] = solution.dominator_distance
    return replace(solution, keep=keep, dominator=heirs(dominator, keep), dominator_distance=distance)

"""The one place where float costs meet integer solvers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["IntegerCosts", "integer_costs", "is_integral"]


@dataclass(frozen=True, eq=False)
class IntegerCosts:
    """Integer costs, never above the float costs they stand for.

    Args:
        values: (n,) int64 >= 0 whose sum fits an int64 with room to spare.
        unit: float cost of one integer step; ``values * unit <= cost``.
        exact: True if ``values * unit == cost`` for every entry.
    """

    values: np.ndarray
    unit: float
    exact: bool


def integer_costs(cost: np.ndarray) -> IntegerCosts:
    """Return integer costs for a solver that knows no floats.

    Integral costs are divided by their greatest common divisor and stay exact. Others are measured
    in a power of two that gives the largest 45 bits (fewer above 2^15 units, so that the sum stays
    below 2^60) and rounded down: a bound proven for the integers, times `unit`, then holds for the
    float costs and lies below their optimum by less than n * unit.

    Args:
        cost: (n,) finite float64 >= 0. Drop candidates dearer than a known solution first: a
            range of 1e30 to 1e-6 leaves no bits for the small ones.

    Example:
        >>> integer_costs(np.array([400.0, 600.0])).values.tolist()
        [2, 3]
    """
    if not cost.size or not cost.max() > 0:
        return IntegerCosts(np.zeros(cost.size, dtype=np.int64), 1.0, True)
    if is_integral(cost):
        whole = cost.astype(np.int64)
        divisor = int(np.gcd.reduce(whole))
        return IntegerCosts(whole // divisor, float(divisor), True)
    bits = min(45, 60 - cost.size.bit_length())
    # 1022: a smaller step is no normal float64 any more
    exponent = min(bits - math.frexp(float(cost.max()))[1], 1022)
    scaled = np.ldexp(cost, exponent)
    # floor, not round: keeps the bound below the true optimum
    values = np.floor(scaled).astype(np.int64)
    return IntegerCosts(values, math.ldexp(1.0, -exponent), bool(np.all(values == scaled)))


def is_integral(cost: np.ndarray) -> bool:
    """Return True if all costs are integers whose sum a float64 holds exactly, so bounds may be rounded up."""
    return bool(cost.size == 0 or (np.all(cost == np.floor(cost)) and cost.sum() < 2.0**53))

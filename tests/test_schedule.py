"""The ramp and exact shares of a budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from topoprune.train.schedule import cubic_ramp, share_out, solve_steps, spread

LAW = settings(max_examples=200, deadline=None)


@given(st.floats(-1, 2), st.floats(-1, 2))
@LAW
def test_the_ramp_rises_from_0_to_1_and_slows_down(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert 0 <= cubic_ramp(low) <= cubic_ramp(high) <= 1
    assert cubic_ramp(min(low, 0)) == 0 and cubic_ramp(max(high, 1)) == 1
    t = min(max(low, 0), 1)
    assert cubic_ramp(t) == pytest.approx(1 - (1 - t) ** 3)
    assert cubic_ramp(t) >= t - 1e-12  # concave: most goes early


@given(st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1), st.integers(1, 20))
@LAW
def test_decisions_are_distinct_rising_steps_inside_the_ramp(total: int, a: float, b: float, solves: int) -> None:
    start, end = sorted((a, b))
    steps = solve_steps(total, (start, end), solves)
    assert steps == sorted(set(steps)) and 1 <= len(steps) <= solves
    assert all(1 <= step <= total for step in steps)
    assert steps[-1] == min(max(1, round(end * total), round(start * total)), total)
    if solves > 1:
        assert steps[0] == min(max(1, round(start * total)), total)
    if len(steps) > 2:
        assert np.ptp(np.diff(steps)) <= 1  # evenly spaced


@given(st.lists(st.integers(0, 500), min_size=0, max_size=20), st.floats(0, 1))
@LAW
def test_spread_is_exact_proportional_and_within_capacity(capacities: list[int], share: float) -> None:
    room = sum(capacities)
    total = round(share * room)
    shares = spread(total, capacities)
    assert sum(shares) == total
    assert all(0 <= s <= c for s, c in zip(shares, capacities, strict=True))
    if room:
        # Cumulative rounding: every share is within one unit of its exact part.
        assert all(abs(s - total * c / room) < 1 for s, c in zip(shares, capacities, strict=True))


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(1, 10))
@LAW
def test_spread_refuses_what_does_not_fit(capacities: list[int], extra: int) -> None:
    with pytest.raises(ValueError, match=f"cannot share out {sum(capacities) + extra}"):
        spread(sum(capacities) + extra, capacities)
    with pytest.raises(ValueError, match="-1"):
        spread(-1, capacities)


SITES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 5000)), min_size=1, max_size=12)


@given(SITES, st.floats(0, 1))
@LAW
def test_share_out_misses_the_target_by_at_most_half_a_unit(sites: list[tuple[int, int]], share: float) -> None:
    units, costs = [n for n, _ in sites], [c for _, c in sites]
    room = sum((n - 1) * c for n, c in sites)
    target = share * room
    removed = share_out(target, units, costs)
    assert all(0 <= r <= n - 1 for r, n in zip(removed, units, strict=True))  # one unit of each stays
    assert abs(sum(r * c for r, c in zip(removed, costs, strict=True)) - target) <= max(costs) / 2 + 1e-6


@given(st.integers(2, 200), st.integers(1, 12), st.integers(1, 100), st.floats(0, 1))
@LAW
def test_share_out_treats_equal_sites_alike(n: int, count: int, cost: int, share: float) -> None:
    removed = share_out(share * (n - 1) * count * cost, [n] * count, [cost] * count)
    assert max(removed) - min(removed) <= 1
    assert removed == sorted(removed)  # ties to the later site


@given(SITES, st.floats(0.51, 10))
@LAW
def test_share_out_refuses_what_cannot_be_reached(sites: list[tuple[int, int]], excess: float) -> None:
    units, costs = [n for n, _ in sites], [c for _, c in sites]
    room = sum((n - 1) * c for n, c in sites)
    target = room + excess * max(costs)
    assume(target > room + max(costs) / 2)
    with pytest.raises(ValueError, match=str(room)):
        share_out(target, units, costs)


def test_share_out_without_sites() -> None:
    assert share_out(0.0, [], []) == []
    with pytest.raises(ValueError, match="above the 0"):
        share_out(1.0, [], [])

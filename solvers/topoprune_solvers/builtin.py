"""Import every built-in algorithm module; each registers its solvers when imported."""

from __future__ import annotations

from topoprune_solvers import (  # noqa: F401
    baselines,
    brute,
    cp_sat,
    edge_baselines,
    edge_brute,
    edge_cp_sat,
    edge_dp,
    edge_greedy,
    edge_min_cost_flow,
    exact,
    facility_location,
    facility_location_exact,
    greedy,
    k_centre,
    k_centre_exact,
    milp,
    neuroprune,
)

__all__: list[str] = []

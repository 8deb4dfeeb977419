"""n:m sparsity: blocks exact in the end, never below n on the way, hubs among the inputs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.masktools import bits, untouched
from tests.prunertools import adamw, prune, train
from tests.tiny import FAMILIES, HIDDEN, NEURONS, build
from topoprune import Plan, Pruner, Recipe, apply, measure_sparsity
from topoprune.architectures import counted_matrices
from topoprune.train.block_edges import choose_in_blocks
from topoprune_solvers import BlockMask, EdgeSelection, Status
from topoprune_solvers import solve as solve_problem

PATTERNS = (("2:4", 0.5), ("1:4", 0.75), ("5:8", 0.375), ("1:2", 0.5))
every_family = pytest.mark.parametrize(
    ("family", "pattern", "sparsity"), [(f, *p) for f, p in zip(FAMILIES, itertools.cycle(PATTERNS), strict=False)]
)


def inputs_last(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A matrix with its inputs along the last axis; GPT-2's Conv1D keeps them along the first."""
    return tensor.t() if ".c_" in name else tensor


@every_family
def test_blocks_are_exact_in_the_end_and_never_short_before(family: str, pattern: str, sparsity: float) -> None:
    n, m = map(int, pattern.split(":"))
    recipe = Recipe.budget(sparsity, granularity=pattern, solves=3)
    model, pruner, seen = prune(family, recipe, steps=6)
    matrices = counted_matrices(pruner.sites)
    assert set(pruner.plan.solutions) == set(matrices)
    for name in matrices:
        weight = inputs_last(name, model.get_parameter(name).detach())
        kept = (weight != 0).reshape(weight.shape[0], -1, m).sum(dim=2)
        assert (kept == n).all(), name
    for number, (event, plan) in enumerate(seen):
        for name, solution in plan.solutions.items():
            axis, shape = plan.edge_axes[name]
            assert model.get_parameter(name).shape[axis] == shape[0]
            blocks = solution.keep.reshape(-1, m).sum(axis=1)
            assert (blocks >= n).all() and ((blocks == n).all() or number < 2)
            goal = solution.n_units // m * (m - n)
            done = 1.0 if number == 2 else 1 - (1 - (number + 1) / 3) ** 3
            assert solution.n_units - solution.n_kept == (goal if number == 2 else int(goal * done))
        assert event.zeros <= sparsity + 1e-9
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert all(not (after.keep(name) & ~s.keep).any() for name, s in before.solutions.items())
    assert measure_sparsity(model, pruner.sites).zeros == pytest.approx(sparsity)


def test_masks_travel_as_those_of_edges_do(tmp_path: Any) -> None:
    _, pruner, _ = prune("gpt2", Recipe.budget(0.5, granularity="2:4", solves=2), steps=6)
    plan = Plan.load(pruner.plan.save(tmp_path / "plan.npz"))
    masks = {name: mask.clone() for name, mask in pruner.handle.masks().items()}
    pruner.close()
    fresh = build("gpt2")
    before = bits(fresh)
    with apply(fresh, plan) as handle:
        assert all(torch.equal(handle.masks()[name], mask) for name, mask in masks.items())
        assert measure_sparsity(fresh, plan.sites).zeros == pytest.approx(0.5)
    assert bits(fresh) == before


def test_t1_holds_at_every_step() -> None:
    model = build("gpt2")
    optimizer = adamw(model)
    pruner = Pruner(model, Recipe.budget(0.75, granularity="1:4", solves=3), total_steps=8).attach(optimizer)

    def zeros(_: int) -> None:
        for name, keep in pruner.handle.masks().items():
            assert (model.get_parameter(name)[~keep] == 0.0).all(), name

    train(model, optimizer, range(8), zeros)
    assert len(pruner.handle.masks()) == len(counted_matrices(pruner.sites))


def test_inputs_that_m_does_not_divide_are_named() -> None:
    model = build("bert")
    named = rf"query\.weight \({HIDDEN} inputs\).*output\.dense\.weight \({NEURONS} inputs\)"
    message = rf"blocks of 16 .* does not divide those of .*{named}"
    with untouched(model), pytest.raises(ValueError, match=message):
        Pruner(model, Recipe.budget(0.5, granularity="8:16"), total_steps=9)
    with pytest.raises(ValueError, match=r"removes exactly 0\.5 of the weights, not sparsity=0\.4"):
        Recipe.budget(0.4, granularity="2:4")


@st.composite
def instances(draw: Any) -> tuple[np.ndarray, int, tuple[int, int]]:
    m = draw(st.integers(1, 4))
    n = draw(st.integers(1, m))
    rows, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    size = rows * blocks * m
    values = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0, 7.25]), min_size=size, max_size=size))
    k = draw(st.integers(size // m * n, size))
    return np.array(values).reshape(rows, blocks * m), k, (n, m)


@given(instances())
@settings(max_examples=60, deadline=None)
def test_without_attachment_the_choice_is_optimal(instance: Any) -> None:
    """Against dynamic programming over the blocks: the best score with so many weights in all."""
    score, k, (n, m) = instance
    solution = choose_in_blocks(score, k, (n, m))
    best = {0: 0.0}
    for block in np.sort(score.reshape(-1, m), axis=1)[:, ::-1]:
        options = [(take, float(block[:take].sum())) for take in range(n, m + 1)]
        grown: dict[int, float] = {}
        for used, value in best.items():
            for take, more in options:
                grown[used + take] = max(grown.get(used + take, -1.0), value + more)
        best = grown
    assert solution.n_kept == k and (solution.keep.reshape(-1, m).sum(axis=1) >= n).all()
    assert solution.objective == pytest.approx(best[k])
    assert solution.status is Status.OPTIMAL and solution.bound is not None
    if k == score.size // m * n:
        problem = BlockMask(score, kept=n, group=m)
        assert problem.violation(solution.keep) is None
        assert solution.objective == pytest.approx(solve_problem(problem, "sorting").objective)


@given(instances(), st.floats(0.01, 20.0), st.sampled_from(["a", "b"]))
@settings(max_examples=60, deadline=None)
def test_attachment_never_costs_its_objective(instance: Any, strength: float, reading: Any) -> None:
    """The choice is at least as good, attachment counted, as the one without; the bound is above both."""
    score, k, pattern = instance
    plain = choose_in_blocks(score, k, pattern)
    solution = choose_in_blocks(score, k, pattern, attachment=strength, reading=reading)
    judge = EdgeSelection(score.T, k=k, attachment=strength, reading=reading)

    def value(keep: np.ndarray) -> float:
        return judge.objective(keep.reshape(score.shape).T)

    assert solution.n_kept == k
    assert (solution.keep.reshape(-1, pattern[1]).sum(axis=1) >= pattern[0]).all()
    assert solution.objective == pytest.approx(value(solution.keep))
    slack = 1e-9 * (abs(solution.objective) + strength)
    assert solution.bound is not None and solution.bound.value >= solution.objective - slack
    assert solution.objective >= value(plain.keep) - slack


def test_attachment_makes_hubs_among_the_inputs() -> None:
    rng = np.random.default_rng(0)
    score = rng.random((96, 64)) * np.exp(0.2 * rng.standard_normal(64))
    spreads = []
    for strength in (0.0, 0.1, 1.0):
        attachment = strength * float(score.mean()) * 96
        keep = choose_in_blocks(score, 96 * 32, (2, 4), attachment=attachment).keep.reshape(score.shape)
        spreads.append(float(keep.sum(axis=0).std()))
    assert spreads[0] < spreads[1] < spreads[2]


@pytest.mark.parametrize("attachment", [0.0, 5.0])
def test_what_is_gone_stays_gone(attachment: float) -> None:
    rng = np.random.default_rng(1)
    score = rng.random((12, 16))
    keep, k = None, 192
    for k in (180, 150, 110, 96):
        solution = choose_in_blocks(score, k, (2, 4), attachment=attachment, allowed=keep)
        here = solution.keep.reshape(score.shape)
        assert keep is None or not (here & ~keep).any()
        keep, score = here, np.where(here, rng.random(score.shape), 0.0)
    with pytest.raises(ValueError, match="cannot keep 95 of 192 weights with 2 in every 4"):
        choose_in_blocks(score, 95, (2, 4), allowed=keep)

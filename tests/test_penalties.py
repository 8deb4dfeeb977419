"""NeuroPrune's penalties: exact prox against sorting and brute force, gradients against autograd."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from topoprune.train.penalties import (
    Scratch,
    attachment_weights,
    group_sqrt_gradient,
    group_sqrt_penalty,
    prox_group_sqrt,
    prox_group_sqrt_by_sorting,
    prox_weighted_l1,
    weighted_l1_gradient,
    weighted_l1_penalty,
)

LAW = settings(max_examples=80, deadline=None)
Parts = list[torch.Tensor]


@st.composite
def rows(draw: st.DrawFn, max_rows: int = 12, max_entries: int = 9, dtype: torch.dtype = torch.float32) -> Parts:
    """One to three matrices with equal rows; scales differ, some entries and rows are exactly 0."""
    count = draw(st.integers(1, max_rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        part = torch.randn(count, draw(st.integers(1, max_entries)), generator=generator)
        part *= 10.0 ** torch.randint(-2, 2, (count, 1), generator=generator)
        part[torch.rand(part.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
        parts.append(part.to(dtype))
    if draw(st.booleans()):
        for part in parts:
            part[0] = 0.0
    return parts


def clone(parts: Parts) -> Parts:
    return [part.clone() for part in parts]


def objective(x: torch.Tensor, a: torch.Tensor, strength: float) -> torch.Tensor:
    """Value of the prox problem of each row, in float64."""
    x, a = x.double(), a.double()
    return (x - a).square().sum(-1) / 2 + strength * x.abs().sum(-1).sqrt()


# Eq. 2: the prox of strength * sqrt(|row|_1)


@given(rows(), st.floats(1e-4, 20))
@LAW
def test_prox_is_as_good_as_its_twin_by_sorting(parts: Parts, strength: float) -> None:
    fast, slow = clone(parts), clone(parts)
    prox_group_sqrt(fast, strength)
    prox_group_sqrt_by_sorting(slow, strength)
    before = torch.cat(parts, dim=1)
    quick, sorted_ = (objective(torch.cat(p, dim=1), before, strength) for p in (fast, slow))
    scale = before.double().square().sum(-1) / 2 + 1e-12
    assert ((quick - sorted_).abs() <= 2e-6 * scale).all()
    # The same point, except where two minimisers tie.
    tie = (sorted_ - objective(torch.zeros_like(before), before, strength)).abs() <= 1e-5 * scale
    torch.testing.assert_close(torch.cat(fast, dim=1)[~tie], torch.cat(slow, dim=1)[~tie], rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**31), st.floats(1e-3, 5), st.integers(1, 3))
@LAW
def test_prox_is_never_worse_than_any_point_of_a_dense_grid(seed: int, strength: float, entries: int) -> None:
    a = torch.randn(1, entries, generator=torch.Generator().manual_seed(seed))
    x = a.clone()
    prox_group_sqrt([x], strength)
    # A minimiser lies between 0 and a in every coordinate (moving there lowers both terms); signs tried too.
    axes = [np.linspace(-abs(v), abs(v), {1: 4001, 2: 161, 3: 41}[entries]) for v in a[0].tolist()]
    grid = torch.tensor(list(itertools.product(*axes)))
    assert objective(x, a, strength)[0] <= objective(grid, a, strength).min() + 1e-6


@given(rows(), st.floats(1e-4, 20))
@LAW
def test_prox_keeps_signs_shrinks_and_makes_exact_zeros(parts: Parts, strength: float) -> None:
    after = clone(parts)
    prox_group_sqrt(after, strength)
    for new, old in zip(after, parts, strict=True):
        assert ((new == 0) | (new.sign() == old.sign())).all()
        assert (new.abs() <= old.abs()).all()
        assert (new[old == 0] == 0).all()
        assert torch.isfinite(new).all()
    # Soft-thresholding: within a row all survivors lose the same amount, the rest is smaller than it.
    joined, before = torch.cat(after, dim=1), torch.cat(parts, dim=1)
    for new, old in zip(joined, before, strict=True):
        alive = new != 0
        if alive.any():
            lost = (old - new).abs()
            limit = float(lost[alive].max())
            assert torch.allclose(lost[alive], lost[alive].max(), rtol=1e-4, atol=1e-6 * float(old.abs().max()))
            assert (old[~alive].abs() <= limit * (1 + 1e-4) + 1e-6 * float(old.abs().max())).all()


@given(rows())
@LAW
def test_strength_zero_is_the_identity(parts: Parts) -> None:
    after = clone(parts)
    prox_group_sqrt(after, 0.0)
    prox_group_sqrt_by_sorting(after, 0.0)
    assert all(torch.equal(new, old) for new, old in zip(after, parts, strict=True))


@given(rows(), st.floats(0.1, 3), st.floats(1.0, 4.0))
@LAW
def test_more_strength_never_leaves_more(parts: Parts, strength: float, factor: float) -> None:
    weak, strong = clone(parts), clone(parts)
    prox_group_sqrt(weak, strength)
    prox_group_sqrt(strong, strength * factor)
    for a, b in zip(weak, strong, strict=True):
        assert (b.abs() <= a.abs() + 1e-5 * (1 + a.abs())).all()


def test_a_row_collapses_exactly_at_its_threshold() -> None:
    """One entry a: x = 0 wins once strength >= (2/3)^1.5 * a^1.5 (value of the cubic at u = 2/3)."""
    critical = (2 / 3) ** 1.5
    for size in (0.01, 1.0, 30.0):
        edge = critical * size**1.5
        for strength, dead in ((edge * 0.999, False), (edge * 1.001, True)):
            row = torch.tensor([[size]])
            prox_group_sqrt([row], strength)
            assert bool(row == 0) is dead
            if not dead:
                assert float(row) > size / 4  # a jump: there are no small survivors


def test_the_support_of_many_rows_does_not_depend_on_their_neighbours() -> None:
    """Rows settle in different numbers of passes; each must get its own answer."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 48, generator=generator) * torch.logspace(-3, 1, 400).unsqueeze(1)
    for strength in (1e-3, 0.1, 2.0):
        together = a.clone()
        prox_group_sqrt([together[:, :24], together[:, 24:]], strength, scratch=Scratch())
        alone = a.clone()
        for row in alone.split(1):
            prox_group_sqrt([row], strength)
        dead = (alone == 0).all(1)
        assert torch.equal((together == 0).all(1), dead) and 0 < int(dead.sum()) < 400
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


# Eq. 1: attachment weights and their prox


@given(rows(), st.sampled_from(["a", "b"]), st.floats(1e-4, 0.5), st.floats(1e-3, 0.5))
@LAW
def test_attachment_weights_against_the_printed_formulas(
    parts: Parts, reading: Any, epsilon: float, delta: float
) -> None:
    weights = attachment_weights(parts, epsilon, reading, delta)
    joined = torch.cat(parts, dim=1)
    assert weights.shape == (len(joined), 1)
    for row, weight in zip(joined.tolist(), weights.flatten().tolist(), strict=True):
        missing = sum(abs(torch.tensor(v)) < epsilon for v in row) / len(row)
        expected = missing if reading == "a" else 1 / (1 - missing + delta)
        assert weight == pytest.approx(float(expected), rel=1e-5)


def test_the_readings_start_and_end_as_the_paper_says() -> None:
    dense, empty = torch.ones(1, 10), torch.zeros(1, 10)
    assert float(attachment_weights([dense], 1e-4, "a")) == 0.0  # a dense start has no penalty
    assert float(attachment_weights([dense], 1e-4, "b")) == pytest.approx(1 / 1.01)  # plain l1
    assert float(attachment_weights([empty], 1e-4, "a")) == 1.0
    assert float(attachment_weights([empty], 1e-4, "b")) == pytest.approx(100.0)


@given(rows(), st.integers(0, 2**31))
@LAW
def test_weighted_l1_prox_is_soft_thresholding(parts: Parts, seed: int) -> None:
    limit = torch.rand(len(parts[0]), 1, generator=torch.Generator().manual_seed(seed))
    after = clone(parts)
    prox_weighted_l1(after, limit)
    for new, old in zip(after, parts, strict=True):
        for i in range(old.shape[0]):
            for j in range(old.shape[1]):
                value, t = old[i, j], limit[i, 0]
                if abs(value) <= t:
                    assert new[i, j] == 0.0
                else:
                    assert new[i, j] == value - t * value.sign()


@given(rows(), st.integers(0, 2**31))
@LAW
def test_weighted_l1_prox_minimises_its_objective(parts: Parts, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    limit = torch.rand(len(parts[0]), 1, generator=generator)
    after = clone(parts)
    prox_weighted_l1(after, limit)

    def value(x: Parts) -> float:
        close = sum(float((n.double() - o.double()).square().sum()) for n, o in zip(x, parts, strict=True)) / 2
        return close + float(weighted_l1_penalty([n.double() for n in x], limit.double()))

    best = value(after)
    for size in (1e-3, 0.1, 1.0):
        other = [n + size * torch.randn(n.shape, generator=generator) for n in after]
        assert best <= value(other) + 1e-6


# Gradients


@given(rows(), st.integers(0, 2**31))
@LAW
def test_gradients_are_those_of_the_penalties(parts: Parts, seed: int) -> None:
    """Away from 0 autograd is right; at 0 it gives 0 for |x| and nan for sqrt, where ours give 0."""
    live = [part.clone().requires_grad_() for part in parts]
    norms = sum(part.abs().sum(1) for part in parts)
    group_sqrt_penalty([part[norms > 0] for part in live]).backward()
    for mine, part in zip(group_sqrt_gradient(parts), live, strict=True):
        expected = part.grad if part.grad is not None else torch.zeros_like(part)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    weights = torch.rand(len(parts[0]), 1, generator=torch.Generator().manual_seed(seed))
    live = [part.clone().requires_grad_() for part in parts]
    weighted_l1_penalty(live, weights).backward()
    for part, leaf in zip(parts, live, strict=True):
        torch.testing.assert_close(weighted_l1_gradient(part, weights), leaf.grad)


@given(rows())
@LAW
def test_penalties_are_the_printed_sums(parts: Parts) -> None:
    joined = torch.cat(parts, dim=1).double()
    assert float(group_sqrt_penalty(parts)) == pytest.approx(
        sum(float(row.abs().sum()) ** 0.5 for row in joined), rel=1e-4
    )
    weights = torch.arange(1.0, len(joined) + 1).unsqueeze(1)
    expected = sum((i + 1) * float(row.abs().sum()) for i, row in enumerate(joined))
    assert float(weighted_l1_penalty(parts, weights)) == pytest.approx(expected, rel=1e-4)


# Storage


@pytest.mark.parametrize("strength", [1e-3, 0.3, 3.0])
def test_transposed_storage_gives_the_same_result(strength: float) -> None:
    """Conv1D and output projections come as transposed views; the values must not notice."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(40, e, generator=generator) for e in (24, 24, 7)]
    scratch = Scratch()
    straight, turned = clone(parts), [part.T.contiguous() for part in parts]
    views = [part.T for part in turned]
    prox_group_sqrt(straight, strength, scratch=scratch)
    prox_group_sqrt(views, strength, scratch=scratch)
    for a, b in zip(straight, turned, strict=True):
        torch.testing.assert_close(b.T, a, rtol=1e-5, atol=1e-6)
    for reading in ("a", "b"):
        one = attachment_weights(straight, 1e-4, reading, scratch=scratch)  # type: ignore[arg-type]
        two = attachment_weights(views, 1e-4, reading, scratch=scratch)  # type: ignore[arg-type]
        assert torch.equal(one, two)
    prox_weighted_l1(straight, one * strength, scratch)
    prox_weighted_l1(views, one * strength, scratch)
    for a, b in zip(straight, turned, strict=True):
        torch.testing.assert_close(b.T, a, rtol=1e-5, atol=1e-6)


def test_a_slice_of_a_fused_matrix_changes_nothing_beside_it() -> None:
    fused = torch.randn(10, 30, generator=torch.Generator().manual_seed(2))
    before = fused.clone()
    prox_group_sqrt([fused[:, 10:20]], 0.5)
    assert torch.equal(fused[:, :10], before[:, :10]) and torch.equal(fused[:, 20:], before[:, 20:])
    expected = before[:, 10:20].clone()
    prox_group_sqrt([expected], 0.5)
    torch.testing.assert_close(fused[:, 10:20], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_formats_agree_with_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(50, 12, generator=generator).to(dtype) for _ in range(2)]
    tolerance = {torch.bfloat16: 0.03, torch.float16: 4e-3, torch.float64: 1e-5}[dtype]
    for strength in (0.05, 1.0):
        own, reference = clone(parts), [part.float() for part in parts]
        prox_group_sqrt(own, strength)
        prox_group_sqrt(reference, strength)
        before = torch.cat(parts, dim=1).double()
        a, b = (objective(torch.cat(p, dim=1), before, strength) for p in (own, reference))
        assert own[0].dtype == dtype and torch.isfinite(own[0]).all()
        assert (a <= b * (1 + tolerance) + tolerance).all()
        weights = attachment_weights(own, 1e-3, "b")
        assert weights.dtype == torch.float32 and torch.isfinite(weights).all()
        prox_weighted_l1(own, 0.01 * weights)
        assert all(gradient.dtype == dtype for gradient in group_sqrt_gradient(own))


def test_scratch_is_reused_and_never_mixes_formats() -> None:
    scratch = Scratch()
    big, small = torch.zeros(8, 8), torch.zeros(3, 4)
    assert scratch.like(big).data_ptr() == scratch.like(small).data_ptr()
    assert scratch.like(big, 1).data_ptr() != scratch.like(big).data_ptr()
    assert scratch.like(small.T).shape == (4, 3) and scratch.like(small.T).T.is_contiguous()
    assert scratch.like(small.to(torch.bfloat16)).dtype == torch.bfloat16

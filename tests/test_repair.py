"""Merging and repair against slow twins, and the law of least squares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.tiny import FAMILIES, build, inputs
from topoprune import Plan, Site, apply, find_sites
from topoprune.extraction import collect_gram
from topoprune.repair import MERGES, consumer_matrix, least_squares, merged_weights, next_ffn, repair_damage
from topoprune_solvers import Solution, Status

every_family = pytest.mark.parametrize("family", FAMILIES)
LAW = settings(max_examples=80, deadline=None)


def units_with_consumer(model: nn.Module) -> list[Site]:
    return [site for site in find_sites(model) if site.consumer]


def drop_half(site: Site, seed: int = 0) -> Solution:
    """Prune half of the units; every pruned one is dominated by some kept one."""
    rng = np.random.default_rng(seed)
    n = site.n_units
    keep = np.ones(n, dtype=bool)
    keep[rng.choice(n, n // 2, replace=False)] = False
    heir = np.where(keep, np.arange(n), rng.choice(np.flatnonzero(keep), n))
    return Solution(
        keep, 0.0, "min", Status.FEASIBLE, "test", dominator=heir, dominator_distance=np.where(keep, 0.0, 0.5)
    )


@st.composite
def moments(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(X, W, C, keep): data of any rank with wild scales, a consumer, its second moment, who stays."""
    n, rank, tokens = draw(st.integers(1, 12)), draw(st.integers(0, 12)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scales = 10.0 ** (draw(st.floats(0, 4)) * (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5))
    low_rank = torch.randn(tokens, rank, generator=generator, dtype=torch.float64)
    x = low_rank @ torch.randn(rank, n, generator=generator, dtype=torch.float64) * scales
    if draw(st.booleans()) and n > 1:
        x[:, 0] = 0.0  # a dead unit
    w = torch.randn(draw(st.integers(1, 5)), n, generator=generator, dtype=torch.float64)
    keep = torch.rand(n, generator=generator) < draw(st.floats(0, 1))
    return x, w, x.T @ x / tokens, keep


# The law


@given(moments())
@LAW
def test_least_squares_never_does_worse_than_dropping(case: tuple[torch.Tensor, ...]) -> None:
    x, w, c, keep = case
    new = least_squares(w, c, keep)
    assert (new[:, ~keep] == 0).all()
    dropped = repair_damage(w, w * keep, c)
    everything = repair_damage(w, torch.zeros_like(w), c)
    assert repair_damage(w, new, c) <= dropped + 1e-9 * max(everything, dropped)
    # ... on the data itself, not only in the quadratic form:
    error = ((x @ (w - new).T) ** 2).sum(1).mean()
    assert error <= ((x @ (w - w * keep).T) ** 2).sum(1).mean() + 1e-9 * max(everything, dropped)


@given(moments())
@LAW
def test_least_squares_is_the_best_linear_substitute(case: tuple[torch.Tensor, ...]) -> None:
    """The residual is orthogonal to the survivors: no change of the kept weights can help."""
    x, w, c, keep = case
    new = least_squares(w, c, keep)
    gradient = (x @ (new - w).T).T @ x[:, keep] / len(x)
    scale = float((x @ w.T).norm() * x[:, keep].norm()) / len(x)
    assert float(gradient.norm()) <= 1e-6 * scale + 1e-300


@given(moments(), st.floats(1e-8, 10))
@LAW
def test_any_ridge_stays_between_dropping_and_least_squares(case: tuple[torch.Tensor, ...], ridge: float) -> None:
    _, w, c, keep = case
    best, dropped = repair_damage(w, least_squares(w, c, keep), c), repair_damage(w, w * keep, c)
    damage = repair_damage(w, least_squares(w, c, keep, ridge=ridge), c)
    slack = 1e-9 * max(dropped, repair_damage(w, torch.zeros_like(w), c))
    assert best - slack <= damage <= dropped + slack


@given(moments())
@LAW
def test_keeping_everything_or_nothing(case: tuple[torch.Tensor, ...]) -> None:
    _, w, c, keep = case
    assert torch.equal(least_squares(w, c, torch.ones_like(keep)), w)
    assert torch.equal(least_squares(w, c, torch.zeros_like(keep)), torch.zeros_like(w))


@given(moments())
@LAW
def test_damage_is_the_mean_squared_error_at_the_output(case: tuple[torch.Tensor, ...]) -> None:
    x, w, c, keep = case
    other = w * keep + 0.1
    direct = float(((x @ (w - other).T) ** 2).sum(1).mean())
    assert repair_damage(w, other, c) == pytest.approx(direct, rel=1e-9, abs=1e-12 * float(c.diagonal().sum()))


@pytest.mark.parametrize(("tokens", "features", "draws"), [(1, 6, 40), (3, 200, 2), (40, 200, 2), (90, 200, 2)])
def test_directions_the_calibration_never_showed_are_left_alone(tokens: int, features: int, draws: int) -> None:
    """Fewer tokens than features, moments in float32 as collected: no huge weights out of rounding noise."""
    for seed in range(draws):
        generator = torch.Generator().manual_seed(1000 * tokens + seed)
        scales = torch.logspace(-2, 2, features)[torch.randperm(features, generator=generator)]
        x = torch.randn(tokens, features, generator=generator) * scales
        w = torch.randn(20, features, generator=generator)
        keep = torch.arange(features) % 2 == 0
        new = least_squares(w, x.T @ x / tokens, keep)
        correction = (new - w)[:, keep].double()
        missing = x[:, ~keep].double() @ w[:, ~keep].double().T
        contribution = x[:, keep].double() @ correction.T
        torch.testing.assert_close(contribution, missing, rtol=1e-2, atol=1e-2 * float(missing.abs().max()))
        # In units of each feature's scale, hardly more than the smallest correction that fits the data.
        scale = x[:, keep].double().square().mean(0).sqrt()
        smallest = torch.linalg.lstsq(x[:, keep].double() / scale, missing, driver="gelsd").solution.T
        assert float((correction * scale).norm()) <= 1.1 * float(smallest.norm())


def test_a_linear_copy_is_replaced_without_any_damage() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    mixing = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x @ mixing], dim=1)  # inputs 6 and 7 are combinations of the others
    w = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    c = x.T @ x / len(x)
    keep = torch.tensor([True] * 6 + [False] * 2)
    new = least_squares(w, c, keep)
    assert repair_damage(w, new, c) <= 1e-12 * repair_damage(w, w * keep, c)
    torch.testing.assert_close(new[:, :6], w[:, :6] + w[:, 6:] @ mixing.T)


@every_family
@pytest.mark.parametrize("batch", [(3, 7), (1, 3)], ids=["many-tokens", "fewer-tokens-than-features"])
def test_the_law_holds_in_the_model_on_the_calibration_set(family: str, batch: tuple[int, int]) -> None:
    """One site at a time (the others dense): error at the consumer's output over real tokens."""
    model = build(family)
    calibration = inputs(model, *batch, seed=5)
    for site in units_with_consumer(model):
        plan = Plan(find_sites(model), {site.name: drop_half(site)})
        _, dense = at_consumer(model, site, calibration)
        errors = {}
        for merge in ("none", "least-squares"):
            with apply(model, plan, merge=merge, calibration=[calibration]):  # type: ignore[arg-type]
                _, merged = at_consumer(model, site, calibration)
                errors[merge] = float((merged - dense).square().sum(-1).mean())
        assert errors["least-squares"] <= errors["none"] * (1 + 1e-5), site.name


def at_consumer(model: nn.Module, site: Site, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters and what leaves the site's consumer at the real tokens of the batch."""
    seen: list[torch.Tensor] = []
    assert site.consumer is not None
    hook = model.get_submodule(site.consumer).register_forward_hook(
        lambda module, args, out: seen.extend((args[0], out))
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    real = batch["attention_mask"] == 1
    if site.stack == "decoder" and "labels" in batch:
        real = batch["labels"] != -100
    entering, leaving = (values.reshape(*real.shape, -1)[real].double() for values in seen)
    return entering, leaving


# Merges against slow twins


@every_family
def test_scale_merge_against_the_formula(family: str) -> None:
    """W_j *= 1 + sum_i G_ij / G_jj with G from what each unit adds, token by token."""
    model = build(family)
    batch = inputs(model, seed=3)
    for site in units_with_consumer(model):
        plan = Plan(find_sites(model), {site.name: drop_half(site)})
        solution = plan.solutions[site.name]
        with torch.no_grad():
            weight = consumer_matrix(site, model.get_submodule(site.consumer).weight).double()  # type: ignore[arg-type]
        x, _ = at_consumer(model, site, batch)
        w = site.unit_width
        added = [x[:, u * w : (u + 1) * w] @ weight[:, u * w : (u + 1) * w].T for u in range(site.n_units)]
        gram = np.array([[float((a * b).sum(1).mean()) for b in added] for a in added])
        expected = weight.clone()
        for j in np.flatnonzero(solution.keep):
            heirs_of = [i for i in np.flatnonzero(~solution.keep) if solution.dominator[i] == j]
            if gram[j, j] > 0:  # a unit that is silent on this batch takes nothing over
                expected[:, j * w : (j + 1) * w] *= 1 + sum(gram[i, j] / gram[j, j] for i in heirs_of)
        moments_ = dict(collect_gram(model, [site], [batch]))
        new = merged_weights(model, find_sites(model), plan, "scale", moments_)
        assert list(new) == [site.writes[0].param]
        found = consumer_matrix(site, new[site.writes[0].param])
        kept = torch.from_numpy(np.repeat(solution.keep, w))
        torch.testing.assert_close(found.double()[:, kept], expected[:, kept], rtol=2e-4, atol=1e-5)


def test_scaling_a_dominator_with_equal_contributions_is_exact() -> None:
    """PAPER.md 6.3: if a head adds exactly what its dominator adds, doubling the dominator repairs it."""
    model = build("bert")
    site = find_sites(model, ("heads",))[0]
    with torch.no_grad():
        for piece in site.slices:
            tensor = model.get_parameter(piece.param)
            tensor.narrow(piece.axis, piece.width, piece.width).copy_(tensor.narrow(piece.axis, 0, piece.width))
    keep = np.array([True, False, True, True])
    solution = Solution(keep, 3.0, "min", Status.FEASIBLE, "test", dominator=np.array([0, 0, 2, 3]))
    plan = Plan(find_sites(model), {site.name: solution})
    batch = inputs(model)
    with torch.no_grad():
        dense = model(**batch).logits
        with apply(model, plan, merge="scale", calibration=[batch]):
            torch.testing.assert_close(model(**batch).logits, dense, rtol=1e-4, atol=1e-4)
        with apply(model, plan, merge="least-squares", calibration=[batch]):
            torch.testing.assert_close(model(**batch).logits, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt", "llama", "gpt2"])
def test_paper_merge_against_the_formula(family: str) -> None:
    """The FFN input columns of a dominated head join its dominator's; nothing else moves."""
    model = build(family)
    sites = find_sites(model)
    attention = [site for site in sites if site.kind in ("head", "kv_group")]
    plan = Plan(sites, {site.name: drop_half(site, seed=i) for i, site in enumerate(attention)})
    new = merged_weights(model, sites, plan, "paper", {})
    expected_names = set()
    for site in attention:
        ffn = next_ffn(site, sites)
        assert ffn is not None and ffn.layer == site.layer
        solution, w = plan.solutions[site.name], site.unit_width
        for piece in ffn.reads:
            if len(piece.shape) != 2:
                continue
            expected_names.add(piece.param)
            matrix = model.get_parameter(piece.param).detach()
            columns = (matrix if piece.axis == 0 else matrix.T).clone()
            for i in np.flatnonzero(~solution.keep):
                for offset in range(w):
                    columns[:, solution.dominator[i] * w + offset] += columns[:, i * w + offset]
            found = new[piece.param] if piece.axis == 0 else new[piece.param].T
            torch.testing.assert_close(found, columns)
    assert set(new) == expected_names


@every_family
@pytest.mark.parametrize("merge", ["none", "scale", "least-squares"])
def test_merging_only_computes(family: str, merge: Any) -> None:
    model = build(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sites = find_sites(model)
    watched = units_with_consumer(model)
    plan = Plan(sites, {site.name: drop_half(site) for site in watched})
    new = merged_weights(model, sites, plan, merge, dict(collect_gram(model, watched, [inputs(model)])))
    assert set(new) == (set() if merge == "none" else {site.writes[0].param for site in watched})
    for name, tensor in new.items():
        assert tensor.shape == before[name].shape and tensor.dtype == before[name].dtype
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_bad_merges_name_what_is_missing() -> None:
    model = build("bert")
    sites = find_sites(model)
    head = next(site for site in sites if site.kind == "head")
    plan = Plan(sites, {head.name: drop_half(head)})
    assert MERGES == ("none", "scale", "least-squares", "paper")
    with pytest.raises(ValueError, match="unknown merge 'sum'; available: none, scale, least-squares, paper"):
        merged_weights(model, sites, plan, "sum", {})  # type: ignore[arg-type]
    for merge in ("scale", "least-squares"):
        with pytest.raises(ValueError, match=head.name.replace(".", r"\.")):
            merged_weights(model, sites, plan, merge, {})  # type: ignore[arg-type]
    no_ffn = tuple(site for site in sites if site.kind != "neuron")
    with pytest.raises(ValueError, match="needs an FFN behind"):
        merged_weights(model, no_ffn, Plan(no_ffn, dict(plan.solutions)), "paper", {})

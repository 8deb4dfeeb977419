"""Merging and repair against slow twins, and the law of least squares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.masktools import PAPER
from tests.naive_measures import real_tokens
from tests.tiny import FAMILIES, LAYERS, build, inputs
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=moments(), ridge=st.sampled_from([0.0, 1e-3]))
@LAW
def test_rounding_does_not_break_the_law(case: tuple[torch.Tensor, ...], ridge: float, dtype: torch.dtype) -> None:
    """Weights in a short format, row by row: where the rounded repair would lose to dropping, the row is dropped."""
    _, w, c, keep = case
    w, c = w.to(dtype), c.float()
    new = least_squares(w, c, keep, ridge=ridge)
    assert new.dtype == dtype and (new[:, ~keep] == 0).all()
    for row, repaired in zip(w, new, strict=True):
        dropped = repair_damage(row[None], (row * keep)[None], c)
        everything = repair_damage(row[None], torch.zeros_like(row)[None], c)
        assert repair_damage(row[None], repaired[None], c) <= dropped + 1e-9 * max(everything, dropped)


def test_a_repair_that_does_not_survive_rounding_is_not_made() -> None:
    """Two nearly equal survivors could only stand in for the third with huge weights that cancel."""
    t = torch.tensor([1.0, -1.0], dtype=torch.float64)
    x = torch.stack([1 + t / 4000, 1 - t / 4000, t], dim=1)
    c = x.T @ x / 2
    w, keep = torch.tensor([[3.1, 2.2, 1.0]], dtype=torch.float64), torch.tensor([True, True, False])
    exact = least_squares(w, c, keep)
    assert repair_damage(w, exact, c) < 1e-6 < repair_damage(w, w * keep, c) < repair_damage(w, exact.bfloat16(), c)
    short = w.bfloat16()
    assert torch.equal(least_squares(short, c, keep), short * keep)


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


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_law_holds_for_query_heads_inside_their_groups(family: str) -> None:
    model = build(family)
    calibration = inputs(model, seed=5)
    site = find_sites(model, ("heads",), gqa="query-heads")[0]
    keep = np.tile([True, False], site.n_units // 2)  # one of two in every group
    heir = np.where(keep, np.arange(site.n_units), np.arange(site.n_units) - 1)
    plan = Plan((site,), {site.name: Solution(keep, 0.0, "min", Status.FEASIBLE, "test", dominator=heir)})
    _, dense = at_consumer(model, site, calibration)
    errors = {}
    for merge in ("none", "least-squares"):
        with apply(model, plan, merge=merge, calibration=[calibration]):  # type: ignore[arg-type]
            _, merged = at_consumer(model, site, calibration)
            errors[merge] = float((merged - dense).square().sum())
    assert errors["least-squares"] < 0.99 * errors["none"]


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
    real = real_tokens(batch, site, seen[1])
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


@pytest.mark.parametrize("family", PAPER)
def test_paper_merge_against_the_formula(family: str) -> None:
    """The FFN input columns of a dominated head join its dominator's; nothing else moves.

    Self and cross attention of a decoder layer meet in one FFN: both add the dense columns, in any order.
    """
    model = build(family)
    sites = find_sites(model)
    attention = [site for site in sites if site.kind in ("head", "kv_group")]
    plan = Plan(sites, {site.name: drop_half(site, seed=i) for i, site in enumerate(attention)})
    new = merged_weights(model, sites, plan, "paper", {})
    backwards = Plan(sites, dict(reversed(plan.solutions.items())))
    for name, tensor in merged_weights(model, sites, backwards, "paper", {}).items():
        torch.testing.assert_close(tensor, new[name])
    expected: dict[str, torch.Tensor] = {}
    for site in attention:
        ffn = next_ffn(site, sites)
        assert ffn is not None and (ffn.stack, ffn.layer, ffn.block) == (site.stack, site.layer, "ffn")
        solution, w = plan.solutions[site.name], site.unit_width
        for piece in ffn.reads:
            if len(piece.shape) != 2:
                continue
            dense = model.get_parameter(piece.param).detach()
            merged = expected.setdefault(piece.param, dense.clone())
            for i in np.flatnonzero(~solution.keep):
                for offset in range(w):
                    j = solution.dominator[i] * w + offset
                    into, out_of = merged.movedim(1 - piece.axis, 0), dense.movedim(1 - piece.axis, 0)
                    into[j] += out_of[i * w + offset]
    assert set(new) == set(expected)
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PAPER)))
def test_paper_merge_is_refused_where_heads_do_not_fill_the_model(family: str) -> None:
    model = build(family)
    sites = find_sites(model)
    for site in (site for site in sites if site.kind in ("head", "kv_group")):
        plan = Plan(sites, {site.name: drop_half(site)})
        with pytest.raises(
            ValueError, match=rf"undefined for '{site.name}': heads \* head width = 32, .* reads 24 dim"
        ):
            merged_weights(model, sites, plan, "paper", {})


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
def test_both_attentions_of_a_decoder_layer_meet_in_its_ffn(family: str) -> None:
    sites = find_sites(build(family))
    behind = {site.name: next_ffn(site, sites) for site in sites if site.kind == "head"}
    for layer in range(LAYERS):
        for stack, blocks in (("encoder", ("attention",)), ("decoder", ("attention", "cross_attention"))):
            found = [behind[f"{stack}.{layer}.{block}"] for block in blocks]
            assert [ffn.name for ffn in found if ffn] == [f"{stack}.{layer}.ffn"] * len(blocks)


@pytest.mark.parametrize("family", ["bert", "vit", "bart"])
def test_units_nobody_dominates_are_merged_into_nothing(family: str) -> None:
    """A plan may prune units without an heir (dominator -1): their part is dropped."""
    model = build(family)
    sites = find_sites(model)
    watched = units_with_consumer(model)
    orphans = {}
    for site in watched:
        solution = drop_half(site)
        heir = np.where(solution.keep, solution.dominator, -1)
        orphans[site.name] = replace(solution, dominator=heir, dominator_distance=None)
    collected = dict(collect_gram(model, watched, [inputs(model)]))
    for merge in ("scale", "paper"):
        for name, tensor in merged_weights(model, sites, Plan(sites, orphans), merge, collected).items():  # type: ignore[arg-type]
            assert torch.equal(tensor, model.get_parameter(name)), name


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

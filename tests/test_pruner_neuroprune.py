"""NeuroPrune's Alg. 1-3 in a plain loop, against the formulas by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.masktools import ATTENTION, bits
from tests.prunertools import UNDEFINED_PAPER_MERGE, adamw, batch_of, sgd, train
from tests.tiny import FAMILIES, HEADS, LAYERS, build
from topoprune import Pruner, Recipe, find_sites, measure_sparsity
from topoprune.sparsity import row_view
from topoprune.train.penalties import attachment_weights

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_proximal_steps_give_exact_zeros_and_heads_go_at_epoch_ends_only(family: str) -> None:
    merge = "none" if family in UNDEFINED_PAPER_MERGE else "paper"
    recipe = Recipe.neuroprune(0.3, 0.02, "auto:0.4", prox_scale="absolute", merge=merge)  # type: ignore[arg-type]
    model = build(family)
    sites = find_sites(model)
    opt = sgd(model)
    pruner = Pruner(model, recipe, steps_per_epoch=3).attach(opt)
    zeros, kept = [], []

    def look(step: int) -> None:
        zeros.append(measure_sparsity(model, sites).zeros)
        kept.append(sum(int(pruner.plan.keep(site.name).sum()) for site in sites if site.kind in ATTENTION))

    train(model, opt, range(7), look)
    assert zeros[0] > 0 and zeros[1] > zeros[0]
    everything = sum(site.n_units for site in sites if site.kind in ATTENTION)
    assert kept[0] == kept[1] == everything
    assert kept[2] < everything and kept[2] == kept[3] == kept[4] and kept[5] <= kept[4] and kept[6] == kept[5]
    assert [event.step for event in pruner.history] == [3, 6]
    for event in pruner.history:
        assert set(event.thetas) == {site.name for site in sites if site.kind in ATTENTION}
        assert all(math.isfinite(theta) and theta >= 0 for theta in event.thetas.values())
        assert event.solver == "neuroprune"
    assert dict(pruner.plan.request["thetas"]) == pruner.history[-1].thetas
    # no head returns, the dominated ones have a live dominator
    for name, solution in pruner.plan.solutions.items():
        assert solution.keep.any()
        heirs = solution.dominator[~solution.keep]  # type: ignore[index]
        assert ((heirs == -1) | solution.keep[heirs]).all(), name


def linf_distances(weights: dict[str, torch.Tensor], layer: int) -> np.ndarray:
    """Alg. 2 by hand: max |A_Hi - A_Hj| over the query, key and value rows of each pair of heads."""
    prefix = f"bert.encoder.layer.{layer}.attention.self."
    rows = [
        torch.cat([weights[f"{prefix}{role}.weight"][6 * h : 6 * h + 6] for role in ("query", "key", "value")])
        for h in range(HEADS)
    ]
    return np.array([[float((a - b).abs().max()) for b in rows] for a in rows])


def test_the_head_step_is_alg_2_and_3_with_the_papers_merge() -> None:
    """Three epochs with lr 0: who goes follows from distances by hand, and each head's columns move once."""
    model = build("bert")
    first = linf_distances({name: p.detach() for name, p in model.named_parameters()}, 0)
    theta = float(np.sort(first[np.triu_indices(HEADS, 1)])[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, Recipe.neuroprune(0.1, 0.1, theta), steps_per_epoch=1).attach(optimizer)
    gone_before = 0
    for epoch in range(3):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        earlier = {layer: pruner.plan.keep(f"encoder.{layer}.attention") for layer in range(LAYERS)}
        train(model, optimizer, range(1))
        assert set(pruner.history[epoch].thetas.values()) == {theta}
        for layer in range(LAYERS):
            solution = pruner.plan.solutions[f"encoder.{layer}.attention"]
            assert solution.dominator is not None
            live = np.flatnonzero(earlier[layer])
            near = linf_distances(before, layer)[np.ix_(live, live)] <= theta
            assert near[:, solution.keep[live]].any(axis=1).all()  # every live head has a kept one within theta
            assert solution.keep[live].all() == (near.sum() == live.size)  # and somebody goes if anybody can
            prefix = f"bert.encoder.layer.{layer}."
            for role in ("query", "key", "value"):
                name = f"{prefix}attention.self.{role}.weight"
                for h in range(HEADS):
                    now, old = (w[6 * h : 6 * h + 6] for w in (model.get_parameter(name).detach(), before[name]))
                    assert torch.equal(now, old if solution.keep[h] else torch.zeros_like(old))
            columns = before[f"{prefix}intermediate.dense.weight"].clone()
            for h in np.flatnonzero(earlier[layer] & ~solution.keep):
                j = int(solution.dominator[h])
                columns[:, 6 * j : 6 * j + 6] += columns[:, 6 * h : 6 * h + 6]
            torch.testing.assert_close(model.get_parameter(f"{prefix}intermediate.dense.weight").detach(), columns)
        gone_before += sum(int((~keep).sum()) for keep in earlier.values())
    assert gone_before  # heads gone in an earlier epoch were there not to be merged again


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5-gated", "opt"])
@pytest.mark.parametrize("eq1", ["a", "b"])
def test_penalty_in_the_loss_is_adding_it_to_the_loss(family: str, eq1: Any) -> None:
    alpha, beta, epsilon = 0.03, 0.02, 0.1
    model, twin = build(family), build(family)  # eval: no dropout
    sites = find_sites(model)
    recipe = Recipe.neuroprune(alpha, beta, 0.0, epsilon=epsilon, eq1=eq1, penalty="loss", merge="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Pruner(model, recipe, steps_per_epoch=100).attach(optimizer)
    batch = batch_of(model, 0)
    model(**batch).loss.backward()
    optimizer.step()

    loss = twin(**batch).loss
    for site in sites:
        if site.kind == "input_dim":
            named = {p.param: p.axis for p in site.reads}
            joined = torch.cat([row_view(twin.get_parameter(n), axis) for n, axis in named.items()], dim=1)
            loss = loss + alpha * joined.abs().sum(1).sqrt().sum()
        elif site.kind == "neuron":
            inward = torch.cat(
                [row_view(twin.get_parameter(p.param), p.axis) for p in site.reads if len(p.shape) == 2], dim=1
            )
            outward = row_view(twin.get_parameter(site.writes[0].param), 1 - site.writes[0].axis)
            for rows in (inward, outward):
                share = (rows.detach().abs() < epsilon).float().mean(dim=1)
                weight = share if eq1 == "a" else 1 / (1 - share + 0.01)
                loss = loss + beta * (weight * rows.abs().sum(1)).sum()
    loss.backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("penalty", ["loss", "proximal"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_no_penalty_and_theta_zero_is_plain_training(family: str, penalty: Any) -> None:
    plain, pruned = build(family), build(family)
    torch.manual_seed(0)
    train(plain, adamw(plain), range(6))
    torch.manual_seed(0)
    optimizer = adamw(pruned)
    recipe = Recipe.neuroprune(0.0, 0.0, 0.0, penalty=penalty, merge="none")
    pruner = Pruner(pruned, recipe, steps_per_epoch=2).attach(optimizer)
    train(pruned, optimizer, range(6))
    assert bits(plain) == bits(pruned)
    assert [sum(event.removed.values()) for event in pruner.history] == [0, 0, 0]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5-gated"])
@pytest.mark.parametrize("scale", ["lr", "absolute"])
def test_a_proximal_step_is_the_optimizers_step_and_then_the_prox(family: str, scale: Any) -> None:
    alpha, beta, lr = 0.2, 0.1, 0.05
    factor = lr if scale == "lr" else 1.0
    model, twin = build(family), build(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    Pruner(model, Recipe.neuroprune(alpha, beta, 0.0, prox_scale=scale, merge="none"), steps_per_epoch=9).attach(
        optimizer
    )
    batch = batch_of(model, 0)
    model(**batch).loss.backward()
    optimizer.step()
    twin(**batch).loss.backward()
    torch.optim.SGD(twin.parameters(), lr=lr).step()
    for site in find_sites(twin):
        if site.kind == "neuron":
            inward = [(p.param, p.axis) for p in site.reads if len(p.shape) == 2]
            for group in (inward, [(site.writes[0].param, 1 - site.writes[0].axis)]):
                before = [row_view(twin.get_parameter(n).detach(), axis) for n, axis in group]
                limit = factor * beta * attachment_weights(before, 1e-4, "b")
                for (name, axis), old in zip(group, before, strict=True):
                    expected = old.sign() * (old.abs() - limit).clamp_min(0)
                    now = row_view(model.get_parameter(name).detach(), axis)
                    torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-6)
                    assert torch.equal(now == 0, expected == 0)


def test_parameters_the_optimizer_does_not_train_are_not_penalised() -> None:
    model = build("bert")
    frozen = {name for name, _ in model.named_parameters() if ".layer.0." in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name not in frozen], lr=0.1)
    Pruner(model, Recipe.neuroprune(0.5, 0.5, 0.0), steps_per_epoch=9).attach(optimizer)
    train(model, optimizer, range(2))
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in frozen)
    assert (model.get_parameter("bert.encoder.layer.1.intermediate.dense.weight") == 0).any()

"""`Recipe.neuroprune` on every family against a naive transcription of Alg. 1-3, a step and a head at a time."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5ForConditionalGeneration

from tests.masktools import ATTENTION, untouched
from tests.prunertools import UNDEFINED_PAPER_MERGE, batch_of, sgd
from tests.tiny import FAMILIES, HEADS, HIDDEN, LAYERS, NEURONS, build, drawn
from topoprune import Pruner, Recipe, find_sites
from topoprune.graph import Site
from topoprune.sparsity import row_view
from topoprune.train.penalties import prox_group_sqrt_by_sorting

LR, STEPS_PER_EPOCH, EPSILON = 0.02, 2, 0.05


def square_t5() -> nn.Module:
    """A T5 whose heads are as wide as the model, like t5-base: the paper's merge is defined."""
    config = T5Config(
        vocab_size=64, d_model=HIDDEN, d_kv=HIDDEN // HEADS, d_ff=NEURONS, num_layers=LAYERS, num_heads=HEADS,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def square_qwen3() -> nn.Module:
    config = Qwen3Config(
        vocab_size=64, hidden_size=HIDDEN, head_dim=HIDDEN // HEADS, num_hidden_layers=LAYERS,
        intermediate_size=NEURONS, num_attention_heads=HEADS, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


MODELS = {name: (lambda name=name: build(name)) for name in FAMILIES}
MODELS |= {"t5-square": lambda: drawn(square_t5), "qwen3-square": lambda: drawn(square_qwen3)}


def merge_of(family: str) -> Any:
    return "none" if family in UNDEFINED_PAPER_MERGE else "paper"


def head_rows(model: nn.Module, site: Site, head: int) -> torch.Tensor:
    """A_H: all entries of one head in Q, K and V."""
    parts = []
    for piece in site.reads:
        if len(piece.shape) == 2:
            rows = row_view(model.get_parameter(piece.param).detach(), piece.axis)
            first = piece.offset + head * piece.width
            parts.append(rows[first : first + piece.width].reshape(-1))
    return torch.cat(parts)


def alg_2(model: nn.Module, site: Site, live: list[int]) -> np.ndarray:
    rows = [head_rows(model, site, head) for head in live]
    return np.array([[float((a - b).abs().max()) for b in rows] for a in rows])


def alg_3(near: np.ndarray) -> set[int]:
    """The printed loop: climb from every head through neighbourhoods that contain the last one."""
    kept = set()
    for i in range(len(near)):
        best = i
        for j in range(len(near)):
            if not (near[best] & ~near[j]).any():
                best = j
        kept.add(best)
    return kept


class Naive:
    """Plain SGD, the penalties as they are written, and after each epoch Alg. 2 and 3 with the merge."""

    def __init__(self, model: nn.Module, recipe: Any) -> None:
        self.model, self.recipe = model, recipe
        self.sites = find_sites(model)
        self.gone: dict[str, set[int]] = {s.name: set() for s in self.sites if s.kind in ATTENTION}

    def rows(self, kind: str) -> list[list[torch.Tensor]]:
        """The matrices of Eq. 1 (kind neuron) or Eq. 2 (input_dim), rows first, those that share rows together."""
        result = []
        for site in self.sites:
            if site.kind != kind:
                continue
            named = {(p.param, p.axis) for p in site.reads if len(p.shape) == 2}
            result.append([row_view(self.model.get_parameter(name), axis) for name, axis in sorted(named)])
            if kind == "neuron":
                piece = site.writes[0]
                result.append([row_view(self.model.get_parameter(piece.param), 1 - piece.axis)])
        return result

    def weight(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The factor of each row in Eq. 1."""
        entries = torch.cat(parts, dim=1).detach().abs()
        share = (entries < EPSILON).sum(dim=1) / entries.shape[1]
        return share if self.recipe.eq1 == "a" else 1 / (1 - share + 0.01)

    def penalty(self) -> torch.Tensor:
        total = torch.zeros(())
        for parts in self.rows("input_dim"):
            mass = torch.cat(parts, dim=1).abs().sum(dim=1)
            # The root has no slope at 0: a row of zeros stays.
            total = total + self.recipe.alpha * mass[mass.detach() > 0].sqrt().sum()
        for parts in self.rows("neuron"):
            total = total + self.recipe.beta * (self.weight(parts) * torch.cat(parts, dim=1).abs().sum(dim=1)).sum()
        return total

    @torch.no_grad()
    def proximal(self) -> None:
        for parts in self.rows("input_dim"):
            prox_group_sqrt_by_sorting(parts, LR * self.recipe.alpha)
        for parts in self.rows("neuron"):
            limits = LR * self.recipe.beta * self.weight(parts)
            for part in parts:
                for row, limit in enumerate(limits):
                    part[row] = part[row].sign() * (part[row].abs() - limit).clamp_min(0)

    @torch.no_grad()
    def zero_gone(self) -> None:
        for site in self.sites:
            for head in self.gone.get(site.name, ()):
                for piece in site.slices:
                    first = piece.offset + head * piece.width
                    self.model.get_parameter(piece.param).narrow(piece.axis, first, piece.width).zero_()

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        self.model.zero_grad()
        loss = self.model(**batch).loss
        if self.recipe.penalty == "loss":
            loss = loss + self.penalty()
        loss.backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(LR * parameter.grad)
        if self.recipe.penalty == "proximal":
            self.proximal()
        self.zero_gone()

    @torch.no_grad()
    def heads(self) -> None:
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for site in self.sites:
            if site.name not in self.gone:
                continue
            live = [head for head in range(site.n_units) if head not in self.gone[site.name]]
            distance = alg_2(self.model, site, live)
            kept = alg_3(distance <= self.recipe.theta)
            for i in set(range(len(live))) - kept:
                heir = min((j for j in kept if distance[i, j] <= self.recipe.theta), key=lambda j: (distance[i, j], j))
                self.gone[site.name].add(live[i])
                if self.recipe.merge == "paper":
                    self.merge(site, live[i], live[heir], before)
        self.zero_gone()

    def merge(self, site: Site, gone: int, heir: int, before: dict[str, torch.Tensor]) -> None:
        """The dominated head's columns of the layer's L_in join its dominator's."""
        width = site.unit_width
        ffn = next(s for s in self.sites if s.kind == "neuron" and (s.stack, s.layer) == (site.stack, site.layer))
        for piece in ffn.reads:
            if len(piece.shape) == 2:
                columns = row_view(self.model.get_parameter(piece.param), piece.axis)
                old = row_view(before[piece.param], piece.axis)
                columns[:, heir * width : (heir + 1) * width] += old[:, gone * width : (gone + 1) * width]


@pytest.mark.parametrize(("penalty", "eq1"), [("loss", "a"), ("loss", "b"), ("proximal", "b")])
@pytest.mark.parametrize("family", MODELS)
def test_two_epochs_are_algorithms_1_to_3_by_hand(family: str, penalty: Any, eq1: Any) -> None:
    """Same heads gone and the same weights, to rounding, after every step; eval mode, so no dropout."""
    model, twin = MODELS[family](), MODELS[family]()
    attention = [s for s in find_sites(model) if s.kind in ATTENTION]
    distances = [alg_2(model, s, list(range(s.n_units)))[np.triu_indices(s.n_units, 1)] for s in attention]
    theta = float(np.quantile(np.concatenate(distances), 0.3))
    recipe = Recipe.neuroprune(
        0.05, 0.02, theta, epsilon=EPSILON, eq1=eq1, penalty=penalty, merge=merge_of(family)
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pruner = Pruner(model, recipe, steps_per_epoch=STEPS_PER_EPOCH).attach(optimizer)
    naive = Naive(twin, recipe)
    for step in range(2 * STEPS_PER_EPOCH + 1):
        batch = batch_of(model, step, batch=3, length=5)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        naive.step(batch)
        if (step + 1) % STEPS_PER_EPOCH == 0:
            naive.heads()
        for site in attention:
            assert set(np.flatnonzero(~pruner.plan.keep(site.name)).tolist()) == naive.gone[site.name], site.name
        for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert any(naive.gone.values())
    if model.config.is_encoder_decoder:
        blocks = {(site.stack, site.block) for site in attention}
        assert blocks == {("encoder", "attention"), ("decoder", "attention"), ("decoder", "cross_attention")}


@pytest.mark.parametrize("family", UNDEFINED_PAPER_MERGE)
def test_the_papers_merge_is_refused_where_heads_are_not_as_wide_as_the_model(family: str) -> None:
    model = build(family)
    wanted = r"merge 'paper' is undefined for .* heads \* head width = 32, but the FFN reads 24 dimensions; use 'none'"
    with untouched(model), pytest.raises(ValueError, match=wanted):
        Pruner(model, Recipe.neuroprune(0.1, 0.1, 0.2), steps_per_epoch=3)


@pytest.mark.parametrize("family", ["bert", "bart"])
def test_the_papers_merge_is_refused_without_a_feed_forward_block(family: str) -> None:
    model = build(family)
    sites = find_sites(model, include=("heads", "input_dims"))
    with pytest.raises(ValueError, match=r"merge 'paper' needs an FFN behind .*; use 'none'"):
        Pruner(model, Recipe.neuroprune(0.1, 0.1, 0.2), steps_per_epoch=3, sites=sites)
    Pruner(model, Recipe.neuroprune(0.1, 0.1, 0.2, merge="none"), steps_per_epoch=3, sites=sites).close()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_has_the_papers_figures(family: str) -> None:
    """Dense: no spread of connectivity. Penalised: rows lose links unevenly, heads go, and the record says which."""
    model = build(family)
    optimizer = sgd(model)
    recipe = Recipe.neuroprune(0.3, 0.02, "auto:0.4", prox_scale="absolute", merge=merge_of(family))
    pruner = Pruner(model, recipe, steps_per_epoch=2).attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        model(**batch_of(model, step)).loss.backward()
        optimizer.step()
    first, *decided = pruner.records
    assert [record.step for record in pruner.records] == [0, 2, 4] and first.zeros == 0
    assert first.connectivity_sd is not None and first.connectivity_sd < 5
    assert all(record.connectivity_sd > first.connectivity_sd for record in decided)  # type: ignore[operator]
    for a, b in itertools.pairwise(pruner.records):
        for name, kept in b.kept.items():
            assert kept == a.kept[name] - len(b.removed.get(name, ()))
    assert any(record.removed for record in decided)

"""What `compact` returns: the right entries, sizes and flags, and a model that owes nothing to the dense one."""

from __future__ import annotations

import copy
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertModel

from tests.compaction.cases import EMPTY, empty_plan, structure_plan
from tests.compaction.laws import assert_same_function, assert_sizes_fit, masked_logits, plan_of
from tests.masktools import PAPER, bits, drive, logits, naive_masks, random_plan
from tests.tiny import FAMILIES, HEADS, HIDDEN, NEURONS, build, inputs
from topoprune import Plan, Site, TensorSlice, apply, compact, extract, find_sites, kept_units, solve
from topoprune.architectures import FAMILIES as DECLARED
from topoprune.architectures import Attention
from topoprune.compaction.cut import padded
from topoprune.extraction.gram import GramCollector
from topoprune.repair import Merge
from topoprune_solvers import Solution, Status

pytestmark = pytest.mark.filterwarnings("ignore:input dimensions of")


# -- the same entries, the right sizes ---------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_are_the_entries_that_no_mask_covers(family: str) -> None:
    model = build(family)
    plan = random_plan(model, 0.4)
    stays = naive_masks(model, plan)
    smaller = dict(compact(model, plan, gather="always").named_parameters())
    for name, tensor in model.named_parameters():
        expected = tensor[stays[name]] if name in stays else tensor.flatten()
        assert torch.equal(smaller[name].flatten(), expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_what_stays_are_those_of_the_masked_model(family: str) -> None:
    model = build(family).double()
    plan = empty_plan(model, EMPTY["no heads in the first layer"])
    smaller = compact(model, plan)
    stays = naive_masks(model, plan)
    with apply(model, plan):
        for each in (model, smaller):
            each(**inputs(each)).logits.square().mean().backward()
    dense = dict(model.named_parameters())
    for name, parameter in smaller.named_parameters():
        expected = dense[name].grad if dense[name].grad is not None else torch.zeros_like(dense[name])
        expected = expected[stays[name]] if name in stays else expected.flatten()
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["half", "no heads in the first layer", "nothing"])
def test_attributes_follow_the_weights(family: str, case: str) -> None:
    model = build(family)
    plan = structure_plan(model) if case == "half" else empty_plan(model, EMPTY[case])
    smaller = compact(model, plan)
    assert_sizes_fit(smaller)
    blocks = DECLARED[smaller.config.model_type].blocks
    widths = {site.name: site.head_width for site in find_sites(model)}
    seen = 0
    for site in find_sites(model, include=("heads",)):
        block = next(b for b in blocks if isinstance(b, Attention) and (b.stack, b.block) == (site.stack, site.block))
        owner = smaller.get_submodule(site.one("q").param.rsplit(".", 2)[0])
        heads = smaller.get_parameter(site.writes[0].param).shape[site.writes[0].axis] // widths[site.name]
        key = site.one("v")
        parts = 3 if block.fused else 1
        kv_heads = smaller.get_parameter(key.param).shape[key.axis] // parts // widths[site.name]
        meaning = {"heads": heads, "width": heads * site.head_width, "groups": heads // kv_heads if kv_heads else 1}
        for attribute, what in block.attributes:
            assert getattr(owner, attribute) == meaning[what], (site.name, attribute)
            seen += 1
        kept = int(plan.keep(site.name).sum())
        assert heads == kept * site.unit_width // site.head_width
    assert seen


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_units_are_those_of_the_plan(family: str) -> None:
    model = build(family)
    plan = random_plan(model, 0.4)
    kept = kept_units(compact(model, plan, gather="always"))
    assert set(kept) == set(plan.solutions)
    for site in plan.sites:
        per_unit = site.unit_width // site.head_width if site.kind == "kv_group" else 1
        assert np.array_equal(kept[site.name], np.flatnonzero(np.repeat(plan.keep(site.name), per_unit)))
    assert kept_units(model) == {}


# -- a model of its own ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_model_is_untouched_and_shares_nothing(family: str) -> None:
    model = build(family)
    before, config, classes = bits(model), model.config.to_dict(), [type(m) for m in model.modules()]
    smaller = compact(model, random_plan(model, 0.4), gather="always")
    assert bits(model) == before
    assert model.config.to_dict() == config
    assert [type(m) for m in model.modules()] == classes
    owned = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not owned & {t.data_ptr() for t in [*smaller.parameters(), *smaller.buffers()] if t.numel()}
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.fill_(7.0)
    assert bits(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_inplace_is_the_same_model(family: str) -> None:
    model = build(family)
    plan = random_plan(model, 0.4)
    other = compact(model, plan, gather="always")
    same = compact(model, plan, gather="always", inplace=True)
    assert same is model
    assert type(same) is type(other)
    assert bits(same) == bits(other)
    assert same.config.to_dict() == other.config.to_dict()
    assert [type(m) for m in same.modules()] == [type(m) for m in other.modules()]
    assert_sizes_fit(same)
    assert torch.equal(logits(same), logits(other))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_ties_flags_types_and_modes_stay(family: str, inplace: bool) -> None:
    model = build(family).to(torch.bfloat16)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    model.train()
    next(model.children()).eval()
    model.register_buffer("mine", torch.arange(3, dtype=torch.int16), persistent=False)
    plan = structure_plan(model)

    def facts(of: nn.Module) -> tuple[object, ...]:
        ties = defaultdict(list)
        for name, parameter in of.named_parameters(remove_duplicate=False):
            ties[id(parameter)].append(name)
        flags = {n: (p.requires_grad, p.dtype, p.device, type(p), p.is_leaf) for n, p in of.named_parameters()}
        buffers = {n: (b.dtype, b.tolist()) for n, b in of.named_buffers() if not n.endswith("kept_heads")}
        return sorted(ties.values()), flags, buffers, [m.training for m in of.modules()]

    before = facts(model)
    assert facts(compact(model, plan, inplace=inplace)) == before


def test_models_that_share_a_config_do_not_become_compacted_together() -> None:
    model = build("bert")
    twin = BertModel(model.config)
    assert twin.config is model.config
    compact(model, structure_plan(model), inplace=True)
    assert len(find_sites(twin)) == 6
    assert not hasattr(twin.config, "topoprune")
    # All modules of the compacted model read the new one.
    assert all(m.config is model.config for m in model.modules() if "config" in vars(m))


# -- beside masks, optimizers and wrappers -----------------------------------------------------------


MERGED = [(f, m) for f in FAMILIES for m in ("none", "scale", "least-squares", "paper") if m != "paper" or f in PAPER]


@pytest.mark.parametrize(("family", "merge"), MERGED)
def test_under_an_open_handle_the_merged_model_is_compacted(family: str, merge: Merge) -> None:
    model = build(family).double()
    plan = structure_plan(model)
    before = bits(model)
    calibration = [inputs(model)] if merge in ("scale", "least-squares") else None
    with apply(model, plan, merge=merge, calibration=calibration):
        expected = logits(model)
        smaller = compact(model, plan)
        assert_same_function(smaller, expected)
    assert bits(model) == before
    assert_same_function(smaller, expected)


def test_hooks_of_handle_and_optimizer_do_not_reach_the_copy() -> None:
    model = build("bert")
    plan = structure_plan(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    handle = apply(model, plan).attach(optimizer)
    smaller = compact(model, plan)
    before, free = bits(smaller), compact(smaller, plan_of(smaller, {"encoder.0.ffn": 3}))
    for _ in drive(model, optimizer, steps=2):
        pass
    assert bits(smaller) == before
    assert len(find_sites(free)) == 6
    handle.close()


def test_hooks_that_watch_a_model_in_training_stay_with_it() -> None:
    model = build("bert")
    mine = []
    model.bert.register_forward_hook(lambda *_: mine.append(1))
    with GramCollector(model, find_sites(model, include=("neurons",))) as collector:
        smaller = compact(model, structure_plan(model))
        logits(smaller)
        assert set(collector.tokens.values()) <= {0}
        assert mine == [1]  # a hook of the user's is copied, as deepcopy does
        logits(model)
        assert min(collector.tokens.values()) > 0
    assert sum(len(m._forward_pre_hooks) for m in smaller.modules()) == 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
def test_wrappers_are_looked_through(wrap: object) -> None:
    model = build("opt")
    plan = structure_plan(model)
    smaller = compact(wrap(model), plan)  # type: ignore[operator]
    assert type(smaller).__name__ == "CompactOPTForCausalLM"
    assert_same_function(smaller, masked_logits(model, plan))


def test_a_plan_of_the_bare_model_fits_the_model_under_a_head() -> None:
    model = build("bert")
    bare = solve(extract(model.bert, include=("neurons",)), budget=0.5, problem="neurons")
    assert_same_function(compact(model, bare), masked_logits(model, bare))


def test_a_plan_that_prunes_nothing_changes_nothing() -> None:
    model = build("bert")
    whole = compact(model, plan_of(model, {"encoder.0.ffn": NEURONS}))
    assert bits(whole) == bits(model)
    assert torch.equal(logits(whole), logits(model))
    assert kept_units(whole) == {}


# -- sites given by hand -----------------------------------------------------------------------------


def _by_hand() -> tuple[nn.Module, tuple[Site, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 5), nn.Linear(5, 8), nn.Linear(8, 5))
    ffn = Site(
        "ffn",
        "neuron",
        12,
        1,
        (TensorSlice("0.weight", 0, "in", (12, 5)), TensorSlice("0.bias", 0, "in_bias", (12,))),
        (TensorSlice("2.weight", 1, "out", (5, 12)),),
        consumer="2",
    )
    heads = Site(
        "attention",
        "head",
        4,
        2,
        (TensorSlice("3.weight", 0, "q", (8, 5), width=2), TensorSlice("3.bias", 0, "q_bias", (8,), width=2)),
        (TensorSlice("4.weight", 1, "o", (5, 8), width=2),),
        consumer="4",
        head_width=2,
    )
    return model, (ffn, heads)


def _decide(site: Site, sites: tuple[Site, ...], kept: int) -> Plan:
    keep = np.arange(site.n_units) < kept
    return Plan(sites, {site.name: Solution(keep, float(kept), "min", Status.FEASIBLE, "test")})


@pytest.mark.parametrize("kept", [0, 1, 7])
@pytest.mark.parametrize("inplace", [False, True])
def test_neurons_of_sites_by_hand_are_removed(kept: int, inplace: bool) -> None:
    model, sites = _by_hand()
    plan = _decide(sites[0], sites, kept)
    x = torch.randn(4, 5)
    with apply(model, plan):
        expected = model(x)
    smaller = compact(model, plan, inplace=inplace)
    assert (smaller is model) is inplace
    assert (smaller[0].out_features, smaller[2].in_features) == (kept, kept)
    torch.testing.assert_close(smaller(x), expected)
    assert_sizes_fit(smaller)


def test_heads_of_sites_by_hand_are_refused() -> None:
    model, sites = _by_hand()
    before = bits(model)
    with pytest.raises(ValueError, match=r"no rules for the attention of 'attention'.*Neurons can be removed"):
        compact(model, _decide(sites[1], sites, 2), inplace=True)
    assert bits(model) == before


# -- weight edges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5-gated", "qwen2"])
def test_masked_edges_stay_zero_beside_removed_units(family: str) -> None:
    model = build(family)
    graph = extract(model, include=("heads", "neurons", "edges"))
    plan = solve(graph, budget=0.6, problem="edges") | solve(graph, budget=0.5, problem="neurons")
    with apply(model, plan) as handle:
        expected, stays = logits(model), handle.masks()
    smaller = compact(model, plan)
    assert_same_function(smaller, expected)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    units = Plan(plan.sites, {n: s for n, s in plan.solutions.items() if n not in plan.edge_axes})
    rows = naive_masks(model, units)
    for name, parameter in smaller.named_parameters():
        dense = model.get_parameter(name)
        masked = torch.where(stays[name], dense, 0) if name in stays else dense
        assert torch.equal(parameter.flatten(), masked[rows[name]] if name in rows else masked.flatten()), name


# -- rounding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_sizes_compute_the_same(family: str, rounding: int) -> None:
    model = build(family)
    plan = structure_plan(model, 0.6)
    smaller = compact(model, plan, rounding=rounding)
    assert_same_function(smaller, masked_logits(model, plan))
    dense = {site.name: site for site in find_sites(model)}
    for site in find_sites(smaller, ("heads", "neurons")):
        features = site.n_units * site.unit_width
        whole = dense[site.name].n_units * dense[site.name].unit_width
        assert features % rounding == 0 or features == whole, site.name
    # Units beyond the plan's are zeros, in everything they read and write.
    kept = kept_units(smaller)
    for site in find_sites(smaller, ("heads", "neurons")):
        if site.name not in kept:
            continue
        planned = np.repeat(plan.keep(site.name), dense[site.name].unit_width // max(1, site.head_width or 1))
        per_unit = site.unit_width // site.head_width if site.head_width else 1
        extra = np.flatnonzero(~planned[kept[site.name]].reshape(-1, per_unit)[:, 0])
        for piece in site.slices:
            part = smaller.get_parameter(piece.param).movedim(piece.axis, 0)[torch.from_numpy(piece.indices(extra))]
            assert not part.any(), (site.name, piece.role)


def test_rounding_that_only_fits_the_whole_site_keeps_it() -> None:
    model = build("bert")
    plan = plan_of(model, {"encoder.0.ffn": 36, "encoder.0.attention": 1})
    smaller = compact(model, plan, rounding=7)  # no multiple from 36 to 40 neurons, nor with heads of width 6
    assert smaller.bert.encoder.layer[0].intermediate.dense.out_features == NEURONS
    assert smaller.bert.encoder.layer[0].attention.self.query.out_features == HIDDEN
    assert_same_function(smaller, masked_logits(model, plan))


@st.composite
def _sites_to_pad(draw: st.DrawFn) -> tuple[Site, np.ndarray, int]:
    groups = draw(st.sampled_from([0, 1, 2, 3]))
    size = draw(st.integers(1, 12))
    n, width = size * max(1, groups), draw(st.integers(1, 6))
    unequal = bool(groups) and draw(st.booleans())
    site = Site("s", "head", n, width, (), n_groups=groups, unequal=unequal)
    if site.equal_groups:
        kept = draw(st.integers(0, size))
        rows = [draw(st.permutations([i < kept for i in range(size)])) for _ in range(groups)]
        keep = np.array(rows, dtype=bool).reshape(-1)
    else:
        keep = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=bool)
    return site, keep, draw(st.integers(1, 16))


@given(_sites_to_pad())
@settings(max_examples=200, deadline=None)
def test_padding_laws(case: tuple[Site, np.ndarray, int]) -> None:
    site, keep, rounding = case
    before = keep.copy()
    stays = padded(site, keep, rounding)
    assert np.array_equal(keep, before)
    assert np.array_equal(padded(site, keep, None), keep)
    assert (stays | ~keep).all()  # what is kept stays
    features = int(stays.sum()) * site.unit_width
    assert features % rounding == 0 or stays.all()
    assert stays.any() == keep.any()
    assert np.array_equal(padded(site, stays, rounding), stays)  # once is enough
    if not site.n_groups:
        smaller = range(int(keep.sum()), int(stays.sum()))
        assert not any(count * site.unit_width % rounding == 0 for count in smaller)
        return
    was, now = keep.reshape(site.n_groups, -1).sum(axis=1), stays.reshape(site.n_groups, -1).sum(axis=1)
    if np.unique(was[was > 0]).size <= 1:  # equal where any stay: equal afterwards, and no copies are needed
        assert np.unique(now[now > 0]).size <= 1


# -- memory ------------------------------------------------------------------------------------------


def test_a_folded_or_zeroed_tensor_is_one_of_its_own() -> None:
    from topoprune.compaction.cut import Cut

    tensor = torch.arange(12.0).reshape(3, 4)
    cut = Cut(values={"w": torch.ones(3, 4)}, zero={"z": {0: np.array([1])}}, keep={"k": {1: np.array([3, 0])}})
    for name, expected in {
        "w": torch.ones(3, 4),
        "z": tensor * torch.tensor([[1.0], [0.0], [1.0]]),
        "k": tensor[:, [3, 0]],
        "other": tensor,
    }.items():
        result = cut.tensor(name, tensor)
        assert torch.equal(result, expected)
        assert result.data_ptr() not in (tensor.data_ptr(), cut.values["w"].data_ptr())
        assert result.is_contiguous()
        assert result.untyped_storage().nbytes() == result.numel() * 4
    # Beside the values lie gradients and optimizer state, which nothing is folded into.
    assert torch.equal(cut.tensor("w", tensor, data=False), tensor)


def test_a_forward_given_by_hand_goes_with_the_copy() -> None:
    # accelerate's mixed precision sets `model.forward` to a method of its own, bound to the model.
    from types import MethodType

    model = build("bert")
    stock = model.forward.__func__
    model.forward = MethodType(lambda self, *a, **k: SimpleNamespace(logits=2 * stock(self, *a, **k).logits), model)
    plan = structure_plan(model)
    assert_same_function(compact(model, plan), masked_logits(model, plan))


def test_compacting_twice_gives_the_same_twice() -> None:
    model = build("bart")
    plan = structure_plan(model)
    first, second = compact(model, plan), compact(copy.deepcopy(model), plan)
    assert bits(first) == bits(second)
    assert type(first) is type(second)
    assert HEADS == 4  # the plan above leaves two heads a layer
    assert {len(units) for name, units in kept_units(first).items() if "attention" in name} == {2}

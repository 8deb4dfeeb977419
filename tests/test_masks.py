"""Zeros on a live model, units or weight edges, in any number format, and the bit-for-bit return."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertModel

from tests.masktools import ATTENTION, OPTIMIZERS, PAPER, bits, drive, logits, naive_masks, random_plan, untouched
from tests.tiny import FAMILIES, HEADS, build, inputs
from topoprune import MaskHandle, Plan, Site, TensorSlice, apply, extract, find_sites, solve
from topoprune_solvers import Solution, Status

every_family = pytest.mark.parametrize("family", FAMILIES)
MERGES = [(name, merge) for name in FAMILIES for merge in ("none", "scale", "least-squares")] + [
    (name, "paper") for name in PAPER
]


# Applying and taking back


@pytest.mark.parametrize(("family", "merge"), MERGES)
def test_closing_restores_the_dense_model_bit_for_bit(family: str, merge: Any) -> None:
    model = build(family)
    before, dense = bits(model), logits(model)
    handle = apply(model, random_plan(model), merge=merge, calibration=[inputs(model, seed=1)])
    assert not handle.closed and not torch.equal(logits(model), dense)
    handle.close()
    assert handle.closed and bits(model) == before
    assert torch.equal(logits(model), dense)


@every_family
def test_masked_slices_are_zero_and_nothing_else_changes(family: str) -> None:
    model = build(family)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = random_plan(model)
    expected = naive_masks(model, plan)
    with apply(model, plan) as handle:
        assert set(handle.masks()) == set(expected)
        for name, parameter in model.named_parameters():
            keep = expected.get(name)
            if keep is None:
                assert torch.equal(parameter, dense[name])
                continue
            assert torch.equal(handle.masks()[name], keep)
            assert torch.equal(parameter[keep], dense[name][keep])
            assert (parameter[~keep] == 0).all()
            assert int((parameter == 0).sum()) == int((~keep).sum())  # random weights are never zero


@every_family
@pytest.mark.parametrize("merge", ["none", "least-squares"])
def test_a_masked_unit_is_a_unit_whose_output_is_zero(family: str, merge: Any) -> None:
    """Masked = ablated at the consumer's input, where units end and the residual stream begins."""
    model = build(family)
    plan = random_plan(model, kinds=(*ATTENTION, "neuron"))
    with apply(model, plan, merge=merge, calibration=[inputs(model, seed=1)]) as handle:
        masked = logits(model)
        consumers = {s.consumer: s for s in handle.sites if s.consumer}
        merged = {name: model.get_submodule(name).weight.detach().clone() for name in consumers}  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in merged.items():
            model.get_submodule(name).weight.copy_(weight)  # type: ignore[arg-type]

    def ablate(site: Site) -> Callable[..., Any]:
        keep = torch.from_numpy(np.repeat(plan.keep(site.name), site.unit_width))
        return lambda module, args: (args[0] * keep, *args[1:])

    hooks = [model.get_submodule(n).register_forward_pre_hook(ablate(s)) for n, s in consumers.items()]  # type: ignore[arg-type]
    torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-4)
    for hook in hooks:
        hook.remove()


def test_the_block_restores_after_an_exception_too() -> None:
    model = build("bert")
    before = bits(model)
    with pytest.raises(ZeroDivisionError), apply(model, random_plan(model)) as handle:
        assert bits(model) != before
        raise ZeroDivisionError
    assert handle.closed and bits(model) == before


def test_closing_twice_is_harmless_and_a_closed_handle_does_nothing_more() -> None:
    model = build("bert")
    plan = random_plan(model)
    handle = apply(model, plan)
    handle.close()
    before = bits(model)
    handle.close()
    assert bits(model) == before
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for use in (lambda: handle.refresh(plan), lambda: handle.attach(optimizer), lambda: handle.__enter__()):
        with pytest.raises(ValueError, match="closed"):
            use()
    assert bits(model) == before
    other = apply(model, plan)
    handle.close()  # of an earlier handle: must not release the new one
    assert not other.closed
    other.close()


def test_close_without_restoring_leaves_the_zeros() -> None:
    model = build("bert")
    plan = random_plan(model)
    handle = apply(model, plan)
    inside = bits(model)
    handle.close(restore=False)
    assert handle.closed and bits(model) == inside


def test_a_model_that_is_no_longer_used_is_freed_even_if_its_handle_was_never_closed() -> None:
    model = build("bert")
    handle = apply(model, random_plan(model))
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None


def test_a_copy_of_a_masked_model_is_a_free_model_with_zeros() -> None:
    model = build("bert")
    plan = random_plan(model)
    with apply(model, plan):
        twin = copy.deepcopy(model)
        inside = bits(twin)
        with apply(twin, plan):
            assert bits(twin) == inside
    assert bits(twin) == inside != bits(model)


@every_family
def test_shared_embeddings_stay_tied_and_untouched(family: str) -> None:
    model = build(family)
    tables = list(model.get_input_embeddings().parameters())
    head = model.get_output_embeddings()
    before = [table.detach().clone() for table in tables]
    with apply(model, random_plan(model)) as handle:
        assert tables and all(torch.equal(table, old) for table, old in zip(tables, before, strict=True))
        names = [name for name, p in model.named_parameters() if any(p is table for table in tables)]
        assert names and not set(names) & set(handle.masks())
        if head is not None and model.config.tie_word_embeddings:
            assert head.weight is tables[0]


# Refreshing


def test_refresh_brings_units_back_and_takes_others() -> None:
    model = build("bert")
    before = bits(model)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = apply(model, random_plan(model, seed=1))
    other = random_plan(model, seed=2)
    handle.refresh(other)
    assert handle.plan is other
    expected = naive_masks(model, other)
    for name, parameter in model.named_parameters():
        keep = expected.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, dense[name] * keep)
    handle.refresh(Plan(other.sites, {}))
    assert all(torch.equal(p, dense[n]) for n, p in model.named_parameters())
    handle.close()
    assert bits(model) == before


def test_a_refused_refresh_changes_nothing() -> None:
    model = build("bert")
    with apply(model, random_plan(model)) as handle:
        plan, inside = handle.plan, bits(model)
        with pytest.raises(ValueError, match=r"decoder\.0\.attention"):
            handle.refresh(random_plan(build("opt")))
        fewer = tuple(site for site in plan.sites if site.kind == "neuron")
        with pytest.raises(ValueError, match="same sites"):
            handle.refresh(Plan(fewer, {}))
        assert handle.plan is plan and bits(model) == inside


def test_state_dict_brings_the_masks_back() -> None:
    model = build("bert")
    plan = random_plan(model, seed=3)
    with apply(model, plan) as handle:
        state, inside = handle.state_dict(), bits(model)
        assert all(torch.equal(state[name], torch.from_numpy(plan.keep(name).copy())) for name in plan.solutions)
        handle.refresh(random_plan(model, seed=4))
        assert bits(model) != inside
        handle.load_state_dict(state)
        assert bits(model) == inside
        name = next(iter(state))
        with pytest.raises(ValueError, match=r"\(3,\)"):
            handle.load_state_dict(state | {name: state[name][:3]})
        with pytest.raises(ValueError, match="state names"):
            handle.load_state_dict({name: state[name]})
        assert bits(model) == inside


# Number formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5-gated", "vit", "bart"])
def test_other_number_formats(family: str, dtype: torch.dtype) -> None:
    model = build(family).to(dtype)
    before = bits(model)
    plan = random_plan(model)
    expected = naive_masks(model, plan)
    with apply(model, plan):
        assert bits(model) != before
    assert bits(model) == before
    with apply(model, plan) as handle:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        handle.attach(optimizer)
        for _ in drive(model, optimizer, steps=3):
            assert all((model.get_parameter(name)[~keep] == 0.0).all() for name, keep in expected.items())


@pytest.mark.parametrize("merge", ["scale", "least-squares", "paper"])
@pytest.mark.parametrize("family", ["bert", "vit", "bart"])
def test_merging_in_bf16(family: str, merge: Any) -> None:
    model = build(family).to(torch.bfloat16)
    before = bits(model)
    with apply(model, random_plan(model), merge=merge, calibration=[inputs(model)]):
        assert all(torch.isfinite(p).all() and p.dtype == torch.bfloat16 for p in model.parameters())
    assert bits(model) == before


def test_a_model_that_changes_its_format_under_the_handle_stays_masked() -> None:
    model = build("bert")
    with apply(model, random_plan(model)) as handle:
        keeps = handle.masks()
        model.to(torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle.attach(optimizer)
        for _ in drive(model, optimizer, steps=2):
            assert all((model.get_parameter(name)[~keep] == 0.0).all() for name, keep in keeps.items())


# Weight edges


@every_family
@pytest.mark.parametrize("attachment", [0.0, 1.0])
def test_an_edge_plan_masks_exactly_its_edges(family: str, attachment: float) -> None:
    model = build(family)
    before = bits(model)
    graph = extract(model, include=("heads", "neurons", "input_dims", "edges"))
    plan = solve(graph, budget=0.3, problem="edges", attachment=attachment)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    with apply(model, plan):
        for name, parameter in model.named_parameters():
            if name not in plan.solutions:
                assert torch.equal(parameter, dense[name])
                continue
            solution, (axis, shape) = plan.solutions[name], plan.edge_axes[name]
            kept = torch.from_numpy(solution.keep.reshape(shape).copy())
            kept = kept if axis == 0 else kept.T
            assert torch.equal(parameter, dense[name] * kept)
            assert int((parameter != 0).sum()) == round(0.3 * parameter.numel())
    assert bits(model) == before


def test_unit_and_edge_plans_hold_together_through_training() -> None:
    model = build("gpt2")
    graph = extract(model, include=("heads", "neurons", "input_dims", "edges"))
    plan = solve(graph, budget=0.5) | solve(graph, budget=0.5, problem="edges")
    with apply(model, plan) as handle:
        zeros = {name: p == 0 for name, p in model.named_parameters() if name in handle.masks()}
        optimizer = OPTIMIZERS["adamw"](model)
        handle.attach(optimizer)
        for _ in drive(model, optimizer, steps=3):
            assert all((model.get_parameter(name)[zero] == 0.0).all() for name, zero in zeros.items())


def test_a_plan_of_edges_alone_knows_its_model() -> None:
    bert = build("bert")
    plan = solve(extract(bert, include=("edges",)), budget=0.5, problem="edges")
    with apply(bert, plan):
        pass
    other = build("opt")
    with untouched(other), pytest.raises(ValueError, match="another model"):
        apply(other, plan)
    changed = build("bert", seed=1)
    with untouched(changed), pytest.raises(ValueError, match="weights have changed"):
        apply(changed, plan)


# The same body under another head


def body_and_head() -> tuple[nn.Module, nn.Module]:
    head = build("bert")
    body = BertModel(head.config).eval()
    body.load_state_dict(head.bert.state_dict(), strict=False)
    return body, head


@pytest.mark.parametrize("problem", ["heads", "neurons", "edges"])
def test_a_plan_of_the_bare_encoder_fits_the_encoder_under_a_head(problem: Any) -> None:
    body, head = body_and_head()
    before = bits(head)
    graph = extract(body, include=("heads", "neurons", "input_dims", "edges"))
    plan = solve(graph, budget=0.5, problem=problem)
    with apply(head, plan), apply(body, plan):
        for name, parameter in body.named_parameters():
            twin = dict(head.named_parameters()).get(f"bert.{name}")
            assert twin is None or torch.equal(parameter, twin)
        assert any((p == 0).any() for p in head.parameters())
    assert bits(head) == before


def test_a_broken_weight_under_another_head_is_found_for_edges_too() -> None:
    body, head = body_and_head()
    plan = solve(extract(body, include=("heads", "edges"), digest_weights=False), budget=0.5, problem="edges")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    with torch.no_grad():
        head.get_parameter(name)[0, 0] = torch.nan
    with untouched(head), pytest.raises(ValueError, match=name.replace(".", r"\.")):
        apply(head, plan)


def test_sites_given_by_hand_work_for_any_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    site = Site(
        "ffn", "neuron", 6, 1,
        reads=(TensorSlice("0.weight", 0, "in", (6, 5)), TensorSlice("0.bias", 0, "in_bias", (6,))),
        writes=(TensorSlice("2.weight", 1, "out", (2, 6)),),
        consumer="2",
    )  # fmt: skip
    before = bits(model)
    plan = solve(extract(model, sites=[site]), budget=2, problem="neurons")
    with apply(model, plan):
        assert [int((model[i].weight != 0).sum()) for i in (0, 2)] == [2 * 5, 2 * 2]
    assert bits(model) == before
    smaller = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0\.weight"):
        apply(smaller, plan)


# Corner cases


def test_a_plan_that_prunes_nothing_changes_nothing() -> None:
    model = build("bert")
    before = bits(model)
    plan = solve(extract(model), budget=1.0)
    for merge in ("none", "scale", "least-squares", "paper"):
        with apply(model, plan, merge=merge, calibration=[inputs(model)]) as handle:
            assert bits(model) == before and handle.masks() == {}


def test_all_heads_of_a_layer_may_go() -> None:
    model = build("bert")
    before = bits(model)
    sites = find_sites(model)
    none = Solution(np.zeros(HEADS, dtype=bool), 0.0, "max", Status.FEASIBLE, "test")
    plan = Plan(sites, {"encoder.0.attention": none})
    for merge in ("none", "least-squares"):
        with apply(model, plan, merge=merge, calibration=[inputs(model)]):
            assert torch.isfinite(logits(model)).all()
    assert bits(model) == before


def test_wrapped_models_are_pruned_inside() -> None:
    model = build("bert")
    plan = random_plan(model)
    compiled = torch.compile(model)  # lazy: nothing is compiled here
    with apply(compiled, plan) as handle:  # type: ignore[arg-type]
        assert handle.model is model
        with pytest.raises(ValueError, match="already pruned"):
            apply(model, plan)


def test_repr_says_what_is_in_force() -> None:
    model = build("bert")
    handle = apply(model, random_plan(model))
    assert isinstance(handle, MaskHandle) and "open" in repr(handle)
    handle.close()
    assert "closed" in repr(handle)

"""T1, T2, T9 and the bit-for-bit return: zeros on a live model, held through training, taken back."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from tests.tiny import FAMILIES, HEADS, HIDDEN, NEURONS, build, inputs
from topoprune import MaskHandle, Plan, Site, TensorSlice, apply, extract, find_sites, solve
from topoprune_solvers import Solution, Status

every_family = pytest.mark.parametrize("family", FAMILIES)
ATTENTION = ("head", "kv_group")
ALL_KINDS = (*ATTENTION, "neuron", "input_dim")
# NeuroPrune's merge adds FFN input columns: it needs heads * head width = model width.
PAPER = [name for name in FAMILIES if name not in ("t5", "t5-gated", "qwen3")]
MERGES = [(name, merge) for name in FAMILIES for merge in ("none", "scale", "least-squares")] + [
    (name, "paper") for name in PAPER
]


class Langevin(torch.optim.Optimizer):
    """Moves every weight at every step, whatever its gradient and state: only enforcement keeps zeros zero."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(torch.randn_like(parameter) - parameter.grad.sign(), alpha=0.05)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    "langevin": Langevin,
    "amsgrad": lambda model: torch.optim.Adam(
        model.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True, foreach=False
    ),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def random_plan(model: nn.Module, share: float = 0.5, seed: int = 0, kinds: tuple[str, ...] = ALL_KINDS) -> Plan:
    """Prune that share of the units of every site at random; pruned units have random dominators."""
    rng = np.random.default_rng(seed)
    sites = find_sites(model)
    solutions = {}
    for site in sites:
        if site.kind in kinds:
            n = site.n_units
            keep = np.ones(n, dtype=bool)
            keep[rng.choice(n, min(max(1, round(share * n)), n - 1), replace=False)] = False
            heir = np.where(keep, np.arange(n), rng.choice(np.flatnonzero(keep), n))
            solutions[site.name] = Solution(
                keep,
                float(keep.sum()),
                "min",
                Status.FEASIBLE,
                "test",
                dominator=heir,
                dominator_distance=np.where(keep, 0.0, 0.5),
            )
    return Plan(sites, solutions)


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer as raw bytes, so that 0.0 and -0.0 differ."""
    state = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in state}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def naive_masks(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """Parameter name -> True where a weight stays, one unit and one slice at a time."""
    here = {site.name: site for site in find_sites(model)}
    params = dict(model.named_parameters())
    masks: dict[str, torch.Tensor] = {}
    for name, solution in plan.unit_solutions().items():
        for unit in np.flatnonzero(~solution.keep):
            for piece in here[name].slices:
                keep = masks.setdefault(piece.param, torch.ones_like(params[piece.param], dtype=torch.bool))
                keep.narrow(piece.axis, piece.offset + int(unit) * piece.width, piece.width).fill_(False)
    return masks


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """T9: nothing inside changes the model, and it stays free to be pruned."""
    before, training = bits(model), [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    yield
    assert bits(model) == before
    assert [m.training for m in model.modules()] == training
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_()
    apply(model, random_plan(model)).close()


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
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    before = table.detach().clone()
    with apply(model, random_plan(model)) as handle:
        assert torch.equal(table, before)
        names = [name for name, p in model.named_parameters() if p is table]
        assert not set(names) & set(handle.masks())
        if head is not None and model.config.tie_word_embeddings:
            assert head.weight is table


# Training under a handle: T1 and T2


def drive(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4, seed: int = 0) -> Iterator[int]:
    """Steps with forced gradients: every entry non-zero, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 10.0 ** float(step)
            parameter.grad = noise.to(parameter)
        optimizer.step()
        yield step


@every_optimizer
@every_family
def test_t1_masked_weights_are_exactly_zero_after_every_step(family: str, optimizer: str) -> None:
    model = build(family)
    with apply(model, random_plan(model)) as handle:
        opt = OPTIMIZERS[optimizer](model)
        seen: list[bool] = []
        handle.attach(opt)
        keeps = handle.masks()
        # A hook of the user's, registered later, sees zeros as well.
        opt.register_step_post_hook(
            lambda *_: seen.append(all(bool((model.get_parameter(n)[~k] == 0.0).all()) for n, k in keeps.items()))
        )
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        for _ in drive(model, opt):
            for name, keep in keeps.items():
                assert (model.get_parameter(name)[~keep] == 0.0).all(), name
        assert seen == [True] * 4
        # ... and everything else trains.
        for name, parameter in model.named_parameters():
            keep = keeps.get(name, torch.ones_like(parameter, dtype=torch.bool))
            assert (parameter != start[name])[keep].all(), name


@every_optimizer
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_t2_the_optimizer_sees_zero_gradients_and_keeps_no_state_of_masked_weights(family: str, optimizer: str) -> None:
    model = build(family)
    opt = OPTIMIZERS[optimizer](model)
    plan = random_plan(model)
    for _ in drive(model, opt, steps=2):
        pass  # state everywhere, before anything is masked
    with apply(model, plan, allow_changed_weights=True) as handle:
        handle.attach(opt)
        keeps = handle.masks()
        assert_no_state(opt, model, keeps)
        checked = []

        def look(*_: Any) -> None:
            for name, keep in keeps.items():
                gradient = model.get_parameter(name).grad
                assert (gradient[~keep] == 0.0).all(), name
                assert (gradient[keep] != 0.0).all(), name
            checked.append(True)

        opt.register_step_pre_hook(look)
        for _ in drive(model, opt, seed=1):
            assert_no_state(opt, model, keeps)
        assert len(checked) == 4

        # Other units go: what the optimizer knew of them goes too, the rest stays as it is.
        known = {p: {k: v.clone() for k, v in s.items() if torch.is_tensor(v)} for p, s in opt.state.items()}
        handle.refresh(random_plan(model, share=0.3, seed=9))
        keeps.clear()
        keeps.update(handle.masks())
        assert_no_state(opt, model, keeps)
        for name, parameter in model.named_parameters():
            keep = keeps.get(name, torch.ones_like(parameter, dtype=torch.bool))
            for key, value in opt.state[parameter].items():
                if torch.is_tensor(value):
                    live = keep if value.shape == keep.shape else torch.ones_like(value, dtype=torch.bool)
                    assert torch.equal(value[live], known[parameter][key][live])
        for _ in drive(model, opt, steps=2, seed=2):
            assert_no_state(opt, model, keeps)


def assert_no_state(optimizer: torch.optim.Optimizer, model: nn.Module, keeps: dict[str, torch.Tensor]) -> None:
    for name, keep in keeps.items():
        for key, value in optimizer.state[model.get_parameter(name)].items():
            if torch.is_tensor(value) and value.shape == keep.shape:
                assert (value[~keep] == 0).all(), (name, key)


def test_real_gradients_train_the_survivors_only() -> None:
    model = build("bert")  # eval: no dropout, so the loss must fall
    batch = inputs(model) | {"labels": torch.tensor([0, 1, 0])}
    with apply(model, random_plan(model)) as handle:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle.attach(optimizer)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for name, keep in handle.masks().items():
            assert (model.get_parameter(name)[~keep] == 0.0).all()


def test_after_closing_the_optimizer_is_free_again() -> None:
    model = build("bert")
    optimizer = OPTIMIZERS["adamw"](model)
    handle = apply(model, random_plan(model)).attach(optimizer)
    keeps = handle.masks()
    handle.close(restore=False)
    for _ in drive(model, optimizer, steps=1):
        pass
    assert all((model.get_parameter(name)[~keep] != 0).all() for name, keep in keeps.items())


def test_parameters_without_gradient_are_no_obstacle() -> None:
    model = build("bert")
    optimizer = OPTIMIZERS["sgd"](model)
    with apply(model, random_plan(model)) as handle:
        handle.attach(optimizer)
        inside = bits(model)
        optimizer.step()
        assert bits(model) == inside


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
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5-gated"])
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
def test_merging_in_bf16(merge: Any) -> None:
    model = build("bert").to(torch.bfloat16)
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


# T9: what is refused, and that nothing happened


def test_a_plan_of_another_family_names_the_site() -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match=r"another model.*decoder\.0\.attention"):
        apply(model, random_plan(build("opt")))


@pytest.mark.parametrize("change", ["layers", "neurons", "heads", "hidden"])
def test_a_plan_of_another_shape_names_the_site(change: str) -> None:
    sizes = {"layers": ("num_hidden_layers", 3), "neurons": ("intermediate_size", NEURONS + 1),
             "heads": ("num_attention_heads", HEADS // 2), "hidden": ("hidden_size", 2 * HIDDEN)}  # fmt: skip
    model = build("bert")
    config = model.config.to_dict()
    config[sizes[change][0]] = sizes[change][1]
    other = BertForSequenceClassification(BertConfig(**config))
    with untouched(model), pytest.raises(ValueError, match=r"another model.*'encoder\.\d\.(attention|ffn)"):
        apply(model, random_plan(other))


def test_changed_weights_are_refused_unless_allowed() -> None:
    model = build("bert")
    plan = solve(extract(model), budget=2)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.attention.self.query.weight")[0, 0] += 1e-3
    with untouched(model), pytest.raises(ValueError, match="allow_changed_weights=True"):
        apply(model, plan)
    with apply(model, plan, allow_changed_weights=True):
        pass


def test_weights_outside_the_plan_may_change() -> None:
    model = build("bert")
    plan = solve(extract(model), budget=2)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    with apply(model, plan) as handle:
        assert not handle.closed
    assert handle.closed


def test_a_masked_model_is_not_masked_again() -> None:
    model = build("bert")
    plan = random_plan(model)
    with apply(model, plan):
        inside = bits(model)
        with pytest.raises(ValueError, match="already pruned"):
            apply(model, plan)
        assert bits(model) == inside
    apply(model, plan).close()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("merge", ["none", "least-squares"])
def test_a_broken_weight_is_named(value: float, merge: Any) -> None:
    model = build("bert")
    plan = random_plan(model)
    name = "bert.encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = value
    with untouched(model), pytest.raises(ValueError, match=name.replace(".", r"\.")):
        apply(model, plan, merge=merge, calibration=[inputs(model)])


@pytest.mark.parametrize("merge", ["scale", "least-squares"])
@pytest.mark.parametrize(
    ("calibration", "message"),
    [(None, "needs calibration"), ([], "empty"), (iter(()), "empty"), ([3], "expected a dict"), (7, "iterable"),
     ([{"input_ids": [[1, 2]]}], "expected a tensor")],
)  # fmt: skip
def test_bad_calibration_is_refused(merge: Any, calibration: Any, message: str) -> None:
    model = build("bert").train()
    with untouched(model), pytest.raises(ValueError, match=message):
        apply(model, random_plan(model), merge=merge, calibration=calibration)


@pytest.mark.parametrize("merge", ["scale", "least-squares"])
def test_activations_that_are_not_finite_are_named(merge: Any) -> None:
    model = build("bert")
    plan = random_plan(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[5:] = torch.inf  # no tensor of the plan
    with untouched(model), pytest.raises(ValueError, match=r"activations at 'bert\.encoder\.layer\.0.*not finite"):
        apply(model, plan, merge=merge, calibration=[inputs(model)])


def test_an_unknown_merge_lists_the_known_ones() -> None:
    model = build("bert")
    with untouched(model), pytest.raises(ValueError, match="unknown merge 'best'; available: none, scale"):
        apply(model, random_plan(model), merge="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PAPER)))
def test_the_papers_merge_is_refused_where_it_is_undefined(family: str) -> None:
    model = build(family)
    with untouched(model), pytest.raises(ValueError, match=r"undefined.*heads \* head width = 32.*24.*least-squares"):
        apply(model, random_plan(model), merge="paper")


@pytest.mark.parametrize("merge", ["scale", "paper"])
def test_merges_that_need_dominators_say_so(merge: Any) -> None:
    model = build("bert")
    plan = random_plan(model, kinds=ATTENTION)
    bare = {name: replace(s, dominator=None, dominator_distance=None) for name, s in plan.solutions.items()}
    with untouched(model), pytest.raises(ValueError, match="needs dominators"):
        apply(model, replace(plan, solutions=bare), merge=merge, calibration=[inputs(model)])


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


def test_refresh_in_training_keeps_what_survivors_learned() -> None:
    model = build("bert")
    graph = extract(model, include=("heads", "neurons"))
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = solve(graph, budget=2, seed=0), solve(graph, budget=3, solver="random", seed=1)
    handle = apply(model, first)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = handle.masks()
    handle.refresh(second)
    after = handle.masks()
    for name, parameter in model.named_parameters():
        was, now = before.get(name), after.get(name)
        kept_was = torch.ones_like(parameter, dtype=torch.bool) if was is None else was
        kept_now = torch.ones_like(parameter, dtype=torch.bool) if now is None else now
        assert bool((parameter[~kept_now] == 0).all())
        assert torch.equal(parameter[kept_was & kept_now], trained[name][kept_was & kept_now])
        assert torch.equal(parameter[~kept_was & kept_now], dense[name][~kept_was & kept_now])
    handle.close(restore=False)


def test_attach_refuses_foreign_and_repeated_optimizers() -> None:
    model = build("bert")
    with apply(model, random_plan(model)) as handle:
        with pytest.raises(ValueError, match="none of this model"):
            handle.attach(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle.attach(optimizer)
        with pytest.raises(ValueError, match="attached to the handle already"):
            handle.attach(optimizer)

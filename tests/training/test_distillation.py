"""Distillation: the mixed loss by hand on every family, untouched evaluation, resume, clear errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tests.masktools import bits, untouched
from tests.prunertools import adamw, batch_of, train
from tests.tiny import FAMILIES, HEADS, HIDDEN, LAYERS, NEURONS, build, drawn
from tests.training.steady import still
from topoprune import Pruner, Recipe
from topoprune.train import Distillation
from topoprune.train.distillation import Distiller, snapshot, weights_fingerprint

every_family = pytest.mark.parametrize("family", FAMILIES)


def budget(settings: Distillation, **more: Any) -> Any:
    return Recipe.budget(0.3, distill=settings, solves=2, **more)


def attached(model: nn.Module, settings: Distillation, teacher: nn.Module | None = None, **more: Any) -> Pruner:
    return Pruner(model, budget(settings), total_steps=100, teacher=teacher, **more).attach(adamw(model))


def naive_divergence(mine: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor, warmth: float, shift: int) -> Any:
    """T^2 KL(teacher || student), one row at a time."""
    total, count = 0.0, 0
    if mine.ndim == 2:
        mine, theirs, labels = mine[:, None], theirs[:, None], labels[:, None]
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - shift):
            if labels[b, t + shift] != -100:
                p, q = (torch.softmax(x[b, t].double() / warmth, dim=-1) for x in (theirs, mine))
                total, count = total + float((p * (p / q).log()).sum()), count + 1
    return warmth**2 * total / count


@every_family
def test_the_loss_is_the_mix_of_labels_and_the_teachers_output(family: str) -> None:
    model, teacher = still(build(family)), build(family, seed=1)
    batch = batch_of(model, 0)
    plain, said = model(**batch), teacher(**batch)
    with attached(model, Distillation(logits=0.7, temperature=3.0), teacher) as pruner:
        mixed = model(**batch).loss
        assert pruner.distilled["task"] == plain.loss.detach()
    decoder_alone = not model.config.is_encoder_decoder and plain.logits.ndim == 3
    apart = naive_divergence(plain.logits.detach(), said.logits.detach(), batch["labels"], 3.0, int(decoder_alone))
    torch.testing.assert_close(float(mixed), 0.3 * float(plain.loss) + 0.7 * apart, rtol=1e-4, atol=1e-5)


@every_family
def test_hidden_states_are_compared_layer_by_layer_on_real_tokens(family: str) -> None:
    model = still(build(family))
    settings = Distillation(logits=0.0, hidden=2.0)
    batch = batch_of(model, 0)
    with attached(model, settings) as pruner:
        same = model(**batch)
        assert float(pruner.distilled["hidden"]) < 1e-10  # its own copy agrees
        assert same.loss.item() == pytest.approx(float(pruner.distilled["task"]), rel=1e-5)
    teacher = snapshot(model)
    caught: dict[str, list[torch.Tensor]] = {}
    distiller = Distiller(model, find(model), settings, teacher)
    with torch.no_grad():
        model.get_parameter(last_written(model)).mul_(1.5)
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda m, a, out, name=name: caught.setdefault(name, []).append(out[0] if isinstance(out, tuple) else out)
        )
        for network in (model, teacher)
        for name in distiller._layers.values()
    ]
    assert len(distiller._layers) == LAYERS * (2 if model.config.is_encoder_decoder else 1)
    plain = model(**batch).loss
    teacher(**batch)
    for hook in hooks:
        hook.remove()
    total = 0.0
    for (stack, _), name in distiller._layers.items():
        mine, theirs = caught[name]
        mask = torch.ones(mine.shape[:2])
        if "attention_mask" in batch:
            mask = batch["attention_mask"]
        if stack == "decoder" and model.config.is_encoder_decoder:
            mask = (batch["labels"] != -100).long()
        error = size = 0.0
        for b, t in mask.nonzero().tolist():
            error += float((mine[b, t] - theirs[b, t]).square().sum())
            size += float(theirs[b, t].square().sum())
        total += error / size / len(distiller._layers)
    assert total > 0
    distiller.attach()
    mixed = model(**batch).loss
    torch.testing.assert_close(float(mixed), float(plain) + 2.0 * total, rtol=1e-4, atol=1e-5)
    distiller.close()


def find(model: nn.Module) -> Any:
    from topoprune import find_sites

    return find_sites(model)


def last_written(model: nn.Module) -> str:
    return next(site for site in find(model) if site.kind == "neuron").writes[0].param


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "vit"])
def test_a_weight_of_nothing_leaves_loss_and_gradients_as_they_are(family: str) -> None:
    plain, model = still(build(family)), still(build(family))
    batch = batch_of(model, 0)
    plain(**batch).loss.backward()
    with attached(model, Distillation(logits=1e-12), build(family, seed=1)):
        loss = model(**batch).loss
        loss.backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7)


@every_family
def test_it_pulls_towards_the_teacher_and_leaves_evaluation_and_teacher_alone(family: str) -> None:
    """Steps that distil only: the divergence falls; eval forwards and the teacher are what they were."""
    model, teacher = still(build(family)), build(family, seed=1)
    before, hooks = bits(teacher), hook_count(model) + hook_count(teacher)
    batch = batch_of(model, 0)
    model.eval()
    evaluated = model(**batch).loss.item()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    recipe = Recipe.budget(0.1, ramp=(1.0, 1.0), solves=1, distill=Distillation(logits=1.0, hidden=0.1))
    pruner = Pruner(model, recipe, total_steps=1000, teacher=teacher).attach(optimizer)
    model.eval()
    assert model(**batch).loss.item() == pytest.approx(evaluated, rel=1e-5)
    with torch.no_grad():
        model.train()
        assert model(**batch).loss.item() == pytest.approx(evaluated, rel=1e-4)
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        seen.append(float(pruner.distilled["logits"]))
    assert seen[-1] < 0.9 * seen[0]
    assert bits(teacher) == before and all(p.grad is None for p in teacher.parameters())
    pruner.close()
    assert hook_count(model) + hook_count(teacher) == hooks
    assert torch.equal(model(**batch).loss, model(**batch).loss)


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("family", ["bert", "opt", "t5", "llama", "bart", "vit"])
def test_a_shrinking_model_learns_from_the_dense_one(family: str, compact: bool) -> None:
    model = build(family)
    dense, teacher = bits(model), None
    torch.manual_seed(0)
    optimizer = adamw(model)
    pruner = Pruner(model, budget(Distillation(hidden=0.5)), total_steps=6, compact=compact).attach(optimizer)
    teacher = pruner._distiller.teacher  # type: ignore[union-attr]
    train(model, optimizer, range(6))
    assert bits(teacher) == dense
    assert pruner.sparsity().removable == pytest.approx(0.3, abs=0.02)
    assert all(float(part) > 0 for part in pruner.distilled.values())


@pytest.mark.parametrize("compact", [False, True])
def test_resuming_finds_the_same_teacher_or_says_so(compact: bool) -> None:
    def fresh() -> tuple[nn.Module, Any]:
        model = still(build("bert"))
        return model, adamw(model)

    recipe = budget(Distillation(hidden=0.3))
    model, optimizer = fresh()
    pruner = Pruner(model, recipe, total_steps=8, compact=compact).attach(optimizer)
    state: dict[str, Any] = {}

    def save(step: int) -> None:
        if step == 3:
            parts = model.state_dict(), optimizer.state_dict(), pruner.state_dict()
            state.update(zip(("model", "optimizer", "pruner"), copy.deepcopy(parts), strict=True))

    train(model, optimizer, range(8), save)

    again, optimizer = fresh()
    resumed = Pruner(again, recipe, total_steps=8, compact=compact)
    resumed.load_state_dict(state["pruner"])
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    resumed.attach(optimizer)
    train(again, optimizer, range(4, 8))
    assert bits(again) == bits(model)

    late = build("bert", seed=3)
    with untouched(late), pytest.raises(ValueError, match=r"learned from a teacher with digest .* pass teacher="):
        Pruner(late, recipe, total_steps=8, resume=state["pruner"])
    resumed.close()


def test_a_fingerprint_is_of_names_shapes_and_values() -> None:
    model = build("bert")
    assert weights_fingerprint(model) == weights_fingerprint(snapshot(model))
    assert weights_fingerprint(model) != weights_fingerprint(build("bert", seed=1))
    with torch.no_grad():
        next(model.parameters()).view(-1)[0].add_(1e-3)
    assert weights_fingerprint(model) != weights_fingerprint(build("bert"))


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_numbers_and_independent_classes(problem: str) -> None:
    labels = 1 if problem == "regression" else 3
    config = BertConfig(
        vocab_size=64, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=NEURONS, num_labels=labels, problem_type=problem,
    )  # fmt: skip
    model, teacher = (still(drawn(lambda: BertForSequenceClassification(config), seed)) for seed in (0, 1))
    batch = batch_of(model, 0) | {"labels": torch.rand(4, labels).round() if labels > 1 else torch.rand(4)}
    mine, theirs = model(**batch), teacher(**batch).logits.double()
    with attached(model, Distillation(logits=0.5, temperature=2.0), teacher):
        mixed = float(model(**batch).loss)
    student = mine.logits.double()
    if problem == "regression":
        apart = float((student - theirs).square().mean())
    else:
        p, q = (x / 2 for x in (theirs, student))
        p, q = p.sigmoid(), q.sigmoid()
        apart = 4 * float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())
    assert mixed == pytest.approx(0.5 * float(mine.loss) + 0.5 * apart, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_micro_batches_weigh_what_their_tokens_do(family: str) -> None:
    """A step of two unequal micro-batches with num_items_in_batch is a step of both at once."""
    model, teacher = still(build(family)), build(family, seed=1)
    a, b = batch_of(model, 0, batch=2), batch_of(model, 1, batch=3)
    both = {name: torch.cat([a[name], b[name]]) for name in a}
    items = (both["labels"][:, 1:] != -100).sum()
    with attached(model, Distillation(logits=0.5), teacher):
        whole = model(**both).loss
        parts = [model(**part, num_items_in_batch=items).loss for part in (a, b)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_model_that_takes_the_number_of_items_and_ignores_it(family: str) -> None:
    model, teacher = still(build(family)), build(family, seed=1)
    batch = batch_of(model, 0)
    with attached(model, Distillation(logits=0.5), teacher):
        plain, told = model(**batch).loss, model(**batch, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(plain, told)


def test_tuples_bf16_and_gradient_checkpointing() -> None:
    model, teacher = still(build("llama")), build("llama", seed=1)
    batch = batch_of(model, 0)
    with attached(model, Distillation(hidden=1.0), teacher):
        loss = model(**batch).loss
        loss.backward()
        wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert torch.equal(model(**batch, return_dict=False)[0], loss)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert float(model(**batch).loss) == pytest.approx(float(loss), rel=0.05)
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch).loss.backward()
        again = [p.grad for p in model.parameters() if p.grad is not None]
        for x, y in zip(wanted, again, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_the_teacher_runs_at_the_precision_the_student_ran_at() -> None:
    """accelerate switches autocast on inside forward, where hooks around the model do not see it."""
    model, teacher = still(build("bert")), build("bert", seed=1)
    inner, seen = model.forward, []
    teacher.classifier.register_forward_hook(lambda m, a, out: seen.append(out.dtype))

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(*args, **kwargs)

    forward.__signature__ = __import__("inspect").signature(inner)  # type: ignore[attr-defined]
    model.forward = forward
    with attached(model, Distillation(), teacher):
        model(**batch_of(model, 0)).loss.backward()
        assert seen == [torch.bfloat16]


def test_what_cannot_be_distilled_is_said() -> None:
    model = still(build("bert"))
    batch = batch_of(model, 0)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    with attached(model, Distillation()):
        with pytest.raises(ValueError, match="pass labels= to the model"):
            model(**unlabelled)
        model.eval()
        assert model(**unlabelled).loss is None
    with untouched(model):
        with pytest.raises(ValueError, match="teacher is the model itself"):
            attached(model, Distillation(), model)
        with pytest.raises(ValueError, match="the teacher has vocab_size=64, the model"):
            attached(still(drawn(_wider)), Distillation(), build("bert"))
        with pytest.raises(ValueError, match=r"has no module .bert\.encoder\.layer\.0"):
            attached(model, Distillation(hidden=1.0), build("roberta"))
        with pytest.raises(ValueError, match="teacher= has no effect without"):
            Pruner(model, Recipe.budget(0.3), total_steps=9, teacher=build("bert"))


def _wider() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=80, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=NEURONS
        )
    )

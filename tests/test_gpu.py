"""T1 and T2 on CUDA tensors, bf16 included; skipped without a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import prunertools
from tests.masktools import OPTIMIZERS, drive, naive_masks, random_plan
from tests.tiny import FAMILIES, build, inputs
from topoprune import Pruner, Recipe, apply, extract, find_sites, measure_sparsity, solve
from topoprune.architectures import matrix_parameters
from topoprune.train.penalties import attachment_weights, prox_group_sqrt, prox_group_sqrt_by_sorting, prox_weighted_l1

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return build(family).to("cuda", dtype)


def batch_of(model: Any, step: int, batch: int = 4) -> dict[str, torch.Tensor]:
    return {key: value.cuda() for key, value in prunertools.batch_of(model, step, batch).items()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # AdamW without fp32 state overflows in fp16
@pytest.mark.parametrize("family", FAMILIES)
def test_t1_and_t2_with_forced_gradients(family: str, dtype: torch.dtype, fused: bool) -> None:
    model = on_gpu(family, dtype)
    plan = random_plan(model)
    keeps = {name: keep.cuda() for name, keep in naive_masks(model, plan).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    for _ in drive(model, optimizer, steps=2):
        pass
    with apply(model, plan) as handle:
        handle.attach(optimizer)

        def look(*_: Any) -> None:
            assert all((model.get_parameter(name).grad[~keep] == 0.0).all() for name, keep in keeps.items())

        optimizer.register_step_pre_hook(look)
        for _ in drive(model, optimizer, steps=3):
            for name, keep in keeps.items():
                parameter = model.get_parameter(name)
                assert (parameter[~keep] == 0.0).all(), name
                for value in optimizer.state[parameter].values():
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        assert (value[~keep] == 0.0).all(), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_t1_with_the_other_optimizers(optimizer: str) -> None:
    model = on_gpu("bert")
    plan = random_plan(model)
    keeps = {name: keep.cuda() for name, keep in naive_masks(model, plan).items()}
    with apply(model, plan) as handle:
        opt = OPTIMIZERS[optimizer](model)
        handle.attach(opt)
        for _ in drive(model, opt):
            assert all((model.get_parameter(name)[~keep] == 0.0).all() for name, keep in keeps.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merge", ["none", "scale", "least-squares", "paper"])
def test_closing_restores_bit_for_bit(merge: Any, dtype: torch.dtype) -> None:
    model = on_gpu("bert", dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calibration = [{key: value.cuda() for key, value in inputs(model).items()}]
    with apply(model, random_plan(model), merge=merge, calibration=calibration):
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_plan_from_the_cpu_fits_the_model_on_the_gpu_and_it_may_move_under_the_handle() -> None:
    model = build("bert")
    plan = solve(extract(model), budget=0.5)
    model.cuda()
    with apply(model, plan) as handle:
        keeps = handle.masks()
        model.cpu()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle.attach(optimizer)
        for _ in drive(model, optimizer, steps=2):
            assert all((model.get_parameter(name)[~keep.cpu()] == 0.0).all() for name, keep in keeps.items())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe.budget(0.5, solves=3),
        Recipe.budget(0.5, granularity="edge", solves=3),
        Recipe.neuroprune(0.05, 0.05, "auto:0.5"),
        Recipe.neuroprune(0.05, 0.05, "auto:0.5", penalty="loss"),
    ],
    ids=["unit", "edge", "proximal", "loss"],
)
def test_both_recipes_train_on_the_gpu(recipe: Any, dtype: torch.dtype, autocast: bool) -> None:
    model = on_gpu("bert", dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(model, recipe, total_steps=9, steps_per_epoch=3).attach(optimizer)
    for step in range(9):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(**batch_of(model, step)).loss
        loss.backward()
        optimizer.step()
        for name, keep in pruner.handle.masks().items():
            assert (model.get_parameter(name)[~keep] == 0.0).all(), name
    total = matrix_parameters(find_sites(model))
    figures = measure_sparsity(model, find_sites(model))
    if getattr(recipe, "granularity", "") == "unit":
        assert abs(figures.removable - 0.5) * total <= 24
    elif getattr(recipe, "granularity", "") == "edge":
        assert sum(s.n_units - s.n_kept for s in pruner.plan.solutions.values()) == round(0.5 * total)
    else:
        assert len(pruner.history) == 3 and not all(s.keep.all() for s in pruner.plan.solutions.values())


@pytest.mark.parametrize("penalty", ["loss", "proximal"])
def test_loss_scaling_does_not_scale_the_penalty(penalty: Any) -> None:
    """fp16 AMP with a fused optimizer unscales inside the step: the penalties must come out the same."""
    results = []
    for scale in (1.0, 1024.0):
        model = on_gpu("bert")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        Pruner(model, Recipe.neuroprune(0.02, 0.02, 0.0, penalty=penalty), steps_per_epoch=99).attach(optimizer)
        scaler = torch.amp.GradScaler("cuda", init_scale=scale)
        scaler.scale(model(**batch_of(model, 0)).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, value in results[0].items():
        torch.testing.assert_close(
            results[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prox_agrees_with_its_twin(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    parts = [torch.randn(300, 48, generator=generator, device="cuda").to(dtype) for _ in range(3)]
    for strength in (0.01, 1.0, 8.0, 40.0):
        fast, slow = [p.clone() for p in parts], [p.clone() for p in parts]
        prox_group_sqrt(fast, strength)
        prox_group_sqrt_by_sorting(slow, strength)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, **tolerance)
        prox_weighted_l1(fast, 0.1 * attachment_weights(fast, 1e-4, "b"))
        assert all(torch.isfinite(part).all() for part in fast)

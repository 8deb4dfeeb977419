"""T6: two gloo processes decide as one, under DistributedDataParallel, FSDP2 and Accelerate."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from tests.prunertools import batch_of
from tests.tiny import build
from topoprune import Pruner, Recipe
from topoprune.sharding import local, sharded, whole
from topoprune.train.distributed import plan_digest

RANKS, STEPS, EPOCH = 2, 8, 4
# So many tokens are asked for that all of every window's are used: one process and two see the same.
RECIPES = {
    "budget": Recipe.budget(0.5, solves=2, ramp=(0.4, 0.8), tokens_per_unit=100, input_dims=0.2, repair="all"),
    "edge": Recipe.budget(0.5, granularity="edge", solves=2, ramp=(0.4, 0.8)),
    "lag": Recipe.budget(0.5, solves=2, ramp=(0.3, 0.7), tokens_per_unit=100, solve_lag=2),
    "neuroprune": Recipe.neuroprune(0.05, 0.05, "auto:0.4"),
    "loss": Recipe.neuroprune(0.01, 0.01, "auto:0.4", penalty="loss", merge="none"),
}

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def model_without_dropout(seed: int = 0) -> nn.Module:
    model = build("bert", seed).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch_of_ranks(model: nn.Module, step: int) -> list[dict[str, torch.Tensor]]:
    """What every rank sees at a step: halves of what one process sees."""
    return [{key: value[rank::RANKS] for key, value in batch_of(model, step).items()} for rank in range(RANKS)]


def loop(wrapped: nn.Module, optimizer: Any, pruner: Pruner, batches: Any, backward: Any = None) -> dict[str, Any]:
    zero = True
    for step in range(STEPS):
        optimizer.zero_grad()
        decided = len(pruner.history)
        loss = wrapped(**batches(step)).loss
        loss.backward() if backward is None else backward(loss)
        optimizer.step()
        for name, keep in pruner.handle.masks().items():
            parameter = pruner.model.get_parameter(name)
            held = [parameter, *(v for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.shape == parameter.shape)]
            if len(pruner.history) == decided:  # gradients of what goes now were not masked yet
                held.append(parameter.grad)
            zero &= all(bool((local(tensor)[~keep] == 0).all()) for tensor in held)
    weights = {name: whole(p.detach()).clone() for name, p in pruner.model.named_parameters()}
    told = hashlib.sha256()
    for name in sorted(weights):
        told.update(weights[name].numpy().tobytes())
    return {
        "plan": plan_digest(pruner.plan),
        "keep": {name: s.keep.tolist() for name, s in pruner.plan.solutions.items()},
        "steps": [(event.decided, event.step) for event in pruner.history],
        "digest": told.hexdigest(),
        "weights": weights,
        "zero": zero,
        "removable": pruner.sparsity().removable,
    }


def alone(recipe: str) -> dict[str, Any]:
    """The same training in one process."""
    model = model_without_dropout()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    pruner = Pruner(model, RECIPES[recipe], total_steps=STEPS, steps_per_epoch=EPOCH).attach(optimizer)
    return loop(model, optimizer, pruner, lambda step: batch_of(model, step))


def _rank(rank: int, port: int, folder: str, kinds: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    for kind, recipe in kinds:
        result = _train(rank, kind, recipe)
        torch.save(result, Path(folder) / f"{kind}-{recipe}-{rank}.pt")
    torch.distributed.destroy_process_group()


def _train(rank: int, kind: str, recipe: str) -> dict[str, Any]:
    model = model_without_dropout()
    batches = lambda step: batch_of_ranks(model, step)[rank]  # noqa: E731
    settings = dict(total_steps=STEPS, steps_per_epoch=EPOCH)
    if kind == "accelerate":
        return _train_accelerate(recipe, model, batches, settings)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        wrapped = model
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02, momentum=0.9)
    pruner = Pruner(wrapped, RECIPES[recipe], **settings).attach(optimizer)
    assert sharded(model) == (kind == "fsdp2")
    return loop(wrapped, optimizer, pruner, batches)


def _train_accelerate(recipe: str, model: nn.Module, batches: Any, settings: Any) -> dict[str, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    pruner = Pruner(wrapped, RECIPES[recipe], **settings).attach(optimizer)
    return loop(wrapped, optimizer, pruner, batches, accelerator.backward)


KINDS = [
    *(("ddp", recipe) for recipe in ("budget", "lag", "neuroprune")),
    *(("fsdp2", recipe) for recipe in RECIPES),
    ("accelerate", "budget"),  # which offers FSDP2 on accelerators only
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_rank, args=(free_port(), str(folder), KINDS), nprocs=RANKS, start_method="spawn")
    return folder


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    return {recipe: alone(recipe) for recipe in RECIPES}


@pytest.mark.parametrize(("kind", "recipe"), KINDS)
def test_two_processes_do_what_one_does(kind: str, recipe: str, two_processes: Path, one_process: Any) -> None:
    first, second = (
        torch.load(two_processes / f"{kind}-{recipe}-{rank}.pt", weights_only=True) for rank in range(RANKS)
    )
    assert first["plan"] == second["plan"]
    assert first["digest"] == second["digest"]
    assert first["zero"] and second["zero"]  # T1, T2 on this rank's part after every step
    expected = one_process[recipe]
    assert expected["zero"]
    assert first["steps"] == expected["steps"]
    assert first["keep"] == expected["keep"]
    assert first["removable"] == pytest.approx(expected["removable"], abs=1e-6)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, atol=5e-3, rtol=5e-3, msg=name)

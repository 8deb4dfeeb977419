"""T6: two gloo processes decide as one, under DistributedDataParallel, FSDP2 and Accelerate."""

from __future__ import annotations

import copy
import hashlib
import os
import re
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
from topoprune.train.distributed import plan_digest, state_of_ranks

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
            held = [
                parameter,
                *(v for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.shape == parameter.shape),
            ]
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
    if kind == "fsdp2" and recipe == "budget":
        with pytest.raises(ValueError, match="compact=True cannot cut parameters that are sharded over ranks"):
            Pruner(wrapped, RECIPES[recipe], compact=True, **settings)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02, momentum=0.9)
    pruner = Pruner(wrapped, RECIPES[recipe], **settings).attach(optimizer)
    if kind == "astray":
        return _go_astray(rank, model, optimizer, pruner, batches)
    if kind == "resumed":
        return _resume(rank, model, wrapped, optimizer, pruner, batches, settings)
    assert sharded(model) == (kind == "fsdp2")
    return loop(wrapped, optimizer, pruner, batches)


def _go_astray(rank: int, model: nn.Module, optimizer: Any, pruner: Pruner, batches: Any) -> dict[str, Any]:
    """Rank 1 changes a weight on its own before the first decision; every rank is to hear of it."""
    if rank == 1:
        with torch.no_grad():
            model.bert.pooler.dense.weight[0, 0] += 1.0
    try:
        loop(model, optimizer, pruner, batches)
    except RuntimeError as error:
        return {"error": str(error), "step": pruner.step}
    return {"error": "", "step": pruner.step}


def _resume(
    rank: int, model: nn.Module, wrapped: nn.Module, optimizer: Any, pruner: Pruner, batches: Any, settings: Any
) -> dict[str, Any]:
    """Save in the middle of a window, go on to the end; then go on from the saved state: the same, bit for bit."""
    finals = []
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(**batches(step)).loss.backward()
        optimizer.step()
        if step == 5:
            sent = [pruner.state_dict()]  # on all ranks; that of rank 0 is what a checkpoint holds
            torch.distributed.broadcast_object_list(sent, src=0)
            saved = {key: value.clone() for key, value in model.state_dict().items()}
            momenta = copy.deepcopy(optimizer.state_dict())
    finals.append({name: p.detach().clone() for name, p in model.named_parameters()})
    pruner.close()
    again = model_without_dropout(seed=5)
    replica = nn.parallel.DistributedDataParallel(again)
    fresh = torch.optim.SGD(replica.parameters(), lr=0.02, momentum=0.9)
    again.load_state_dict(saved)
    fresh.load_state_dict(momenta)
    resumed = Pruner(replica, pruner.recipe, resume=sent[0], **settings).attach(fresh)
    for step in range(6, STEPS):
        fresh.zero_grad()
        replica(**batches(step)).loss.backward()
        fresh.step()
    finals.append({name: p.detach().clone() for name, p in again.named_parameters()})
    same = all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    return {"same": same, "ranks": sorted(sent[0]["driver"]["ranks"]), "plan": plan_digest(resumed.plan)}


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


OTHERS = [("astray", "neuroprune"), ("resumed", "budget")]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_rank, args=(free_port(), str(folder), KINDS + OTHERS), nprocs=RANKS, start_method="spawn")
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


def test_ranks_that_disagree_fail_loudly_with_their_digests(two_processes: Path) -> None:
    for rank in range(RANKS):
        told = torch.load(two_processes / f"astray-neuroprune-{rank}.pt", weights_only=True)
        assert re.search(
            r"ranks disagree after the decision of step 4: weights differs \(rank 0 has \w{16}, rank 1 has \w{16}\)",
            told["error"],
        )
        assert told["step"] == 4  # the first decision after it happened


def test_a_run_of_two_ranks_resumes_bit_for_bit(two_processes: Path) -> None:
    first, second = (torch.load(two_processes / f"resumed-budget-{r}.pt", weights_only=True) for r in range(RANKS))
    assert first["same"] and second["same"]
    assert first["ranks"] == ["0", "1"] and first["plan"] == second["plan"]


def test_a_state_of_two_ranks_is_refused_by_one() -> None:
    with pytest.raises(ValueError, match="was written by 2 processes, 1 resume it; use as many as before"):
        state_of_ranks({"ranks": {"0": {}, "1": {}}})

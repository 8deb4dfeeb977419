"""Two gloo processes under DistributedDataParallel: one plan, and replicas that follow a shrunk model."""

from __future__ import annotations

import hashlib
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
from topoprune.compaction.modeling_topoprune import Compacted

RANKS, STEPS, EPOCH = 2, 8, 4
RECIPE = Recipe.budget(sparsity=0.6, solves=2, ramp=(0.3, 0.7))

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed")


def _digest(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total.update(f"{name} {tuple(parameter.shape)}".encode())
        total.update(parameter.detach().numpy().tobytes())
    return total.hexdigest()


def _rank(rank: int, port: int, folder: str, compact: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    model = build("bert").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    replica = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(replica.parameters(), lr=2e-3)
    pruner = Pruner(replica, RECIPE, total_steps=STEPS, steps_per_epoch=EPOCH, compact=compact).attach(optimizer)
    losses, sizes = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = replica(**batch_of(model, RANKS * step + rank)).loss  # every rank its own batches
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        sizes.append(sum(p.numel() for p in model.parameters()))
    keep = {name: s.keep.tolist() for name, s in pruner.plan.solutions.items()}
    result: dict[str, Any] = {
        "losses": losses,
        "sizes": sizes,
        "digest": _digest(model),
        "keep": keep,
        "compacted": isinstance(model, Compacted),
        "removable": pruner.sparsity().removable,
    }
    torch.save(result, Path(folder) / f"{compact}-{rank}.pt")
    torch.distributed.destroy_process_group()


def _run(folder: Path, compact: bool) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_rank, args=(port, str(folder), compact), nprocs=RANKS, start_method="spawn")
    return [torch.load(folder / f"{compact}-{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_ranks_apply_one_plan_and_shrink_at_epoch_ends_only(tmp_path: Path) -> None:
    shrunk, masked = _run(tmp_path, True), _run(tmp_path, False)
    for first, second in (shrunk, masked):
        assert first["digest"] == second["digest"]  # gradients were averaged over whole, equal models
        assert first["keep"] == second["keep"]
        assert first["losses"] != second["losses"]
    for here, there in zip(shrunk, masked, strict=True):
        assert here["keep"] == there["keep"]
        assert here["losses"] == pytest.approx(there["losses"], rel=2e-4)
        assert here["removable"] == pytest.approx(0.6, abs=0.02)
        assert here["compacted"] and not there["compacted"]
        assert len(set(there["sizes"])) == 1
        # Sizes as seen after each step: they change after the last step of an epoch, never inside one.
        changes = {step + 1 for step in range(1, STEPS) if here["sizes"][step] != here["sizes"][step - 1]}
        assert changes and all(step % EPOCH == 0 for step in changes)


def test_compaction_under_ddp_needs_to_know_the_epoch() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(build("bert"))
        with pytest.raises(ValueError, match="give steps_per_epoch="):
            Pruner(replica, RECIPE, total_steps=STEPS, compact=True)
    finally:
        torch.distributed.destroy_process_group()

"""Pruning under torch.distributed: one decision by all ranks, checked, and replicas that follow a shrunk model.

Every rank sees other batches. What they collect is added up, so all ranks see the same graphs; the sites are shared
out over them, solved, and gathered (T6). All ranks must call these functions at the same steps, which the schedule
guarantees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from topoprune.extraction import GramCollector
from topoprune.planning import Plan
from topoprune.sharding import is_sharded
from topoprune.train.decision import Draft

__all__ = [
    "find_replica",
    "gathered",
    "of_first_rank",
    "own_rank",
    "plan_digest",
    "ranks",
    "require_same",
    "restart_replica",
    "state_of_ranks",
    "states_to_first",
    "sum_over_ranks",
    "weights_checksum",
]

T = TypeVar("T")


def ranks() -> int:
    """Return the number of processes that train together; 1 without torch.distributed."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Return the rank of this process; 0 without torch.distributed."""
    return torch.distributed.get_rank() if ranks() > 1 else 0


def of_first_rank(value: T) -> T:
    """Return the value of rank 0 on every rank: for what is measured, and may differ by a little."""
    if ranks() == 1:
        return value
    sent = [value]
    torch.distributed.broadcast_object_list(sent, src=0)
    return sent[0]


def sum_over_ranks(collector: GramCollector) -> None:
    """Add up what the collectors of all ranks saw, so that all decide on the tokens of all batches."""
    if ranks() > 1:
        collector.reduce(torch.distributed.all_reduce)


def states_to_first(state: dict[str, Any]) -> dict[str, Any]:
    """Return, on rank 0, a state that holds those of all ranks; elsewhere the own one. All ranks must call this.

    Every rank has seen other batches; adding them up here would change the order of summation, and so the last
    bits of a resumed run.
    """
    if ranks() == 1:
        return state
    own = tensors_on(state, torch.device("cpu"))
    found: list[Any] | None = [None] * ranks() if own_rank() == 0 else None
    torch.distributed.gather_object(own, found, dst=0)
    return state if found is None else {"ranks": {str(rank): entry for rank, entry in enumerate(found)}}


def state_of_ranks(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return this rank's state from `states_to_first`.

    Raises:
        ValueError: it was written by another number of ranks.
    """
    if "ranks" not in state:
        if ranks() > 1 and state.get("collector") is not None:
            raise ValueError(f"the pruner state was written by 1 process, {ranks()} resume it; use as many as before")
        return state
    if len(state["ranks"]) != ranks():
        raise ValueError(
            f"the pruner state was written by {len(state['ranks'])} processes, {ranks()} resume it; use as many as "
            "before"
        )
    entry: Mapping[str, Any] = state["ranks"][str(own_rank())]
    return entry


def tensors_on(value: Any, device: torch.device) -> Any:
    """Return a nested dict with its tensors on a device."""
    if torch.is_tensor(value):
        return value.to(device)
    return {key: tensors_on(item, device) for key, item in value.items()} if isinstance(value, Mapping) else value


def gathered(draft: Draft, error: Exception | None = None) -> Draft:
    """Return a draft with the solutions that all ranks found, each for its share of the sites.

    Raises:
        Exception: `error` of this rank. RuntimeError: another rank failed; has its message.
    """
    if ranks() == 1:
        if error is not None:
            raise error
        return draft
    found: list[Any] = [None] * ranks()
    own = {"solutions": draft.solutions, "axes": draft.edge_axes, "error": None if error is None else str(error)}
    torch.distributed.all_gather_object(found, own)
    if error is not None:
        raise error
    failed = [(rank, share["error"]) for rank, share in enumerate(found) if share["error"] is not None]
    if failed:
        raise RuntimeError(f"the decision of step {draft.step} failed on rank {failed[0][0]}: {failed[0][1]}")
    # Rank r ran jobs r, r + n, ...: taking turns gives the order of one process.
    turns = zip_longest(*(share["solutions"].items() for share in found))
    draft.solutions = {pair[0]: pair[1] for turn in turns for pair in turn if pair is not None}
    draft.edge_axes = {name: axis for share in found for name, axis in share["axes"].items()}
    return draft


def plan_digest(plan: Plan) -> str:
    """Return a hex digest of what a plan keeps."""
    told = hashlib.sha256()
    for name in sorted(plan.solutions):
        keep = plan.solutions[name].keep
        told.update(f"{name} {keep.size} ".encode() + np.packbits(keep).tobytes())
    return told.hexdigest()


@torch.no_grad()
def weights_checksum(model: nn.Module) -> str:
    """Return a hex digest of sums of the bits of every parameter that is not sharded.

    Sums of integers do not depend on the order of summation, so equal weights give equal digests on any hardware.
    Complexity: one pass over the weights.
    """
    sums = []
    for parameter in model.parameters():
        if not is_sharded(parameter):
            bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[parameter.element_size()]
            sums.append(parameter.detach().contiguous().view(bits).sum(dtype=torch.int64))
    told = hashlib.sha256()
    if sums:
        told.update(torch.stack([total.to(sums[0].device) for total in sums]).cpu().numpy().tobytes())
    return told.hexdigest()


def require_same(what: str, **digests: str) -> None:
    """Raise RuntimeError on every rank, with the digests, unless all ranks have the same ones.

    Args:
        what: when this is, for the message. digests: what is compared -> hex digest (or a short text).
    """
    if ranks() == 1:
        return
    found: list[Any] = [None] * ranks()
    torch.distributed.all_gather_object(found, digests)
    for name in digests:
        values = [rank[name] for rank in found]
        if len(set(values)) > 1:
            listed = ", ".join(f"rank {rank} has {value[:16]}" for rank, value in enumerate(values))
            raise RuntimeError(
                f"the ranks disagree {what}: {name} differs ({listed}). All ranks must begin with the same weights, "
                "recipe and seed and step together; start again from the last checkpoint"
            )


def find_replica(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """Return the DistributedDataParallel wrapper in what a user passed as the model, if there is one."""
    found: Any = model
    while found is not None:
        if isinstance(found, nn.parallel.DistributedDataParallel):
            return found
        found = getattr(found, "_orig_mod", None)
    return None


def restart_replica(replica: nn.parallel.DistributedDataParallel) -> None:
    """Rebuild the gradient buckets of a replica, in place, after its parameters have changed their shapes.

    All ranks must call this between two steps. The wrapper stays the same object, with the same settings.
    """
    settings: dict[str, Any] = {
        "device_ids": replica.device_ids,
        "output_device": replica.output_device,
        "dim": replica.dim,
        "process_group": replica.process_group,
        "bucket_cap_mb": replica.bucket_bytes_cap / 2**20,
        "find_unused_parameters": replica.find_unused_parameters,
        "gradient_as_bucket_view": replica.gradient_as_bucket_view,
        "static_graph": replica.static_graph,
    }
    if not replica.broadcast_buffers:  # the default need not be said, and newer versions of torch warn of the name
        settings["broadcast_buffers"] = False
    module, training = replica.module, replica.training
    for parameter in module.parameters():
        parameter.grad = None  # may be a view into the old buckets
    replica.__init__(module, **settings)  # type: ignore[misc]
    replica.train(training)

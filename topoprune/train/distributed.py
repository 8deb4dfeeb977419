"""Pruning under torch.distributed: one decision for all ranks, and replicas that follow a shrunk model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from topoprune.planning import Plan
from topoprune.train.decision import Decision

__all__ = ["find_replica", "restart_replica", "same_everywhere"]


def _world() -> int:
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def same_everywhere(decision: Decision) -> Decision:
    """Return the decision of rank 0 on every rank; as it is without torch.distributed.

    Every rank sees other batches, so their moments, and with them their decisions, would differ. All ranks must
    call this at the same step, which the schedule guarantees.
    """
    if _world() == 1:
        return decision
    plan = decision.plan
    sent: list[Any] = [
        {
            "solutions": dict(plan.solutions),
            "edge_axes": dict(plan.edge_axes),
            "request": dict(plan.request),
            "changed": {name: tensor.cpu() for name, tensor in decision.changed.items()},
            "thetas": dict(decision.thetas),
        }
    ]
    torch.distributed.broadcast_object_list(sent, src=0)
    got = sent[0]
    same = Plan(plan.sites, got["solutions"], got["edge_axes"], got["request"])
    return replace(decision, plan=same, changed=got["changed"], thetas=got["thetas"])


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

"""Where the zeros are: the share that is gone, by layer and by part of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from topoprune.graph import Site

__all__ = ["PARTS", "zero_shares"]

PARTS = ("heads", "neurons", "q", "k", "v", "o", "in", "out")
# Gated feed-forwards: gate and up are the two halves of what a neuron reads.
_PART_OF_ROLE = {"q": "q", "k": "k", "v": "v", "o": "o", "in": "in", "gate": "in", "up": "in", "out": "out"}


def zero_shares(model: Any, sites: Sequence[Site]) -> dict[str, dict[str, float]]:
    """Return layer -> part -> share in [0, 1]: removed heads and neurons, and zero entries of each matrix.

    Args:
        model: any module holding the sites' parameters.
        sites: from `find_sites`; layers come in their order. Layer names are ``"0"``, or with
            several stacks ``"encoder 0"``, ``"decoder 0"``.

    Complexity: one pass over the weights.
    """
    import torch

    from topoprune.sparsity import measure_sparsity

    params = dict(model.named_parameters())
    kept = measure_sparsity(model, sites).kept
    stacks = {site.stack for site in sites}
    zero: dict[tuple[str, str], list[int]] = {}
    shares: dict[str, dict[str, float]] = {}
    counted: set[tuple[str, str]] = set()
    for site in sites:
        layer = f"{site.stack} {site.layer}" if len(stacks) > 1 else str(site.layer)
        if site.block == "cross_attention":
            layer += " cross"
        shares.setdefault(layer, {})
        if site.kind == "input_dim":
            continue
        stay, total = kept[site.name]
        shares[layer]["neurons" if site.kind == "neuron" else "heads"] = 1 - stay / max(total, 1)
        for piece in site.slices:
            part = _PART_OF_ROLE.get(piece.role)
            if part is None or len(piece.shape) != 2 or (piece.param, piece.role) in counted:
                continue
            counted.add((piece.param, piece.role))
            used = params[piece.param].detach().narrow(piece.axis, piece.offset, site.n_units * piece.width)
            tally = zero.setdefault((layer, part), [0, 0])
            tally[0] += used.numel() - int(torch.count_nonzero(used))
            tally[1] += used.numel()
    for (layer, part), (gone, total) in zero.items():
        shares[layer][part] = gone / max(total, 1)
    return shares

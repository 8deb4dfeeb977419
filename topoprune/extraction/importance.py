"""What a unit is worth.

Shape legend: n units, w unit width, d residual width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from topoprune.extraction.grammath import consumer_blocks, unit_energy
from topoprune.extraction.tensors import unit_rows
from topoprune.graph import Site

__all__ = ["IMPORTANCES", "gram_diagonal", "magnitude"]

IMPORTANCES = ("auto", "magnitude", "gram-diagonal")


def magnitude(tensors: Mapping[str, torch.Tensor], site: Site) -> torch.Tensor:
    """Return (n,) float64 weight magnitudes, data-free.

    Heads and KV groups: sum |W_O| over the unit's slice (the paper's). Neurons: product of the
    norms of the incoming rows (gate and up apart) and the outgoing column, the norm of the
    neuron's rank-one operator, which does not change when weight is moved from one side to the
    other. Input dimensions: sum |.| over the unit's row of [Q, K, V].
    """
    if site.kind == "neuron":
        result = torch.ones(site.n_units, dtype=torch.float64)
        for piece in site.slices:
            if len(piece.shape) == 2:
                norm = torch.linalg.vector_norm(unit_rows(tensors, site, piece).float(), dim=1)
                result = result * norm.double().cpu()
        return result
    pieces = site.writes if site.writes else site.reads
    result = torch.zeros(site.n_units, dtype=torch.float64)
    for piece in pieces:
        if len(piece.shape) == 2:
            result += unit_rows(tensors, site, piece).abs().sum(dim=1, dtype=torch.float32).double().cpu()
    return result


def gram_diagonal(tensors: Mapping[str, torch.Tensor], site: Site, moment: torch.Tensor) -> torch.Tensor:
    """Return (n,) float64 G_ii: mean squared output of each unit at the consumer's output.

    Args:
        tensors: parameter name -> tensor.
        site: a site with a consumer.
        moment: (n * w, n * w) second moment of the consumer's input; (n,) is enough for neurons.
    """
    return unit_energy(consumer_blocks(tensors, site), moment).double().cpu()

"""The output Gram of a site's units, from the second moment of the consumer's input.

With C = E[o oᵀ] over non-padding tokens and W the consumer's weight,
``G_ij = E<W_i o_i, W_j o_j>`` is the sum of block (i, j) of ``(Wᵀ W) ∘ C``. G is positive
semidefinite, and dropping a set P of units costs exactly ``1_Pᵀ G 1_P`` (mean squared change) at
the projection's output.

Shape legend: n units, w unit width, f = n * w consumer inputs, d consumer outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from topoprune.extraction.tensors import unit_blocks
from topoprune.graph import Site

__all__ = ["consumer_blocks", "gram_tile", "unit_energy", "unit_gram"]


def consumer_blocks(tensors: Mapping[str, torch.Tensor], site: Site) -> torch.Tensor:
    """Return the consumer's weight unit-major, (n, w, d) float32."""
    found = [piece for piece in site.writes if len(piece.shape) == 2]
    if site.consumer is None or len(found) != 1 or found[0].width != site.unit_width:
        raise ValueError(f"site {site.name!r} has no single output projection, so no output Gram")
    return unit_blocks(tensors, site, found[0]).float()


def gram_tile(weight: torch.Tensor, moment: torch.Tensor, a: slice, b: slice) -> torch.Tensor:
    """Return the G of units a x b from (n, w, d) weights and the (f, f) moment."""
    width = weight.shape[1]
    product = weight[a].flatten(0, 1) @ weight[b].flatten(0, 1).T
    product *= moment[a.start * width : a.stop * width, b.start * width : b.stop * width]
    if width == 1:
        return product
    return product.reshape(-1, width, product.shape[1] // width, width).sum(dim=(1, 3))


def unit_energy(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of G, (n,) >= 0, from the (f, f) moment, or (f,) where w = 1."""
    n, width, _ = weight.shape
    if width == 1:
        diagonal = moment if moment.ndim == 1 else moment.diagonal()
        return weight.square().sum(dim=(1, 2)) * diagonal.clamp_min(0.0)
    blocks = moment.reshape(n, width, n, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return ((weight @ weight.transpose(1, 2)) * blocks).sum(dim=(1, 2)).clamp_min(0.0)


def unit_gram(site: Site, weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return the (n, n) output Gram of a site.

    Args:
        site: a site with a consumer.
        weight: (n, w, d) unit-major weight, as from `consumer_blocks`, or the consumer's
            parameter itself.
        moment: (f, f) second moment E[o oᵀ] of the consumer's input.

    Raises:
        ValueError: shapes that do not belong to the site.
    """
    if weight.ndim == 2:
        weight = consumer_blocks({site.writes[0].param: weight.detach()}, site)
    expected = (site.n_units * site.unit_width,) * 2
    if tuple(moment.shape) != expected or weight.shape[:2] != (site.n_units, site.unit_width):
        raise ValueError(
            f"site {site.name!r}: weight blocks {tuple(weight.shape)} and moment {tuple(moment.shape)}, expected "
            f"({site.n_units}, {site.unit_width}, outputs) and {expected}"
        )
    whole = slice(0, site.n_units)
    gram = gram_tile(weight, moment, whole, whole)
    return (gram + gram.T) / 2

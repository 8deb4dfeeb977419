"""How unlike two units are: named, pluggable distance measures.

=================  ==========  ==============================================================
`weights-linf`     data-free   largest difference of two weights (the paper's); unbounded
`circuit-cosine`   data-free   1 - cosine of what the units compute, whatever basis they use
`output-gram`      calibrated  1 - squared cosine of what the units add to the residual stream
=================  ==========  ==============================================================

A measure is registered by `register_measure` or by the entry-point group ``topoprune.measures``
(an entry point names a `Measure` object).

Shape legend: n units, w width of a unit in a tensor, d residual width, b tile side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

import torch

from topoprune.extraction.grammath import consumer_blocks, gram_tile, unit_energy
from topoprune.extraction.tensors import unit_blocks, unit_rows
from topoprune.extraction.tiles import DistanceTile
from topoprune.graph import Site, TensorSlice

__all__ = ["Measure", "get_measure", "measure_names", "register_measure"]

ENTRY_POINT_GROUP = "topoprune.measures"


@dataclass(frozen=True)
class Measure:
    """A distance between the units of a site.

    Args:
        name: registry name.
        normalised: distances are clipped to [0, 1] and 1 - distance is a similarity.
        calibrated: it needs the second moment of the consumer's input.
        prepare: (parameter name -> tensor, site, (f, f) second moment or None) -> function that
            returns a tile of float32 distances; small means alike.
        basis_free: unchanged by a change of basis inside a unit that leaves its function alone.
    """

    name: str
    normalised: bool
    calibrated: bool
    prepare: Callable[[Mapping[str, torch.Tensor], Site, torch.Tensor | None], DistanceTile]
    basis_free: bool = True


_MEASURES: dict[str, Measure] = {}


def register_measure(measure: Measure) -> Measure:
    """Add a measure under its name; a later one replaces an earlier one."""
    _MEASURES[measure.name] = measure
    return measure


@cache
def _load() -> None:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        register_measure(entry.load())


def measure_names() -> list[str]:
    """Return the names of all measures, sorted."""
    _load()
    return sorted(_MEASURES)


def get_measure(name: str) -> Measure:
    """Return a measure by name.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    _load()
    if name not in _MEASURES:
        raise ValueError(f"unknown measure {name!r}; available: {', '.join(measure_names())}")
    return _MEASURES[name]


def _matrices(pieces: tuple[TensorSlice, ...]) -> list[TensorSlice]:
    return [piece for piece in pieces if len(piece.shape) == 2]


def _weights_linf(tensors: Mapping[str, torch.Tensor], site: Site, moment: torch.Tensor | None) -> DistanceTile:
    """max |A_i - A_j| over all weights the units read with: [Q, K, V], or [in] / [gate, up].

    Not invariant: a change of basis inside a head changes it (the paper's choice, kept for
    reproduction). Complexity: n^2 / 2 * entries comparisons.
    """
    rows = [unit_rows(tensors, site, piece) for piece in _matrices(site.reads + site.shared)]
    _require(rows, site, "weight matrices to read with")

    def tile(a: slice, b: slice) -> torch.Tensor:
        distance = None
        for own in rows:
            part = torch.cdist(own[a].float(), own[b].float(), p=torch.inf)
            distance = part if distance is None else torch.maximum(distance, part)
        assert distance is not None
        return distance

    return tile


def _circuit_cosine(tensors: Mapping[str, torch.Tensor], site: Site, moment: torch.Tensor | None) -> DistanceTile:
    """1 - cosine of the units' linear operators; negative cosines count as 1 (not alike).

    A head or KV group: mean of the cosines of its QK circuit W_Qᵀ W_K and its VO circuit W_O W_V,
    or VO alone where queries and keys are rotated (site.rotary) or missing. In a group the query
    heads' W_Q and W_O are summed over the group; query heads as units have the W_K and W_V of their
    group. A neuron: product of the cosines of its rows (gate and up apart) and its outgoing column,
    which is the cosine of its rank-one operator w_out ⊗ w_in (⊗ w_up).

    Biases and relative position biases are left out. A dead unit (operator zero) is at distance 0
    of other dead units and 1 of all others.
    """
    return _neuron_cosine(tensors, site) if site.kind == "neuron" else _head_cosine(tensors, site)


def _neuron_cosine(tensors: Mapping[str, torch.Tensor], site: Site) -> DistanceTile:
    factors = [unit_rows(tensors, site, piece).float() for piece in _matrices(site.slices)]
    _require(factors, site, "weight matrices")
    norms = [torch.linalg.vector_norm(factor, dim=1, keepdim=True) for factor in factors]
    dead = torch.stack([norm == 0 for norm in norms]).any(dim=0)
    factors = [factor / norm.masked_fill(dead, 1.0) for factor, norm in zip(factors, norms, strict=True)]
    if bool(dead.any()):
        # One more coordinate that only dead units have: cosine 1 among them, 0 with the others.
        factors = [torch.cat([factor.masked_fill(dead, 0.0), dead.float()], dim=1) for factor in factors]
    one = torch.ones((), device=factors[0].device)

    def tile(a: slice, b: slice) -> torch.Tensor:
        product = factors[0][a] @ factors[0][b].T
        if len(factors) == 1:
            return product.neg_().add_(1.0)
        for factor in factors[1:-1]:
            product *= factor[a] @ factor[b].T
        return torch.addcmul(one, product, factors[-1][a] @ factors[-1][b].T, value=-1.0)

    return tile


def _head_cosine(tensors: Mapping[str, torch.Tensor], site: Site) -> DistanceTile:
    parts = {piece.role: _per_head(tensors, site, piece) for piece in _matrices(site.tensors)}
    if not {"v", "o"} <= set(parts):
        raise ValueError(f"site {site.name!r} has roles {sorted(parts)}; circuit-cosine needs 'v' and 'o'")
    pairs = [("v", "o")]
    if not site.rotary and {"q", "k"} <= set(parts):
        pairs.append(("q", "k"))
    energy = {pair: _circuit_diagonal(parts[pair[0]], parts[pair[1]]) for pair in pairs}
    dead = energy["v", "o"] == 0

    def tile(a: slice, b: slice) -> torch.Tensor:
        total = torch.zeros((), device=dead.device)
        for pair in pairs:
            left, right = parts[pair[0]], parts[pair[1]]
            inner = _block_sums(left[a], left[b], right[a], right[b])
            scale = torch.sqrt(energy[pair][a, None]) * torch.sqrt(energy[pair][None, b])
            # Two empty circuits are the same circuit, an empty and a full one are unlike.
            empty = ((energy[pair] == 0)[a, None] & (energy[pair] == 0)[None, b]).float()
            total = total + torch.where(scale > 0, inner / scale, empty)
        distance = 1.0 - total / len(pairs)
        return torch.where(dead[a, None] | dead[None, b], (dead[a, None] != dead[None, b]).float(), distance)

    return tile


def _per_head(tensors: Mapping[str, torch.Tensor], site: Site, piece: TensorSlice) -> torch.Tensor:
    """Return (n, head_width, d) float32, summed over the heads of a group."""
    own = unit_blocks(tensors, site, piece).float()
    width = site.head_width or own.shape[1]
    return own.reshape(own.shape[0], own.shape[1] // width, width, own.shape[2]).sum(dim=1)


def _block_sums(
    left_a: torch.Tensor, left_b: torch.Tensor, right_a: torch.Tensor, right_b: torch.Tensor
) -> torch.Tensor:
    """Return <L_iᵀ R_i, L_jᵀ R_j> for all i in a, j in b, from w x w Gram blocks: never d x d."""
    (n, width, _), m = left_a.shape, left_b.shape[0]
    product = left_a.flatten(0, 1) @ left_b.flatten(0, 1).T
    product *= right_a.flatten(0, 1) @ right_b.flatten(0, 1).T
    return product.reshape(n, width, m, width).sum(dim=(1, 3))


def _circuit_diagonal(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ||L_iᵀ R_i||² (n,)."""
    return ((left @ left.transpose(1, 2)) * (right @ right.transpose(1, 2))).sum(dim=(1, 2)).clamp_min(0.0)


def _output_gram(tensors: Mapping[str, torch.Tensor], site: Site, moment: torch.Tensor | None) -> DistanceTile:
    """1 - G_ij² / (G_ii G_jj), with G_ij = E<o_i W_O,i , o_j W_O,j> over non-padding tokens.

    A silent unit (G_ii = 0) is at distance 0 of other silent units and 1 of all others.
    """
    if moment is None:
        raise ValueError("output-gram needs calibration=[batch, ...]")
    weight = consumer_blocks(tensors, site)
    energy = unit_energy(weight, moment)
    silent = energy <= 0
    scale = torch.rsqrt(energy.masked_fill(silent, 1.0))
    any_silent = bool(silent.any())

    def tile(a: slice, b: slice) -> torch.Tensor:
        cosine = gram_tile(weight, moment, a, b).mul_(scale[a, None]).mul_(scale[None, b])
        distance = cosine.square_().neg_().add_(1.0)
        if any_silent:
            unlike = (silent[a, None] != silent[None, b]).float()
            distance = torch.where(silent[a, None] | silent[None, b], unlike, distance)
        return distance

    return tile


def _require(found: list[torch.Tensor], site: Site, what: str) -> None:
    if not found:
        raise ValueError(f"site {site.name!r} has no {what}")


register_measure(Measure("weights-linf", False, False, _weights_linf, basis_free=False))
register_measure(Measure("circuit-cosine", True, False, _circuit_cosine))
register_measure(Measure("output-gram", True, True, _output_gram))

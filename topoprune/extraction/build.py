"""From a model to a `ModelGraph`: the only place where weights become edges."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from topoprune.architectures import check_sites, find_sites, model_config
from topoprune.extraction.gram import collect_gram
from topoprune.extraction.importance import IMPORTANCES, gram_diagonal, magnitude
from topoprune.extraction.measures import Measure, get_measure
from topoprune.extraction.tensors import check_finite, named_tensors, weights_digest
from topoprune.extraction.tiles import complete_graph, nearest_graph, threshold_graph
from topoprune.graph import BipartiteGraph, Graph, ModelGraph, Site, TensorSlice

__all__ = ["connectivity", "extract", "site_graph"]

_KINDS = {"heads": ("head", "kv_group"), "neurons": ("neuron",), "input_dims": ("input_dim",)}


def extract(
    model: nn.Module,
    *,
    measure: str | Mapping[str, str] = "circuit-cosine",
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    sites: Iterable[Site] | None = None,
    include: Collection[str] = ("heads", "neurons", "input_dims"),
    importance: str = "auto",
    neighbours: int | None = 32,
    theta: float | None = None,
    max_bytes: int = 2**30,
    max_tokens: int | None = None,
    block: int = 768,
    digest_weights: bool = True,
    gqa: str = "groups",
) -> ModelGraph:
    """Return the graph of a model's prunable units; the model is not changed.

    Heads and KV groups get the complete graph of their distances, neurons the union of everyone's
    `neighbours` nearest, or all edges up to `theta`. Input dimensions have importance and cost
    but no edges.

    Args:
        model: a transformers model of a known family, or any module with `sites`.
        measure: name of a distance measure, or ``{"heads": name, "neurons": name}``.
        calibration: batches (dicts of tensors) for measures and importances that need data.
        sites: sites given by hand; overrides what the family would find, filtered by `include`.
        include: some of ``"heads"``, ``"neurons"``, ``"input_dims"``, ``"edges"`` (the weight
            edges |w| of every attention and feed-forward matrix, which copies them to the CPU).
        importance: ``"auto"`` (Gram diagonal where the measure collects it, else magnitude),
            ``"magnitude"`` or ``"gram-diagonal"`` (needs calibration; input dimensions always
            have magnitude).
        neighbours: k of the neurons' graphs; None needs `theta`.
        theta: threshold >= 0 on the neurons' distances; overrides `neighbours`.
        max_bytes: limit for accumulators in flight and for threshold edges.
        max_tokens: calibration tokens per site; None for all.
        block: units along one side of a distance tile.
        digest_weights: record a digest of all weights read.
        gqa: units of grouped-query attention, ``"groups"``, ``"query-heads"`` or ``"any-query-heads"``, see
            `find_sites`; says nothing about `sites` given by hand.

    Returns:
        A `ModelGraph` on the CPU.

    Raises:
        ValueError: unknown names, bad numbers, missing or empty calibration, non-finite weights,
            sites that do not fit the model.

    Memory: beyond the model, on its device, three tiles of block² float32 (7 MiB at 768), the
    float32 unit rows of one site, and for calibrated measures the accumulators.
    """
    names = _measure_names(measure)
    _check_numbers(include, importance, neighbours, theta, block)
    wanted = tuple(label for label in _KINDS if label in include)
    kinds = {kind for label in wanted for kind in _KINDS[label]}
    # "edges" alone still needs to know every matrix.
    found = tuple(sites) if sites is not None else find_sites(model, tuple(_KINDS), gqa=gqa)
    check_sites(model, found)
    kept = tuple(site for site in found if site.kind in kinds)
    # Weight edges lie in every matrix: a plan on them must know all sites to recognise its model.
    known = found if "edges" in include else kept
    measures = {site.name: get_measure(names[label]) for site in kept if (label := _label(site)) in names}
    gram_sites, diagonal = _calibrated(kept, measures, importance)
    if gram_sites and calibration is None:
        why = "importance 'gram-diagonal'" if importance == "gram-diagonal" else "this measure"
        raise ValueError(f"{why} needs calibration=[batch, ...] (dicts of tensors as the model takes them)")
    if calibration is not None and not gram_sites:
        warnings.warn(
            f"calibration is not used: measure={measure!r} and importance={importance!r} are data-free", stacklevel=2
        )

    with torch.no_grad():
        tensors = named_tensors(model)
        check_finite(tensors, known)
        redundancy: dict[str, Graph] = {}
        worth: dict[str, np.ndarray] = {}

        def finish(site: Site, moment: torch.Tensor | None) -> None:
            if site.name in measures:
                full = moment if moment is not None and moment.ndim == 2 else None
                redundancy[site.name] = site_graph(
                    tensors,
                    site,
                    measures[site.name],
                    full,
                    neighbours=neighbours,
                    theta=theta,
                    block=block,
                    max_bytes=max_bytes,
                )
            use_gram = moment is not None and importance != "magnitude"
            value = gram_diagonal(tensors, site, moment) if use_gram else magnitude(tensors, site)  # type: ignore[arg-type]
            worth[site.name] = value.numpy()

        by_name = {site.name: site for site in gram_sites}
        if gram_sites:
            assert calibration is not None
            moments = collect_gram(
                model, gram_sites, calibration, max_bytes=max_bytes, max_tokens=max_tokens, diagonal=diagonal
            )
            for name, moment in moments:
                finish(by_name[name], moment)
        for site in kept:
            if site.name not in by_name:
                finish(site, None)
        wires = connectivity(tensors, found) if "edges" in include else {}
    return ModelGraph(
        sites=known,
        redundancy={site.name: redundancy[site.name] for site in kept if site.name in redundancy},
        connectivity=wires,
        importance={site.name: worth[site.name] for site in kept},
        cost={site.name: np.full(site.n_units, float(site.parameters_per_unit)) for site in kept},
        measures={name: own.name for name, own in measures.items()},
        model_type=getattr(model_config(model), "model_type", None) or "custom",
        weights_digest=weights_digest(tensors, known) if digest_weights else "",
    )


def site_graph(
    tensors: Mapping[str, torch.Tensor],
    site: Site,
    measure: Measure | str,
    moment: torch.Tensor | None = None,
    *,
    neighbours: int | None = 32,
    theta: float | None = None,
    block: int = 768,
    max_bytes: int = 2**30,
) -> Graph:
    """Return the redundancy graph of one site: complete for heads, sparse for neurons.

    Args:
        tensors: parameter name -> tensor.
        site: a site of kind head, kv_group or neuron.
        measure: the measure or its name.
        moment: second moment of the consumer's input, for calibrated measures.
        neighbours, theta, block, max_bytes: as in `extract`.
    """
    measure = get_measure(measure) if isinstance(measure, str) else measure
    n = site.n_units
    try:
        with torch.no_grad():
            tile = measure.prepare(tensors, site, moment)
            if site.kind != "neuron":
                # A tile of heads spans block features, not block heads.
                side = max(1, block // max(1, site.unit_width))
                return complete_graph(tile, n, block=side, normalised=measure.normalised)
            if theta is not None:
                # An edge takes 2 keys and 2 weights while it is sorted, about 64 bytes.
                return threshold_graph(
                    tile, n, theta, block=block, normalised=measure.normalised, max_edges=max_bytes // 64
                )
            assert neighbours is not None
            return nearest_graph(tile, n, neighbours, block=block, normalised=measure.normalised)
    except ValueError as error:
        raise ValueError(f"{measure.name} at site {site.name!r}: {error}") from error


def connectivity(tensors: Mapping[str, torch.Tensor], sites: Iterable[Site]) -> dict[str, BipartiteGraph]:
    """Return |w| of every attention and feed-forward matrix, with the rows of Eq. 1 and Eq. 2.

    Rows are neurons in the FFN's input matrices, input dimensions in q, k and v, and residual
    dimensions in both output matrices. Float32 copies on the CPU.
    """
    result: dict[str, BipartiteGraph] = {}
    for site in sites:
        for piece in site.tensors:
            if len(piece.shape) != 2 or piece.param in result:
                continue
            axis = _row_axis(site, piece)
            strength = tensors[piece.param].abs().float().cpu()
            strength = strength if axis == 0 else strength.T
            result[piece.param] = BipartiteGraph(strength.contiguous().numpy(), piece.param, axis)
    return result


def _row_axis(site: Site, piece: TensorSlice) -> int:
    # Units lie on the output axis of what makes them and on the input axis of what reads them.
    own_axis_is_row = site.kind == "input_dim" or (site.kind == "neuron" and piece in site.reads)
    return piece.axis if own_axis_is_row else 1 - piece.axis


def _label(site: Site) -> str:
    return next(label for label, kinds in _KINDS.items() if site.kind in kinds)


def _measure_names(measure: Any) -> dict[str, str]:
    if isinstance(measure, str):
        measure = {"heads": measure, "neurons": measure}
    if not isinstance(measure, Mapping) or set(measure) - {"heads", "neurons"}:
        raise ValueError(f'measure is {measure!r}, expected a name or {{"heads": name, "neurons": name}}')
    for name in measure.values():
        get_measure(name)
    return dict(measure)


def _check_numbers(
    include: Collection[str], importance: str, neighbours: int | None, theta: float | None, block: int
) -> None:
    known = (*_KINDS, "edges")
    if isinstance(include, str) or set(include) - set(known):
        raise ValueError(f"unknown include {include!r}; choose from {', '.join(known)}")
    if importance not in IMPORTANCES:
        raise ValueError(f"unknown importance {importance!r}; available: {', '.join(IMPORTANCES)}")
    if theta is None and neighbours is None:
        raise ValueError("neighbours and theta are both None; give one of them")
    if theta is not None and not (theta >= 0 and np.isfinite(theta)):
        raise ValueError(f"theta must be a finite number >= 0, found {theta}")
    if theta is None and neighbours is not None and neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, found {neighbours}")
    if block < 1:
        raise ValueError(f"block must be at least 1, found {block}")


def _calibrated(
    sites: Iterable[Site], measures: Mapping[str, Measure], importance: str
) -> tuple[list[Site], frozenset[str]]:
    """Return the sites whose consumer must be observed, and those that only need E[o²]."""
    observed, diagonal = [], set()
    for site in sites:
        measured = site.name in measures and measures[site.name].calibrated
        if site.kind == "input_dim" or not (measured or importance == "gram-diagonal"):
            continue
        observed.append(site)
        if not measured and site.unit_width == 1:
            diagonal.add(site.name)
    return observed, frozenset(diagonal)

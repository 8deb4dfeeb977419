"""Graphs from a function that gives one tile of the distance matrix at a time.

Only tiles on and above the diagonal are ever computed: each value serves both directions, which
halves the work and makes the result exactly symmetric. Nothing larger than a tile is held. Where not even that
fits into memory, the work starts afresh with tiles of half the side, with a warning.

Shape legend: n units, b tile side, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from topoprune.extraction.memory import with_smaller_blocks
from topoprune.graph import Graph

__all__ = ["DistanceTile", "complete_graph", "nearest_graph", "threshold_graph"]

_LEAST = 16  # smallest side of a tile of neurons: below, the work would take hours

DistanceTile = Callable[[slice, slice], torch.Tensor]
"""(rows, columns) -> (b_rows, b_columns) float32 distances on the model's device."""


def complete_graph(tile: DistanceTile, n: int, *, block: int, normalised: bool) -> Graph:
    """Return the complete graph on n units. Memory: n * n on the CPU, so for heads only."""
    what = f"the graph of {n} units"
    return with_smaller_blocks(lambda side: _complete(tile, n, side, normalised), block, what)


def _complete(tile: DistanceTile, n: int, block: int, normalised: bool) -> Graph:
    dense = np.zeros((n, n), dtype=np.float32)
    for rows, columns, values in _upper_tiles(tile, n, block):
        found = _clip(values, normalised).cpu().numpy()
        dense[rows, columns] = found
        dense[columns, rows] = found.T
    np.fill_diagonal(dense, 0.0)
    i, j = np.nonzero(~np.eye(n, dtype=bool))
    return _graph(n, i * n + j, dense[i, j], normalised)


def nearest_graph(tile: DistanceTile, n: int, k: int, *, block: int, normalised: bool) -> Graph:
    """Return the k nearest neighbours of every unit, an edge where either end has the other.

    Distances are ranked before they are clipped; equal ones rank by the lower index.

    Complexity: n^2 / 2 distances, O(n * (block + k)) values in flight on the device.
    """
    k = min(k, n - 1)
    if k <= 0:
        return _graph(n, np.zeros(0, np.int64), np.zeros(0, np.float32), normalised)
    what = f"the neighbours of {n} units"
    return with_smaller_blocks(lambda side: _nearest_graph(tile, n, k, side, normalised), block, what, least=_LEAST)


def _nearest_graph(tile: DistanceTile, n: int, k: int, block: int, normalised: bool) -> Graph:
    best: dict[int, torch.Tensor] = {}
    for rows, columns, values in _upper_tiles(tile, n, block):
        best[rows.start] = _nearest(values, columns.start, n, k, best.get(rows.start))
        if rows != columns:
            best[columns.start] = _nearest(values.T, rows.start, n, k, best.get(columns.start))
    distance, target = _unpack(torch.cat([best[start] for start in sorted(best)]), n)
    weight = _clip(distance, normalised).cpu().numpy().reshape(-1)
    source = np.repeat(np.arange(n, dtype=np.int64), k)
    other = target.cpu().numpy().reshape(-1).astype(np.int64)
    keys = np.concatenate([source * n + other, other * n + source])
    return _graph(n, keys, np.concatenate([weight, weight]), normalised)


def threshold_graph(tile: DistanceTile, n: int, theta: float, *, block: int, normalised: bool, max_edges: int) -> Graph:
    """Return all edges with (clipped) distance <= theta.

    Raises:
        ValueError: more than `max_edges` edges; says how many and what to do.
    """
    what = f"the edges of {n} units"
    return with_smaller_blocks(
        lambda side: _threshold(tile, n, theta, side, normalised, max_edges), block, what, least=_LEAST
    )


def _threshold(tile: DistanceTile, n: int, theta: float, block: int, normalised: bool, max_edges: int) -> Graph:
    keys: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    edges = 0
    for rows, columns, values in _upper_tiles(tile, n, block):
        clipped = _clip(values, normalised)
        near = clipped <= theta
        if rows == columns:
            near = near.triu(1)
        i, j = near.nonzero(as_tuple=True)
        edges += len(i)
        if edges > max_edges:
            raise ValueError(
                f"theta={theta:g} keeps more than {max_edges} edges among {n} units; lower theta, raise max_bytes, or "
                "use neighbours instead"
            )
        weight = clipped[i, j].cpu().numpy()
        a, b = (i + rows.start).cpu().numpy().astype(np.int64), (j + columns.start).cpu().numpy().astype(np.int64)
        keys += [a * n + b, b * n + a]
        weights += [weight, weight]
    return _graph(n, np.concatenate(keys), np.concatenate(weights), normalised)


def _upper_tiles(tile: DistanceTile, n: int, block: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield tiles row by row; a diagonal tile mirrors its upper half, with inf on the diagonal.

    For every unit the tiles come in ascending order of the other unit's index.
    """
    ranges = [slice(start, min(start + block, n)) for start in range(0, n, block)]
    probe: torch.Tensor | None = None
    for position, rows in enumerate(ranges):
        for columns in ranges[position:]:
            values = tile(rows, columns)
            total = values.sum()
            probe = total if probe is None else probe + total
            if rows == columns:
                # A product X Xᵀ need not be symmetric to the last bit.
                upper = values.triu(1)
                values = upper + upper.T
                values.fill_diagonal_(torch.inf)
            yield rows, columns, values
    # NaN and infinity survive summation; one check at the end waits for the device once.
    if probe is not None and not torch.isfinite(probe):
        raise ValueError("a distance is not finite")


def _clip(distance: torch.Tensor, normalised: bool) -> torch.Tensor:
    return distance.clamp(0.0, 1.0) if normalised else distance.clamp_min(0.0)


def _nearest(values: torch.Tensor, start: int, n: int, k: int, best: torch.Tensor | None) -> torch.Tensor:
    """Fold the (b, c) distances to units start .. start + c - 1 into the (b, <= k) packed best so far."""
    width = min(k + 1, values.shape[1])
    distance, target = values.topk(width, dim=1, largest=False)
    keys = _pack(distance, target + start, n)
    if width > k:
        # topk breaks ties anyhow; where the k-th equals the next, rank the whole row by index too.
        tied = (distance[:, -1] == distance[:, -2]).nonzero().squeeze(1)
        keys = keys[:, :k]
        if len(tied):
            whole = _pack(values[tied], torch.arange(start, start + values.shape[1], device=values.device), n)
            keys[tied] = whole.topk(k, dim=1, largest=False).values
    if best is None:
        return keys
    together = torch.cat([best, keys], dim=1)
    return together.topk(min(k, together.shape[1]), dim=1, largest=False).values


def _pack(distance: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    """Return int64 keys that order like (distance, index): float32 order like their bits."""
    bits = distance.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits) * n + index


def _unpack(keys: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float32 distances and int64 indices that `_pack` was given."""
    order = keys.div(n, rounding_mode="floor")
    bits = torch.where(order < 0, -order - (1 << 31), order).to(torch.int32)
    return bits.view(torch.float32), keys - order * n


def _graph(n: int, keys: np.ndarray, weight: np.ndarray, normalised: bool) -> Graph:
    """Build a Graph from directed keys row * n + column, duplicates with equal weights allowed."""
    order = np.argsort(keys)
    keys, weight = keys[order], weight[order]
    first = np.ones(keys.size, dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    keys, weight = keys[first], weight[first]
    row, column = np.divmod(keys, n)
    indptr = np.zeros(n + 1, dtype=np.int32)
    np.cumsum(np.bincount(row, minlength=n), out=indptr[1:])
    return Graph(indptr, column.astype(np.int32), weight.astype(np.float32), normalised)

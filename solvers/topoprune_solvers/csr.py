"""Compressed adjacency of an undirected graph, checked once at the door."""

from __future__ import annotations

import numpy as np
from scipy import sparse

__all__ = ["adjacency_from_dense", "adjacency_from_edges", "check_adjacency", "read_only"]


def read_only(array: np.ndarray) -> np.ndarray:
    """Return a read-only view or copy of an array that nobody else can write through."""
    if array.flags.writeable:
        array = array.copy()
        array.setflags(write=False)
    return array


def check_adjacency(indptr: np.ndarray, indices: np.ndarray, weight: np.ndarray | None = None) -> None:
    """Raise ValueError unless the arrays are a symmetric, loop-free, sorted CSR adjacency.

    Args:
        indptr: (n + 1,) integers.
        indices: (nnz,) integers in [0, n), strictly increasing within a row.
        weight: (nnz,) finite numbers equal in both directions, or None.

    Complexity: O(n + nnz).
    """
    if indptr.ndim != 1 or indptr.size == 0 or indptr[0] != 0 or np.any(np.diff(indptr) < 0):
        raise ValueError("indptr must be 1-D, start at 0 and never decrease")
    n = indptr.size - 1
    if indices.ndim != 1 or indices.size != indptr[-1]:
        raise ValueError(f"indices has {indices.size} entries, indptr ends at {int(indptr[-1])}")
    if indices.size and (indices.min() < 0 or indices.max() >= n):
        raise ValueError(f"indices must lie in [0, {n}), found {int(indices.min())}..{int(indices.max())}")
    rows = np.repeat(np.arange(n), np.diff(indptr))
    if np.any(rows == indices):
        raise ValueError(f"self-loop at node {int(rows[rows == indices][0])}; remove loops first")
    key = rows.astype(np.int64) * n + indices
    if np.any(np.diff(key) <= 0):
        raise ValueError("indices must be strictly increasing within each row (no duplicates)")
    mirrored = indices.astype(np.int64) * n + rows
    order = np.argsort(mirrored, kind="stable")
    if not np.array_equal(mirrored[order], key):
        raise ValueError("adjacency is not symmetric: some edge i-j has no j-i")
    if weight is not None:
        if weight.shape != indices.shape:
            raise ValueError(f"weight has shape {weight.shape}, expected {indices.shape}")
        if not np.all(np.isfinite(weight)):
            raise ValueError("edge weights must be finite")
        if not np.array_equal(weight[order], weight):
            raise ValueError("edge weights differ between i-j and j-i")


def adjacency_from_edges(
    n: int, edges: np.ndarray, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Build (indptr, indices, weight) from an (m, 2) edge list; each edge given once or twice.

    Duplicates keep the smallest weight; loops are dropped. Missing weights are 1.

    Complexity: O(m log m).
    """
    edges = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    values = np.ones(len(edges)) if weight is None else np.asarray(weight, dtype=np.float64).reshape(-1)
    if values.size != len(edges):
        raise ValueError(f"{len(edges)} edges but {values.size} weights")
    if edges.size and (edges.min() < 0 or edges.max() >= n):
        raise ValueError(f"edge endpoints must lie in [0, {n}), found {edges.min()}..{edges.max()}")
    proper = edges[:, 0] != edges[:, 1]
    edges, values = edges[proper], values[proper]
    source = np.concatenate([edges[:, 0], edges[:, 1]])
    target = np.concatenate([edges[:, 1], edges[:, 0]])
    doubled = np.concatenate([values, values])
    order = np.lexsort((doubled, target, source))
    source, target, doubled = source[order], target[order], doubled[order]
    first = np.ones(source.size, dtype=bool)
    first[1:] = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
    source, target, doubled = source[first], target[first], doubled[first]
    indptr = np.zeros(n + 1, dtype=np.int32)
    np.cumsum(np.bincount(source, minlength=n), out=indptr[1:])
    return indptr, target.astype(np.int32), doubled


def adjacency_from_dense(
    distance: np.ndarray, present: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Build (indptr, indices, weight) from a symmetric (n, n) matrix; `present` selects edges."""
    distance = np.asarray(distance, dtype=np.float64)
    if distance.ndim != 2 or distance.shape[0] != distance.shape[1]:
        raise ValueError(f"expected a square matrix, found shape {distance.shape}")
    mask = np.ones(distance.shape, dtype=bool) if present is None else np.asarray(present, dtype=bool)
    mask = mask & ~np.eye(len(distance), dtype=bool)
    row, col = np.nonzero(mask)
    matrix = sparse.csr_array((np.arange(row.size), (row, col)), shape=distance.shape)
    order = matrix.data
    return matrix.indptr.astype(np.int32), matrix.indices.astype(np.int32), distance[row, col][order]

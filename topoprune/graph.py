"""The graph IR: what a transformer layer looks like to a solver.

`ModelGraph` is the noun of this library. It holds the prunable units of a model (`Site`), how
alike they are (`Graph`, edge weights are distances), how they are wired (`BipartiteGraph`),
what they are worth and what they cost. Everything is numpy, frozen and read-only; nothing here
imports torch.

Shape legend: n units of a site, nnz stored directed edges, r rows, c columns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from topoprune.files import atomic_path, read_npz, write_npz
from topoprune.sites import Kind, Site, TensorSlice, structure_digest
from topoprune_solvers import adjacency_from_dense, adjacency_from_edges, check_adjacency

if TYPE_CHECKING:
    import igraph
    import networkx

__all__ = ["SCHEMA_VERSION", "BipartiteGraph", "Graph", "Kind", "ModelGraph", "Site", "TensorSlice", "structure_digest"]

SCHEMA_VERSION = 1


def _freeze(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if array.flags.writeable:
        array = array.copy()
        array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph on the units of a site, CSR, no loops; edge weights are distances.

    Args:
        indptr: (n + 1,) int32.
        indices: (nnz,) int32, sorted within a row.
        weight: (nnz,) float32 or float64 distances >= 0; small means alike.
        normalised: True if distances lie in [0, 1] and ``1 - distance`` is a similarity.

    Raises:
        ValueError: not symmetric, loops, unsorted, negative or non-finite weights.

    Example:
        >>> g = Graph.from_dense(np.array([[0.0, 0.2], [0.2, 0.0]]))
        >>> g
        Graph(2 nodes, 1 edges, density 1.000, distances 0.2..0.2)
    """

    indptr: np.ndarray
    indices: np.ndarray
    weight: np.ndarray
    normalised: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "indptr", _freeze(np.asarray(self.indptr, dtype=np.int32)))
        object.__setattr__(self, "indices", _freeze(np.asarray(self.indices, dtype=np.int32)))
        weight = np.asarray(self.weight)
        if weight.dtype not in (np.float32, np.float64):
            weight = weight.astype(np.float64)
        object.__setattr__(self, "weight", _freeze(weight))
        check_adjacency(self.indptr, self.indices, self.weight)
        if self.weight.size and self.weight.min() < 0:
            raise ValueError(f"distances must be >= 0, found {self.weight.min():g}")

    @classmethod
    def from_dense(cls, distance: np.ndarray, *, normalised: bool = False) -> Graph:
        """Build the complete graph of a symmetric (n, n) distance matrix; the diagonal is ignored."""
        indptr, indices, weight = adjacency_from_dense(distance)
        return cls(indptr, indices, weight, normalised)

    @classmethod
    def from_edges(
        cls, n: int, edges: np.ndarray, weight: np.ndarray | None = None, *, normalised: bool = False
    ) -> Graph:
        """Build from an (m, 2) edge list with (m,) distances (default 1)."""
        return cls(*adjacency_from_edges(n, edges, weight), normalised)

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return int(self.indptr.size - 1)

    @property
    def n_edges(self) -> int:
        """Number of undirected edges."""
        return int(self.indices.size // 2)

    @property
    def density(self) -> float:
        """Edges present over edges possible, in [0, 1]; 0 for fewer than two nodes."""
        n = self.n_nodes
        return 2 * self.n_edges / (n * (n - 1)) if n > 1 else 0.0

    def degree(self) -> np.ndarray:
        """Return (n,) int64 node degrees."""
        return np.diff(self.indptr).astype(np.int64)

    def edge_list(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (m, 2) edges with i < j and their (m,) distances."""
        rows = np.repeat(np.arange(self.n_nodes), np.diff(self.indptr))
        upper = rows < self.indices
        return np.stack([rows[upper], self.indices[upper]], axis=1), self.weight[upper]

    def to_dense(self) -> np.ndarray:
        """Return the (n, n) float64 distance matrix, inf where there is no edge, 0 on the diagonal."""
        dense = np.full((self.n_nodes, self.n_nodes), np.inf)
        rows = np.repeat(np.arange(self.n_nodes), np.diff(self.indptr))
        dense[rows, self.indices] = self.weight
        np.fill_diagonal(dense, 0.0)
        return dense

    def at_most(self, theta: float) -> Graph:
        """Return the subgraph of edges with distance <= theta (all nodes stay)."""
        kept = self.weight <= theta
        rows = np.repeat(np.arange(self.n_nodes), np.diff(self.indptr))
        indptr = np.zeros(self.n_nodes + 1, dtype=np.int32)
        np.cumsum(np.bincount(rows[kept], minlength=self.n_nodes), out=indptr[1:])
        return Graph(indptr, self.indices[kept], self.weight[kept], self.normalised)

    def quantile(self, q: float) -> float:
        """Return the q-quantile of the stored distances (each edge once); nan without edges."""
        return float(np.quantile(self.edge_list()[1], q)) if self.n_edges else float("nan")

    def to_igraph(self) -> igraph.Graph:
        """Return an `igraph.Graph` with edge attribute ``distance``."""
        import igraph

        edges, weight = self.edge_list()
        graph = igraph.Graph(n=self.n_nodes, edges=edges.tolist())
        graph.es["distance"] = weight.tolist()
        return graph

    def to_networkx(self) -> networkx.Graph:
        """Return a `networkx.Graph` with edge attribute ``distance`` (needs networkx)."""
        import networkx

        edges, weight = self.edge_list()
        graph = networkx.Graph()
        graph.add_nodes_from(range(self.n_nodes))
        graph.add_weighted_edges_from(
            ((int(i), int(j), float(w)) for (i, j), w in zip(edges, weight, strict=True)), weight="distance"
        )
        return graph

    def write_graphml(self, path: str | os.PathLike[str]) -> Path:
        """Write GraphML through igraph, atomically; return the path."""
        with atomic_path(path) as temporary:
            self.to_igraph().write_graphml(str(temporary))
        return Path(path)

    def __repr__(self) -> str:
        span = f"{self.weight.min():.3g}..{self.weight.max():.3g}" if self.weight.size else "none"
        return f"Graph({self.n_nodes} nodes, {self.n_edges} edges, density {self.density:.3f}, distances {span})"


@dataclass(frozen=True, eq=False)
class BipartiteGraph:
    """The weight edges of one matrix: rows are the units whose degree counts.

    Args:
        weight: (r, c) float32 or float64 edge strengths >= 0, e.g. |w|; 0 is no edge.
        param: qualified name of the parameter the edges live in.
        row_axis: axis of the parameter that the rows lie on (the other one is the columns).
    """

    weight: np.ndarray
    param: str
    row_axis: int = 0

    def __post_init__(self) -> None:
        weight = np.asarray(self.weight)
        if weight.ndim != 2 or self.row_axis not in (0, 1):
            raise ValueError(f"expected a (rows, columns) matrix and row_axis 0 or 1, found {weight.shape}")
        if not np.all(np.isfinite(weight)) or (weight.size and weight.min() < 0):
            raise ValueError(f"edge strengths of {self.param!r} must be finite and >= 0")
        object.__setattr__(self, "weight", _freeze(weight))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.weight.shape[0], self.weight.shape[1]

    def degree(self, epsilon: float = 1e-4) -> np.ndarray:
        """Return (r,) int64: entries of each row with strength >= epsilon."""
        return np.count_nonzero(self.weight >= epsilon, axis=1)

    def density(self, epsilon: float = 1e-4) -> float:
        """Return the share of entries >= epsilon, in [0, 1]."""
        return float(np.mean(self.weight >= epsilon)) if self.weight.size else 0.0

    def to_igraph(self, epsilon: float = 1e-4) -> igraph.Graph:
        """Return a bipartite `igraph.Graph`: rows first (type False), edges >= epsilon with ``weight``."""
        import igraph

        rows, cols = np.nonzero(self.weight >= epsilon)
        types = [False] * self.shape[0] + [True] * self.shape[1]
        graph = igraph.Graph.Bipartite(types, np.stack([rows, cols + self.shape[0]], axis=1).tolist())
        graph.es["weight"] = self.weight[rows, cols].tolist()
        return graph

    def to_networkx(self, epsilon: float = 1e-4) -> networkx.Graph:
        """Return a bipartite `networkx.Graph` (node attribute ``bipartite``, edge ``weight``)."""
        import networkx

        rows, cols = np.nonzero(self.weight >= epsilon)
        graph = networkx.Graph()
        graph.add_nodes_from(range(self.shape[0]), bipartite=0)
        graph.add_nodes_from(range(self.shape[0], sum(self.shape)), bipartite=1)
        graph.add_weighted_edges_from(
            (int(i), int(j) + self.shape[0], float(self.weight[i, j])) for i, j in zip(rows, cols, strict=True)
        )
        return graph

    def write_graphml(self, path: str | os.PathLike[str], epsilon: float = 1e-4) -> Path:
        """Write GraphML through igraph, atomically; return the path."""
        with atomic_path(path) as temporary:
            self.to_igraph(epsilon).write_graphml(str(temporary))
        return Path(path)

    def __repr__(self) -> str:
        return f"BipartiteGraph({self.param}: {self.shape[0]} x {self.shape[1]}, density {self.density():.3f})"


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """A model as units, distances, wires, worth and cost.

    Args:
        sites: all prunable sites, in model order.
        redundancy: site name -> `Graph` on its units (heads: complete; neurons: k nearest or
            threshold).
        connectivity: parameter name -> `BipartiteGraph` of its weight edges.
        importance: site name -> (n,) float64 >= 0.
        cost: site name -> (n,) float64 parameters per unit.
        measures: site name -> name of the distance its graph holds.
        model_type: the transformers model type, or ``"custom"``.
        weights_digest: digest of all tensors read, or ``""`` if it was not asked for.
    """

    sites: tuple[Site, ...]
    redundancy: Mapping[str, Graph] = field(default_factory=dict)
    connectivity: Mapping[str, BipartiteGraph] = field(default_factory=dict)
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    cost: Mapping[str, np.ndarray] = field(default_factory=dict)
    measures: Mapping[str, str] = field(default_factory=dict)
    model_type: str = "custom"
    weights_digest: str = ""

    def __post_init__(self) -> None:
        names = [site.name for site in self.sites]
        if len(set(names)) != len(names):
            raise ValueError(f"site names must be unique, found duplicates in {names}")
        by_name = {site.name: site for site in self.sites}
        object.__setattr__(self, "sites", tuple(self.sites))
        for label in ("redundancy", "connectivity", "importance", "cost", "measures"):
            value = dict(getattr(self, label))
            if label != "connectivity":
                unknown = sorted(set(value) - set(by_name))
                if unknown:
                    raise ValueError(f"{label} names unknown sites {unknown[:5]}; known: {names[:5]}...")
            if label in ("importance", "cost"):
                value = {name: self._vector(label, by_name[name], array) for name, array in value.items()}
            object.__setattr__(self, label, MappingProxyType(value))
        for name, graph in self.redundancy.items():
            if graph.n_nodes != by_name[name].n_units:
                raise ValueError(f"graph of {name!r} has {graph.n_nodes} nodes, its site {by_name[name].n_units} units")

    @classmethod
    def from_graph(cls, graph: Graph, name: str = "graph") -> ModelGraph:
        """Wrap a bare graph: one site, kind ``"node"``, so that it can be solved and compared like a model's.

        >>> ModelGraph.from_graph(Graph.from_edges(3, np.array([[0, 1], [1, 2]])))
        ModelGraph(graph: 1 sites, 3 nodes)
        """
        site = Site(name, "node", graph.n_nodes, 1, reads=())
        return cls((site,), {name: graph}, model_type="graph")

    @staticmethod
    def _vector(label: str, site: Site, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array, dtype=np.float64)
        if array.shape != (site.n_units,):
            raise ValueError(f"{label} of {site.name!r} has shape {array.shape}, expected ({site.n_units},)")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{label} of {site.name!r} is not finite at unit {int(np.argmin(np.isfinite(array)))}")
        return _freeze(array)

    @property
    def structure_digest(self) -> str:
        """Digest of the sites; a plan only fits a model with the same one."""
        return structure_digest(self.sites)

    def site(self, name: str) -> Site:
        """Return a site by name; KeyError lists the known ones."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"unknown site {name!r}; known: {', '.join(s.name for s in self.sites)}")

    def of_kind(self, *kinds: Kind) -> list[Site]:
        """Return the sites of the given kinds, in model order."""
        return [site for site in self.sites if site.kind in kinds]

    def summary(self) -> str:
        """Return a readable table, one line a site."""
        lines = [
            f"{self!r}",
            f"{'site':34} {'kind':9} {'units':>6} {'edges':>9} {'density':>8} {'importance':>18}  measure",
        ]
        for site in self.sites:
            graph, worth = self.redundancy.get(site.name), self.importance.get(site.name)
            edges = f"{graph.n_edges:9d} {graph.density:8.3f}" if graph is not None else f"{'-':>9} {'-':>8}"
            span = f"{worth.min():.3g}..{worth.max():.3g}" if worth is not None and worth.size else "-"
            measure = self.measures.get(site.name, "-")
            lines.append(f"{site.name:34} {site.kind:9} {site.n_units:6d} {edges} {span:>18}  {measure}")
        for name, wires in self.connectivity.items():
            lines.append(
                f"{name:34} {'edges':9} {wires.shape[0]:6d} {wires.shape[0] * wires.shape[1]:9d} {wires.density():8.3f}"
            )
        return "\n".join(lines)

    def to_igraph(self) -> igraph.Graph:
        """Return all redundancy graphs as one `igraph.Graph`, a component (or more) a site.

        Vertex attributes: ``site``, ``kind``, ``unit`` (index within the site), ``importance`` (nan
        where unknown); edge attribute: ``distance``.
        """
        import igraph

        sites = [site for site in self.sites if site.name in self.redundancy]
        offsets = np.cumsum([0] + [site.n_units for site in sites])
        lists = [self.redundancy[site.name].edge_list() for site in sites]
        edges = [pairs + offset for (pairs, _), offset in zip(lists, offsets, strict=False)]
        graph = igraph.Graph(n=int(offsets[-1]), edges=np.concatenate(edges).tolist() if edges else [])
        graph.es["distance"] = np.concatenate([w for _, w in lists]).tolist() if lists else []
        for label, values in (
            ("site", [[site.name] * site.n_units for site in sites]),
            ("kind", [[site.kind] * site.n_units for site in sites]),
            ("unit", [list(range(site.n_units)) for site in sites]),
            ("importance", [self.importance.get(s.name, np.full(s.n_units, np.nan)).tolist() for s in sites]),
        ):
            graph.vs[label] = [value for part in values for value in part]
        return graph

    def to_networkx(self) -> networkx.Graph:
        """Return `to_igraph` as a `networkx.Graph` (needs networkx)."""
        return self.to_igraph().to_networkx()

    def write_graphml(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_igraph` as GraphML, atomically; return the path."""
        with atomic_path(path) as temporary:
            self.to_igraph().write_graphml(str(temporary))
        return Path(path)

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for site in self.sites:
            counts[site.kind] = counts.get(site.kind, 0) + site.n_units
        units = ", ".join(f"{count} {kind}s" for kind, count in counts.items()) or "no units"
        return f"ModelGraph({self.model_type}: {len(self.sites)} sites, {units})"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one ``.npz`` (arrays) with an embedded JSON header; atomic, no pickle.

        Returns:
            The path written (``.npz`` is appended if missing).
        """
        arrays: dict[str, np.ndarray] = {}
        for name, graph in self.redundancy.items():
            for part in ("indptr", "indices", "weight"):
                arrays[f"redundancy/{name}/{part}"] = getattr(graph, part)
        for name, wires in self.connectivity.items():
            arrays[f"connectivity/{name}"] = wires.weight
        for label in ("importance", "cost"):
            for name, array in getattr(self, label).items():
                arrays[f"{label}/{name}"] = array
        header = {
            "format": "topoprune.ModelGraph",
            "schema_version": SCHEMA_VERSION,
            "sites": [site.to_dict() for site in self.sites],
            "normalised": {name: graph.normalised for name, graph in self.redundancy.items()},
            "connectivity": {name: [wires.param, wires.row_axis] for name, wires in self.connectivity.items()},
            "measures": dict(self.measures),
            "model_type": self.model_type,
            "structure_digest": self.structure_digest,
            "weights_digest": self.weights_digest,
        }
        return write_npz(path, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelGraph:
        """Read a graph written by `save`.

        Raises:
            ValueError: not such a file, a newer schema version, or content that does not match
                its digest.
        """
        header, arrays = read_npz(path, "topoprune.ModelGraph", SCHEMA_VERSION)
        graph = cls(
            sites=tuple(Site.from_dict(site) for site in header["sites"]),
            redundancy={
                name: Graph(
                    arrays[f"redundancy/{name}/indptr"],
                    arrays[f"redundancy/{name}/indices"],
                    arrays[f"redundancy/{name}/weight"],
                    normalised=flag,
                )
                for name, flag in header["normalised"].items()
            },
            connectivity={
                name: BipartiteGraph(arrays[f"connectivity/{name}"], param, axis)
                for name, (param, axis) in header["connectivity"].items()
            },
            importance=_by_label(arrays, "importance"),
            cost=_by_label(arrays, "cost"),
            measures=header["measures"],
            model_type=header["model_type"],
            weights_digest=header["weights_digest"],
        )
        if graph.structure_digest != header["structure_digest"]:
            raise ValueError(f"{path}: the sites do not match the recorded digest; the file was altered")
        return graph


def _by_label(arrays: Mapping[str, np.ndarray], label: str) -> dict[str, np.ndarray]:
    prefix = f"{label}/"
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}

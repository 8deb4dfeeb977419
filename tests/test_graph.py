"""Laws of the graph IR: symmetry, read-only arrays, digests, files and exports."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import igraph
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import build, inputs
from topoprune.extraction import extract
from topoprune.files import read_npz, write_npz
from topoprune.graph import BipartiteGraph, Graph, ModelGraph, Site, TensorSlice, structure_digest

networkx = pytest.importorskip("networkx", reason="networkx is an optional dependency")


def distances(n: int, seed: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).random((n, n)), 1)
    return upper + upper.T


def model_graph() -> ModelGraph:
    model = build("bert")
    return extract(
        model,
        measure={"heads": "output-gram", "neurons": "weights-linf"},
        calibration=[inputs(model)],
        include=("heads", "neurons", "input_dims", "edges"),
        neighbours=3,
    )


@pytest.fixture(scope="module")
def graph() -> ModelGraph:
    return model_graph()


# Graph


@given(n=st.integers(0, 12), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_dense_round_trip(n: int, seed: int) -> None:
    dense = distances(n, seed)
    graph = Graph.from_dense(dense)
    np.testing.assert_array_equal(graph.to_dense(), dense)
    assert (graph.n_nodes, graph.n_edges) == (n, n * (n - 1) // 2)
    assert graph.density == (1.0 if n > 1 else 0.0)
    edges, weight = graph.edge_list()
    again = Graph.from_edges(n, edges, weight)
    np.testing.assert_array_equal(again.to_dense(), dense)


@given(n=st.integers(1, 12), seed=st.integers(0, 99), theta=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_threshold_keeps_exactly_the_near_edges(n: int, seed: int, theta: float) -> None:
    graph = Graph.from_dense(distances(n, seed), normalised=True)
    cut = graph.at_most(theta)
    expected = np.where(distances(n, seed) <= theta, distances(n, seed), np.inf)
    np.fill_diagonal(expected, 0.0)
    np.testing.assert_array_equal(cut.to_dense(), expected)
    assert cut.normalised
    np.testing.assert_array_equal(cut.degree(), np.isfinite(expected).sum(1) - 1)


def test_graph_is_read_only_and_does_not_share_its_arrays() -> None:
    indptr, indices, weight = np.array([0, 1, 2]), np.array([1, 0]), np.array([0.5, 0.5])
    graph = Graph(indptr, indices, weight)
    weight[:] = 9
    assert graph.weight.tolist() == [0.5, 0.5]
    for array in (graph.indptr, graph.indices, graph.weight):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(FrozenInstanceError):
        graph.weight = weight  # type: ignore[misc]
    assert (graph.indptr.dtype, graph.indices.dtype) == (np.int32, np.int32)
    assert Graph(indptr, indices, np.array([1, 1])).weight.dtype == np.float64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([0, 1, 2], [1, 0], [1.0, 2.0]), "differ between"),
        (([0, 1, 1], [1], [1.0]), "not symmetric"),
        (([0, 1, 1], [0], [1.0]), "self-loop at node 0"),
        (([0, 1, 2], [1, 0], [-1.0, -1.0]), "distances must be >= 0, found -1"),
        (([0, 1, 2], [1, 0], [np.nan, np.nan]), "finite"),
        (([0, 1, 2], [1, 5], [1.0, 1.0]), r"must lie in \[0, 2\)"),
        (([1, 1], [], []), "start at 0"),
    ],
)
def test_malformed_graphs_are_refused(arrays: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(*(np.array(a) for a in arrays))


def test_quantile_counts_each_edge_once() -> None:
    graph = Graph.from_edges(4, np.array([[0, 1], [1, 2], [2, 3]]), np.array([0.1, 0.2, 0.9]))
    assert graph.quantile(0.5) == pytest.approx(0.2)
    assert np.isnan(Graph.from_edges(3, np.zeros((0, 2))).quantile(0.5))
    assert repr(Graph.from_edges(3, np.zeros((0, 2)))) == "Graph(3 nodes, 0 edges, density 0.000, distances none)"


def test_exports_of_a_graph_agree(tmp_path: Path) -> None:
    graph = Graph.from_dense(distances(7, 1)).at_most(0.6)
    edges, weight = graph.edge_list()
    pairs = {(int(i), int(j)): float(w) for (i, j), w in zip(edges, weight, strict=True)}
    first = graph.to_igraph()
    assert {(min(e.tuple), max(e.tuple)): e["distance"] for e in first.es} == pairs
    second = graph.to_networkx()
    assert second.number_of_nodes() == 7
    assert {(min(i, j), max(i, j)): d for i, j, d in second.edges(data="distance")} == pairs
    path = graph.write_graphml(tmp_path / "heads.graphml")
    third = igraph.Graph.Read_GraphML(str(path))
    assert third.vcount() == 7
    assert {(min(e.tuple), max(e.tuple)): e["distance"] for e in third.es} == pytest.approx(pairs)


# BipartiteGraph


def test_bipartite_degree_density_and_exports(tmp_path: Path) -> None:
    wires = BipartiteGraph(np.array([[0.5, 0.0, 1e-5], [0.2, 1e-4, 3.0]]), "layer.weight")
    assert wires.degree().tolist() == [1, 3]
    assert wires.degree(0.3).tolist() == [1, 1]
    assert wires.density() == pytest.approx(4 / 6)
    assert "layer.weight: 2 x 3" in repr(wires)
    first = wires.to_igraph()
    assert first.vs["type"] == [False] * 2 + [True] * 3
    expected = {(0, 2): 0.5, (1, 2): 0.2, (1, 3): 1e-4, (1, 4): 3.0}
    assert {e.tuple: e["weight"] for e in first.es} == expected
    second = wires.to_networkx()
    assert networkx.is_bipartite(second)
    assert {(i, j): w for i, j, w in second.edges(data="weight")} == expected
    third = igraph.Graph.Read_GraphML(str(wires.write_graphml(tmp_path / "wires.graphml")))
    assert third.ecount() == 4
    with pytest.raises(ValueError, match="read-only"):
        wires.weight[0, 0] = 1


@pytest.mark.parametrize("weight", [np.ones(3), -np.ones((2, 2)), np.full((2, 2), np.nan)])
def test_malformed_wires_are_refused(weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected a \(rows, columns\)|finite and >= 0"):
        BipartiteGraph(weight, "w")


def test_row_axis_is_checked() -> None:
    with pytest.raises(ValueError, match="row_axis 0 or 1"):
        BipartiteGraph(np.ones((2, 2)), "w", 2)


# Sites and digests


def test_site_round_trip_and_roles(graph: ModelGraph) -> None:
    for site in graph.sites:
        assert Site.from_dict(json.loads(json.dumps(site.to_dict()))) == site
        assert {site.one(piece.role).param for piece in site.slices} == {piece.param for piece in site.slices}
    with pytest.raises(KeyError, match="no tensor with role 'gate'"):
        graph.sites[0].one("gate")


def test_structure_digest_ignores_parameter_names_only(graph: ModelGraph) -> None:
    digest = graph.structure_digest
    assert digest == structure_digest(reversed(graph.sites))
    site = graph.sites[0]
    renamed = replace(site, reads=tuple(replace(piece, param=f"x.{piece.param}") for piece in site.reads), consumer="y")
    assert structure_digest([renamed, *graph.sites[1:]]) == digest
    for other in (
        replace(site, name="z"),
        replace(site, n_units=3),
        replace(site, kind="kv_group"),
        replace(site, reads=site.reads[1:]),
        replace(site, reads=(replace(site.reads[0], shape=(1, 2)), *site.reads[1:])),
    ):
        assert structure_digest([other, *graph.sites[1:]]) != digest
    assert structure_digest(graph.sites[1:]) != digest


# ModelGraph


def test_model_graph_is_read_only(graph: ModelGraph) -> None:
    with pytest.raises(TypeError):
        graph.importance["encoder.0.ffn"] = np.ones(3)  # type: ignore[index]
    for mapping in (graph.importance, graph.cost):
        for array in mapping.values():
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
    with pytest.raises(FrozenInstanceError):
        graph.sites = ()  # type: ignore[misc]


def test_lookups_and_summary(graph: ModelGraph) -> None:
    assert graph.site("encoder.1.ffn").kind == "neuron"
    with pytest.raises(KeyError, match=r"unknown site 'nope'; known: encoder\.0\.attention"):
        graph.site("nope")
    assert [site.name for site in graph.of_kind("head")] == ["encoder.0.attention", "encoder.1.attention"]
    text = graph.summary()
    assert text.startswith("ModelGraph(bert: 6 sites, 8 heads, 48 input_dims, 80 neurons)")
    assert all(site.name in text for site in graph.sites) and all(name in text for name in graph.connectivity)
    assert repr(ModelGraph(())) == "ModelGraph(custom: 0 sites, no units)"


def test_save_and_load_round_trip(graph: ModelGraph, tmp_path: Path) -> None:
    path = graph.save(tmp_path / "bert")
    assert path.name == "bert.npz"
    again = ModelGraph.load(path)
    assert again.sites == graph.sites
    assert (again.model_type, again.weights_digest, dict(again.measures)) == (
        graph.model_type,
        graph.weights_digest,
        dict(graph.measures),
    )
    assert again.structure_digest == graph.structure_digest
    assert list(again.redundancy) == list(graph.redundancy)
    for name, own in graph.redundancy.items():
        other = again.redundancy[name]
        assert other.normalised == own.normalised
        for part in ("indptr", "indices", "weight"):
            np.testing.assert_array_equal(getattr(other, part), getattr(own, part))
            assert getattr(other, part).dtype == getattr(own, part).dtype
            assert not getattr(other, part).flags.writeable
    for name, wires in graph.connectivity.items():
        np.testing.assert_array_equal(again.connectivity[name].weight, wires.weight)
        assert (again.connectivity[name].param, again.connectivity[name].row_axis) == (wires.param, wires.row_axis)
    for label in ("importance", "cost"):
        for name, array in getattr(graph, label).items():
            np.testing.assert_array_equal(getattr(again, label)[name], array)
    assert list(tmp_path.iterdir()) == [path]  # no temporary file stays


def test_same_model_same_file_content(graph: ModelGraph) -> None:
    again = model_graph()
    assert again.weights_digest == graph.weights_digest
    for name, own in graph.redundancy.items():
        np.testing.assert_array_equal(again.redundancy[name].weight, own.weight)


def test_bad_files(graph: ModelGraph, tmp_path: Path) -> None:
    path = graph.save(tmp_path / "good.npz")
    header, arrays = read_npz(path, "topoprune.ModelGraph", 1)
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
        ModelGraph.load(tmp_path / "nothing.npz")
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    with pytest.raises(ValueError, match=r"text\.npz is not a readable topoprune\.ModelGraph file"):
        ModelGraph.load(text)
    half = tmp_path / "half.npz"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="not a readable"):
        ModelGraph.load(half)
    bare = tmp_path / "bare.npz"
    np.savez(bare, x=np.ones(2))
    with pytest.raises(ValueError, match="not a readable"):
        ModelGraph.load(bare)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="not a readable"):
        ModelGraph.load(pickled)
    with pytest.raises(ValueError, match=r"holds a 'something\.else'"):
        ModelGraph.load(write_npz(tmp_path / "other", {**header, "format": "something.else"}, arrays))
    with pytest.raises(ValueError, match=r"schema version 99.*upgrade topoprune"):
        ModelGraph.load(write_npz(tmp_path / "newer", {**header, "schema_version": 99}, arrays))
    altered = json.loads(json.dumps(header))
    altered["sites"][0]["head_width"] = 99
    altered["sites"][0]["reads"][0]["shape"] = [2, 2]
    with pytest.raises(ValueError, match="was altered"):
        ModelGraph.load(write_npz(tmp_path / "altered", altered, arrays))


def test_saving_into_a_missing_folder(graph: ModelGraph, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        graph.save(tmp_path / "no" / "graph.npz")


SITE = Site("a", "neuron", 3, 1, (TensorSlice("w", 0, "in", (3, 2)),))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(sites=(SITE, SITE)), "unique"),
        (dict(redundancy={"b": Graph.from_dense(np.zeros((3, 3)))}), r"redundancy names unknown sites \['b'\]"),
        (dict(redundancy={"a": Graph.from_dense(np.zeros((4, 4)))}), "has 4 nodes, its site 3 units"),
        (dict(importance={"a": np.ones(2)}), r"importance of 'a' has shape \(2,\), expected \(3,\)"),
        (dict(cost={"a": np.array([1, np.inf, 1])}), "cost of 'a' is not finite at unit 1"),
        (dict(measures={"c": "x"}), "measures names unknown sites"),
    ],
)
def test_inconsistent_model_graphs_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelGraph(**{"sites": (SITE,), **fields})


def test_slice_indices_and_counts() -> None:
    piece = TensorSlice("w", 1, "q", (5, 12), offset=2, width=3)
    assert piece.indices(np.array([0, 2])).tolist() == [2, 3, 4, 8, 9, 10]
    site = Site("s", "head", 3, 3, (piece, TensorSlice("b", 0, "q_bias", (12,), 2, 3)))
    assert (site.parameters_per_unit, site.matrix_parameters_per_unit) == (18, 15)

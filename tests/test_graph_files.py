"""Graph files: whatever the bytes, a valid graph or an error that names the file and the line."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.tiny import build
from topoprune import Graph, ModelGraph, extract
from topoprune.graph_files import FORMATS, is_graph_file, read_graph, write_graph
from topoprune.graph_text import parse_edge_list, parse_pace
from topoprune.graph_xml import parse_graphml

PARSERS: dict[str, Callable[[bytes, str], Graph]] = {
    "x.gr": parse_pace,
    "x.txt": parse_edge_list,
    "x.graphml": parse_graphml,
}
GRAPHML = """<?xml version="1.0"?>
<graphml xmlns="http://graphml.graphdrawing.org/xmlns">
<key id="d" for="edge" attr.name="distance" attr.type="double"/>
<graph edgedefault="undirected">
<node id="a"/><node id="b"/><node id="c"/>
<edge source="a" target="b"><data key="d">0.5</data></edge>
<edge source="c" target="b"/>
</graph></graphml>
"""


def same(first: Graph, second: Graph) -> bool:
    return all(np.array_equal(getattr(first, f), getattr(second, f)) for f in ("indptr", "indices", "weight"))


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    n = draw(st.integers(1, 12))
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda p: p[0] != p[1])
    edges = draw(st.lists(pair, max_size=20, unique_by=frozenset))
    distance = draw(st.lists(st.floats(0, 1e9), min_size=len(edges), max_size=len(edges)))
    return Graph.from_edges(n, np.array(edges, dtype=np.int64).reshape(-1, 2), np.array(distance))


# -- what is read ------------------------------------------------------------------------------


@given(
    graph=graphs(),
    suffix=st.sampled_from([s for s in FORMATS if s != ".graphml"]),
    packed=st.sampled_from(["", ".gz", ".xz"]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_written_graphs_are_read_back(graph: Graph, suffix: str, packed: str, tmp_path: Path) -> None:
    back = read_graph(write_graph(graph, tmp_path / f"g{suffix}{packed}"))
    assert isinstance(back, Graph)
    if suffix == ".gr":
        graph = Graph(graph.indptr, graph.indices, np.ones_like(graph.weight))
    assert same(back, graph)


def test_graphml_of_igraph_is_read_back(tmp_path: Path) -> None:
    graph = Graph.from_edges(4, np.array([[0, 1], [1, 2]]), np.array([0.25, 3.5]))
    assert same(read_graph(write_graph(graph, tmp_path / "g.graphml")), graph)  # type: ignore[arg-type]
    (tmp_path / "g.graphml.gz").write_bytes(gzip.compress((tmp_path / "g.graphml").read_bytes()))
    assert same(read_graph(tmp_path / "g.graphml.gz"), graph)  # type: ignore[arg-type]


def test_model_graphs_are_read_back(tmp_path: Path) -> None:
    graph = extract(build("bert"), include=("heads",))
    back = read_graph(write_graph(graph, tmp_path / "g.npz"))
    assert isinstance(back, ModelGraph) and back.structure_digest == graph.structure_digest
    union = read_graph(write_graph(graph, tmp_path / "g.graphml"))
    assert isinstance(union, Graph) and union.n_nodes == sum(site.n_units for site in graph.sites)
    with pytest.raises(ValueError, match=r"expected \.npz or \.graphml"):
        write_graph(graph, tmp_path / "g.gr")


@pytest.mark.parametrize(
    ("text", "nodes", "edges", "distances"),
    [
        ("0 1\n1 2\n", 3, [(0, 1), (1, 2)], [1, 1]),
        ("# comment\n% comment\n\n0\t1\t0.5\r\n1\t2\t1e-3\r\n", 3, [(0, 1), (1, 2)], [0.5, 1e-3]),
        ("0,1\n\n2,1", 3, [(0, 1), (1, 2)], [1, 1]),
        ("source,target,weight\n0,1,.5\n1,2,2.", 3, [(0, 1), (1, 2)], [0.5, 2]),
        ("From To\n0 1\n", 2, [(0, 1)], [1]),
        ("anna, bert, 0.5\nbert, carl, 1\n", 3, [(0, 1), (1, 2)], [0.5, 1]),
        ("été a\n# between\na c\n", 3, [(0, 1), (1, 2)], [1, 1]),
        ("\ufeff0 1\n", 2, [(0, 1)], [1]),
        ("0 1\n1 0\n", 2, [(0, 1)], [1]),
        ("0 5", 6, [(0, 5)], [1]),
        ("0 1 2\n1 2 0\n", 3, [(0, 1), (1, 2)], [2, 0]),
    ],
)
def test_edge_lists(text: str, nodes: int, edges: list[tuple[int, int]], distances: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = parse_edge_list(text.encode(), "x.txt")
    pairs, weight = graph.edge_list()
    assert (graph.n_nodes, [tuple(p) for p in pairs.tolist()], weight.tolist()) == (nodes, edges, distances)


def test_pace_with_comments_anywhere() -> None:
    plain = parse_pace(b"p ds 4 2\n1 2\n2 3\n", "x.gr")
    commented = parse_pace(b"c one\np ds 4 2\nc two\n1 2\n\nc\n2 3\n", "x.gr")
    assert same(plain, commented) and plain.n_nodes == 4
    assert parse_pace(b"p ds 3 0", "x.gr").n_edges == 0 and parse_pace(b"p tw 0 0\n", "x.gr").n_nodes == 0


def test_graphml_attributes() -> None:
    graph = parse_graphml(GRAPHML.encode(), "x.graphml")
    assert graph.edge_list()[1].tolist() == [0.5, 1.0]
    default = GRAPHML.replace('"double"/>', '"double"><default>0.25</default></key>')
    assert parse_graphml(default.encode(), "x.graphml").edge_list()[1].tolist() == [0.5, 0.25]
    weight = GRAPHML.replace('"distance"', '"weight"')
    assert parse_graphml(weight.encode(), "x.graphml").edge_list()[1].tolist() == [0.5, 1.0]
    other = GRAPHML.replace('"distance"', '"colour"')
    assert parse_graphml(other.encode(), "x.graphml").edge_list()[1].tolist() == [1.0, 1.0]


def test_loops_and_differing_duplicates_warn() -> None:
    with pytest.warns(UserWarning, match=r"x\.txt: 1 self-loops dropped"):
        assert parse_edge_list(b"0 1\n2 2\n", "x.txt").n_nodes == 3
    with pytest.warns(UserWarning, match=r"1 duplicate edges joined, the smallest distance stays"):
        graph = parse_edge_list(b"0 1 3\n1 0 2\n", "x.txt")
    assert graph.edge_list()[1].tolist() == [2]
    with pytest.warns(UserWarning, match="1 duplicate edges joined"):  # they count as promised
        assert parse_pace(b"p ds 2 2\n1 2\n1 2\n", "x.gr").n_edges == 1


def test_archives(tmp_path: Path) -> None:
    plain, path = b"p ds 3 2\n1 2\n2 3\n", tmp_path / "x.gr.tar.xz"
    path.write_bytes(lzma.compress(tar({"./inner.gr": plain})))
    expected = parse_pace(plain, "x.gr")
    assert same(read_graph(path), expected)  # type: ignore[arg-type]
    loose = tmp_path / "graphs.tar.gz"  # the member says the format
    loose.write_bytes(gzip.compress(tar({"../../y.gr": plain})))
    assert same(read_graph(loose), expected) and is_graph_file(loose)  # type: ignore[arg-type]
    for members, message in (
        ({"a.gr": plain, "b.gr": plain}, r"exactly one file in the archive, found 2: 'a\.gr', 'b\.gr'"),
        ({}, "exactly one file in the archive, found 0: none"),
    ):
        path.write_bytes(lzma.compress(tar(members)))
        with pytest.raises(ValueError, match=rf"x\.gr\.tar\.xz: expected {message}"):
            read_graph(path)
    path.write_bytes(lzma.compress(tar({"a.gr": plain})[:515]))
    with pytest.raises(ValueError, match=r"x\.gr\.tar\.xz: .*(truncated|unexpected end of data)"):
        read_graph(path)
    loose.write_bytes(gzip.compress(tar({"y.doc": plain})))
    with pytest.raises(ValueError, match=r"unknown kind of graph file 'y\.doc' in the archive"):
        read_graph(loose)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.gr", "p ds 3 2\n1 2\n3 x\n", "x.gr:3: expected two node numbers in 1..3, found '3 x'"),
        ("x.gr", "p ds 3 2\n1 2\nc\n1 4\n", "x.gr:4: expected two node numbers in 1..3, found '1 4'"),
        ("x.gr", "p ds 3 2\n1 2\n0 1\n", "x.gr:3: expected two node numbers in 1..3, found '0 1'"),
        ("x.gr", "p ds 3 2\n1 2 3\n1\n", "x.gr:2: expected two node numbers in 1..3, found '1 2 3'"),
        ("x.gr", "c\np ds 3 2\n1 2\n", "x.gr:2: the header promises 2 edges, the file has 1; truncated?"),
        ("x.gr", "p ds 3 1\n1 2\n2 3\n", "x.gr:1: the header promises 1 edges, the file has 2"),
        ("x.gr", "p ds 999999999999 0\n", "x.gr:1: the header asks for 999999999999 nodes; the limit is"),
        ("x.gr", "p ds 3\n1 2\n", "x.gr:1: expected a header 'p ds n m' before the edges, found 'p ds 3'"),
        ("x.gr", "p ds -3 1\n1 2\n", "x.gr:1: expected a header"),
        ("x.gr", "1 2\n", "x.gr:1: expected a header"),
        ("x.gr", "c nothing\n", "x.gr: no header"),
        ("x.gr", "p ds 3 1\np ds 3 1\n1 2\n", "x.gr:2: a second header 'p ds 3 1'; the first is on line 1"),
        ("x.gr", "p ds 2 1\n99999999999999999999 1\n", "x.gr:2: expected two node numbers"),
        ("x.gr", "p ds 2 1\n²  1\n", "x.gr:2: expected two node numbers"),
        ("x.gr", "\0\1\2", "x.gr:1: not text"),
        ("x.txt", "0 1\n1\n", "x.txt:2: expected 2 columns as in the lines before (node, node, distance), found '1'"),
        ("x.txt", "0 1 2 3\n", "x.txt:1: expected two or three columns"),
        ("x.txt", "0,,1\n", "x.txt:1: expected 3 columns"),
        ("x.txt", "0 1 0.5\n1 2 nan\n", "x.txt:2: distance 'nan'; expected a finite number >= 0"),
        ("x.txt", "0 1 0.5\n1 2 -1\n", "x.txt:2: distance '-1'; expected a finite number >= 0"),
        ("x.txt", "0 1 1e999\n", "x.txt:1: distance '1e999'"),
        ("x.txt", "0 1 far\n", "x.txt:1: distance 'far'"),
        ("x.txt", "0 1\n2 a\n", "x.txt:2: node 'a' is a name, the lines before have numbers"),
        ("x.txt", "b a\n2 a\n", "x.txt:2: node '2' is a number, the lines before have names"),
        ("x.txt", "0 1\n-2 0\n", "x.txt:2: node '-2'; expected a node number 0, 1, 2, ... or a name"),
        ("x.txt", "0 1\n2 999999999999\n", "x.txt:2: node number '999999999999'; the limit is"),
        ("x.txt", "# only\n", "x.txt: no edge found"),
        ("x.txt", "a b\n\xff\n", None),
        ("x.txt", "# topoprune edge list: 3 nodes, 2 edges\n0 1\n", "x.txt:1: the first line promises 3 nodes and 2"),
        ("x.txt", "# topoprune edge list: 99999999999 nodes, 0 edges\n", "x.txt:1: the first line promises 999"),
        ("x.graphml", GRAPHML[:-15], "x.graphml:8: not well-formed XML"),
        ("x.graphml", GRAPHML.replace("0.5", "nan"), "x.graphml:6: distance 'nan'"),
        ("x.graphml", GRAPHML.replace('"c" ', '"z" '), "x.graphml:7: an edge of a node that is not declared"),
        ("x.graphml", GRAPHML.replace('<node id="b"/>', '<node id="a"/>'), "x.graphml:5: node 'a' is declared twice"),
        ("x.graphml", GRAPHML.replace(' target="b"/>', "/>"), "x.graphml:7: a <edge> without target"),
        ("x.graphml", GRAPHML.replace("<graph ", "<graph/><graph "), "x.graphml:4: a second <graph>"),
        ("x.graphml", GRAPHML.replace("<node", "<hyperedge/><node", 1), "x.graphml:5: a <hyperedge>"),
        ("x.graphml", "<html/>", "x.graphml:1: expected <graphml>, found <html>"),
        ("x.graphml", "<graphml/>", "x.graphml: no <graph> found"),
        ("x.graphml", '<!DOCTYPE g [<!ENTITY a "b">]>\n<graphml/>', "x.graphml:1: an entity declaration"),
        ("x.graphml", "0 1\n", "x.graphml:1: not well-formed XML"),
    ],
)
def test_malformed_text_names_file_and_line(name: str, text: str, message: str | None) -> None:
    if message is None:
        parsed = PARSERS[name]
        with pytest.raises(ValueError, match=r"x\.txt:2: not text"):
            parsed(text.encode("latin-1"), name)
        return
    with pytest.raises(ValueError) as error:
        PARSERS[name](text.encode(), name)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("packed", [".gz", ".xz", ".tar.xz"])
def test_damaged_compression_names_the_file(packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.gr{packed}"
    squeeze = gzip.compress if packed == ".gz" else lzma.compress
    whole = squeeze(tar({"x.gr": b"p ds 1 0\n"}) if packed == ".tar.xz" else b"p ds 3 2\n1 2\n2 3\n")
    for data, message in (
        (whole[:-9], "ends too early; the file is truncated"),
        (b"", "is empty"),
        (b"junk" + whole, "cannot unpack"),
        (squeeze(b""), "is empty" if packed != ".tar.xz" else "cannot read the tar archive"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            read_graph(path)
        assert path.name in str(error.value)


def test_files_that_are_no_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.gr"):
        read_graph(tmp_path / "x.gr")
    with pytest.raises(ValueError, match=r"is a folder; expected a graph file \(\.npz, \.gr"):
        read_graph(tmp_path)
    (tmp_path / "x.doc").write_text("0 1\n")
    with pytest.raises(ValueError, match=r"x\.doc: unknown kind of graph file; known: \.npz, \.gr, \.graphml"):
        read_graph(tmp_path / "x.doc")
    (tmp_path / "x.el").write_text(" \n")
    with pytest.raises(ValueError, match=r"x\.el is empty; expected a graph as edge list"):
        read_graph(tmp_path / "x.el")
    monkeypatch.setattr("topoprune.graph_files.MAX_BYTES", 1 << 10)
    (tmp_path / "bomb.gr.xz").write_bytes(lzma.compress(b"p ds 1 0\n" + b"c\n" * 1000))
    with pytest.raises(ValueError, match=r"bomb\.gr\.xz: more than .* the limit for a graph file"):
        read_graph(tmp_path / "bomb.gr.xz")
    with pytest.raises(ValueError, match="cannot write a graph to"):
        write_graph(Graph.from_edges(1, np.empty((0, 2))), tmp_path / "x.doc")


TEXT = st.text(alphabet="0123456789 \t\r\n,.#%+-eEpdscabn²\ufeff\0_", max_size=60).map(str.encode)
MARKUP = st.lists(st.sampled_from([*GRAPHML.splitlines(), "<node/>", "<data key='d'>", "</edge>", "-1"]), max_size=12)


@given(
    name=st.sampled_from(sorted(PARSERS)),
    data=st.one_of(
        st.binary(max_size=80), TEXT, TEXT.map(lambda t: b"p ds 5 1\n" + t), MARKUP.map(lambda m: "\n".join(m).encode())
    ),
)
@example(name="x.txt", data=b"0 1 2\n 3 4 5\n6 7 8e")
@example(name="x.txt", data=b"0,1,,2\n")
@example(name="x.gr", data=b"p ds 2 1\r\n1 2\r")
@settings(deadline=None)
def test_any_bytes_give_a_graph_or_a_named_error(name: str, data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = PARSERS[name](data, name)
        except ValueError as error:
            assert str(error).startswith(name)
        else:
            assert same(graph, Graph(graph.indptr, graph.indices, graph.weight))


@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.floats(0, 1e6)), min_size=1, max_size=12),
    columns=st.sampled_from([2, 3]),
    separator=st.sampled_from([" ", "\t", ",", "  "]),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
@settings(deadline=None)
def test_quick_and_slow_path_agree(rows: list[tuple[int, int, float]], columns: int, separator: str, end: str) -> None:
    text = end.join(separator.join(map(repr, row[:columns])) for row in rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quick = parse_edge_list(text.encode(), "x.txt")
        slow = parse_edge_list((text + "\n# a comment at the end").encode(), "x.txt")
        n = 1 + max(max(row[:2]) for row in rows)
        straight = Graph.from_edges(
            n, np.array([r[:2] for r in rows]), np.array([r[2] for r in rows]) if columns == 3 else None
        )
    assert same(quick, slow) and same(quick, straight)


@given(
    packed=st.sampled_from([".gz", ".xz", ".tar.xz", ".tar.gz", ""]),
    data=st.binary(max_size=60),
    cut=st.integers(0, 200),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_gives_a_graph_or_a_named_error(packed: str, data: bytes, cut: int, tmp_path: Path) -> None:
    path = tmp_path / f"x.gr{packed}"
    squeeze = {"gz": gzip.compress, "xz": lzma.compress, "": bytes}[packed.rpartition(".")[2]]
    content = squeeze(tar({"x.gr": data}) if packed.startswith(".tar") else data)
    path.write_bytes(content[:cut] + data[:5] if cut % 2 else content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert isinstance(read_graph(path), Graph)
        except ValueError as error:
            assert path.name in str(error)


@given(data=st.binary(max_size=100))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_npz_gives_a_graph_or_a_named_error(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.npz"):
        read_graph(path)

"""Graph files: our own ``.npz``, GraphML, edge lists and PACE ``.gr``, also compressed.

Whatever the bytes of a file are, the answer is a valid graph or a `ValueError` that names the file and,
where there is one, the line.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path

from topoprune.files import atomic_path
from topoprune.graph import Graph, ModelGraph
from topoprune.graph_text import parse_edge_list, parse_pace, render_edge_list, render_pace
from topoprune.graph_xml import parse_graphml

__all__ = ["FORMATS", "MAX_BYTES", "is_graph_file", "read_graph", "write_graph"]

FORMATS = {
    ".gr": "PACE",
    ".graphml": "GraphML",
    ".txt": "edge list",
    ".edges": "edge list",
    ".el": "edge list",
    ".tsv": "edge list",
    ".csv": "edge list",
}
_PACKED = (".tar.xz", ".tar.gz", ".xz", ".gz")
MAX_BYTES = 2 << 30
"""Largest size of a graph file after unpacking; a small archive can hold a very large file."""


def read_graph(path: str | os.PathLike[str]) -> ModelGraph | Graph:
    """Read a graph file; the suffix says the format.

    - ``.npz``: a `ModelGraph` written by `ModelGraph.save`.
    - ``.gr``: PACE, a header ``p ds n m``, then m lines of two node numbers in 1..n; ``c`` starts a comment.
    - ``.graphml``: nodes, and edges with their ``distance`` (or ``weight``).
    - ``.txt .edges .el .tsv .csv``: an edge list, two or three columns (node, node, distance) divided by white
      space or commas; ``#`` and ``%`` start comments. Nodes are numbers from 0, or names, which are numbered in
      order of appearance; a first line of column titles (source, target, weight) is skipped.

    All but ``.npz`` also as ``.gz``, ``.xz``, or ``.tar.xz`` / ``.tar.gz`` with exactly one file in it.

    An edge without a distance has distance 1. Directions are dropped. Loops are dropped and edges given several
    times are joined at their smallest distance; a warning says so (not for two directions of one edge that agree).
    An unpacked file may have `MAX_BYTES` (2 GiB), a graph `topoprune.graph_text.MAX_NODES` (20 million) nodes.

    Args:
        path: the file.

    Returns:
        A `ModelGraph` for ``.npz``, a `Graph` for all others.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown suffix, or a malformed, truncated or too large file; names file and line.

    Complexity: O(bytes + m log m).
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no file {path}")
    if file.is_dir():
        raise ValueError(f"{path} is a folder; expected a graph file ({_known()})")
    if file.name.lower().endswith(".npz"):
        return ModelGraph.load(file)
    stem, packed = _unpacked_name(file.name)
    suffix = Path(stem).suffix.lower()
    if suffix not in FORMATS and not packed.startswith(".tar"):
        raise ValueError(f"{path}: unknown kind of graph file; known: {_known()}")
    data, member = _contents(file, packed)
    if suffix not in FORMATS:
        suffix = Path(member).suffix.lower()
        if suffix not in FORMATS:
            raise ValueError(f"{path}: unknown kind of graph file {member!r} in the archive; known: {_known()}")
    if not data.strip():
        raise ValueError(f"{path} is empty; expected a graph as {FORMATS[suffix]}")
    name = str(path)
    if suffix == ".gr":
        return parse_pace(data, name)
    if suffix == ".graphml":
        return parse_graphml(data, name)
    return parse_edge_list(data, name)


def write_graph(graph: ModelGraph | Graph, path: str | os.PathLike[str]) -> Path:
    """Write a graph file that `read_graph` reads, atomically; the suffix says the format.

    Edge lists hold the distances exactly and the number of nodes in a first comment; ``.gr`` holds no distances.

    Args:
        graph: a `Graph`; a `ModelGraph` goes to ``.npz`` or ``.graphml``.
        path: the file, its suffix as for `read_graph`, without ``.tar``.

    Returns:
        The path written.

    Raises:
        ValueError: an unknown suffix, or a format that cannot hold the graph.
    """
    file = Path(path)
    stem, packed = _unpacked_name(file.name)
    suffix = Path(stem).suffix.lower()
    if isinstance(graph, ModelGraph):
        if suffix == ".npz" and not packed:
            return graph.save(file)
        if suffix == ".graphml" and not packed:
            return graph.write_graphml(file)
        raise ValueError(f"cannot write a ModelGraph to {path}; expected .npz or .graphml")
    if suffix not in FORMATS or packed.startswith(".tar") or (suffix == ".graphml" and packed):
        raise ValueError(f"cannot write a graph to {path}; known: .graphml, or .gr .txt .edges .el .tsv .csv [.gz .xz]")
    if suffix == ".graphml":
        return graph.write_graphml(file)
    separator = {".csv": ",", ".tsv": "\t"}.get(suffix, " ")
    data = render_pace(graph) if suffix == ".gr" else render_edge_list(graph, separator)
    with atomic_path(file) as temporary:
        if packed == ".gz":
            data = gzip.compress(data, mtime=0)
        elif packed == ".xz":
            data = lzma.compress(data)
        temporary.write_bytes(data)
    return file


def is_graph_file(path: str | os.PathLike[str]) -> bool:
    """Return True if the name is one of a graph file that `read_graph` knows; the file need not exist."""
    stem, packed = _unpacked_name(Path(path).name)
    suffix = Path(stem).suffix.lower()
    return suffix in FORMATS or packed.startswith(".tar") or (suffix == ".npz" and not packed)


def _known() -> str:
    return f".npz, {', '.join(FORMATS)}, also with {', '.join(sorted(_PACKED))}"


def _unpacked_name(name: str) -> tuple[str, str]:
    """Split ``x.gr.tar.xz`` into ``("x.gr", ".tar.xz")``."""
    for packed in _PACKED:
        if name.lower().endswith(packed):
            return name[: -len(packed)], packed
    return name, ""


def _contents(file: Path, packed: str) -> tuple[bytes, str]:
    """Return the unpacked bytes, and the name of the one file in a tar."""
    if packed and file.stat().st_size == 0:
        raise ValueError(f"{file} is empty; expected {packed} data")
    try:
        if packed.endswith(".xz"):
            with lzma.open(file) as stream:
                data = stream.read(MAX_BYTES + 1)
        elif packed.endswith(".gz"):
            with gzip.open(file) as stream:
                data = stream.read(MAX_BYTES + 1)
        else:
            with open(file, "rb") as stream:
                data = stream.read(MAX_BYTES + 1)
    except PermissionError:
        raise
    except EOFError:
        raise ValueError(f"{file}: the {packed} data ends too early; the file is truncated") from None
    except Exception as error:  # damaged bytes surface as zlib, lzma, gzip, struct and other errors
        raise ValueError(f"{file}: cannot unpack the {packed} data: {error}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{file}: more than {MAX_BYTES >> 30} GiB unpacked, the limit for a graph file")
    return _only_member(file, data) if packed.startswith(".tar") else (data, "")


def _only_member(file: Path, data: bytes) -> tuple[bytes, str]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            members = [member for member in archive.getmembers() if not member.isdir()]
            stream = archive.extractfile(members[0]) if len(members) == 1 and members[0].isfile() else None
            content = None if stream is None else stream.read()
    except Exception as error:  # damaged headers surface as tar, value, overflow, unicode and other errors
        raise ValueError(f"{file}: cannot read the tar archive: {error}") from error
    if content is None:
        names = ", ".join(repr(member.name) for member in members[:5]) or "none"
        raise ValueError(f"{file}: expected exactly one file in the archive, found {len(members)}: {names}")
    if len(content) != members[0].size:
        raise ValueError(f"{file}: the archive ends too early; the file is truncated")
    return content, members[0].name

"""Text formats of graphs: edge lists and PACE ``.gr``, quick when well-formed, precise when not."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from typing import NoReturn

import numpy as np

from topoprune.graph import Graph

__all__ = ["MAX_NODES", "build_graph", "parse_edge_list", "parse_pace", "render_edge_list", "render_pace"]

MAX_NODES = 20_000_000
"""Largest number of nodes a file may ask for: memory grows with it, even without an edge."""

_TITLES = {"source", "target", "src", "dst", "from", "to", "u", "v", "node1", "node2", "weight", "distance"}
_OWN_COMMENT = re.compile(r"# topoprune edge list: (\d{1,18}) nodes, (\d{1,18}) edges")
_BLANK, _COMMA, _DIGIT, _FLOAT = 1, 2, 3, 4  # kinds of bytes the quick path knows; 0 is any other
_KIND = np.zeros(256, dtype=np.uint8)
for _characters, _of in ((b" \t\r\n", _BLANK), (b",", _COMMA), (b"0123456789", _DIGIT), (b".+-eE", _FLOAT)):
    _KIND[list(_characters)] = _of
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)


def parse_pace(data: bytes, name: str) -> Graph:
    """Return the graph of a PACE file: a header ``p ds n m``, m lines of two nodes in 1..n, comments ``c``.

    Args:
        data: contents of the file. name: what errors call it.

    Raises:
        ValueError: malformed; names the line.
    """
    n = m = header_line = -1
    body = 0
    for line, text, end in _lines(data, name, "c"):
        words = text.split()
        numbers = [_integer(word) for word in words[2:]]
        if words[0] != "p" or len(words) != 4 or None in numbers:
            _refuse(name, line, f"expected a header 'p ds n m' before the edges, found {_short(text)}")
        n, m = (int(number or 0) for number in numbers)
        header_line, body = line, end
        break
    if header_line < 0:
        raise ValueError(f"{name}: no header 'p ds n m' found")
    if n > MAX_NODES:
        _refuse(name, header_line, f"the header asks for {n} nodes; the limit is {MAX_NODES}")
    table = _table(data[body:], 2)
    edges = None if table is None else table[0]
    if edges is None or (edges.size and (edges.min() < 1 or edges.max() > n)):
        edges = _pace_lines(data, name, n, header_line)
    if len(edges) != m:
        what = "truncated?" if len(edges) < m else "expected as many as promised"
        _refuse(name, header_line, f"the header promises {m} edges, the file has {len(edges)}; {what}")
    return build_graph(n, edges - 1, None, name)


def _pace_lines(data: bytes, name: str, n: int, header_line: int) -> np.ndarray:
    """Return the edges line by line: comments between them are skipped, the first bad line is named."""
    pairs: list[tuple[int, int]] = []
    for line, text, _ in _lines(data, name, "c"):
        if line <= header_line:
            continue
        numbers = [_integer(word) for word in text.split()]
        if len(numbers) != 2 or any(number is None or not 1 <= number <= n for number in numbers):
            if text.startswith("p "):
                _refuse(name, line, f"a second header {_short(text)}; the first is on line {header_line}")
            _refuse(name, line, f"expected two node numbers in 1..{n}, found {_short(text)}")
        pairs.append((numbers[0] or 0, numbers[1] or 0))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def parse_edge_list(data: bytes, name: str) -> Graph:
    """Return the graph of an edge list: two or three columns, nodes as numbers from 0 or as names.

    Args:
        data: contents of the file. name: what errors call it.

    Raises:
        ValueError: malformed; names the line.
    """
    promised = _own_comment(data)
    start = _first_row(data)
    for columns in (2, 3):
        table = _table(data[start:], columns)
        if table is not None and table[0].size and table[0].max() < MAX_NODES:
            n = int(table[0].max()) + 1 if promised is None else promised[0]
            if n <= MAX_NODES and promised in (None, (n, len(table[0]))) and table[0].max() < n:
                return build_graph(n, *table, name)
    return _edge_list_lines(data, name, promised)


def _own_comment(data: bytes) -> tuple[int, int] | None:
    """Return the (nodes, edges) that our own first comment promises; `render_edge_list` writes it."""
    found = _OWN_COMMENT.fullmatch(data[:100].partition(b"\n")[0].decode("latin-1").rstrip())
    return None if found is None else (int(found[1]), int(found[2]))


def _first_row(data: bytes) -> int:
    """Return where the first line lies that is neither a comment nor column titles, for the quick path."""
    start = 0
    while data[start : start + 1] in (b"#", b"%"):
        end = data.find(b"\n", start)
        start = len(data) if end < 0 else end + 1
    title = data[start : start + 100].partition(b"\n")[0].decode("latin-1")
    return start + len(title) if _words(title) and _is_title(_words(title)) else start


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")] if "," in text else text.split()


def _is_title(words: list[str]) -> bool:
    return len(words) in (2, 3) and all(word.lower() in _TITLES for word in words)


def _edge_list_lines(data: bytes, name: str, promised: tuple[int, int] | None) -> Graph:
    ends: list[str] = []
    values: list[float] = []
    lines: list[int] = []
    columns = 0
    for line, text, _ in _lines(data, name, "#%"):
        words = _words(text)
        if not columns:
            columns = len(words)
            if _is_title(words):
                continue
        if len(words) != columns or columns not in (2, 3) or "" in words:
            expected = "two or three columns" if columns not in (2, 3) else f"{columns} columns as in the lines before"
            _refuse(name, line, f"expected {expected} (node, node, distance), found {_short(text)}")
        if columns == 3:
            values.append(_distance(words[2], name, line))
        ends += words[:2]
        lines.append(line)
    if not lines and promised is None:
        raise ValueError(f"{name}: no edge found; expected lines of two or three columns")
    edges, n = _numbered(ends, lines, name)
    if promised is not None:
        if n > promised[0] or len(lines) != promised[1]:
            found = f"found {n} and {len(lines)}; truncated?"
            _refuse(name, 1, f"the first line promises {promised[0]} nodes and {promised[1]} edges, {found}")
        n = promised[0]
    if n > MAX_NODES:
        _refuse(name, 1, f"the first line promises {n} nodes; the limit is {MAX_NODES}")
    return build_graph(n, edges, np.array(values) if columns == 3 else None, name)


def _numbered(ends: list[str], lines: list[int], name: str) -> tuple[np.ndarray, int]:
    """Turn node words, two a line, into (m, 2) node numbers and their count; names count in order of appearance."""
    numeric = [word.isascii() and word.isdigit() for word in ends]
    if all(numeric):
        long = next((i for i, word in enumerate(ends) if len(word) > 18 or int(word) >= MAX_NODES), None)
        if long is not None:
            _refuse(name, lines[long // 2], f"node number {_short(ends[long])}; the limit is {MAX_NODES} nodes")
        numbers = np.array([int(word) for word in ends], dtype=np.int64)
        return numbers.reshape(-1, 2), int(numbers.max(initial=-1)) + 1
    table: dict[str, int] = {}
    for i, word in enumerate(ends):
        if not numeric[i] and _NUMBER.fullmatch(word):
            _refuse(name, lines[i // 2], f"node {_short(word)}; expected a node number 0, 1, 2, ... or a name")
        if numeric[i] != numeric[0]:
            kinds = ("a number", "names") if numeric[i] else ("a name", "numbers")
            _refuse(name, lines[i // 2], f"node {_short(word)} is {kinds[0]}, the lines before have {kinds[1]}")
        table.setdefault(word, len(table))
    return np.array([table[word] for word in ends], dtype=np.int64).reshape(-1, 2), len(table)


def build_graph(n: int, edges: np.ndarray, distance: np.ndarray | None, name: str) -> Graph:
    """Return the graph of (m, 2) edges; warn where loops are dropped or different distances joined.

    Args:
        n: nodes. edges: (m, 2) int64 in [0, n). distance: (m,) float64 >= 0, or None for 1 everywhere.
        name: the file, for the warnings.
    """
    graph = Graph.from_edges(n, edges, distance)
    loops = int(np.count_nonzero(edges[:, 0] == edges[:, 1]))
    if loops:
        warnings.warn(f"{name}: {loops} self-loops dropped", stacklevel=3)
    if len(edges) - loops > graph.n_edges and _duplicates_differ(edges, distance):
        extra = len(edges) - loops - graph.n_edges
        warnings.warn(f"{name}: {extra} duplicate edges joined, the smallest distance stays", stacklevel=3)
    return graph


def _duplicates_differ(edges: np.ndarray, distance: np.ndarray | None) -> bool:
    """Return True unless all duplicates are the two directions of an edge, with one distance."""
    pairs = np.unique(edges, axis=0)
    if len(pairs) < len(edges):
        return True
    if distance is None:
        return False
    order = np.lexsort((edges.max(axis=1), edges.min(axis=1)))
    low, high, value = edges.min(axis=1)[order], edges.max(axis=1)[order], distance[order]
    same = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
    return bool(np.any(same & (value[1:] != value[:-1])))


def render_pace(graph: Graph) -> bytes:
    """Return a graph as PACE ``.gr``; distances are left out."""
    edges, _ = graph.edge_list()
    rows = [f"p ds {graph.n_nodes} {graph.n_edges}"]
    rows += [f"{i} {j}" for i, j in (edges + 1).tolist()]
    return ("\n".join(rows) + "\n").encode()


def render_edge_list(graph: Graph, separator: str = " ") -> bytes:
    """Return a graph as an edge list with exact distances, three columns."""
    edges, distance = graph.edge_list()
    rows = [f"# topoprune edge list: {graph.n_nodes} nodes, {graph.n_edges} edges"]
    rows += [
        f"{i}{separator}{j}{separator}{w!r}"
        for (i, j), w in zip(edges.tolist(), distance.astype(np.float64).tolist(), strict=True)
    ]
    return ("\n".join(rows) + "\n").encode()


def _table(data: bytes, columns: int) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Return (m, 2) int64 nodes and, of three columns, (m,) float64 distances; None unless every line is like that.

    Vectorised over the bytes: the quick path of all text formats. What it takes the slow path takes too, with the
    same result. Blank lines are skipped; columns are divided by white space, or by commas and nothing else.
    """
    raw = np.frombuffer(data, dtype=np.uint8)
    kind = _KIND[raw]
    if not kind.all() or (columns == 2 and np.any(kind == _FLOAT)):
        return None
    newlines = np.flatnonzero(raw == ord("\n"))
    commas = np.flatnonzero(kind == _COMMA)
    if commas.size:
        per_line = np.bincount(np.searchsorted(newlines, commas), minlength=newlines.size + 1)
        if np.any((per_line != 0) & (per_line != columns - 1)) or b" " in data or b"\t" in data:
            return None
    word = kind >= _DIGIT
    step = np.diff(word.view(np.int8), prepend=np.int8(0), append=np.int8(0))
    starts, stops = np.flatnonzero(step == 1), np.flatnonzero(step == -1)
    if starts.size % columns:
        return None
    line = np.searchsorted(newlines, starts).reshape(-1, columns)
    if np.any(line[:, 0] != line[:, -1]) or np.any(line[1:, 0] == line[:-1, -1]):
        return None
    if commas.size and np.count_nonzero(per_line) != len(line):
        return None
    ends = [bounds.reshape(-1, columns)[:, :2].reshape(-1) for bounds in (starts, stops)]
    nodes = _integers(raw, kind, *ends)
    if nodes is None:
        return None
    if columns == 2:
        return nodes.reshape(-1, 2), None
    try:
        words = data.replace(b",", b" ").split()[2::3]
        distance = np.fromiter(map(float, words), dtype=np.float64, count=len(words))
    except ValueError:
        return None
    if distance.size and not (np.isfinite(distance).all() and distance.min() >= 0):
        return None
    return nodes.reshape(-1, 2), distance


def _integers(raw: np.ndarray, kind: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray | None:
    """Return the (k,) int64 numbers between the (k,) starts and stops; None unless all are of 1..18 digits."""
    length = stops - starts
    if length.size and length.max() > 18:
        return None
    values = np.zeros(starts.size, dtype=np.int64)
    for position in range(int(length.max(initial=0))):
        longer = np.flatnonzero(length > position)
        at = starts[longer] + position
        if np.any(kind[at] != _DIGIT):
            return None
        values[longer] = values[longer] * 10 + (raw[at] - np.uint8(ord("0")))
    return values


def _lines(data: bytes, name: str, comment: str) -> Iterator[tuple[int, str, int]]:
    """Yield (line number, text, position after it) of lines that are neither blank nor comments."""
    position = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    line = 0
    while position < len(data):
        end = data.find(b"\n", position)
        after = len(data) if end < 0 else end + 1
        line += 1
        raw = data[position:after]
        position = after
        try:
            text = raw.decode().strip()
        except UnicodeDecodeError:
            text = "\0"
        if not text or (text[0] in comment and (comment != "c" or text.split(maxsplit=1)[0] == "c")):
            continue
        if "\0" in text:
            _refuse(name, line, "not text (expected UTF-8); is it another kind of file?")
        yield line, text, after


def _integer(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() and len(word) <= 18 else None


def _distance(word: str, name: str, line: int) -> float:
    value = float(word) if _NUMBER.fullmatch(word) and word.isascii() else None
    if value is None or not math.isfinite(value) or value < 0:
        _refuse(name, line, f"distance {_short(word)}; expected a finite number >= 0")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _refuse(name: str, line: int, what: str) -> NoReturn:
    raise ValueError(f"{name}:{line}: {what}")

"""GraphML: nodes, and edges with a distance; errors name the line."""

from __future__ import annotations

import math
from typing import NoReturn
from xml.parsers import expat

import numpy as np

from topoprune.graph import Graph
from topoprune.graph_text import MAX_NODES, build_graph

__all__ = ["parse_graphml"]

_DISTANCES = ("distance", "weight")


def parse_graphml(data: bytes, name: str) -> Graph:
    """Return the graph of a GraphML file; the edge attribute ``distance`` (or else ``weight``) is the distance.

    Edges without it get the attribute's default, or 1. All other attributes are skipped. Nested graphs, several
    graphs and hyperedges are refused, entity declarations too (they can grow without limit).

    Args:
        data: contents of the file. name: what errors call it.

    Raises:
        ValueError: malformed; names the line.
    """
    reader = _Reader(name)
    try:
        reader.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ValueError(f"{name}:{error.lineno}: not well-formed XML: {expat.ErrorString(error.code)}") from None
    return reader.graph()


class _Reader:
    """Callbacks of the XML parser, and what they have gathered."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.text
        self.parser.EntityDeclHandler = self.entity
        self.depth = self.graphs = 0
        self.inside_graph = self.inside_edge = False
        self.nodes: dict[str, int] = {}
        self.sources: list[str] = []
        self.targets: list[str] = []
        self.lines: list[int] = []
        self.rows: dict[str, list[int]] = {attribute: [] for attribute in _DISTANCES}
        self.values: dict[str, list[float]] = {attribute: [] for attribute in _DISTANCES}
        self.keys: dict[str, str] = {}
        self.defaults: dict[str, float] = {}
        self.key = self.data_key = ""
        self.characters: list[str] | None = None

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if ":" in tag:
            tag = tag.rpartition(":")[2]
        self.depth += 1
        if self.depth == 1 and tag != "graphml":
            self.refuse(f"expected <graphml>, found <{tag[:60]}>")
        if tag == "edge":
            self.sources.append(self.needed("edge", "source", attributes))
            self.targets.append(self.needed("edge", "target", attributes))
            self.lines.append(self.parser.CurrentLineNumber)
            self.inside_edge = True
        elif tag == "data":
            key = attributes.get("key", "")
            if self.inside_edge and key in self.keys:
                self.data_key, self.characters = key, []
        elif tag == "node":
            node = self.needed("node", "id", attributes)
            if node in self.nodes:
                self.refuse(f"node {node[:60]!r} is declared twice")
            if len(self.nodes) >= MAX_NODES:
                self.refuse(f"more than {MAX_NODES} nodes, the limit")
            self.nodes[node] = len(self.nodes)
        elif tag == "key":
            if attributes.get("for", "all") in ("edge", "all") and attributes.get("attr.name") in _DISTANCES:
                self.key = self.needed("key", "id", attributes)
                self.keys[self.key] = attributes["attr.name"]
        elif tag == "default":
            if self.key:
                self.characters = []
        elif tag == "graph":
            self.graphs += 1
            if self.graphs > 1:
                self.refuse("a second <graph>; expected one graph, not nested")
        elif tag == "hyperedge":
            self.refuse("a <hyperedge>; expected edges between two nodes")

    def end(self, tag: str) -> None:
        if ":" in tag:
            tag = tag.rpartition(":")[2]
        self.depth -= 1
        if tag == "edge":
            self.inside_edge = False
        elif tag == "data" and self.characters is not None:
            attribute = self.keys[self.data_key]
            self.rows[attribute].append(len(self.sources) - 1)
            self.values[attribute].append(self.distance("".join(self.characters)))
            self.characters = None
        elif tag == "default" and self.characters is not None:
            self.defaults[self.keys[self.key]] = self.distance("".join(self.characters))
            self.characters = None
        elif tag == "key":
            self.key = ""

    def text(self, characters: str) -> None:
        if self.characters is not None:
            self.characters.append(characters)

    def entity(self, *_: object) -> None:
        self.refuse("an entity declaration; expected GraphML without a DTD of its own")

    def graph(self) -> Graph:
        if not self.graphs:
            raise ValueError(f"{self.name}: no <graph> found")
        nodes = self.nodes
        try:
            flat = [nodes[end] for side in (self.sources, self.targets) for end in side]
        except KeyError:
            sides = zip(self.sources, self.targets, self.lines, strict=True)
            line = next(line for source, target, line in sides if source not in nodes or target not in nodes)
            raise ValueError(f"{self.name}:{line}: an edge of a node that is not declared") from None
        ends = np.array(flat, dtype=np.int64).reshape(2, -1).T
        attribute = next((a for a in _DISTANCES if a in self.keys.values()), None)
        distance = None
        if attribute is not None:
            distance = np.full(len(ends), self.defaults.get(attribute, 1.0))
            distance[self.rows[attribute]] = self.values[attribute]
        return build_graph(len(self.nodes), ends, distance, self.name)

    def distance(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            self.refuse(f"distance {text[:60]!r}; expected a finite number >= 0")
        return value

    def needed(self, tag: str, attribute: str, attributes: dict[str, str]) -> str:
        if attribute not in attributes:
            self.refuse(f"a <{tag}> without {attribute}")
        return attributes[attribute]

    @property
    def line(self) -> int:
        return self.parser.CurrentLineNumber

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.name}:{self.line}: {what}")

"""Pictures for people: where the zeros are, and which head stands in for which.

matplotlib is imported inside the functions and drawn without a display. Colours are from the
Okabe-Ito palette, safe for colour-blind readers; shape and outline carry the same information.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from topoprune.files import atomic_path

__all__ = ["HeadLayer", "RunPicture", "draw_runs"]

_KEPT, _PRUNED, _EDGE, _TEXT = "#0072B2", "#D55E00", "#c4c4c4", "#222222"
_HEAD = 0.75  # inches above the drawings of a band: its title and its note


@dataclass(frozen=True)
class HeadLayer:
    """The heads of one attention layer.

    Args:
        name: shown above the graph.
        keep: (n,) bool, True for what stays.
        dominator: (n,) int, the head that stands in for each pruned one; -1 for none. None: unknown.
        edges: (m, 2) int, pairs of similar heads.
    """

    name: str
    keep: np.ndarray
    dominator: np.ndarray | None = None
    edges: np.ndarray | None = None


@dataclass(frozen=True)
class RunPicture:
    """What is drawn of one run.

    Args:
        title: the run and its figures, one line.
        shares: layer -> part -> share that is gone, in [0, 1] (see `topoprune.tasks.shares`).
        layers: head graphs, in model order.
        note: what the edges and arrows are, one line.
    """

    title: str
    shares: Mapping[str, Mapping[str, float]]
    layers: Sequence[HeadLayer]
    note: str = ""


def draw_runs(runs: Sequence[RunPicture], path: str | os.PathLike[str], *, title: str = "", dpi: int = 150) -> Path:
    """Write one picture with a band for each run: sparsity map on the left, head graphs on the right.

    Args:
        runs: at least one. path: ``.png``, ``.pdf`` or ``.svg``. title: above everything.

    Returns:
        The path.

    Raises:
        ValueError: nothing to draw. OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not runs:
        raise ValueError("there is no run to draw")
    heights = []
    for run in runs:
        rows = math.ceil(max(len(run.layers), 1) / _columns(len(run.layers)))
        heights.append(_HEAD + max(2.2 * rows, 1.1 + 0.4 * len(run.shares)))
    figure = Figure(figsize=(15.0, sum(heights) + 1.0), dpi=dpi, facecolor="white")  # not pyplot: no global state
    FigureCanvasAgg(figure)
    total = figure.get_figheight()
    top = total - 0.55
    if title:
        figure.text(0.02, (total - 0.3) / total, title, size=15, weight="bold", color=_TEXT, va="center")
    for run, height in zip(runs, heights, strict=True):
        _band(figure, run, top / total, height / total, total)
        top -= height
    _legend(figure, 0.22 / total)
    target = Path(path)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=dpi, facecolor="white", format=target.suffix.lstrip(".") or "png")
    return target


def _columns(n_layers: int) -> int:
    return 3 if n_layers <= 6 else 6


def _band(figure: Any, run: RunPicture, top: float, height: float, total: float) -> None:
    inch = 1 / total
    figure.text(0.02, top - 0.22 * inch, run.title, size=12.5, weight="bold", color=_TEXT, va="center")
    if run.note:
        figure.text(0.02, top - 0.48 * inch, run.note, size=10, color="#555555", va="center")
    bottom, body = top - height, height - _HEAD * inch
    map_height = min(body - 0.9 * inch, 0.55 * inch * max(len(run.shares), 2))
    axes = figure.add_axes((0.065, bottom + (body - 0.6 * inch - map_height) / 2, 0.36, map_height))
    _sparsity_map(axes, run.shares)
    if not run.layers:
        return
    columns = _columns(len(run.layers))
    rows = math.ceil(len(run.layers) / columns)
    left, width = 0.46, 0.53
    for i, layer in enumerate(run.layers):
        row, column = divmod(i, columns)
        cell = (
            left + column * width / columns,
            bottom + body * (1 - (row + 1) / rows),
            width / columns,
            body / rows,
        )
        _head_graph(figure.add_axes(cell), layer)


def _sparsity_map(axes: Any, shares: Mapping[str, Mapping[str, float]]) -> None:
    parts = list(dict.fromkeys(part for row in shares.values() for part in row))
    order = ("heads", "neurons", "q", "k", "v", "o", "in", "out")
    parts.sort(key=lambda part: order.index(part) if part in order else len(order))
    values = np.array([[shares[layer].get(part, math.nan) for part in parts] for layer in shares])
    axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            colour = "white" if value > 0.55 else _TEXT
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", size=10, color=colour)
    axes.set_xticks(range(len(parts)), parts, size=10.5)
    axes.set_yticks(range(len(shares)), list(shares), size=10.5)
    axes.set_ylabel("layer", size=10.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, colors=_TEXT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xticks(np.arange(len(parts) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(shares) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    units = sum(part in ("heads", "neurons") for part in parts)
    if 0 < units < len(parts):
        axes.axvline(units - 0.5, color="white", linewidth=7)
        for middle, text in (
            ((units - 1) / 2, "% of units removed"),
            ((units + len(parts) - 1) / 2, "% of weights that are zero"),
        ):
            axes.annotate(
                text, (middle, 1), (0, 22), xycoords=("data", "axes fraction"), textcoords="offset points",
                ha="center", va="bottom", size=9.5, color="#555555",
            )  # fmt: skip


def _head_graph(axes: Any, layer: HeadLayer) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import FancyArrowPatch

    n = len(layer.keep)
    angle = math.pi / 2 - 2 * math.pi * np.arange(n) / max(n, 1)
    place = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    size = float(np.clip(3600 / max(n, 8), 60, 270))
    if layer.edges is not None and len(layer.edges):
        axes.add_collection(LineCollection(place[np.asarray(layer.edges)], colors=_EDGE, linewidths=1.0, zorder=1))
    if layer.dominator is not None:
        for head in np.flatnonzero(~layer.keep):
            heir = int(layer.dominator[head])
            if heir >= 0 and heir != head:
                axes.add_patch(
                    FancyArrowPatch(
                        place[head], place[heir], arrowstyle="-|>", mutation_scale=12, color=_PRUNED, linewidth=1.6,
                        shrinkA=math.sqrt(size) / 2, shrinkB=math.sqrt(size) / 2 + 1,
                        connectionstyle="arc3,rad=0.12", zorder=2,
                    )
                )  # fmt: skip
    for kept, face, edge, style, marker in (
        (True, _KEPT, _KEPT, "-", "o"),
        (False, "white", _PRUNED, (0, (2, 1.5)), "o"),
    ):
        chosen = place[np.asarray(layer.keep) == kept]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=size,
            c=face,
            edgecolors=edge,
            linewidths=1.6,
            linestyle=style,
            marker=marker,
            zorder=3,
        )
    for i, (x, y) in enumerate(place):
        axes.text(
            x, y - 0.01, str(i), ha="center", va="center", size=9.5 if n <= 16 else 7, zorder=4,
            color="white" if layer.keep[i] else _PRUNED, weight="bold",
        )  # fmt: skip
    axes.text(
        0,
        1.36,
        f"{layer.name}: {int(np.sum(layer.keep))} of {n} stay",
        ha="center",
        va="center",
        size=10.5,
        color=_TEXT,
    )
    axes.set_xlim(-1.4, 1.4)
    axes.set_ylim(-1.22, 1.52)
    axes.set_aspect("equal")
    axes.axis("off")


def _legend(figure: Any, height: float) -> None:
    from matplotlib.lines import Line2D

    round_marker: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 11, "markeredgewidth": 1.6}
    figure.legend(
        handles=[
            Line2D([], [], color=_KEPT, **round_marker, label="head stays"),
            Line2D([], [], markerfacecolor="white", markeredgecolor=_PRUNED, **round_marker, label="head pruned"),
            Line2D([], [], color=_PRUNED, linewidth=1.8, marker=">", markersize=7, label="to its dominator"),
            Line2D([], [], color=_EDGE, linewidth=1.6, label="similar heads"),
        ],
        loc="center", bbox_to_anchor=(0.72, height), ncols=4, frameon=False, fontsize=10.5,
    )  # fmt: skip

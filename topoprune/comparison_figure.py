"""A comparison as a picture: what each solver reached, how far that can be from the best, and how long it took.

matplotlib is imported inside the functions and drawn without a display; colours are from the Okabe-Ito palette.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from topoprune.files import atomic_path

if TYPE_CHECKING:
    from topoprune.comparison_table import Comparison

__all__ = ["SUFFIXES", "check_picture_path", "draw_comparison"]

SUFFIXES = (".png", ".svg", ".pdf")
_PROVEN, _OPEN, _BOUND, _TEXT, _GREY = "#0072B2", "#E69F00", "#D55E00", "#222222", "#888888"


def check_picture_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a picture can be written to, so that a long run does not end in an error.

    Raises:
        ValueError: a suffix other than .png .svg .pdf. OSError: a folder that does not exist or is not writable.
    """
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot draw {path}; expected a name that ends in {', '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: folder {file.parent} does not exist; create it first")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: it is a folder, or its folder is not writable")
    return file


def draw_comparison(comparison: Comparison, path: str | os.PathLike[str], *, title: str = "", dpi: int = 150) -> Path:
    """Write one picture: left the objectives with the best bound, right the seconds, a row a solver.

    Args:
        comparison: from `compare`. Solvers that refused stand there with their reason.
        path: ``.png``, ``.svg`` or ``.pdf``. title: above everything.

    Returns:
        The path.

    Raises:
        ValueError: an unknown suffix, or no rows. OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    target, rows = check_picture_path(path), list(comparison.rows)
    if not rows:
        raise ValueError("there is no solver to draw")
    figure = Figure(figsize=(10.5, 1.5 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_TEXT)
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    left.set_yticks(range(len(rows)), [str(row["solver"]) for row in rows])
    left.set_ylim(len(rows) - 0.4, -0.6)
    solved = [(y, row) for y, row in enumerate(rows) if not row["error"]]
    finite = [(y, row) for y, row in solved if math.isfinite(row["objective"])]
    for y, row in finite:
        proven = row["gap"] == 0
        left.barh(y, row["objective"], height=0.62, color=_PROVEN if proven else _OPEN)
    bound = next((row["bound"] for _, row in solved if row["bound"] is not None and math.isfinite(row["bound"])), None)
    if bound is not None:
        left.axvline(bound, color=_BOUND, linewidth=1.6, linestyle=(0, (4, 2)))
    # The space right of the longest bar is for the texts.
    extent = max([abs(row["objective"]) for _, row in finite] + [abs(bound or 0.0), 1e-12])
    lowest = min([0.0] + [row["objective"] for _, row in finite])
    left.set_xlim(1.02 * lowest, 1.4 * extent)
    for y, row in enumerate(rows):
        if row["error"]:
            reason = str(row["error"])
            reason = reason if len(reason) <= 70 else reason[:67] + "..."
            clear = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            left.text(0.01 * extent, y, reason, va="center", color=_GREY, fontsize=9, bbox=clear)
            continue
        gap = "no bound" if math.isnan(row["gap"]) else "optimal" if row["gap"] == 0 else f"gap {row['gap']:.1%}"
        start = max(row["objective"], bound or 0.0, 0.0) if math.isfinite(row["objective"]) else 0.0
        left.text(start + 0.015 * extent, y, f"{row['objective']:.5g}  ({gap})", va="center", color=_TEXT, fontsize=9)
    label = "objective, sum over sites"
    left.set_xlabel(label if bound is None else f"{label}; dashed: best bound proven, {bound:.5g}", color=_TEXT)
    seconds = [(y, max(float(row["seconds"]), 1e-6)) for y, row in solved]
    right.set_xscale("log")
    right.hlines([y for y, _ in seconds], 1e-7, [s for _, s in seconds], color="#c4c4c4", linewidth=1.2)
    right.plot([s for _, s in seconds], [y for y, _ in seconds], "o", color=_TEXT, markersize=5)
    for y, s in seconds:
        right.annotate(_duration(s), (s, y), (7, 0), textcoords="offset points", va="center", color=_TEXT, fontsize=9)
    times = [s for _, s in seconds] or [1.0]
    right.set_xlim(min(times) / 3, max(times) * 8)
    right.set_xlabel("seconds, all sites (log scale)", color=_TEXT)
    if title:
        figure.suptitle(title, color=_TEXT, fontsize=11)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=dpi, format=target.suffix[1:].lower())
    return target


def _duration(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"

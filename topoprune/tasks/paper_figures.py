"""The paper's own figures of one run or several: as numbers, as a table, as a picture.

Four of them: how the spread of connectivity changes with sparsity, which layers lose heads, how important removed
heads were beside kept ones, and how often each head goes over runs (seeds).

References: Dhurandhar et al., NeuroPrune, Findings of ACL 2024, arXiv 2404.01306.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from topoprune.comparison_figure import check_picture_path
from topoprune.files import atomic_path
from topoprune.train.record import HeadSite, RunRecord

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["draw_history", "history_data", "history_table", "write_history"]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
_TEXT, _GREY = "#222222", "#888888"


def write_history(record: RunRecord, folder: str | os.PathLike[str]) -> dict[str, str]:
    """Write ``history.json``, and ``history.png`` where matplotlib is installed; return kind -> path."""
    files = {"history": str(record.save(Path(folder) / "history.json"))}
    if find_spec("matplotlib") is not None:
        files["history picture"] = str(draw_history([record], Path(folder) / "history.png"))
    return files


def history_data(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the four figures as numbers, JSON-ready.

    Returns:
        ``runs``: for each run its name, and lists over its steps: ``step``, ``zeros``, ``removable``,
        ``connectivity_sd``, ``attention_sd``, ``heads`` (kept), and ``importance_ratio``, ``energy_ratio`` (removed to
        kept heads). ``layers``: attention layers in order. ``lost``: layer -> heads lost in each run.
        ``removed_importance``, ``kept_importance``: layer -> mean over decisions and runs, None without any.
        ``frequency``: layer -> share of the runs in which each head is gone in the end.

    Raises:
        ValueError: no run, or runs of models with different heads.
    """
    sites = _common_sites(records)
    gone = [record.gone() for record in records]
    worth = [record.worth() for record in records]
    names = [site.name for site in sites]
    return {
        "runs": [
            {
                "name": record.name,
                "seed": record.seed,
                "step": [s.step for s in record.steps],
                "zeros": [s.zeros for s in record.steps],
                "removable": [s.removable for s in record.steps],
                "connectivity_sd": [s.connectivity_sd for s in record.steps],
                "attention_sd": [s.attention_sd for s in record.steps],
                "heads": [sum(s.kept.values()) for s in record.steps],
                "importance_ratio": record.ratio(),
                "energy_ratio": record.ratio("energy"),
            }
            for record in records
        ],
        "layers": names,
        "lost": {name: [int(run[name].sum()) for run in gone] for name in names},
        "removed_importance": {name: _mean([v for removed, _ in worth for v in removed[name]]) for name in names},
        "kept_importance": {name: _mean([v for _, kept in worth for v in kept[name]]) for name in names},
        "frequency": {name: np.mean([run[name] for run in gone], axis=0).tolist() for name in names},
    }


def history_table(records: Sequence[RunRecord], title: str | None = None) -> Table:
    """Return a table for `rich`: a row for every decision of every run."""
    from rich.table import Table

    data = history_data(records)
    total = sum(site.n_units for site in records[0].sites)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("run", style="bold")
    for name in ("step", "zeros", "removable", "FFN sd", "attention sd", "heads", "lost now, by layer"):
        table.add_column(name, justify="left" if name.startswith("lost") else "right", no_wrap=True)
    for record, row in zip(records, data["runs"], strict=True):
        for i, step in enumerate(record.steps):
            lost = [len(step.removed.get(site.name, ())) for site in record.sites]
            table.add_row(
                record.name if i == 0 else "",
                str(step.step),
                f"{step.zeros:.1%}",
                f"{step.removable:.1%}",
                _shown(step.connectivity_sd),
                _shown(step.attention_sd),
                f"{row['heads'][i]} of {total}",
                " ".join(map(str, lost)) if any(lost) else "-",
            )
        table.add_section()
    return table


def draw_history(
    records: Sequence[RunRecord], path: str | os.PathLike[str], *, title: str = "", dpi: int = 150
) -> Path:
    """Write one picture with the four figures.

    Args:
        records: of runs of the same model. path: ``.png``, ``.svg`` or ``.pdf``. title: above everything.

    Returns:
        The path.

    Raises:
        ValueError: no run, different models, an unknown suffix. OSError: the file cannot be written.
    """
    target, data = check_picture_path(path), history_data(records)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sites = records[0].sites
    wide = 11.0 + 0.3 * max(0, len(sites) - 12)
    figure = Figure(figsize=(min(wide, 20.0), 8.2), dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, size=13, weight="bold", color=_TEXT, x=0.01, ha="left")
    top, bottom = figure.subplots(2, 2)
    labels = _labels(sites)
    _draw_connectivity(top[0], data)
    _draw_lost(top[1], data, sites, labels)
    _draw_importance(bottom[0], data, labels)
    _draw_frequency(figure, bottom[1], data, sites, labels)
    for axes in (*top, bottom[0]):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_TEXT, labelsize=9)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=dpi, facecolor="white", format=target.suffix.lstrip("."))
    return target


def _draw_connectivity(axes: Any, data: dict[str, Any]) -> None:
    for i, run in enumerate(data["runs"]):
        colour = _COLOURS[i % len(_COLOURS)]
        name = f"{run['name']}: " if len(data["runs"]) > 1 else ""
        for key, what, style, marker in (
            ("connectivity_sd", "FFN rows", "-", "o"),
            ("attention_sd", "attention rows", "--", "s"),
        ):
            points = [(100 * x, y) for x, y in zip(run["zeros"], run[key], strict=True) if y is not None]
            if points:
                label = name + what if len(data["runs"]) <= 6 or i == 0 else None
                axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, label=label)
    axes.set_title("Spread of connectivity over sparsity", size=11, loc="left", color=_TEXT)
    axes.set_xlabel("zero weights, %", size=9.5)
    axes.set_ylabel("sd of links of a row, points", size=9.5)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)


def _draw_lost(axes: Any, data: dict[str, Any], sites: Sequence[HeadSite], labels: list[str]) -> None:
    lost = np.array([data["lost"][site.name] for site in sites], dtype=float).reshape(len(sites), -1)
    mean = lost.mean(axis=1)
    place = np.arange(len(sites))
    axes.bar(place, [site.n_units for site in sites], color="#eeeeee", width=0.75, label="heads as built")
    axes.bar(place, mean, color=_COLOURS[1], width=0.75, label="lost" + (", mean of runs" if lost.shape[1] > 1 else ""))
    if lost.shape[1] > 1:
        reach = np.stack([mean - lost.min(axis=1), lost.max(axis=1) - mean])
        axes.errorbar(place, mean, yerr=reach, fmt="none", ecolor=_TEXT, elinewidth=1, capsize=2, label="least to most")
    axes.set_title("Heads lost by layer", size=11, loc="left", color=_TEXT)
    axes.yaxis.get_major_locator().set_params(integer=True)
    _name_layers(axes.set_xticks, labels)
    axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper left", bbox_to_anchor=(0.0, -0.08))


def _draw_importance(axes: Any, data: dict[str, Any], labels: list[str]) -> None:
    place = np.arange(len(labels))
    for shift, key, colour, what in (
        (-0.2, "kept_importance", _COLOURS[0], "kept"),
        (0.2, "removed_importance", _COLOURS[1], "removed"),
    ):
        values = [math.nan if (v := data[key][name]) is None else v for name in data["layers"]]
        axes.bar(place + shift, values, width=0.38, color=colour, label=what)
    ratios = [run["importance_ratio"] for run in data["runs"] if math.isfinite(run["importance_ratio"])]
    note = f"removed to kept: {np.mean(ratios):.2f}" if ratios else "no head was removed"
    energies = [run["energy_ratio"] for run in data["runs"] if math.isfinite(run["energy_ratio"])]
    note += f"; by output energy {np.mean(energies):.2f}" if energies else ""
    axes.set_title("Importance of heads when some of their layer went", size=11, loc="left", color=_TEXT)
    axes.set_ylabel("mean |W_O|", size=9.5)
    axes.text(1.0, -0.105, note, transform=axes.transAxes, size=9, color=_TEXT, ha="right", va="top")
    _name_layers(axes.set_xticks, labels)
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper left", bbox_to_anchor=(0.0, -0.08))


def _draw_frequency(figure: Any, axes: Any, data: dict[str, Any], sites: Sequence[HeadSite], labels: list[str]) -> None:
    runs = len(data["runs"])
    widest = max((site.n_units for site in sites), default=1)
    values = np.full((max(len(sites), 1), max(widest, 1)), np.nan)
    for row, site in enumerate(sites):
        values[row, : site.n_units] = data["frequency"][site.name]
    picture = axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    what = f"How often each head goes: share of {runs} runs" if runs > 1 else "Which heads went (one run)"
    axes.set_title(what, size=11, loc="left", color=_TEXT)
    axes.set_xlabel("head", size=9.5)
    axes.set_xticks(range(0, widest, max(1, widest // 16)))
    _name_layers(axes.set_yticks, labels)
    axes.set_xticks(np.arange(widest + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(sites) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0, colors=_TEXT, labelsize=9)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(_GREY)
    if runs > 1:
        figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02)


def _name_layers(ticks: Any, labels: list[str]) -> None:
    step = max(1, math.ceil(len(labels) / 16))
    ticks(range(0, len(labels), step), labels[::step], size=9)


def _labels(sites: Sequence[HeadSite]) -> list[str]:
    several = len({(site.stack, site.block) for site in sites}) > 1
    short = {"encoder": "enc ", "decoder": "dec "}
    return [
        (short.get(site.stack, "") if several else "") + str(site.layer) + ("x" if "cross" in site.block else "")
        for site in sites
    ]


def _common_sites(records: Sequence[RunRecord]) -> tuple[HeadSite, ...]:
    if not records:
        raise ValueError("there is no run to show")
    first = records[0]
    for other in records[1:]:
        if other.sites != first.sites:
            raise ValueError(
                f"{other.name!r} is of a model with other attention layers than {first.name!r}; show runs of one model "
                "together"
            )
    return first.sites


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

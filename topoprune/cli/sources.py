"""What ``extract``, ``solve`` and ``compare`` share: their options, and the graph they start from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from topoprune.cli.output import stderr_console

if TYPE_CHECKING:
    from topoprune import ModelGraph

__all__ = [
    "Budget",
    "Calibration",
    "Floor",
    "Gqa",
    "Limit",
    "Measure",
    "ModelOptions",
    "Objective",
    "Problem",
    "Samples",
    "Scope",
    "Source",
    "Theta",
    "calibration_texts",
    "from_model",
    "load",
    "requested",
    "share_or_count",
]

_INCLUDE = {"heads": ("heads",), "neurons": ("neurons",), "edges": ("edges",)}
Source = Annotated[
    str,
    typer.Argument(
        metavar="GRAPH|MODEL",
        help="A graph (.npz, .graphml, PACE .gr, edge list .txt .tsv .csv ..., also .gz .xz), a model folder, a hub "
        "id, or 'embedded'.",
    ),
]
Measure = Annotated[
    str | None, typer.Option(help="Distance: circuit-cosine, weights-linf, output-gram, or a plug-in's.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Texts for measures that need data (a file with a text column); default: embedded docstrings."),
]
Samples = Annotated[int, typer.Option(help="Calibration texts.")]
Theta = Annotated[str | None, typer.Option(help="A distance, or auto:q for each layer's q-quantile.")]
Budget = Annotated[str | None, typer.Option(help="Keep so many units of a layer (8) or such a share (0.5).")]
Problem = Annotated[
    str | None, typer.Option(help="heads (the default), neurons or edges; for a bare graph: leave it out.")
]
Objective = Annotated[str, typer.Option(help="With --budget: k-centre, or soft (most importance explained).")]
Scope = Annotated[str, typer.Option(help="With --budget: it holds for each site, or for the model as a whole.")]
Floor = Annotated[int | None, typer.Option(help="With --scope model: least units to keep in each site (default 1).")]
Gqa = Annotated[
    str,
    typer.Option(
        help="Units of grouped-query attention: groups, query-heads (equally many stay in each) or any-query-heads."
    ),
]
Limit = Annotated[float | None, typer.Option(help="Seconds a layer.")]


@dataclass(frozen=True)
class ModelOptions:
    """How a graph is made from a model; none of it means anything for a graph file.

    Args:
        measure: name of a distance, None for the default. calibration_file: texts, None for the embedded ones.
        samples: calibration texts. gqa: units of grouped-query attention.
    """

    measure: str | None
    calibration_file: Path | None
    samples: int
    gqa: str = "groups"


def requested(
    theta: str | None,
    budget: str | None,
    objective: str,
    scope: str,
    floor: int | None,
    time_limit: float | None,
    seed: int,
) -> dict[str, Any]:
    """Return the request of `topoprune.solve` that the options spell, without the problem.

    Raises:
        ValueError: an option that cannot mean anything; names it.
    """
    if time_limit is not None and not time_limit >= 0:
        raise ValueError(f"--time-limit is {time_limit}; expected seconds >= 0")
    if seed < 0:
        raise ValueError(f"--seed is {seed}; expected an integer >= 0")
    request: dict[str, Any] = {"time_limit": time_limit, "seed": seed}
    if scope != "site":
        request["scope"] = scope
    if floor is not None:
        if scope != "model":
            raise ValueError(f"--floor {floor} goes with --scope model: it is what each site keeps of a common budget")
        request["floor"] = floor
    if theta is not None:
        try:
            request["theta"] = float(theta)
        except ValueError:
            request["theta"] = theta
    if budget is not None:
        request |= {"budget": share_or_count("--budget", budget), "objective": objective}
    return request


def share_or_count(option: str, text: str | None) -> float | int | None:
    """Return what an option like ``--budget`` spells: ``8`` is a number of units, ``0.5`` and ``1.0`` are shares.

    Raises:
        ValueError: no number; names the option.
    """
    if text is None:
        return None
    try:
        value = int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"{option} is {text!r}; expected a number of units (8) or a share (0.5)")
    return value


def load(
    source: str,
    problem: str | None,
    request: dict[str, Any],
    options: ModelOptions,
) -> tuple[ModelGraph, dict[str, Any]]:
    """Return the graph of a file or model, and the request with its problem filled in.

    Raises:
        ValueError: an unknown problem, options that do not go together, or a file that is no graph.
    """
    if problem not in (*_INCLUDE, "graph", None):
        raise ValueError(f"unknown problem {problem!r}; available: {', '.join(_INCLUDE)}")
    from topoprune.comparison import complete_request
    from topoprune.graph import Graph, ModelGraph
    from topoprune.graph_files import is_graph_file, read_graph

    request = dict(request) if problem is None else {**request, "problem": problem}
    if request.get("problem") == "edges":
        request.pop("objective", None)
    path = Path(source).expanduser()
    if not (path.is_file() or (is_graph_file(path) and not path.is_dir())):
        if problem == "graph":
            raise ValueError(f"--problem graph is for bare graphs; {source} is a model: heads, neurons or edges")
        request.setdefault("problem", "heads")
        return from_model(source, _INCLUDE[request["problem"]], options), request
    if options.measure is not None or options.calibration_file is not None or options.gqa != "groups":
        raise ValueError(
            f"--measure, --calibration-file and --gqa are for models; {source} is a graph that was extracted already"
        )
    graph = read_graph(path)
    wrapped = ModelGraph.from_graph(graph, path.name) if isinstance(graph, Graph) else graph
    wrapped, request = complete_request(wrapped, request)
    return wrapped, {"problem": "heads", **request}


def from_model(source: str, include: tuple[str, ...], options: ModelOptions) -> ModelGraph:
    """Return the graph of a model folder, a hub id, or ``embedded``."""
    from topoprune import extract as extract_graph
    from topoprune.tasks.models import calibration_batches, load_backbone

    model = load_backbone(source)
    console = stderr_console()

    def batches() -> Iterator[dict[str, Any]]:
        # A generator, so that data-free measures read no data and load no tokenizer.
        texts, origin = calibration_texts(options.calibration_file, options.samples)
        console.print(f"calibration: {len(texts)} texts, {origin}", highlight=False)
        yield from calibration_batches(source, model, texts)

    with warnings.catch_warnings():
        if options.calibration_file is None:
            warnings.filterwarnings("ignore", message="calibration is not used")
        asked: dict[str, Any] = {} if options.measure is None else {"measure": options.measure}
        return extract_graph(model, include=include, calibration=batches(), gqa=options.gqa, **asked)


def calibration_texts(path: Path | None, samples: int) -> tuple[list[str], str]:
    """Return calibration texts and where they are from: a file's text column, or the embedded docstrings.

    Raises:
        ValueError: samples < 1, a file without a text column. OSError: no such file.
    """
    if samples < 1:
        raise ValueError(f"--calibration-samples is {samples}; expected at least 1")
    if path is None:
        from topoprune.tasks.docstrings import load_docstrings

        data = load_docstrings().limit(samples, None)
        return [example.text for example in data.train], "docstrings of the standard library (embedded)"
    from topoprune.tasks.tables import read_table

    table = read_table(path)
    column = next((name for name in ("text", "sentence", "sentence1") if name in table.columns), None)
    if column is None:
        raise ValueError(
            f"{path} has no column text, sentence or sentence1; its columns are: {', '.join(table.columns)}"
        )
    return [str(row.get(column, "")) for _, row in table.rows[:samples]], f"{path}, column {column!r}"

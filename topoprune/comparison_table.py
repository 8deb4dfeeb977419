"""The table that `topoprune.compare` returns: printed, plotted, saved, or handed to pandas."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topoprune.files import atomic_path
from topoprune.planning import Joint, Plan
from topoprune_solvers import Bound, Solution, best_bound, relative_gap

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]
    from rich.table import Table

__all__ = ["Comparison", "best_bounds", "solver_row"]


@dataclass(frozen=True)
class Comparison:
    """Solvers side by side on the same problems: a table to print, plot, save, or hand to pandas.

    Args:
        rows: one dict a solver, over all sites: solver, kept, units, objective (sum), bound (sum of the best
            bound that any of the solvers proved), gap (worst site, against that bound), ratio (objective over
            bound), seconds (sum), status, error. A solver that refused has an error and None elsewhere.
        plans: solver name -> its `Plan`, ready for `apply`; without the solvers that refused.
        notes: solvers that were left out or not run, and why.
        interrupted: True if Ctrl-C ended it: running solvers gave their incumbents, later ones did not run.
    """

    rows: tuple[Mapping[str, Any], ...]
    plans: Mapping[str, Plan] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def best(self) -> str | None:
        """Name of the solver with the best objective, the first of several; None if all refused."""
        sense = next((part.sense for plan in self.plans.values() for part in _parts(plan).values()), "min")
        sign = 1 if sense == "min" else -1
        solved = [row for row in self.rows if not row["error"]]
        return min(solved, key=lambda row: sign * row["objective"])["solver"] if solved else None

    def per_site(self) -> list[dict[str, Any]]:
        """Return one row a solver and site: the keys of `rows`, with site, own_bound and bound_source.

        Sites that shared a budget are one row, named by how many they are.
        """
        bounds = best_bounds(self.plans)
        return [
            {"solver": name, "site": site, **_site_row(plan, part, bounds[site])}
            for name, plan in self.plans.items()
            for site, part in _parts(plan).items()
        ]

    def __str__(self) -> str:
        wide = max([14, *(len(row["solver"]) for row in self.rows)])
        lines = [f"{'solver':{wide}} {'kept':>13} {'objective':>12} {'bound':>12} {'gap':>8} {'ms':>10}  status"]
        for row in self.rows:
            kept, objective, bound, gap, milliseconds, status = _cells(row)
            if row["error"]:
                lines.append(f"{row['solver']:{wide}} {row['error']}")
                continue
            lines.append(
                f"{row['solver']:{wide}} {kept:>13} {objective:>12} {bound:>12} {gap:>8} {milliseconds:>10}  {status}"
            )
        return "\n".join([*lines, *self.notes])

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(caption="\n".join(map(escape, self.notes)) or None, caption_justify="left")
        for title in ("solver", "kept", "objective", "bound", "gap", "ms", "status"):
            table.add_column(title, justify="left" if title in ("solver", "status") else "right")
        best = self.best
        for row in self.rows:
            cells = [row["solver"], *_cells(row)]
            table.add_row(*map(escape, cells), style="bold" if row["solver"] == best else None)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict: best, rows, sites (`per_site`), notes, interrupted; no nan, no infinity."""
        return {
            "best": self.best,
            "rows": [_finite(row) for row in self.rows],
            "sites": [_finite(row) for row in self.per_site()],
            "notes": list(self.notes),
            "interrupted": self.interrupted,
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON; nan and infinities become null."""
        return json.dumps(self.to_dict(), indent=2)

    def to_pandas(self) -> pandas.DataFrame:
        """Return `rows` as a `pandas.DataFrame`, indexed by solver (needs pandas)."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs the package pandas; install it with: pip install pandas") from error
        return pandas.DataFrame([dict(row) for row in self.rows]).set_index("solver")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table, atomically: ``.json`` with all sites, ``.csv`` with one line a solver.

        Raises:
            ValueError: another suffix. OSError: the folder does not exist or cannot be written.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in (".json", ".csv"):
            raise ValueError(f"cannot save a comparison as {path}; expected .json or .csv (plot writes .png .svg .pdf)")
        with atomic_path(path) as temporary:
            if suffix == ".json":
                temporary.write_text(self.to_json() + "\n", encoding="utf-8")
            else:
                import csv

                with open(temporary, "w", newline="", encoding="utf-8") as file:
                    writer = csv.DictWriter(file, list(self.rows[0]) if self.rows else ["solver"])
                    writer.writeheader()
                    writer.writerows(_finite(row) for row in self.rows)
        return Path(path)

    def plot(self, path: str | os.PathLike[str], *, title: str = "") -> Path:
        """Draw objective and bound, and time, a bar a solver; ``.png``, ``.svg`` or ``.pdf``."""
        from topoprune.comparison_figure import draw_comparison

        return draw_comparison(self, path, title=title)


def best_bounds(plans: Mapping[str, Plan]) -> dict[str, Bound | None]:
    """Return for every site the best bound that any of the plans (by solver name) proved."""
    first = next(iter(plans.values()), None)
    if first is None:
        return {}
    return {
        site: best_bound(part.sense, [_parts(plan)[site].bound for plan in plans.values()])
        for site, part in _parts(first).items()
    }


def solver_row(name: str, plan: Plan | str, bounds: Mapping[str, Bound | None]) -> dict[str, Any]:
    """Return the row of a solver: its plan against the best bounds by site, or why it refused."""
    if isinstance(plan, str):
        empty = ("kept", "units", "objective", "bound", "gap", "ratio", "seconds", "status")
        return {"solver": name, **dict.fromkeys(empty), "error": plan}
    solutions, parts = plan.solutions, _parts(plan)
    known = [bound.value for bound in bounds.values() if bound is not None]
    complete = len(known) == len(bounds)
    gaps = [relative_gap(parts[site].objective, b.value) for site, b in bounds.items() if b is not None]
    objective, bound = sum(part.objective for part in parts.values()), sum(known) if complete else None
    return {
        "solver": name,
        "kept": sum(s.n_kept for s in solutions.values()),
        "units": sum(s.n_units for s in solutions.values()),
        "objective": objective,
        "bound": bound,
        "gap": max(gaps, default=0.0) if complete else math.nan,
        "ratio": _ratio(objective, bound),
        "seconds": plan.seconds,
        "status": ", ".join(sorted({part.status.name for part in parts.values()})),
        "error": "",
    }


def _parts(plan: Plan) -> dict[str, Solution | Joint]:
    """Return what has a certificate: solutions by site, and the joint ones of sites that shared a budget."""
    together = {site for joint in plan.joint for site in joint.sites}
    parts: dict[str, Solution | Joint] = {
        site: solution for site, solution in plan.solutions.items() if site not in together
    }
    return parts | {f"{len(joint.sites)} sites together": joint for joint in plan.joint}


def _site_row(plan: Plan, solution: Solution | Joint, bound: Bound | None) -> dict[str, Any]:
    value = None if bound is None else bound.value
    members = [plan.solutions[site] for site in solution.sites] if isinstance(solution, Joint) else [solution]
    return {
        "kept": sum(member.n_kept for member in members),
        "units": sum(member.n_units for member in members),
        "objective": solution.objective,
        "bound": value,
        "own_bound": None if solution.bound is None else solution.bound.value,
        "bound_source": None if bound is None else bound.source,
        "gap": math.nan if value is None else relative_gap(solution.objective, value),
        "ratio": _ratio(solution.objective, value),
        "seconds": solution.seconds,
        "status": solution.status.name,
    }


def _ratio(objective: float, bound: float | None) -> float:
    """Return objective over bound; nan without a bound, or where a quotient says nothing (bound <= 0)."""
    if bound is not None and objective == bound:
        return 1.0
    return objective / bound if bound is not None and bound > 0 and math.isfinite(bound) else math.nan


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Return kept, objective, bound, gap, ms and status of a row as text."""
    if row["error"]:
        return ["-", "-", "-", "-", "-", row["error"]]
    bound = "-" if row["bound"] is None else f"{row['bound']:.5g}"
    gap = "-" if math.isnan(row["gap"]) else f"{row['gap']:.2%}"
    kept, milliseconds = f"{row['kept']}/{row['units']}", f"{1e3 * row['seconds']:.2f}"
    return [kept, f"{row['objective']:.5g}", bound, gap, milliseconds, row["status"]]


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}

"""The charts of a live page: the panels of the dashboard, with the points of one run or of many."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning_hessian.histories.run_table import RunRecord
from lightning_hessian.reports.verdicts import GAP
from lightning_hessian.tracking.dashboard import Lines, Runs, sections
from lightning_hessian.tracking.history import Row, key_part
from lightning_hessian.tracking.loggers import STEP
from lightning_hessian.tracking.style import evenly_chosen

_MOST_POINTS = 400
"""A chart of a thousand pixels shows no more."""

_MOST_KEYS = 2
"""Of a chart of many runs, whose colours are the runs."""

_KIND = re.compile(r"^(pearson|differences|spearman|num_points)_")


def rows_of(record: RunRecord) -> list[Row]:
    """Return the rows of a run, one for each step, with what it logged there."""
    rows = []
    for place, step in enumerate(record.steps.tolist()):
        values = {key: float(column[place]) for key, column in record.columns.items()}
        logged = {key: value for key, value in values.items() if not math.isnan(value)}
        if "gap" not in logged and GAP in logged:
            logged["gap"] = logged[GAP]  # the name by which it is asked for
        rows.append({"step": step, **logged})
    return rows


def panels(rows: Sequence[Row], monitors: Sequence[str]) -> list[dict[str, Any]]:
    """Return the charts of the dashboard's sections that have points."""
    drawn = []
    for heading, plan in _plans(rows, monitors).items():
        charts = [_chart(rows, panel, monitors) for panel in plan if isinstance(panel, Lines)]
        charts = [chart for chart in charts if chart["series"]]
        if charts:
            drawn.append({"name": heading, "charts": charts})
    return drawn


def panels_of_many(rows: Sequence[Sequence[Row]], monitors: Sequence[str]) -> list[dict[str, Any]]:
    """Return the same of several runs: a series for each run, which it names by its place.

    Charts of more than two metrics, and of correlations, are left out. Of the second metric the
    line is dashed.
    """
    drawn = []
    together = [row for of_run in rows for row in of_run]
    for heading, plan in _plans(together, monitors).items():
        charts = []
        for panel in plan:
            if isinstance(panel, Lines) and _suits_many(panel):
                charts.append(_chart_of_many(rows, panel, monitors))
            elif isinstance(panel, Runs):
                charts.append(_last_values(rows, panel))
        charts = [chart for chart in charts if chart["series"]]
        if charts:
            drawn.append({"name": heading, "charts": charts})
    return drawn


def _suits_many(panel: Lines) -> bool:
    return len(panel.keys) <= _MOST_KEYS and not panel.keys[0].startswith("correlation/")


def _plans(rows: Sequence[Row], monitors: Sequence[str]) -> dict[str, list[Any]]:
    """Return the panels by section that have keys, those of a pattern with what it matches."""
    logged = list(dict.fromkeys(key for row in rows for key in row))
    plans = {}
    for name, plan in sections(monitors).items():
        found = [_expanded(panel, logged) if isinstance(panel, Lines) else panel for panel in plan]
        plans[name] = [p for p in found if not isinstance(p, Lines) or p.keys]
    return plans


def _expanded(panel: Lines, logged: Sequence[str]) -> Lines:
    """Return a panel with the keys that its pattern matches."""
    if not panel.pattern:
        return panel
    return replace(panel, keys=tuple(key for key in logged if re.fullmatch(panel.pattern, key)))


def _chart_of_many(
    rows: Sequence[Sequence[Row]], panel: Lines, monitors: Sequence[str]
) -> dict[str, Any]:
    """Return a chart in which each run has a series of each key."""
    found: dict[str, Any] = {**_chart((), panel, monitors), "parts": []}
    keys: set[int] = set()
    for place, of_run in enumerate(rows):
        for series in _chart(of_run, panel, monitors)["series"]:
            part = panel.keys.index(series.pop("logged"))
            found["series"].append({**series, "run": place, "part": part})
            keys.add(part)
    if len(keys) > 1:
        found["parts"] = _labels(panel, monitors)
    return found


def _last_values(rows: Sequence[Sequence[Row]], panel: Runs) -> dict[str, Any]:
    """Return a chart with one point for each run: the last row that holds both metrics."""
    series = []
    for place, of_run in enumerate(rows):
        both = [(row[panel.x], row[panel.y]) for row in of_run if panel.x in row and panel.y in row]
        both = [pair for pair in both if all(map(math.isfinite, pair))]
        if both:
            series.append({"key": panel.y, "points": both[-1:], "run": place, "part": 0})
    return {
        "title": panel.title, "x": panel.x, "lines": False, "log": False, "bounds": (None, None),
        "level": None, "series": series if len(series) > 1 else [], "parts": [],
    }  # fmt: skip


def _chart(rows: Sequence[Row], panel: Lines, monitors: Sequence[str]) -> dict[str, Any]:
    x = "step" if panel.x == STEP else panel.x
    series = []
    for key, label in zip(panel.keys, _labels(panel, monitors), strict=True):
        points = [(row[x], row[key]) for row in rows if x in row and key in row]
        points = [point for point in points if all(map(math.isfinite, point))]
        points = [point for point in points if point[1] > 0 or not panel.log]
        if points:
            shown = evenly_chosen(points, _MOST_POINTS)
            series.append({"key": label, "logged": key, "points": shown})
    return {
        "title": panel.title,
        "x": "training step" if x == "step" else x,
        "lines": x == "step",
        "log": panel.log,
        "bounds": panel.bounds,
        "level": panel.level,
        "series": series,
    }


def _labels(panel: Lines, monitors: Sequence[str]) -> list[str]:
    """Return what the legend calls keys: without their section, if they share it.

    Of correlations with one metric only the statistic is left, and which end of an interval it is;
    of one statistic of the layers, the layer.
    """
    keys = panel.keys
    if panel.pattern:
        return [key.removeprefix(panel.pattern.removesuffix(".*")) for key in keys]
    if len({key.partition("/")[0] for key in keys}) > 1:
        return list(keys)
    names = [key.partition("/")[2] or key for key in keys]
    if not keys[0].startswith("correlation/"):
        return names
    for monitor in monitors:
        end = f"_{key_part(monitor)}"
        if all(name.endswith(end) for name in names):
            return [_KIND.sub("", name.removesuffix(end)) for name in names]
    return names

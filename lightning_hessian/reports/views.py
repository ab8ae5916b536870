"""What a report says of itself; `results.shown` looks this up when one is first shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_hessian.reports import glance
from lightning_hessian.reports.findings import CorrelationReport
from lightning_hessian.reports.numbers import COLUMNS, correlation_rows
from lightning_hessian.reports.verdicts import number
from lightning_hessian.results.shown import Telling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW = 4


def telling(report: CorrelationReport) -> Telling:
    """Return the sentence of the first screen and the strongest pairs."""
    lines = []
    for pair in glance.glances(report):
        what = f"{pair.statistic} with {pair.monitor}"
        text = f"r = {number(pair.r)}, Spearman {number(pair.spearman)}, {pair.num_points} points"
        where = f" (in {pair.run})" if pair.run and len(report.table) > 1 else ""
        lines.append((what, f"{text}: {pair.label}{where}"))
    count = len(report.table)
    title = f"Correlations of {len(report.statistics)} statistics with "
    title += f"{', '.join(report.monitors)} over {count} run{'' if count == 1 else 's'}"
    brief = [("in short", glance.sentence(report)), *lines[:_FEW]]
    more = [*lines[_FEW:], ("the whole", "write_report(report, folder)")]
    return Telling(title, brief, more)


def draw(report: CorrelationReport, axes: Axes) -> None:
    """Draw the strongest pairs."""
    glance.draw(report, axes)


def columns(report: CorrelationReport) -> Mapping[str, Any]:
    """Return the columns of correlations.csv."""
    rows = list(correlation_rows(report))
    return {name: [row.get(name) for row in rows] for name in COLUMNS}

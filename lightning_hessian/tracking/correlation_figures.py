"""Figures of live correlation: each statistic against a monitored metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_hessian.results import FloatArray
from lightning_hessian.statistics.correlation import Correlation, pearson
from lightning_hessian.statistics.verdict import corrected, movement, verdict
from lightning_hessian.tracking.history import History, Row
from lightning_hessian.tracking.style import (
    SYMBOLS,
    evenly_chosen,
    log_if_wide,
    new_figure,
    quiet_grid,
    shades,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 3
_MOST_POINTS = 500
"""More than fit a panel a finger wide; coefficients are those of all points."""


def scatter_plot(
    rows: Sequence[Row],
    statistics: Sequence[str],
    monitor: str,
    *,
    title: str | None = None,
    monitors: Sequence[str] = (),
) -> Figure:
    """Return each statistic against a monitored metric, one panel each, dark to light in time.

    Of more than 500 measurements, as many are drawn, evenly chosen.

    Above each panel: Pearson's r with its 95 % interval and n, the r of first differences, in which
    a common trend cancels, and Spearman's of the ranks; in it the verdict (`statistics.verdict`).
    The interval takes the points as independent, which those of one run are not. An axis is
    logarithmic where its values span more than a factor of 20.

    Args:
        rows: The measurements, as in ``callback.history``.
        statistics: Which; those that no row has beside the metric are left out.
        monitor: The metric.
        title: Of the figure.
        monitors: All metrics that are looked at; the verdict corrects for their number too.

    Raises:
        ValueError: No row has one of the statistics and the metric.
    """
    history = History(rows)
    metric = history.series(monitor)
    found = {name: history.series(name) for name in statistics}
    drawn = [name for name in statistics if _pairs(found[name], metric)]
    if not drawn:
        raise ValueError(f"No measurement has a statistic beside {monitor!r}.")
    labels = _labels(history, statistics, monitor, monitors)
    columns = min(_COLUMNS, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    figure, panels = new_figure(
        3.1 * columns + 0.4, 2.9 * lines + 0.3, nrows=lines, ncols=columns, squeeze=False
    )
    for axes, name in zip(panels.flat, drawn, strict=False):
        pairs = evenly_chosen(_pairs(found[name], metric), _MOST_POINTS)
        xs, ys = zip(*pairs, strict=True)
        axes.plot(xs, ys, color="0.75", linewidth=0.8, zorder=1)
        axes.scatter(xs, ys, c=shades(len(xs)), s=22, zorder=2)
        axes.set_title(correlation_text(pearson(found[name], metric)), fontsize="small")
        axes.text(0.03, 0.97, labels[name], transform=axes.transAxes, va="top",
                  fontsize="small", bbox={"color": "white", "alpha": 0.7, "pad": 1})  # fmt: skip
        axes.set_xlabel(SYMBOLS.get(name, name))
        log_if_wide(axes, xs, ys)
        if axes.get_xscale() == "linear":
            axes.locator_params(axis="x", nbins=4)
        quiet_grid(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel(monitor)
    for axes in list(panels.flat)[len(drawn) :]:
        axes.remove()
    figure.suptitle(title or f"statistics against {monitor}", fontsize="medium")
    return figure


def _labels(
    history: History, statistics: Sequence[str], monitor: str, monitors: Sequence[str]
) -> dict[str, str]:
    """Return the verdict on each statistic in a few words, corrected for all pairs."""
    watched = dict.fromkeys([monitor, *monitors])
    pairs = [(name, metric) for metric in watched for name in statistics]
    moved = corrected([movement(history.series(n), history.series(m)) for n, m in pairs])
    return {
        name: verdict(found).label
        for (name, metric), found in zip(pairs, moved, strict=True)
        if metric == monitor
    }


def correlation_text(correlation: Correlation) -> str:
    """Return r, its interval, n and the r of differences, or why there is none, in two lines.

    Example:
        >>> print(correlation_text(pearson([1, 2, 3, 4, 6], [2, 1, 4, 3, 9])))
        r = 0.88 [0.01, 0.99], n = 5
        r of differences 0.83, ranks 0.80
    """
    if math.isnan(correlation.r):
        return f"n = {correlation.num_points}\n(r from 4 points on)"
    low, high = correlation.interval
    text = f"r = {correlation.r:.2f} [{low:.2f}, {high:.2f}], n = {correlation.num_points}\n"
    if math.isnan(correlation.r_differences):
        return text + "(r of differences from 5 points on)"
    text += f"r of differences {correlation.r_differences:.2f}"
    ranks = correlation.spearman
    return text if math.isnan(ranks) else f"{text}, ranks {ranks:.2f}"


def _pairs(first: FloatArray, second: FloatArray) -> list[tuple[float, float]]:
    both = np.isfinite(first) & np.isfinite(second)
    return list(zip(first[both].tolist(), second[both].tolist(), strict=True))

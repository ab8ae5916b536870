"""Figures of a correlation report, as SVG that follows the colours of the page around it."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import escape

from lightning_hessian.histories.run_table import RunRecord
from lightning_hessian.reports.across import Points, Scaling
from lightning_hessian.reports.defaults import short_name
from lightning_hessian.reports.within import WithinRun
from lightning_hessian.results.escaping import visible
from lightning_hessian.tracking.style import (
    COLOURS,
    MARKERS,
    few_ticks,
    log_if_wide,
    new_figure,
    quiet_grid,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#1b1c1d"  # becomes the colour of the text around the figure
_MOST_GROUPS = len(COLOURS) * len(MARKERS)
_MANY_RUNS = 400  # more dots would be a smear, and a page of megabytes


@dataclass(frozen=True)
class Drawing:
    """A figure of the report.

    Attributes:
        name: Name of its file, without ending.
        svg: The whole SVG file.
        caption: What it shows.
    """

    name: str
    svg: str
    caption: str

    @property
    def inline(self) -> str:
        """The figure as part of an HTML page, in the colour of its text."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        # Names that nothing refers to would stand in the page once for each figure.
        svg = re.sub(r' id="(?!m|p[0-9a-f]{9})[^"]*"', "", svg)
        svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
        label = escape(visible(self.caption))
        return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).replace(
            _INK, "currentColor"
        )

    @property
    def standalone(self) -> str:
        """The figure as a file of its own, on white."""
        white = '<rect width="100%" height="100%" fill="white"/>'
        return self.svg.replace("<defs>", f"{white}<defs>", 1)


def glance_figure(draw_on: Callable[[Axes], None], num_rows: int, caption: str) -> Drawing:
    """Return the figure of the first screen, a line for each of the strongest pairs."""
    with _style():
        figure, axes = new_figure(7.0, 0.42 * num_rows + 1.0)
        draw_on(axes)
        return _drawing(figure, "glance", caption)


def across_figure(
    points: Points, statistics: Sequence[str], monitor: str, group: str | None
) -> Drawing:
    """Return one panel for each statistic: the monitor against it, one dot a run.

    ``group`` is what the colours mean, None for one colour.
    """
    with _style():
        figure, grid = _panels(len(statistics), sharey=True)
        handles: dict[str, Any] = {}
        for axes, statistic in zip(grid.flat, statistics, strict=False):
            x, y = points.values[statistic], points.values[monitor]
            for label, colour, marker, mask in _groups(points):
                handles[label] = axes.scatter(
                    x[mask], y[mask], s=22, color=colour, marker=marker, alpha=0.85, linewidths=0
                )
            axes.set_xlabel(_plain(statistic))
            log_if_wide(axes, x, y)
            if axes.get_xscale() == "linear":
                axes.locator_params(axis="x", nbins=5)  # numbers of five digits stay apart
            quiet_grid(axes)
        for axes in grid[:, 0]:
            axes.set_ylabel(_plain(monitor))
        if group is not None and len(handles) > 1:
            place: dict[str, Any] = {"loc": "outside upper center", "ncols": min(6, len(handles))}
            place |= {"title": _plain(group), "frameon": False, "fontsize": "small"}
            figure.legend(handles.values(), map(_plain, handles), **place)
        colours = f", coloured by {group}" if group else ""
        caption = f"{monitor} against each statistic; a dot is a run{colours}."
        return _drawing(figure, f"across_{_slug(monitor)}", caption)


def scaling_figure(points: Points, scalings: Sequence[Scaling]) -> Drawing:
    """Return one log-log panel for each quantity that scales, with its line and 95 % band."""
    with _style():
        figure, grid = _panels(len(scalings))
        for axes, scaling in zip(grid.flat, scalings, strict=False):
            y = points.values[scaling.quantity]
            for _, colour, marker, mask in _groups(points):
                axes.scatter(points.sizes[mask], y[mask], s=18, color=colour, marker=marker,
                             alpha=0.85, linewidths=0)  # fmt: skip
            sizes = points.sizes[np.isfinite(points.sizes) & (points.sizes > 0) & (y > 0)]
            line = np.geomspace(sizes.min(), sizes.max(), 60)
            centre, low, high = scaling.fit.predict(line)
            axes.plot(line, centre, color=_INK, linewidth=1.2)
            axes.fill_between(line, low, high, color="#888888", alpha=0.25, linewidth=0)
            axes.set(yscale="log", ylabel=_plain(scaling.quantity))
            few_ticks(axes)  # of this axis alone: sizes are named by their decades
            axes.set(xscale="log", xlabel=_plain(short_name(scaling.size)))
            axes.set_title(f"exponent {scaling.fit.exponent:.2f}", fontsize="small")
            quiet_grid(axes)
        caption = "Least-squares lines in the log-log plot with 95 % bands."
        return _drawing(figure, "scaling", caption)


def _panels(count: int, **shared: bool) -> tuple[Figure, Any]:
    """Return a figure with so many panels, up to three beside each other."""
    columns = min(3, count)
    lines = -(-count // columns)
    figure, grid = new_figure(
        3.1 * columns, 2.7 * lines + 0.4, nrows=lines, ncols=columns, squeeze=False, **shared
    )
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, grid


def over_runs_figure(
    pairs: Sequence[WithinRun], statistics: Sequence[str], monitor: str
) -> Drawing:
    """Return r of the levels and of first differences, one dot a run, a line a statistic."""
    with _style():
        figure, (left, right) = new_figure(
            7.6, 0.42 * len(statistics) + 1.1, nrows=1, ncols=2, sharey=True
        )
        chosen = [pair for pair in pairs if pair.monitor == monitor]
        rng = np.random.default_rng(0)
        for axes, title in ((left, "whole run"), (right, "first differences")):
            for place, statistic in enumerate(statistics):
                members = [pair for pair in chosen if pair.statistic == statistic]
                r = np.array([p.r if axes is left else p.r_differences for p in members])
                r = r[np.isfinite(r)]
                if len(r) == 0:
                    continue
                shown = r if len(r) <= _MANY_RUNS else rng.choice(r, _MANY_RUNS, replace=False)
                axes.scatter(shown, place + rng.uniform(-0.18, 0.18, len(shown)), s=11,
                             color=COLOURS[0], alpha=0.55, linewidths=0)  # fmt: skip
                axes.plot([np.median(r)] * 2, [place - 0.32, place + 0.32], color=COLOURS[1],
                          linewidth=2)  # fmt: skip
            axes.axvline(0, color=_INK, linewidth=0.7)
            axes.set(xlim=(-1.05, 1.05), xlabel=f"r with {_plain(monitor)}, {title}")
            quiet_grid(axes)
        left.set_yticks(range(len(statistics)), [_plain(key) for key in statistics])
        left.invert_yaxis()
        caption = f"Pearson's r with {monitor} within each run (a dot a run, a bar at the median)."
        return _drawing(figure, f"within_{_slug(monitor)}", caption)


def run_figure(run: RunRecord, pairs: Sequence[WithinRun], monitor: str) -> Drawing:
    """Return, for one run, each statistic with the monitor over the steps, and lead and lag.

    A run too short for lead and lag has no panel for them.
    """
    with _style():
        columns: dict[str, Any] = {"ncols": 1}
        leads = [pair for pair in pairs if pair.lead is not None]
        if leads:
            columns = {"ncols": 2, "width_ratios": (2, 1)}
        figure, grid = new_figure(
            8.2, 1.75 * len(pairs) + 0.3, nrows=len(pairs), squeeze=False, **columns
        )
        for row, pair in zip(grid, pairs, strict=True):
            _series(row[0], run, pair.statistic, monitor)
            if leads:
                _lags(row[1], pair, last=pair is leads[-1])
        grid[-1][0].set_xlabel("step")
        caption = (
            f"{run.name}: each statistic (left axis, solid) and {monitor} (right axis, dashed) "
            "over the run"
        )
        if leads:
            caption += "; beside it r of first differences when one series is moved along the other"
        caption += "."
        return _drawing(figure, f"run_{_slug(run.name)}_{_slug(monitor)}", caption)


def _series(axes: Axes, run: RunRecord, statistic: str, monitor: str) -> None:
    other = axes.twinx()
    styles = ((axes, statistic, COLOURS[0], "-"), (other, monitor, COLOURS[1], "--"))
    for place, key, colour, line in styles:
        values = run.series(key)
        seen = np.isfinite(values)
        place.plot(run.steps[seen], values[seen], color=colour, linestyle=line, linewidth=1.3,
                   marker="o" if seen.sum() <= 60 else None, markersize=2.5)  # fmt: skip
        place.set_ylabel(_plain(key).replace("/", "/\n", 1), color=colour, fontsize="small")
        place.spines[["top"]].set_visible(False)
    quiet_grid(axes)


def _lags(axes: Axes, pair: WithinRun, *, last: bool) -> None:
    if pair.lead is None:
        axes.set_visible(False)
        return
    axes.axhline(0, color=_INK, linewidth=0.7)
    axes.set_ylim(-1.05, 1.05)
    quiet_grid(axes)
    colours = [COLOURS[1] if lag == pair.lead.lag else COLOURS[0] for lag in pair.lead.lags]
    axes.vlines(pair.lead.lags, 0, pair.lead.coefficients, colors=colours, linewidth=3)
    axes.set_xticks(sorted({pair.lead.lags[0], 0, pair.lead.lags[-1]}))
    if last:
        axes.set_xlabel("measurements by which it leads")


def _groups(points: Points) -> Iterator[tuple[str, str, str, Any]]:
    """Yield label, colour, marker and mask of each group; the rarest share the last look."""
    labels = np.array(points.groups, dtype=str)
    names = sorted(set(labels.tolist()), key=_natural)
    for place, name in enumerate(names[: _MOST_GROUPS - 1]):
        marker = MARKERS[(place // len(COLOURS) + place) % len(MARKERS)]
        yield name, COLOURS[place % len(COLOURS)], marker, labels == name
    if len(names) >= _MOST_GROUPS:
        rest = names[_MOST_GROUPS - 1 :]
        yield f"{len(rest)} others", "#888888", "x", np.isin(labels, rest)


def _natural(label: str) -> tuple[bool, float, str]:
    try:
        return False, float(label), ""
    except ValueError:
        return True, 0.0, label


@contextlib.contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    settings: dict[str, Any] = dict.fromkeys(ink, _INK) | dict.fromkeys(clear, "none")
    settings |= {"svg.fonttype": "none", "font.size": 9.0, "axes.unicode_minus": True}
    with matplotlib.rc_context(settings):  # type: ignore[arg-type, unused-ignore]
        yield


def _drawing(figure: Figure, name: str, caption: str) -> Drawing:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return Drawing(name, out.getvalue(), caption)


def _plain(key: str) -> str:
    """Return a key that matplotlib takes for words, dollar signs and all."""
    return visible(key).replace("$", r"\$")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")[:80]  # a file's name has an end


def has_band(scaling: Scaling) -> bool:
    """Whether there is a line to draw."""
    return not math.isnan(scaling.fit.exponent)

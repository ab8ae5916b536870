"""What the figures of docs/papers show: ours beside the papers' digits, and spectra by rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from made import PROTOCOLS, Made, slope_agrees, verdict

from lightning_hessian.statistics.correlation import fisher_interval, pearson
from lightning_hessian.tracking.style import (
    COLOURS,
    MARKERS,
    few_ticks,
    legend_below,
    new_figure,
    quiet_grid,
    shades,
)

if TYPE_CHECKING:
    from charts import Chart
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRINTED = "0.35"
LOOKS = {
    "converged": (COLOURS[0], MARKERS[0]),
    "pooled": (COLOURS[1], MARKERS[1]),
    "gradients": (COLOURS[0], MARKERS[0]),
}


# Numbers over a setting --------------------------------------------------------------------------


def draw_distances(chart: Chart, rows: Sequence[Made], label: str, *, log: bool = True) -> Figure:
    """Return d_ks over a setting: the printed ones, ours by protocol, and the critical one."""
    figure, axes = new_figure(6.4, 3.9)
    ordered = sorted(rows, key=chart.place)
    places = [chart.place(one) for one in ordered]
    given = [(x, one.row.printed.d_ks) for x, one in zip(places, ordered, strict=True)]
    known = [(x, float(text)) for x, text in given if text is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "--", marker="x", color=PRINTED, label="printed")
    for protocol in PROTOCOLS[ordered[0].row.paper]:
        _draw_seeds(axes, places, ordered, protocol, "d_ks", protocol)
    axes.axhline(float(ordered[0].row.printed.d_c), color=PRINTED, lw=1, ls=":", label="$d_c$")
    axes.set(xlabel=label, ylabel="KS distance $d_{ks}$")
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
    return _finished(figure, axes, log=log, columns=4)


def draw_rates(chart: Chart, rows: Sequence[Made]) -> Figure:
    """Return power-law and Gaussian rates over the batch size (SG fig. 2)."""
    figure, panels = new_figure(8.6, 3.6, ncols=2, sharey=True)
    for axes, kind in zip(panels, ("dimension", "iteration"), strict=True):
        of_kind = sorted((one for one in rows if f"-{kind}-" in one.row.id), key=chart.place)
        places = [chart.place(one) for one in of_kind]
        for i, name in enumerate(("rate", "gaussian_rate")):
            title = ("power law", "Gaussian")[i]
            printed = [float(getattr(one.row.printed, name)) / 100 for one in of_kind]
            axes.plot(places, printed, "--", marker="x", color=COLOURS[i], alpha=0.6,
                      label=f"{title}, printed")  # fmt: skip
            ours = [one.first("gradients")[name] for one in of_kind]
            axes.plot(places, ours, marker=MARKERS[i], color=COLOURS[i], label=title)
        axes.set(xscale="log", xlabel="batch size $B$", ylim=(-0.03, 1.03))
        axes.set_title(f"over {kind}s", fontsize="medium")
        quiet_grid(axes)
    panels[0].set_ylabel("share not rejected")
    _one_legend(figure, panels[0], columns=4)
    return figure


def draw_sharpness(chart: Chart, rows: Sequence[Made]) -> Figure:
    """Return lambda_1 and the test loss over the slope s, a point for each row (HPL fig. 3, 4)."""
    figure, panels = new_figure(8.6, 4.6, ncols=2)
    found = [one.first("converged") for one in rows]
    slopes = [numbers["s"] for numbers in found]
    losses = [one.own[0]["about"]["test_loss"] for one in rows]
    sharpness = [numbers["lambda_1"] for numbers in found]
    names = [one.row.network.recipe.optimizer for one in rows if one.row.network.recipe]
    for axes, values in zip(panels, (sharpness, losses), strict=True):
        for i, (slope, value, numbers) in enumerate(zip(slopes, values, found, strict=True)):
            turn, colour = divmod(i, len(COLOURS))
            axes.plot(slope, value, MARKERS[(turn + colour) % len(MARKERS)], color=COLOURS[colour],
                      fillstyle="full" if numbers["power_law"] else "none",
                      label=names[i])  # fmt: skip
        axes.set_title(_correlation(slopes, values), fontsize="small")
        axes.set_xlabel(r"slope $\hat s$ of converged eigenvalues")
        quiet_grid(axes)
        few_ticks(axes)
    panels[0].set_ylabel(r"$\lambda_1$ (loss / parameter$^2$)")
    panels[1].set_ylabel("test loss")
    _one_legend(figure, panels[0], columns=6)
    return figure


def _correlation(x: Sequence[float], y: Sequence[float]) -> str:
    found = pearson(x, y)
    low, high = fisher_interval(found.r, found.num_points)
    return f"Pearson {found.r:.2f} ({low:.2f} to {high:.2f}), Spearman {found.spearman:.2f}"


def _draw_seeds(
    axes: Axes, places: Sequence[float], rows: Sequence[Made], protocol: str, name: str, label: str
) -> None:
    """Draw the mean of the seeds, and their range where there are several."""
    colour, marker = LOOKS[protocol]
    found = [(x, one.values(protocol, name)) for x, one in zip(places, rows, strict=True)]
    kept = [(x, values) for x, values in found if values]
    if not kept:
        return
    means = [sum(values) / len(values) for _, values in kept]
    low = [mean - min(values) for mean, (_, values) in zip(means, kept, strict=True)]
    high = [max(values) - mean for mean, (_, values) in zip(means, kept, strict=True)]
    axes.errorbar([x for x, _ in kept], means, yerr=[low, high], color=colour, marker=marker,
                  capsize=2, label=label)  # fmt: skip


# All rows of a paper -----------------------------------------------------------------------------


def draw_slopes(chart: Chart, rows: Sequence[Made]) -> Figure:
    """Return our slopes against the printed ones, with two standard errors."""
    figure, axes = new_figure(5.6, 4.8)
    ends: list[float] = []
    for protocol in PROTOCOLS[rows[0].row.paper]:
        both = [one for one in rows if slope_agrees(one, protocol) is not None]
        if not both:
            continue
        colour, marker = LOOKS[protocol]
        theirs = [float(one.row.printed.s or 0) for one in both]
        ours = [one.first(protocol)["s"] for one in both]
        errors = [
            2 * s / one.first(protocol)["k"] ** 0.5 for s, one in zip(ours, both, strict=True)
        ]
        their_errors = [2 * s / one.row.measure.k**0.5 for s, one in zip(theirs, both, strict=True)]
        agree = sum(slope_agrees(one, protocol) is True for one in both)
        axes.errorbar(theirs, ours, xerr=their_errors, yerr=errors, fmt=marker, color=colour,
                      elinewidth=0.8, alpha=0.75,
                      label=f"{protocol}: {agree} of {len(both)} agree")  # fmt: skip
        ends += [*theirs, *ours]
    low, high = 0.8 * min(ends), 1.25 * max(ends)
    axes.plot([low, high], [low, high], ":", color=PRINTED, lw=1, label="equal")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="printed slope $s$", ylabel="slope $s$ here")
    return _finished(figure, axes, columns=3)


def draw_verdicts(chart: Chart, rows: Sequence[Made]) -> Figure:
    """Return a square for each made row: is the verdict the paper's?"""
    paper = rows[0].row.paper
    tables = list(dict.fromkeys(one.row.table for one in rows))
    lines = [(table, protocol) for table in tables for protocol in PROTOCOLS[paper]]
    figure, axes = new_figure(7.2, 1.2 + 0.26 * len(lines))
    kinds = {True: ("same", COLOURS[0]), False: ("other", COLOURS[1]), None: ("none", "0.85")}
    counts = dict.fromkeys(kinds, 0)
    most = max(sum(one.row.table == table for one in rows) for table in tables)
    side = min(8.0, 260 / most)  # points; the axes are about 340 wide
    for y, (table, protocol) in enumerate(lines):
        of_table = [one for one in rows if one.row.table == table]
        for x, one in enumerate(of_table, 1):
            found = verdict(one, protocol)
            counts[found] += 1
            axes.scatter(x, y, s=side**2, marker="s", linewidths=0, color=kinds[found][1])
    for kind, (name, colour) in kinds.items():
        if counts[kind]:
            axes.scatter([], [], s=50, marker="s", color=colour, label=f"{name} ({counts[kind]})")
    axes.set_yticks(range(len(lines)), [_line_name(*line, paper) for line in lines])
    axes.set(xlabel="row of the table, of those made", ylim=(len(lines) - 0.4, -0.6))
    axes.xaxis.get_major_locator().set_params(integer=True)
    quiet_grid(axes)
    legend_below(figure, 3)
    return figure


def _line_name(table: str, protocol: str, paper: str) -> str:
    name = table if table.startswith("figure") else f"table {table}"
    return name if len(PROTOCOLS[paper]) == 1 else f"{name}, {protocol}"


# Spectra -----------------------------------------------------------------------------------------


def draw_spectra(chart: Chart, rows: Sequence[Made], what: str) -> Figure:
    """Return values against rank, log-log, of all rows of a chart."""
    figure, axes = new_figure(6.4, 4.2 + 0.16 * len(rows))
    colours = COLOURS[: len(rows)] if len(rows) <= len(COLOURS) else shades(len(rows))
    for (one, found), colour in zip(_spectra(rows), colours, strict=True):
        label = f"{one.row.label}: $d_{{ks}}$ = {found['d_ks']:.3f}"
        thinned = found["spectrum"]
        axes.plot(thinned["ranks"], thinned["values"], ".-", ms=4, lw=0.8, color=colour,
                  label=label)  # fmt: skip
    axes.set(yscale="log", xlabel="rank $k$", ylabel=what)
    longest = max(len(one.row.label) for one in rows)
    return _finished(figure, axes, columns=2 if len(rows) > 4 and longest < 26 else 1)


def _spectra(rows: Sequence[Made]) -> Iterator[tuple[Made, dict[str, Any]]]:
    """Yield each row with the numbers that hold its spectrum: eigenvalues before Ritz values."""
    for one in rows:
        found = (one.first(protocol) for protocol in PROTOCOLS[one.row.paper])
        yield one, next(numbers for numbers in found if "spectrum" in numbers)


def _finished(figure: Figure, axes: Axes, *, columns: int, log: bool = True) -> Figure:
    if log:
        axes.set_xscale("log")
    quiet_grid(axes)
    few_ticks(axes)
    legend_below(figure, columns)
    return figure


def _one_legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """Put the legend of one of several alike axes below them all."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False,
                  fontsize="small")  # fmt: skip

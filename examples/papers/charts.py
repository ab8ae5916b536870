"""Figures of docs/papers from the results: ours beside the papers' digits, and spectra by rank.

A figure is drawn where enough of its rows are made; the pages name the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from made import PROTOCOLS, Made, slope_agrees, verdict

from lightning_hessian.tracking.style import (
    COLOURS,
    MARKERS,
    few_ticks,
    legend_below,
    new_figure,
    quiet_grid,
    render,
    shades,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRINTED = "0.35"
LOOKS = {
    "converged": (COLOURS[0], MARKERS[0]),
    "pooled": (COLOURS[1], MARKERS[1]),
    "gradients": (COLOURS[0], MARKERS[0]),
}
DPI = 100

Draw = Callable[[Sequence[Made]], "Figure"]


@dataclass(frozen=True)
class Chart:
    """A figure of a page.

    Attributes:
        name: Of its file, which begins with the paper.
        title: What it shows.
        source: The paper's own figure or table.
        caption: What a reader sees there.
        rows: Which rows belong to it: a pattern of their ids. Its first group, or else what
            ``places`` says of an id, is where the row stands on the axis.
        draw: Draws those of them that have results.
        least: How many must have them.
        counts: Whether the numbers of a row's first seed are enough to be drawn.
        places: Where rows stand that the pattern says nothing of.
    """

    name: str
    title: str
    source: str
    caption: str
    rows: str
    draw: Callable[[Chart, Sequence[Made]], Figure]
    least: int = 2
    counts: Callable[[Made, str], bool] = lambda made, name: "power_law" in made.first(name)
    places: Mapping[str, float] | None = None

    def chosen(self, rows: Sequence[Made]) -> list[Made]:
        """Return its rows that have what it needs, in the order of the page."""
        return [
            one for one in rows
            if one.own and re.fullmatch(self.rows, one.row.id)
            and any(self.counts(one, name) for name in PROTOCOLS[one.row.paper])
        ]  # fmt: skip

    def place(self, made: Made) -> float:
        """Return where a row stands on the axis."""
        if self.places is not None and made.row.id in self.places:
            return self.places[made.row.id]
        found = re.fullmatch(self.rows, made.row.id)
        assert found is not None
        return float(found[1])


def sorted_out(paper: str, rows: Sequence[Made]) -> tuple[list[Chart], list[Chart]]:
    """Return the charts of a paper that can be drawn, and those that cannot yet."""
    drawn, left = [], []
    for chart in CHARTS:
        if chart.name.startswith(f"{paper}-"):
            enough = len(chart.chosen(rows)) >= chart.least
            (drawn if enough else left).append(chart)
    return drawn, left


def pictures(by_paper: Mapping[str, Sequence[Made]]) -> dict[str, bytes]:
    """Return the PNG of every chart that can be drawn, by the name of its file."""
    return {
        f"{chart.name}.png": render(chart.draw(chart, chart.chosen(rows)), dpi=DPI)
        for paper, rows in by_paper.items()
        for chart in sorted_out(paper, rows)[0]
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
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False,
                  fontsize="small")  # fmt: skip
    return figure


def draw_sharpness(chart: Chart, rows: Sequence[Made]) -> Figure:
    """Return lambda_1 and the test loss over the slope s, a point for each row (HPL fig. 3, 4)."""
    figure, panels = new_figure(8.6, 3.8, ncols=2)
    found = [(one.first("converged"), one.own[0]["about"]) for one in rows]
    slopes = [numbers["s"] for numbers, _ in found]
    panels[0].plot(slopes, [numbers["lambda_1"] for numbers, _ in found], "o", color=COLOURS[0])
    panels[1].plot(slopes, [about["test_loss"] for _, about in found], "s", color=COLOURS[1])
    panels[0].set(ylabel=r"$\lambda_1$ (loss / parameter$^2$)", yscale="log")
    panels[1].set(ylabel="test loss")
    for axes in panels:
        axes.set_xlabel(r"slope $\hat s$ of converged eigenvalues")
        quiet_grid(axes)
        few_ticks(axes)
    return figure


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


# The charts --------------------------------------------------------------------------------------

_BATCH = "batch size $B$"
_OPTIMIZERS = r"hpl-{}-(?!random|b\d|n\d|noise|shuffled|eigengap|epoch).*"
_OVER = (
    "KS distance as printed and as measured here; below the dotted line a power law is accepted."
)
_HESSIAN = r"Hessian eigenvalue $\lambda_k$ (loss / parameter$^2$)"
_COVARIANCE = r"eigenvalue $\lambda_k$ (loss$^2$ / parameter$^2$)"
_BY_RANK = "Values by rank, 60 of them, from the results."


def _has_slope(made: Made, protocol: str) -> bool:
    return protocol == "converged" and "s" in made.first(protocol)


def _has_spectrum(made: Made, protocol: str) -> bool:
    return "spectrum" in made.first(protocol)


def _distances(name: str, title: str, source: str, rows: str, label: str, **options: Any) -> Chart:
    log = options.pop("log", True)
    draw = partial(draw_distances, label=label, log=log)
    return Chart(name, title, source, _OVER, rows, draw, **options)


def _spectrum(name: str, title: str, source: str, rows: str, *, least: int = 2) -> Chart:
    what = _HESSIAN if name.startswith("hpl") else _COVARIANCE
    draw = partial(draw_spectra, what=what)
    return Chart(name, title, source, _BY_RANK, rows, draw, least=least, counts=_has_spectrum)


def _all_of(paper: str) -> list[Chart]:
    return [
        Chart(f"{paper}-verdicts", "Verdicts, row by row", "all tables",
              "Blue where the verdict is the paper's, red where it is the other, grey where one of "
              "the two has none. A line is a table.", f"{paper}-.*", draw_verdicts),
        Chart(f"{paper}-slopes", "Slopes beside the printed ones", "all tables",
              "Bars are two standard errors, which allow for the fit and not for the seed.",
              f"{paper}-.*", draw_slopes,
              counts=lambda made, name: slope_agrees(made, name) is not None),
    ]  # fmt: skip


CHARTS: list[Chart] = [
    *_all_of("hpl"),
    _distances("hpl-epochs", "d_ks over the epochs", "table 7, figure 29",
               r"hpl-7-mnist-epoch(\d+)|hpl-7-mnist-sgd", "epochs",
               places={"hpl-7-mnist-sgd": 50}),
    _distances("hpl-samples", "d_ks over the number of training samples", "table 7",
               r"hpl-7-mnist-n(\d+)|hpl-7-mnist-sgd", "training samples $N$",
               places={"hpl-7-mnist-sgd": 60_000}),
    _distances("hpl-batch-sizes", "d_ks over the batch size", "table 7, figure 7",
               r"hpl-7-mnist-b(\d+)", _BATCH),
    _distances("hpl-iterations", "d_ks over the batch size at the same iterations",
               "table 5, figure 16", r"hpl-5-b(\d+)", _BATCH),
    _distances("hpl-label-noise", "d_ks over the label noise", "table 7, figure 15",
               r"hpl-7-mnist-noise-(\d+)|hpl-7-mnist-sgd", "labels flipped (%)", log=False,
               places={"hpl-7-mnist-sgd": 0}),
    _distances("hpl-widths", "d_ks over the width", "table 9, figure 26",
               r"hpl-9-width(\d+)", "width"),
    *(
        Chart(f"hpl-sharpness-{data}", f"Slope, sharpness and test loss by optimizer, {title}",
              source, "A point is an optimizer. The paper finds that s follows both.",
              rows, draw_sharpness, least=4, counts=_has_slope)
        for data, title, source, rows in (
            ("mnist", "MNIST", "figures 3, 4", _OPTIMIZERS.format("7-mnist")),
            ("cifar10", "CIFAR-10", "figures 22, 23", _OPTIMIZERS.format("8-cifar10")),
        )
    ),
    _spectrum("hpl-spectra", "Spectra before and after training", "figure 1",
              r"hpl-[78]-(mnist|fashion|cifar10)-(random|sgd)"),
    _spectrum("hpl-spectra-gaps", "Eigengaps re-sorted by size", "figures 2, 21",
              r"hpl-7-\w+-eigengap", least=1),
    _spectrum("hpl-spectra-optimizers", "Spectra by optimizer", "figure 3",
              _OPTIMIZERS.format("7-mnist")),
    _spectrum("hpl-spectra-batch-sizes", "Spectra by batch size", "figure 7",
              r"hpl-7-mnist-b\d+"),
    _spectrum("hpl-spectra-labels", "Spectra by labels", "figures 15, 17",
              r"hpl-7-mnist-(sgd|noise-\d+|shuffled)"),
    _spectrum("hpl-spectra-avila", "Spectrum on Avila", "figure 20", "hpl-9-avila", least=1),
    _spectrum("hpl-spectra-widths", "Spectra by width", "figure 26", r"hpl-9-width\d+"),
    _spectrum("hpl-spectra-linear", "Spectra of linear networks", "figure 28", r"hpl-28-.*"),
    _spectrum("hpl-spectra-epochs", "Spectra by epoch", "figure 29", r"hpl-7-mnist-epoch\d+"),
    *_all_of("sg"),
    Chart("sg-rates", "Power-law and Gaussian rates over the batch size", "table 4, figure 2",
          "Share of columns (left) and rows (right) of G that each test does not reject.",
          r"sg-4-(?:dimension|iteration)-b(\d+)", draw_rates, least=4),
    _distances("sg-batch-sizes", "d_ks of the covariance over the batch size, as initialised",
               "table 7, figure 6", r"sg-7-random-b(\d+)", _BATCH),
    _distances("sg-batch-sizes-pretrained", "d_ks of the covariance over the batch size, trained",
               "table 7, figure 6", r"sg-7-pretrain-b(\d+)", _BATCH),
    _distances("sg-second-moment", "d_ks of the second moment over the batch size, as initialised",
               "table 6, figure 5", r"sg-6-random-b(\d+)", _BATCH),
    _distances("sg-label-noise", "d_ks over the label noise", "table 7, figure 7",
               r"sg-7-noise-(\d+)|sg-7-pretrain-b1", "labels flipped (%)", log=False,
               places={"sg-7-pretrain-b1": 0}),
    _distances("sg-widths", "d_ks over the width, as initialised", "table 8, figure 8",
               r"sg-8-2layer-fcn-random(?:-width(\d+))?", "width",
               places={"sg-8-2layer-fcn-random": 70}),
    _distances("sg-widths-pretrained", "d_ks over the width, trained", "table 8, figure 8",
               r"sg-8-2layer-fcn-pretrain(?:-width(\d+))?", "width",
               places={"sg-8-2layer-fcn-pretrain": 70}),
    _spectrum("sg-spectra", "Spectra as initialised and trained", "figures 4, 5",
              r"sg-[67]-(random|pretrain)-b1"),
    _spectrum("sg-spectra-batch-sizes", "Spectra by batch size", "figure 6",
              r"sg-7-random-b\d+"),
    _spectrum("sg-spectra-labels", "Spectra by labels", "figure 7",
              r"sg-7-(pretrain-b1|noise-\d+|shuffled)"),
    _spectrum("sg-spectra-widths", "Spectra by width and depth", "figure 8", r"sg-8-.*"),
    _spectrum("sg-spectra-linear", "Spectra of linear networks", "figure 9", r"sg-9-.*"),
    _spectrum("sg-spectra-optimizers", "Spectra with momentum, weight decay and Adam",
              "figure 13", r"sg-10-.*-random-(sgd|momentum|weight-decay|adam)"),
    _spectrum("sg-spectra-outliers", "Outliers of LeNet and of the FCN", "figure 11",
              r"sg-7-pretrain-b1|sg-8-2layer-fcn-pretrain"),
    Chart("sg-entries", "Sorted magnitudes of gradients and of parameters", "figure 1",
          "Magnitude by rank of one gradient and of one parameter over the iterations, those of "
          "median KS distance.", r"sg-1-.*",
          partial(draw_spectra, what="magnitude (loss / parameter)"), counts=_has_spectrum),
]  # fmt: skip

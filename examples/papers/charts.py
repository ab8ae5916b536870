"""Figures of docs/papers from the results: ours beside the papers' digits, and spectra by rank.

A figure is drawn where enough of its rows are made; the pages name the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from drawings import (
    draw_distances,
    draw_rates,
    draw_sharpness,
    draw_slopes,
    draw_spectra,
    draw_verdicts,
)
from made import PROTOCOLS, Made, is_at_chance, slope_agrees

from lightning_hessian.tracking.style import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100


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


# The charts --------------------------------------------------------------------------------------

_BATCH = "batch size $B$"
_OPTIMIZERS = r"hpl-{}-(?!random|b\d|n\d|noise|shuffled|eigengap|epoch).*"
_OVER = (
    "KS distance as printed and as measured here; below the dotted line a power law is accepted."
)
_SHARPNESS = (
    "A point is an optimizer, hollow where its spectrum is no power law; networks that have hardly "
    "trained are left out; in brackets Fisher's 95 % interval. "
    'The paper: "A smaller $\\hat{s}$ highly correlates to a smaller largest eigenvalue '
    'and a smaller trace".'
)
_HESSIAN = r"Hessian eigenvalue $\lambda_k$ (loss / parameter$^2$)"
_COVARIANCE = r"eigenvalue $\lambda_k$ (loss$^2$ / parameter$^2$)"
_BY_RANK = "Values by rank, 60 of them, from the results."


def _has_slope(made: Made, protocol: str) -> bool:
    return protocol == "converged" and "s" in made.first(protocol) and not is_at_chance(made)


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
              source, _SHARPNESS, rows, draw_sharpness, least=4, counts=_has_slope)
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

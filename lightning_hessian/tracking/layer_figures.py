"""The layers of one measurement side by side, in the order in which the data passes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lightning_hessian.results import FloatArray, HessianSpectrum
from lightning_hessian.tracking.scalars import spectrum_scalars
from lightning_hessian.tracking.style import (
    COLOURS,
    SYMBOLS,
    evenly_chosen,
    few_ticks,
    legend_below,
    new_figure,
    quiet_grid,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST_LAYERS = 3
"""Fewer are no depth that something could change over."""

_MOST_NAMES = 48
_DRAWN = ("lambda_1", "s_hat", "d_ks")


def depth_plot(
    spectra: Mapping[str, HessianSpectrum], *, significance: float = 0.05, title: str | None = None
) -> Figure:
    """Return lambda_1, s_hat and d_ks of layers over the depth, one above another (HPL fig. 31).

    A statistic that a layer has not (nothing converged, too few values for a fit) leaves a gap in
    its curve. d_c is drawn beside d_ks, for each layer by its own number of values.

    Args:
        spectra: Spectra by name of the layer, in order.
        significance: Level of d_c.
        title: Of the figure.

    Raises:
        ValueError: There are fewer than three layers.
    """
    if len(spectra) < FEWEST_LAYERS:
        raise ValueError(f"{len(spectra)} layers; a comparison over depth takes {FEWEST_LAYERS}.")
    found = [spectrum_scalars(spectrum, significance)[0] for spectrum in spectra.values()]
    places = np.arange(len(found))
    figure, rows = new_figure(6.4, 6.4, nrows=len(_DRAWN), sharex=True)
    for axes, statistic, colour in zip(rows, _DRAWN, COLOURS, strict=False):
        values = _series(found, statistic)
        axes.plot(places, values, "o-", color=colour, markersize=4, linewidth=1)
        if statistic == "d_ks":
            axes.plot(places, _series(found, "d_c"), "k:", linewidth=1, label=SYMBOLS["d_c"])
            axes.set_ylim(bottom=0)
            legend_below(figure)
        if statistic == "lambda_1" and np.any(values > 0) and not np.any(values <= 0):
            axes.set_yscale("log")  # layers lie decades apart
        unit = " (loss / parameter$^2$)" if statistic == "lambda_1" else ""
        axes.set_ylabel(SYMBOLS[statistic] + unit)
        quiet_grid(axes)
        few_ticks(axes)
    named = evenly_chosen(list(zip(places, spectra, strict=True)), _MOST_NAMES)
    ticks, names = zip(*named, strict=True)
    size = 8 if len(names) <= 16 else 6
    rows[-1].set_xticks(ticks, names, rotation=90, fontsize=size)
    rows[0].set_title(title or "", fontsize="medium")
    return figure


def _series(found: list[dict[str, float]], statistic: str) -> FloatArray:
    """Return one statistic of all layers, NaN where a layer has none."""
    return np.array([scalars.get(statistic, np.nan) for scalars in found], dtype=np.float64)

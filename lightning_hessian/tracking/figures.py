"""Figures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lightning_hessian.results import HessianSpectrum
from lightning_hessian.statistics.power_law import fit_power_law
from lightning_hessian.tracking.style import COLOURS, MARKERS, new_figure, quiet_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rank_plot(spectra: Mapping[str, HessianSpectrum], *, significance: float = 0.05) -> Figure:
    """Returns eigenvalue against rank, log-log, with the fitted line of each spectrum (HPL fig. 1).

    Filled markers have converged, hollow ones have not. The line is
    lambda_k = lambda_K (K / k)^s over the values that were fitted.

    Args:
        spectra: Spectra by what the legend calls them.
        significance: Level of the verdict in the legend.

    Raises:
        ValueError: There is no spectrum.
    """
    if not spectra:
        raise ValueError("There is no spectrum to draw.")
    figure, axes = new_figure()
    for i, (name, spectrum) in enumerate(spectra.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        values, converged = spectrum.eigenvalues, spectrum.converged
        ranks = np.arange(1, len(values) + 1)
        label = name
        leading = spectrum.leading
        if len(leading) >= 2 and leading[0] > leading[-1]:
            fit = fit_power_law(leading, significance=significance)
            sign = "<" if fit.is_power_law else "≥"
            label += (
                f": $\\hat s$ = {fit.slope:.2f}, $d_{{ks}}$ = {fit.ks_distance:.3f} {sign} "
                f"$d_c$ = {fit.critical_value:.3f}"
            )
            fitted = ranks[: len(leading)]
            line = fit.cutoff * (fitted[-1] / fitted) ** fit.slope
            axes.plot(fitted, line, color=colour, linewidth=1.2, zorder=3)
        positive = values > 0
        for mask, fill in ((positive & converged, colour), (positive & ~converged, "none")):
            axes.scatter(
                ranks[mask],
                values[mask],
                s=14,
                marker=marker,
                facecolors=fill,
                edgecolors=colour,
                linewidths=0.7,
                alpha=0.75,
                label=label if fill == colour else None,
            )
    axes.set(
        xscale="log", yscale="log", xlabel="rank $k$", ylabel="Hessian eigenvalue $\\lambda_k$"
    )
    quiet_grid(axes)
    axes.legend(loc="lower left", frameon=False, fontsize="small")
    return figure

"""Figures of spectral densities: that of the largest eigenvalues, and those by quadrature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lightning_hessian.results import FloatArray, SpectralDensity
from lightning_hessian.statistics.heterogeneity import transformed_densities
from lightning_hessian.statistics.power_law import fit_power_law
from lightning_hessian.tracking.style import COLOURS, few_ticks, new_figure, quiet_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_EIGENVALUE = r"eigenvalue $\lambda$ (loss / parameter$^2$)"
_MOST_DENSITIES = 10
_FAINTEST = 1e-6  # of the largest density: an outlier of a million parameters is seen


def spectral_density_plot(
    leading: FloatArray,
    densities: Mapping[str, SpectralDensity] | None = None,
    *,
    significance: float = 0.05,
    title: str | None = None,
) -> Figure:
    """Return the density of the largest eigenvalues with its power law, and whole densities.

    Left, a histogram of the K largest eigenvalues in bins of equal width in the logarithm, over
    p(lambda) = (beta - 1) / lambda_K (lambda / lambda_K)^-beta. Right, where there are any, the
    densities of all eigenvalues, found by quadrature and broadened, over asinh(lambda / unit):
    both signs, and all sizes.

    Args:
        leading: lambda_k, positive and descending, float64 [K].
        densities: By what the legend calls them, that of H or those of its diagonal blocks; the
            first ten are drawn.
        significance: Level of the fit.
        title: Of the figure.

    Raises:
        ValueError: There is neither a power law to fit nor a density.
    """
    num_panels = (len(leading) > 1) + bool(densities)
    if not num_panels:
        raise ValueError("There is no density to draw: no two eigenvalues, and no quadrature.")
    width = 9.0 if num_panels == 2 else 6.0
    figure, axes = new_figure(width, 3.9, ncols=num_panels, squeeze=False)
    if len(leading) > 1:
        _draw_leading(axes[0, 0], leading, significance)
    if densities:
        draw_densities(axes[0, -1], densities)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def draw_densities(axes: Axes, densities: Mapping[str, SpectralDensity]) -> None:
    """Draw the first ten densities over asinh(lambda / unit), as `heterogeneity` compares them."""
    grid, rows, unit = transformed_densities(list(densities.values()))
    drawn = list(zip(densities, rows, strict=True))[:_MOST_DENSITIES]
    for i, (name, row) in enumerate(drawn):
        dashes = ("-", "--")[i // len(COLOURS) % 2]
        axes.plot(grid, row, dashes, color=COLOURS[i % len(COLOURS)], linewidth=1.2, label=name)
    exponents = np.arange(-12, 13)
    powers = np.r_[-(10.0 ** exponents[::-1]), 0.0, 10.0**exponents]
    places = np.arcsinh(powers / unit)
    shown = (np.abs(places) > 2) & (places > grid[0]) & (places < grid[-1]) | (powers == 0)
    axes.set_xticks(places[shown], [_power(value) for value in powers[shown]])
    if shown.sum() > 7:
        axes.tick_params(axis="x", labelrotation=45)
    highest = float(rows.max())
    axes.set(xlim=(grid[0], grid[-1]), yscale="log", ylim=(highest * _FAINTEST, 3 * highest))
    axes.set(xlabel=_EIGENVALUE, ylabel=r"density of asinh($\lambda$ / unit)")
    quiet_grid(axes)
    left = len(densities) - len(drawn)
    heading = f"the first {len(drawn)} of {len(densities)}" if left else None
    axes.legend(frameon=False, fontsize="small", title=heading, title_fontsize="small")


def _draw_leading(axes: Axes, leading: FloatArray, significance: float) -> None:
    edges = np.geomspace(leading[-1], leading[0], 2 + int(2 * np.sqrt(len(leading))))
    edges[-1] *= 1 + 1e-12  # the largest lies in the last bin, whatever the rounding
    if leading[0] > leading[-1]:
        counts, edges = np.histogram(leading, edges)
        heights = counts / len(leading) / np.diff(edges)
        filled = counts > 0
        centres = np.sqrt(edges[:-1] * edges[1:])
        x, y, label = centres[filled], heights[filled], f"the {len(leading)} largest"
        axes.scatter(x, y, s=18, color=COLOURS[0], alpha=0.8, label=label)
        fit = fit_power_law(leading, significance=significance)
        line = (fit.exponent - 1) / fit.cutoff * (edges / fit.cutoff) ** -fit.exponent
        label = rf"$\lambda^{{-\hat\beta}}$, $\hat\beta$ = {fit.exponent:.2f}"
        label += f" ± {fit.exponent_std_error:.2f}"
        axes.plot(edges, line, color=COLOURS[1], linewidth=1.2, label=label)
        axes.set(xscale="log", yscale="log")
    axes.set(xlabel=_EIGENVALUE, ylabel=r"density $p(\lambda)$ (parameter$^2$ / loss)")
    quiet_grid(axes)
    few_ticks(axes)
    axes.legend(frameon=False, fontsize="small", loc="lower left")


def _power(value: float) -> str:
    """Return a power of ten as the axis writes it."""
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""  # typeset as a minus
    return f"${sign}10^{{{round(np.log10(abs(value)))}}}$"

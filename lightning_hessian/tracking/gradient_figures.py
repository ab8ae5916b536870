"""Figures of gradient spectra, beside the Hessian's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_hessian.results import FloatArray, GradientStructure, HessianSpectrum
from lightning_hessian.statistics.subspace import proportionality
from lightning_hessian.tracking.figures import draw_line
from lightning_hessian.tracking.style import (
    COLOURS,
    few_ticks,
    legend_below,
    new_figure,
    quiet_grid,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COVARIANCE, _HESSIAN, _SECOND_MOMENT = COLOURS[:3]
_ITERATION, _DIMENSION = COLOURS[:2]  # blue and red, as in SG's figures
_MOST_POINTS = 400  # of a sorted row, evenly over the logarithm of the rank
_EIGENVALUES = r"$\lambda_k$ of $C$ (loss$^2$/parameter$^2$), of $H$ (loss/parameter$^2$)"


def spectra_plot(
    structure: GradientStructure,
    hessian: HessianSpectrum | None = None,
    *,
    significance: float = 0.05,
) -> Figure:
    """Return the spectra of covariance, second moment and Hessian by rank, log-log (SG fig. 5).

    The lines are the fitted power laws lambda_k = lambda_K (K / k)^s; of the Hessian only
    converged eigenvalues are drawn.

    Args:
        structure: Of the gradients.
        hessian: Spectrum at the same parameters, on the same data.
        significance: Level of the verdicts in the legend.
    """
    figure, axes = new_figure(height=5.0)
    draw_gradient_spectra(axes, structure, hessian, significance)
    few_ticks(axes)
    legend_below(figure)
    return figure


def draw_gradient_spectra(
    axes: Axes,
    structure: GradientStructure,
    hessian: HessianSpectrum | None,
    significance: float,
) -> None:
    """Draw what `spectra_plot` shows, without its legend."""
    floor = structure.leading[-1] if len(structure.leading) else np.inf
    second_moment = structure.second_moment[structure.second_moment >= floor]
    _draw(axes, "covariance C", structure.leading, _COVARIANCE, "o", significance)
    _draw(axes, "second moment", second_moment, _SECOND_MOMENT, "^", significance)
    if hessian is not None:
        _draw(axes, "Hessian H", hessian.leading, _HESSIAN, "s", significance)
    axes.set(xscale="log", yscale="log", xlabel="rank $k$", ylabel=_EIGENVALUES)
    quiet_grid(axes)


def magnitude_plot(structure: GradientStructure, *, significance: float = 0.05) -> Figure:
    """Return the sorted magnitudes of G's entries against rank, log-log (SG fig. 1 and 3).

    One gradient over its dimensions, and one parameter over the iterations: of each kind the one
    whose KS distance is the median. The lines are the power laws of the K largest magnitudes,
    lambda_k = lambda_K (K / k)^s.

    Args:
        structure: Of gradients whose entries were tested.
        significance: Level of the verdicts in the legend.

    Raises:
        ValueError: The entries were not tested, or all are zero.
    """
    figure, axes = new_figure(height=4.8)
    draw_entries(axes, structure, significance)
    few_ticks(axes)
    legend_below(figure)
    return figure


def draw_entries(axes: Axes, structure: GradientStructure, significance: float) -> None:
    """Draw what `magnitude_plot` shows, without its legend."""
    drawn = False
    for tests, name, colour, marker in (
        (structure.dimension_tests, "gradient {} over dimensions", _DIMENSION, "o"),
        (structure.iteration_tests, "parameter {} over iterations", _ITERATION, "^"),
    ):
        if tests is None or tests.typical is None:
            continue
        values, label = tests.typical.values, name.format(tests.typical.index)
        if fit := draw_line(axes, values[: tests.num_values], colour, significance):
            label += f": $\\hat s$ = {fit.slope:.2f}, {verdict(fit)}"
        ranks = np.arange(1, len(values) + 1)
        shown = np.unique(np.geomspace(1, len(values), _MOST_POINTS).round().astype(int)) - 1
        look: dict[str, Any] = {"s": 14, "marker": marker, "color": colour, "alpha": 0.6}
        axes.scatter(ranks[shown], values[shown], label=label, **look)
        drawn = True
    if not drawn:
        raise ValueError("No entries to draw: measure with tests=True, and gradients not zero.")
    axes.set(xscale="log", yscale="log", xlabel="rank by magnitude")
    axes.set_ylabel("magnitude of a gradient's entry (loss / parameter)")
    quiet_grid(axes)


def ratio_plot(structure: GradientStructure, hessian: HessianSpectrum) -> Figure:
    """Return lambda_k(C) / lambda_k(H) by rank, with its geometric mean and spread.

    A flat line is what proportional matrices would give (SG eq. 3); the dotted one is 1 / B.

    Args:
        structure: Of the gradients.
        hessian: Spectrum at the same parameters, on the same data.

    Raises:
        ValueError: Fewer than two ranks have positive eigenvalues in both.
    """
    found = proportionality(structure.leading, hessian.leading)
    ranks = np.arange(1, len(found.ratios) + 1)
    figure, axes = new_figure(6.4, 3.6)
    axes.scatter(ranks, found.ratios, s=14, color=_COVARIANCE, alpha=0.75)
    label = f"geometric mean {found.constant:.3g}, spread $\\times$ {found.spread:.2f}"
    axes.axhline(found.constant, color=_COVARIANCE, linewidth=1.2, label=label)
    low, high = found.constant / found.spread, found.constant * found.spread
    axes.axhspan(low, high, color=_COVARIANCE, alpha=0.12, linewidth=0)
    if structure.batch_size is not None:
        expected = 1 / structure.batch_size
        label = f"$1/B$ = {expected:.3g}"
        axes.axhline(expected, color=_HESSIAN, linestyle=":", label=label)
    axes.set(xscale="log", yscale="log", xlabel="rank $k$")
    axes.set_ylabel("$\\lambda_k(C)\\,/\\,\\lambda_k(H)$ (loss)")
    quiet_grid(axes)
    few_ticks(axes)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _draw(
    axes: Axes, name: str, values: FloatArray, colour: str, marker: str, significance: float
) -> None:
    """Draw one spectrum and its line."""
    if not len(values):
        return
    ranks = np.arange(1, len(values) + 1)
    if fit := draw_line(axes, values, colour, significance):
        name += f": $\\hat s$ = {fit.slope:.2f}, {verdict(fit)}"
    axes.scatter(ranks, values, s=14, marker=marker, color=colour, alpha=0.6, label=name)

"""Figures of spectra: by rank, their gaps, the choice of K, and how they change in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_hessian.results import FloatArray, HessianSpectrum, PowerLawFit
from lightning_hessian.statistics.eigengaps import eigengaps
from lightning_hessian.statistics.power_law import (
    fit_power_law,
    ks_distance_by_cutoff,
    optimal_cutoff,
)
from lightning_hessian.statistics.significance import critical_value
from lightning_hessian.statistics.subspace import num_outliers
from lightning_hessian.statistics.theory import approximate_eigengaps, eigengaps_of_values
from lightning_hessian.tracking.style import (
    COLOURS,
    EIGENVALUE,
    MARKERS,
    evenly_chosen,
    few_ticks,
    legend_below,
    new_figure,
    quiet_grid,
    shades,
    verdict,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CURVES = 60
_MOST_CUTOFFS = 200
_FEWEST_OF_CUTOFF = 10


def rank_plot(
    spectra: Mapping[str, HessianSpectrum], *, significance: float = 0.05, title: str | None = None
) -> Figure:
    """Return eigenvalue against rank, log-log, with the fitted line of each spectrum (HPL fig. 1).

    Filled markers have converged, hollow ones have not; ringed ones are outliers, which stand off
    the power law of those below (`num_outliers`). The line is lambda_k = lambda_K (K / k)^s over
    the values that were fitted, and the dotted one their cutoff lambda_K.

    Args:
        spectra: Spectra by what the legend calls them.
        significance: Level of the verdict in the legend, and of the outliers.
        title: Of the figure.

    Raises:
        ValueError: There is no spectrum, or nothing positive in any.
    """
    if not any((spectrum.eigenvalues > 0).any() for spectrum in spectra.values()):
        raise ValueError("There is no positive eigenvalue to draw.")
    figure, axes = new_figure(height=4.8)
    draw_ranks(axes, spectra, significance)
    few_ticks(axes)
    legend_below(figure)
    if title:
        axes.set_title(title, fontsize="medium")
    return figure


def draw_ranks(axes: Axes, spectra: Mapping[str, HessianSpectrum], significance: float) -> None:
    """Draw what `rank_plot` shows, without its legend."""
    for i, (name, spectrum) in enumerate(spectra.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        label = name + _draw_fit(axes, spectrum.leading, colour, significance)
        values, converged = spectrum.eigenvalues, spectrum.converged
        ranks = np.arange(1, len(values) + 1)
        filled, hollow = (values > 0) & converged, (values > 0) & ~converged
        look: dict[str, Any] = {"s": 14, "marker": marker, "linewidths": 0.7, "alpha": 0.75}
        look["edgecolors"] = colour
        axes.scatter(ranks[filled], values[filled], facecolors=colour, label=label, **look)
        axes.scatter(ranks[hollow], values[hollow], facecolors="none", **look)
    axes.set(xscale="log", yscale="log", xlabel="rank $k$", ylabel=f"Hessian {EIGENVALUE}")
    quiet_grid(axes)


def _draw_fit(axes: Axes, leading: FloatArray, colour: str, significance: float) -> str:
    """Draw line, cutoff and outliers, and return what the legend says of them."""
    fit = draw_line(axes, leading, colour, significance)
    if fit is None:
        return ""
    ranks = np.arange(1, len(leading) + 1)
    axes.axhline(fit.cutoff, color=colour, linewidth=0.8, linestyle=":", zorder=1)
    axes.annotate(
        rf"$\lambda_K$ = {fit.cutoff:.3g}",
        (0, fit.cutoff),
        xycoords=("axes fraction", "data"),
        xytext=(4, 2),
        textcoords="offset points",
        va="bottom",
        color=colour,
        fontsize="small",
    )
    text = f": $\\hat s$ = {fit.slope:.2f}, {verdict(fit)}"
    outliers = num_outliers(leading, significance=significance) if len(leading) >= 4 else 0
    if outliers:
        x, y = ranks[:outliers], leading[:outliers]
        axes.scatter(x, y, s=70, facecolors="none", edgecolors=colour, linewidths=0.9)
        text += f", {outliers} outlier{'s' if outliers > 1 else ''}"
    return text


def eigengap_plot(
    eigenvalues: ArrayLike,
    residuals: ArrayLike | None = None,
    *,
    significance: float = 0.05,
    title: str | None = None,
) -> Figure:
    """Return the gaps between neighbours, by original rank and re-sorted, log-log (HPL fig. 2).

    Left, the line is that of least squares, whose slope is about s + 1 (HPL eq. 13); right, that
    of the maximum-likelihood power law of the re-sorted gaps.

    Args:
        eigenvalues: lambda_k, real [K], those that a power law is fitted to.
        residuals: Their residual bounds [K]: gaps below them are not drawn; see `eigengaps`.
        significance: Level of the verdict.
        title: Of the figure.

    Raises:
        ValueError: As `eigengaps`.
    """
    found = eigengaps(eigenvalues, residuals, significance=significance)
    figure, (left, right) = new_figure(9.0, 3.9, ncols=2, sharey=True)
    ranks = np.flatnonzero(found.fitted) + 1
    gaps = found.gaps[found.fitted]
    left.scatter(ranks, gaps, s=12, color=COLOURS[0], alpha=0.7)
    logs = np.log(ranks)
    line = np.exp(np.log(gaps).mean() - found.rank_slope * (logs - logs.mean()))
    slope = f"slope $-${found.rank_slope:.2f} ± {found.rank_slope_std_error:.2f}"
    left.plot(ranks, line, color=COLOURS[1], linewidth=1.2, label=slope)
    left.set(xscale="log", yscale="log", xlabel="rank $k$ of the eigenvalue")
    left.set_ylabel(r"gap $\delta_k$ (loss / parameter$^2$)")
    descending, order = np.sort(gaps)[::-1], np.arange(1, len(gaps) + 1)
    right.scatter(order, descending, s=12, color=COLOURS[0], alpha=0.7)
    fit = found.fit
    label = f"$\\hat s$ = {fit.slope:.2f}, {verdict(fit)}"
    right.plot(order, line_of(fit, order), color=COLOURS[1], linewidth=1.2, label=label)
    right.set(xscale="log", xlabel="rank of the gap by size")
    for axes in (left, right):
        quiet_grid(axes)
        axes.legend(loc="lower left", frameon=False, fontsize="small")
    few_ticks(left)
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def eigengap_theory_plot(
    eigenvalues: ArrayLike,
    residuals: ArrayLike | None = None,
    *,
    significance: float = 0.05,
    title: str | None = None,
) -> Figure:
    """Return the gaps by rank beside those of the fitted power law, log-log (HPL eq. 11 to 14).

    Left the measured gaps, those that the law expects below each measured eigenvalue (eq. 12),
    those of the law itself (eq. 11) and their approximation for s near 1 (eq. 13). Right how far
    an eigenvector may turn, as a bound on the sine of the angle over the norm of what is added to
    the Hessian: with the measured gaps (eq. 7), and after eq. 13 (eq. 14).

    Args:
        eigenvalues: lambda_k, real [K], those that a power law is fitted to.
        residuals: Their residual bounds [K]: gaps below them are not drawn; see `eigengaps`.
        significance: Level of the fit.
        title: Of the figure.

    Raises:
        ValueError: As `eigengaps`, or there are too few positive eigenvalues for a fit.
    """
    found = eigengaps(eigenvalues, residuals, significance=significance)
    fit = fit_power_law(eigenvalues, significance=significance)
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64).ravel())[::-1][: fit.num_values]
    law = line_of(fit, np.arange(1, len(values) + 1))
    gaps, drawn = found.gaps[: len(values) - 1], found.fitted[: len(values) - 1]
    ranks = np.arange(1, len(gaps) + 1)
    approximate = approximate_eigengaps(len(values), fit.slope, float(law.sum()))
    figure, (left, right) = new_figure(9.0, 4.3, ncols=2)
    left.scatter(ranks[drawn], gaps[drawn], s=12, color=COLOURS[0], alpha=0.6, label="measured")
    expected = eigengaps_of_values(values, fit.slope)
    left.plot(ranks, expected, color=COLOURS[2], lw=1.2, label=r"from each $\lambda_k$ (12)")
    label = f"of the law, $\\hat s$ = {fit.slope:.2f} (11)"
    left.plot(ranks, eigengaps_of_values(law, fit.slope), color=COLOURS[1], lw=1.2, label=label)
    left.plot(ranks, approximate, "--", color="0.4", lw=1.1, label="for $s$ near 1 (13)")
    left.set_ylabel(r"gap $\delta_k$ (loss / parameter$^2$)")
    # The smaller of the gaps above and below; the first eigenvalue has none above.
    nearest, known = np.r_[np.inf, gaps[:-1]], np.r_[True, drawn[:-1]] & drawn
    turned = 2 / np.minimum(nearest, gaps)[known]
    right.scatter(
        ranks[known], turned, s=12, color=COLOURS[0], alpha=0.6, label="measured gaps (7)"
    )
    right.plot(ranks, 2 / approximate, "--", color="0.4", lw=1.1, label="for $s$ near 1 (14)")
    right.set_ylabel(r"bound on $\sin\langle u_k, \tilde u_k\rangle\,/\,\Vert\epsilon M\Vert$")
    for axes, where in ((left, "lower left"), (right, "lower right")):
        axes.set(xscale="log", yscale="log", xlabel="rank $k$ of the eigenvalue")
        quiet_grid(axes)
        few_ticks(axes)
        axes.legend(loc=where, frameon=False, fontsize="small")
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure


def cutoff_plot(
    eigenvalues: ArrayLike, *, significance: float = 0.05, title: str | None = None
) -> Figure:
    """Return the KS distance as a function of K, beside d_c: does the verdict depend on K?

    The triangle marks all K values, the circle the K of the smallest distance among those of at
    least ten values (Clauset et al. 2009); that one's verdict is too kind, since it was chosen.

    Args:
        eigenvalues: lambda_k, real [K].
        significance: Level of d_c.
        title: Of the figure.

    Raises:
        ValueError: As `fit_power_law`.
    """
    whole = fit_power_law(eigenvalues, significance=significance)
    count = whole.num_values
    grid = np.unique(np.geomspace(2, count, min(count - 1, _MOST_CUTOFFS)).round().astype(int))
    ks, distances = ks_distance_by_cutoff(eigenvalues, grid)
    figure, axes = new_figure(6.4, 4.2)
    axes.plot(ks, distances, color=COLOURS[0], linewidth=1.4, label="$d_{ks}$ of the $K$ largest")
    critical = [critical_value(int(k), significance) for k in ks]
    axes.plot(ks, critical, "--", color="0.4", linewidth=1.1, label=f"$d_c$ at {significance:g}")
    if count > _FEWEST_OF_CUTOFF:
        best = optimal_cutoff(eigenvalues, k_min=_FEWEST_OF_CUTOFF, significance=significance)
        label = f"smallest: $K$ = {best.num_values}, $d_{{ks}}$ = {best.ks_distance:.3f}"
        axes.plot(best.num_values, best.ks_distance, "o", color=COLOURS[2], label=label)
    label = f"all: $K$ = {count}, {verdict(whole)}"
    axes.plot(count, whole.ks_distance, "^", color=COLOURS[1], label=label)
    axes.set(xscale="log", xlabel="number of eigenvalues $K$", ylabel="KS distance")
    settled = np.nanmax(distances[ks >= min(5, count)])
    axes.set_ylim(0, min(1.0, 1.3 * max(float(settled), 1.5 * whole.critical_value)))
    quiet_grid(axes)
    few_ticks(axes)
    legend_below(figure, 2)
    if title:
        axes.set_title(title, fontsize="medium")
    return figure


def emergence_plot(
    spectra: Sequence[tuple[int, FloatArray]], *, title: str | None = None
) -> Figure:
    """Return the spectra of all measurements over one another, dark to light (HPL fig. 9 and 10).

    Of more than 60, as many are drawn, evenly chosen, the first and the last among them.

    Args:
        spectra: Step and eigenvalues, descending, of each measurement, in the order of training.
        title: Of the figure.

    Raises:
        ValueError: None has a positive eigenvalue.
    """
    some = evenly_chosen(spectra, MOST_CURVES)
    chosen = [(step, values[values > 0]) for step, values in some if (values > 0).any()]
    if not chosen:
        raise ValueError("There is no spectrum with positive eigenvalues to draw.")
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    steps = [step for step, _ in chosen]
    norm = Normalize(min(steps), max(max(steps), min(steps) + 1))
    colours = ListedColormap(shades(256))
    figure, axes = new_figure()
    for step, values in chosen:
        ranks = np.arange(1, len(values) + 1)
        marker = "o" if len(values) == 1 else None
        axes.plot(ranks, values, marker=marker, color=colours(norm(step)), lw=1.1, alpha=0.9)
    axes.set(xscale="log", yscale="log", xlabel="rank $k$", ylabel=f"Hessian {EIGENVALUE}")
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="training step", shrink=0.9)
    quiet_grid(axes)
    few_ticks(axes)
    told = f"{len(spectra)} measurement{'s' if len(spectra) > 1 else ''}"
    axes.set_title(title or f"{told}, dark to light", fontsize="medium")
    return figure


def draw_line(
    axes: Axes, leading: FloatArray, colour: str, significance: float
) -> PowerLawFit | None:
    """Draw the fitted line of a spectrum and return its fit; None where there is none."""
    if len(leading) < 2 or leading[0] <= leading[-1]:
        return None
    fit = fit_power_law(leading, significance=significance)
    ranks = np.arange(1, len(leading) + 1)
    axes.plot(ranks, line_of(fit, ranks), color=colour, linewidth=1.2, zorder=3)
    return fit


def line_of(fit: PowerLawFit, ranks: NDArray[np.int64]) -> FloatArray:
    """Return the fitted lambda_k = lambda_K (K / k)^s at the ranks."""
    return fit.cutoff * (fit.num_values / ranks) ** fit.slope

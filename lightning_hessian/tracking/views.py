"""What records say of themselves: the lines of their repr, their pictures, their tables.

`results.shown` looks this room up when a record is first shown.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from lightning_hessian.results import (
    BlockStructure,
    FloatArray,
    GradientStructure,
    HessianSpectrum,
    PowerLawFit,
    RowTests,
)
from lightning_hessian.results.shown import Telling
from lightning_hessian.statistics.power_law import fit_power_law

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIGNIFICANCE = 0.05
_MATRICES = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton matrix"}
_FEW = 4  # blocks that are named, largest first
_SIZE = (5.2, 3.4)  # of a picture beside the lines, in inches
_PICTURE_DPI = 80


def picture(draw_on: Callable[[Axes], None]) -> str:
    """Return a small PNG as the address of an image that holds itself."""
    from lightning_hessian.tracking.style import new_figure, render

    figure, axes = new_figure(*_SIZE)
    draw_on(axes)
    data = base64.b64encode(render(figure, dpi=_PICTURE_DPI)).decode("ascii")
    return f"data:image/png;base64,{data}"


@singledispatch
def telling(record: Any) -> Telling:
    """Return what a record says of itself."""
    raise TypeError(f"{type(record).__name__} has no lines to show.")


@singledispatch
def draw(record: Any, axes: Axes) -> None:
    """Draw a record on axes.

    Raises:
        ValueError: There is nothing to draw.
    """
    raise TypeError(f"{type(record).__name__} has no picture.")


@singledispatch
def columns(record: Any) -> Mapping[str, Any]:
    """Return the columns of the table of a record."""
    raise TypeError(f"{type(record).__name__} has no table.")


# Spectra ----------------------------------------------------------------------------------------


@telling.register(HessianSpectrum)
def _telling_of_spectrum(record: HessianSpectrum) -> Telling:
    matrix = _MATRICES.get(record.matrix_kind, record.matrix_kind)
    count, converged = len(record.eigenvalues), record.num_converged
    told = "all converged" if converged == count else f"{converged} of them converged"
    brief = [("eigenvalues", f"{count}, {told}")]
    if record.protocol == "pooled_slq":
        text = f"{count} Ritz values of {record.num_runs} runs, {record.num_copies} of them copies"
        brief = [("pooled", f"{text}; {converged} converged")]
    if count:
        first, last = record.eigenvalues[0], record.eigenvalues[-1]
        text = f"lambda_1 = {first:.5g} ± {record.residuals[0]:.1g}"
        text += f", lambda_{count} = {last:.4g}" if count > 1 else ""
        brief.append(("largest", text))
    brief.append(("trace", _estimate(record.trace, record.trace_std_error)))
    brief.append(("power law", _law_of(record.leading)))
    more = [("loss", f"{record.loss:.5g}, mean over {record.num_samples:,g} samples")]
    if record.lambda_min is not None:
        more.append(("smallest", f"{record.lambda_min:.5g}"))
    if record.trace_of_square is not None:
        text = _estimate(record.trace_of_square, record.trace_of_square_std_error)
        more.append(("trace of square", text))
    if record.density is not None:
        text = f"{len(record.density.nodes)} nodes{', exact' if record.density.exact else ''}"
        more.append(("density", text))
    if record.eigenvectors is not None:
        more.append(("eigenvectors", " x ".join(map(str, record.eigenvectors.shape))))
    more.append(("cost", _cost(record)))
    return Telling(f"Spectrum of a {matrix} of {record.num_parameters:,} parameters", brief, more)


def _law_of(leading: FloatArray) -> str:
    """Return the verdict on the eigenvalues that a power law is fitted to."""
    try:
        fit = fit_power_law(leading, significance=_SIGNIFICANCE)
    except ValueError:
        return f"none fitted: {len(leading)} leading eigenvalues that converged and are positive"
    return f"s = {fit.slope:.3f}, {_distance(fit)}"


@draw.register(HessianSpectrum)
def _draw_of_spectrum(record: HessianSpectrum, axes: Axes) -> None:
    from lightning_hessian.tracking.figures import draw_ranks
    from lightning_hessian.tracking.style import few_ticks

    if not (record.eigenvalues > 0).any():
        raise ValueError("There is no positive eigenvalue to draw.")
    name = _MATRICES.get(record.matrix_kind, record.matrix_kind).removesuffix(" matrix")
    draw_ranks(axes, {name: record}, _SIGNIFICANCE)
    axes.set_ylabel(axes.get_ylabel().replace("Hessian", name, 1))
    few_ticks(axes)
    axes.legend(loc="upper right", frameon=False, fontsize="x-small")


@columns.register(HessianSpectrum)
def _columns_of_spectrum(record: HessianSpectrum) -> Mapping[str, Any]:
    return {
        "rank": np.arange(1, len(record.eigenvalues) + 1),
        "eigenvalue": record.eigenvalues,
        "residual": record.residuals,
        "converged": record.converged,
    }


# Fits -------------------------------------------------------------------------------------------


@telling.register(PowerLawFit)
def _telling_of_fit(record: PowerLawFit) -> Telling:
    brief = [
        ("verdict", _distance(record)),
        ("p", f"{record.p_value:.2g} (that of a fitted exponent; d_c is kinder)"),
        ("exponent", f"beta = {record.exponent:.4g} ± {record.exponent_std_error:.2g}"),
        ("slope", f"s = {record.slope:.4g}, of value against rank"),
    ]
    more = [("cutoff", f"{record.cutoff:.5g}, the smallest value fitted")]
    if record.reason:
        more.append(("no verdict", record.reason))
    for other in record.alternatives:
        text = other.reason or "no comparison"
        if other.log_likelihood_ratio is not None and other.p_value is not None:
            better = "power law" if other.log_likelihood_ratio > 0 else other.name
            text = f"R = {other.log_likelihood_ratio:.2f}, for the {better}; "
            text += f"p = {other.p_value:.2g}"
        more.append((f"or {other.name}", text))
    return Telling(f"Power law fitted to the {record.num_values} largest values", brief, more)


@draw.register(PowerLawFit)
def _draw_of_fit(record: PowerLawFit, axes: Axes, values: ArrayLike | None = None) -> None:
    """Draw the line by rank, and where the values of a power law lie by the critical distance."""
    from lightning_hessian.tracking.figures import line_of
    from lightning_hessian.tracking.style import COLOURS, few_ticks, quiet_grid, verdict

    ranks = np.arange(1, record.num_values + 1)
    line = line_of(record, ranks)
    # The k-th largest value has the share k / K above it. Within d_c of that share is the band.
    share = ranks / record.num_values
    low = record.cutoff * np.minimum(share + record.critical_value, 1.0) ** -record.slope
    least = max(1 / record.num_values, np.finfo(float).tiny)
    high = record.cutoff * np.maximum(share - record.critical_value, least) ** -record.slope
    label = f"$\\hat s$ = {record.slope:.2f}, {verdict(record)}"
    axes.plot(ranks, line, color=COLOURS[0], linewidth=1.4, label=label)
    axes.fill_between(
        ranks, low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="within $d_c$ of it"
    )
    if values is not None:
        largest = np.sort(np.asarray(values, dtype=np.float64).ravel())[::-1][: record.num_values]
        label = f"the {len(largest)} largest"
        axes.scatter(ranks[: len(largest)], largest, s=14, color=COLOURS[1], label=label)
    axes.set(xscale="log", yscale="log", xlabel="rank $k$", ylabel="value")
    quiet_grid(axes)
    few_ticks(axes)
    axes.legend(loc="upper right", frameon=False, fontsize="x-small")


@columns.register(PowerLawFit)
def _columns_of_fit(record: PowerLawFit) -> Mapping[str, Any]:
    found = {
        name: [getattr(record, name)]
        for name in ("num_values", "exponent", "exponent_std_error", "slope", "ks_distance",
                     "critical_value", "is_power_law", "p_value", "cutoff", "significance")
    }  # fmt: skip
    for other in record.alternatives:
        found[f"{other.name}_ratio"] = [other.log_likelihood_ratio]
        found[f"{other.name}_p_value"] = [other.p_value]
    return found


# Blocks -----------------------------------------------------------------------------------------


@telling.register(BlockStructure)
def _telling_of_blocks(record: BlockStructure) -> Telling:
    matrix = _MATRICES.get(record.matrix_kind, record.matrix_kind)
    title = f"Block structure of a {matrix}: {len(record.names)} blocks, "
    title += f"{sum(record.sizes):,} parameters"
    ratio = _estimate(record.off_diagonal_ratio, record.off_diagonal_ratio_std_error)
    share = _estimate(record.off_diagonal_share, record.off_diagonal_share_std_error)
    diagonal = np.diagonal(record.frobenius)
    largest = [
        f"{record.names[i]} ({diagonal[i]:.3g})" for i in np.argsort(-diagonal)[:_FEW].tolist()
    ]
    brief = [
        ("off the diagonal", f"{ratio} times the norm on it (mean over blocks)"),
        ("share off it", f"{share} of the squared norm"),
        ("largest blocks", ", ".join(largest)),
    ]
    if record.mean_heterogeneity is not None:
        text = f"{record.mean_heterogeneity:.3f}, mean Jensen-Shannon distance (0 alike, 1 not)"
        brief.append(("heterogeneity", text))
    groups = dict.fromkeys(record.groups)
    more = [("groups", f"{len(groups)}: {', '.join(list(groups)[:_FEW])}")]
    if len(groups) > _FEW:
        more[0] = (more[0][0], more[0][1] + ", ...")
    more.append(("errors", "none, all columns computed" if record.exact else record.stopped))
    more.append(("loss", f"{record.loss:.5g}, mean over {record.num_samples:,g} samples"))
    more.append(("cost", _cost(record)))
    return Telling(title, brief, more)


@draw.register(BlockStructure)
def _draw_of_blocks(record: BlockStructure, axes: Axes) -> None:
    from lightning_hessian.tracking.block_figures import draw_blocks

    draw_blocks(axes, record)


@columns.register(BlockStructure)
def _columns_of_blocks(record: BlockStructure) -> Mapping[str, Any]:
    names = np.array(record.names, dtype=object)
    count = len(names)
    found = {
        "row": np.repeat(names, count),
        "column": np.tile(names, count),
        "frobenius": record.frobenius.ravel(),
        "std_error": record.std_error.ravel(),
        "ratio": record.ratios.ravel(),
    }
    if record.heterogeneity is not None:
        found["heterogeneity"] = record.heterogeneity.ravel()
    return found


# Gradients --------------------------------------------------------------------------------------


@telling.register(GradientStructure)
def _telling_of_gradients(record: GradientStructure) -> Telling:
    size = "batches as given" if record.batch_size is None else f"{record.batch_size} samples each"
    title = f"Structure of {record.num_gradients:,} stochastic gradients ({size}) of "
    title += f"{record.num_parameters:,} parameters"
    first = f"lambda_1 = {record.covariance[0]:.4g}, " if len(record.covariance) else ""
    square = record.mean_gradient_norm**2
    noise = record.covariance_trace / square if square > 0 else math.inf
    brief = [
        ("covariance", f"{first}trace = {record.covariance_trace:.4g}"),
        ("power law", _law_of(record.leading)),
        ("mean gradient", f"norm {record.mean_gradient_norm:.4g}; noise over signal {noise:.3g}"),
    ]
    for name, tests in (
        ("over dimensions", record.dimension_tests),
        ("over iterations", record.iteration_tests),
    ):
        if tests is not None:
            brief.append((name, _tests(tests)))
    more = [
        ("second moment", f"trace = {record.second_moment_trace:.4g}"),
        ("loss", f"{record.loss:.5g}"),
        ("cost", f"{record.num_computed:,} gradients, {_how(record)}"),
    ]
    return Telling(title, brief, more)


def _tests(tests: RowTests) -> str:
    return (
        f"power law in {tests.power_law_rate:.0%} of {tests.num_ks_tested:,} rows, "
        f"Gaussian in {tests.gaussian_rate:.0%} of {tests.num_gaussian_tested:,}"
    )


@draw.register(GradientStructure)
def _draw_of_gradients(record: GradientStructure, axes: Axes, entries: bool = False) -> None:
    from lightning_hessian.tracking.gradient_figures import draw_entries, draw_gradient_spectra
    from lightning_hessian.tracking.style import few_ticks

    if entries:
        draw_entries(axes, record, _SIGNIFICANCE)
        few_ticks(axes)
        axes.legend(loc="lower left", frameon=False, fontsize="x-small")
        return
    if not len(record.leading):
        raise ValueError("No eigenvalue of the covariance stands above the rounding of gradients.")
    draw_gradient_spectra(axes, record, None, _SIGNIFICANCE)
    axes.set_ylabel(r"eigenvalue $\lambda_k$ (loss$^2$ / parameter$^2$)")
    few_ticks(axes)
    axes.legend(loc="upper right", frameon=False, fontsize="x-small")


@columns.register(GradientStructure)
def _columns_of_gradients(record: GradientStructure) -> Mapping[str, Any]:
    length = max(len(record.covariance), len(record.second_moment))
    spectra = {"covariance": record.covariance, "second_moment": record.second_moment}
    padded = {
        name: np.r_[values, np.full(length - len(values), np.nan)]
        for name, values in spectra.items()
    }
    return {"rank": np.arange(1, length + 1), **padded}


# Words ------------------------------------------------------------------------------------------


def _estimate(value: float | None, std_error: float | None) -> str:
    """Return a number with its standard error; ``exact`` where that is 0."""
    if value is None:
        return "not measured"
    if std_error is None:
        return f"{value:.4g}"
    return f"{value:.4g} {f'± {std_error:.2g}' if std_error else '(exact)'}"


def _distance(fit: PowerLawFit) -> str:
    """Return d_ks beside d_c and what follows from them, without mathematics.

    Example:
        >>> _distance(fit_power_law([16.0, 8.0, 4.0, 2.0, 1.0]))
        'd_ks = 0.232 < d_c = 0.608 at 5 %: too few values to tell'
    """
    sign = "<" if fit.ks_distance < fit.critical_value else ">="
    words = {True: "a power law", False: "no power law", None: "too few values to tell"}
    level = f"{100 * fit.significance:g} %"
    return (
        f"d_ks = {fit.ks_distance:.3f} {sign} d_c = {fit.critical_value:.3f} at {level}: "
        f"{words[fit.is_power_law]}"
    )


def _cost(record: HessianSpectrum | BlockStructure) -> str:
    return f"{record.num_hvps:,} Hessian-vector products, {_how(record)}"


def _how(record: HessianSpectrum | BlockStructure | GradientStructure) -> str:
    return f"{record.seconds:.3g} s, {record.engine}, {record.dtype}"

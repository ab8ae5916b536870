"""Which figures a measurement has: names and what draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from lightning_hessian.results import (
    BlockStructure,
    FloatArray,
    GradientStructure,
    HessianSpectrum,
    SpectralDensity,
)
from lightning_hessian.statistics.correlation import MIN_POINTS
from lightning_hessian.statistics.eigengaps import eigengaps
from lightning_hessian.tracking.block_figures import block_heatmap, heterogeneity_heatmap
from lightning_hessian.tracking.correlation_figures import scatter_plot
from lightning_hessian.tracking.density_figures import spectral_density_plot
from lightning_hessian.tracking.figures import (
    MOST_CURVES,
    cutoff_plot,
    eigengap_plot,
    emergence_plot,
    rank_plot,
)
from lightning_hessian.tracking.gradient_figures import spectra_plot
from lightning_hessian.tracking.history import Row, key_part
from lightning_hessian.tracking.layer_figures import FEWEST_LAYERS, depth_plot
from lightning_hessian.tracking.stability_figures import stability_plot
from lightning_hessian.tracking.style import evenly_chosen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = Callable[[], "Figure"]


def hessian_drawings(
    spectrum: HessianSpectrum,
    blocks: BlockStructure | None,
    spectra: Sequence[tuple[int, FloatArray]],
    *,
    densities: Mapping[str, SpectralDensity] | None = None,
    layers: Mapping[str, HessianSpectrum] | None = None,
    significance: float = 0.05,
    stability: Sequence[tuple[int, float, float]] = (),
) -> dict[str, Drawing]:
    """Return the figures that a measurement has enough for.

    ``spectra`` are step and eigenvalues of all measurements so far; ``densities`` are those of
    whole spectra, by name, and beside them stand those of the blocks. ``layers`` are the spectra
    of the layers in their order; ``stability`` are step, ratio and loss of all points of the run.
    """
    leading = spectrum.leading
    title = f"step {spectra[-1][0]}" if spectra else None
    found: dict[str, Drawing] = {}
    if (spectrum.eigenvalues > 0).any():
        named = {"Hessian": spectrum}
        found["rank"] = partial(rank_plot, named, significance=significance, title=title)
    if len(leading) > 1 and leading[0] > leading[-1]:
        found["cutoff"] = partial(cutoff_plot, leading, significance=significance, title=title)
    residuals = spectrum.leading_residuals
    with suppress(ValueError):  # too few gaps for a fit: the reason is told beside the scalars
        eigengaps(leading, residuals, significance=significance)
        found["eigengaps"] = partial(
            eigengap_plot, leading, residuals, significance=significance, title=title
        )
    shown = dict(densities or {})
    if blocks is not None and blocks.densities is not None:
        shown |= zip(blocks.names, blocks.densities, strict=True)
    if shown or len(leading) > 1:
        found["density"] = partial(
            spectral_density_plot, leading, shown, significance=significance, title=title
        )
    drawn = evenly_chosen(spectra, MOST_CURVES)
    if sum(bool((values > 0).any()) for _, values in drawn) > 1:
        found["emergence"] = partial(emergence_plot, spectra)
    if blocks is not None and (blocks.frobenius > 0).any():
        found["blocks"] = partial(block_heatmap, blocks)
    if blocks is not None and blocks.mean_heterogeneity is not None:
        found["heterogeneity"] = partial(heterogeneity_heatmap, blocks)
    if layers is not None and len(layers) >= FEWEST_LAYERS:
        found["layers"] = partial(depth_plot, layers, significance=significance, title=title)
    if len(stability) > 1:
        found["stability"] = partial(stability_plot, stability)
    return found


def gradient_drawings(
    structure: GradientStructure, *, significance: float = 0.05
) -> dict[str, Drawing]:
    """Return the figures of a gradient structure."""
    if not len(structure.leading):
        return {}
    return {"spectra": partial(spectra_plot, structure, significance=significance)}


def correlation_drawings(
    rows: Sequence[Row], statistics: Sequence[str], monitors: Sequence[str]
) -> dict[str, Drawing]:
    """Return a scatter plot for each monitored metric, once there are points for a correlation."""
    return {
        f"scatter_{key_part(monitor)}": partial(
            scatter_plot, rows, statistics, monitor, monitors=monitors
        )
        for monitor in monitors
        if _has_points(rows, statistics, monitor)
    }


def _has_points(rows: Sequence[Row], statistics: Sequence[str], monitor: str) -> bool:
    """Return whether there are points for a correlation; looks no further than it must."""
    points = (row for row in rows if monitor in row and any(x in row for x in statistics))
    return sum(1 for _ in islice(points, MIN_POINTS)) == MIN_POINTS

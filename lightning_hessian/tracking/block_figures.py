"""Figures of the block structure: heatmaps of norms, of spectra that differ, and of H itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_hessian.results import BlockStructure, FloatArray
from lightning_hessian.tracking.density_figures import draw_densities
from lightning_hessian.tracking.style import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMES = 40
"""Above so many blocks the ticks show where groups begin, not each name."""

_DECADES = 6
"""The colours reach down so many decades below the largest value."""

_MOST_PIXELS = 800


def block_heatmap(
    blocks: BlockStructure, *, ratios: bool = False, title: str | None = None
) -> Figure:
    """Return the norms of all blocks as a heatmap with logarithmic colours.

    Each block is a cell of the same size, whatever its number of parameters. Colours span at most
    six decades; what is smaller, or zero, has the darkest.

    Args:
        blocks: What was measured.
        ratios: Draw r_ij = norm_F(H_ij) / norm_F(H_ii) instead of norm_F(H_ij).
        title: By default the off-diagonal ratio with its standard error.

    Raises:
        ValueError: All norms are zero.
    """
    figure, axes = _square_figure()
    draw_blocks(axes, blocks, ratios=ratios, title=title)
    return figure


def draw_blocks(
    axes: Axes, blocks: BlockStructure, *, ratios: bool = False, title: str | None = None
) -> None:
    """Draw what `block_heatmap` shows."""
    values = blocks.ratios if ratios else blocks.frobenius
    label = r"$\Vert H_{ij}\Vert_F$ (loss / parameter$^2$)"
    if ratios:
        label = r"$\Vert H_{ij}\Vert_F / \Vert H_{ii}\Vert_F$"
    _log_image(axes, values, label)
    _name_blocks(axes, blocks)
    if title is None and blocks.off_diagonal_ratio is not None:
        title = f"off-diagonal ratio {blocks.off_diagonal_ratio:.3g}"
        if blocks.off_diagonal_ratio_std_error:
            title += f" ± {blocks.off_diagonal_ratio_std_error:.1g}"
    axes.set_title(title or "", fontsize="medium")


def heterogeneity_heatmap(blocks: BlockStructure, *, title: str | None = None) -> Figure:
    """Return the Jensen-Shannon distances between the spectra of the diagonal blocks.

    The colours reach from 0 to 1 always, so that two networks can be held side by side.

    Args:
        blocks: What was measured, with densities.
        title: By default the mean distance.

    Raises:
        ValueError: The densities were not measured.
    """
    if blocks.heterogeneity is None:
        raise ValueError(
            "No heterogeneity was measured; call block_structure(..., densities=True), with a "
            "larger budget if there is one."
        )
    figure, axes = _square_figure()
    image = axes.imshow(blocks.heterogeneity, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="Jensen-Shannon distance", shrink=0.85)
    _name_blocks(axes, blocks)
    if title is None and blocks.mean_heterogeneity is not None:
        title = f"mean distance {blocks.mean_heterogeneity:.3f}"
    axes.set_title(title or "", fontsize="medium")
    return figure


def entries_image(blocks: BlockStructure, *, title: str | None = None) -> Figure:
    """Return the entries of H in absolute value, with lines between the groups of blocks.

    Above 800 parameters, a pixel shows the largest of its entries, so that thin lines stay.

    Args:
        blocks: What was measured, with its matrix.
        title: Of the figure.

    Raises:
        ValueError: The matrix was not kept, or is zero.
    """
    if blocks.matrix is None:
        raise ValueError("No matrix was kept; call block_structure(..., return_matrix=True).")
    figure, axes = _square_figure()
    side = len(blocks.matrix)
    shrunk = _largest_of_tiles(np.abs(blocks.matrix), -(-side // _MOST_PIXELS))
    _log_image(axes, shrunk, r"$|H|$ (loss / parameter$^2$)", extent=(0, side, side, 0))
    ends = np.cumsum(blocks.sizes)
    for first in _group_starts(blocks)[1:]:
        axes.axhline(ends[first - 1], color="white", linewidth=0.6)
        axes.axvline(ends[first - 1], color="white", linewidth=0.6)
    axes.set_title(title or "", fontsize="medium")
    axes.set_xlabel("parameter")
    return figure


def density_plot(blocks: BlockStructure, *, title: str | None = None) -> Figure:
    """Return the spectral densities of the diagonal blocks, over asinh(lambda / unit).

    They are drawn as they are compared: see `statistics.heterogeneity.heterogeneity`.

    Args:
        blocks: What was measured, with densities; the first 10 blocks are drawn.
        title: Of the figure.

    Raises:
        ValueError: The densities were not measured.
    """
    if blocks.densities is None:
        raise ValueError("No densities were measured; call block_structure(..., densities=True).")
    figure, axes = new_figure(6.4, 4.0)
    draw_densities(axes, dict(zip(blocks.names, blocks.densities, strict=True)))
    axes.set_title(title or "", fontsize="medium")
    return figure


def _square_figure() -> tuple[Figure, Axes]:
    return new_figure(5.6, 4.8)


def _log_image(
    axes: Axes,
    values: FloatArray,
    label: str,
    extent: tuple[float, float, float, float] | None = None,
) -> None:
    from matplotlib.colors import LogNorm

    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        raise ValueError("All values are zero; there is nothing to draw on a logarithmic scale.")
    high = float(positive.max())
    low = max(float(positive.min()), high * 10.0**-_DECADES)
    norm = LogNorm(vmin=min(low, 0.9 * high), vmax=high)
    shown = np.clip(np.nan_to_num(values), norm.vmin, None)
    image = axes.imshow(shown, cmap="inferno", norm=norm, extent=extent, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label=label, shrink=0.85)


def _name_blocks(axes: Axes, blocks: BlockStructure) -> None:
    """Put the names of the blocks at both axes; of their groups, where there are too many."""
    count = len(blocks.names)
    if count <= _MOST_NAMES:
        places, names = list(range(count)), list(blocks.names)
    else:
        places = _group_starts(blocks)
        names = [blocks.groups[i] for i in places]
        for first in places[1:]:
            axes.axhline(first - 0.5, color="white", linewidth=0.5)
            axes.axvline(first - 0.5, color="white", linewidth=0.5)
    size = 8 if len(places) <= 16 else 5
    axes.set_xticks(places, names, rotation=90, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)


def _group_starts(blocks: BlockStructure) -> list[int]:
    """Return where in the order of blocks a group follows another."""
    groups = blocks.groups
    return [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]


def _largest_of_tiles(values: FloatArray, side: int) -> NDArray[np.float64]:
    """Return the largest value of each square tile."""
    if side <= 1:
        return values
    padding = -len(values) % side
    padded = np.pad(values, (0, padding))
    tiles = len(padded) // side
    found: FloatArray = padded.reshape(tiles, side, tiles, side).max(axis=(1, 3))
    return found

"""One look for all figures: colours, sizes, symbols, and how they become SVG or PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_hessian.results import PowerLawFit

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's, told apart by colour-blind readers and in grey."""

MARKERS = ("o", "s", "^", "D", "v", "P")

DPI = 110
"""A figure is about 700 pixels wide: what a panel shows without scaling it down much."""

EIGENVALUE = r"eigenvalue $\lambda_k$ (loss / parameter$^2$)"

SYMBOLS = {
    "d_ks": "$d_{ks}$",
    "d_c": "$d_c$",
    "p_value": "$p$",
    "beta_hat": r"$\hat\beta$",
    "s_hat": r"$\hat s$",
    "lambda_1": r"$\lambda_1$",
    "lambda_min": r"$\lambda_{min}$",
    "trace": "$Tr(H)$",
    "eigengap_d_ks": "$d_{ks}$ of gaps",
    "eigengap_s_hat": r"$\hat s$ of gaps",
    "stability/ratio": "sharpness / threshold",
    "stability/update_curvature": "$u^T H u / u^T u$",
    "stability/gradient_share": "gradient in the leading span",
}
"""How a statistic is written at an axis; others are written by their names."""

_PALETTE = 255  # colours of a PNG: one byte a pixel, a third of the size


def new_figure(width: float = 6.4, height: float = 4.4, **subplots: Any) -> tuple[Figure, Any]:
    """Return a figure (in inches) that no global state knows, and what ``subplots`` makes of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**subplots)


def quiet_grid(axes: Axes) -> None:
    """Draw a light grid, and no frame above and on the right."""
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def few_ticks(axes: Axes) -> None:
    """Name 1, 2 and 5 of each decade where a logarithmic axis spans few, and else the decades.

    Where it spans less than a factor of four, which may hold one of these, it has ticks as a linear
    axis has.
    """
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "log":
            continue
        low, high = sorted(axis.get_view_interval())
        axis.set_minor_formatter(NullFormatter())
        if low > 0 and high / low < 100:
            narrow = high / low < 4
            axis.set_major_locator(
                MaxNLocator(4) if narrow else LogLocator(base=10, subs=(1, 2, 5))
            )
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.5g}"))


def log_if_wide(axes: Axes, x: ArrayLike, y: ArrayLike) -> None:
    """Make an axis logarithmic where positive values span more than a factor of 20."""
    for given, scale in ((x, axes.set_xscale), (y, axes.set_yscale)):
        values = np.asarray(given, dtype=np.float64)
        finite = values[np.isfinite(values)]
        if len(finite) and finite.min() > 0 and finite.max() > 20 * finite.min():
            scale("log")


def legend_below(figure: Figure, columns: int = 1) -> None:
    """Put one legend for all axes below them, where it hides nothing."""
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def evenly_chosen(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many items, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def shades(count: int) -> list[tuple[float, float, float, float]]:
    """Return colours from dark to light, told apart by their lightness alone, [count]."""
    from matplotlib import colormaps

    last = max(count - 1, 1)
    return [colormaps["viridis"](0.9 * i / last) for i in range(count)]


def verdict(fit: PowerLawFit) -> str:
    """Return d_ks beside d_c and what follows, in words; nothing follows from too few values.

    Example:
        >>> from lightning_hessian.statistics.power_law import fit_power_law
        >>> verdict(fit_power_law([16.0, 8.0, 4.0, 2.0, 1.0]))
        '$d_{ks}$ = 0.232 < $d_c$ = 0.608, too few values to tell'
    """
    sign = "<" if fit.ks_distance < fit.critical_value else "≥"
    words = {True: "power law", False: "no power law", None: "too few values to tell"}
    return (
        f"$d_{{ks}}$ = {fit.ks_distance:.3f} {sign} $d_c$ = {fit.critical_value:.3f}, "
        f"{words[fit.is_power_law]}"
    )


def render(figure: Figure, kind: Literal["png", "svg", "pdf"] = "png", dpi: int = DPI) -> bytes:
    """Return a figure as a file's bytes; equal figures give equal PNGs.

    Args:
        figure: Drawn without pyplot.
        kind: ``"png"``, with a palette of 255 colours, or a vector format.
        dpi: Dots per inch of a PNG.
    """
    file = io.BytesIO()
    if kind != "png":
        date = {"svg": "Date", "pdf": "CreationDate"}[kind]
        figure.savefig(file, format=kind, metadata={date: None})
        return file.getvalue()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    pixels = bytes(canvas.buffer_rgba())
    image = Image.frombytes("RGBA", (width, height), pixels).convert("RGB")
    image.quantize(_PALETTE, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "png")
    return file.getvalue()

"""One look for all figures: colours, sizes, and how they become SVG or PNG."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's, told apart by colour-blind readers and in grey."""

MARKERS = ("o", "s", "^", "D", "v", "P")


def new_figure(width: float = 6.4, height: float = 4.4, **subplots: Any) -> tuple[Figure, Any]:
    """Returns a figure that no global state knows, and its axes (one, or an array of them).

    Args:
        width: In inches.
        height: In inches.
        **subplots: Handed on to ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**subplots)


def quiet_grid(axes: Axes) -> None:
    """Draws a light grid, and no frame above and on the right."""
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)

"""The figure of stability: how close an optimizer is to its threshold, and the loss beneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_hessian.tracking.style import COLOURS, evenly_chosen, new_figure, quiet_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIO, LOSS = "stability/ratio", "stability/loss"
_MOST_POINTS = 1000


class StabilityCurve:
    """The ratio and the loss of a run, of whole measurements and of those between them.

    A long run keeps every second point whenever there are twice as many as a figure shows.
    """

    def __init__(self) -> None:
        self._points: list[tuple[int, float, float]] = []

    @property
    def points(self) -> list[tuple[int, float, float]]:
        """Step, ratio and loss of each."""
        return list(self._points)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take in what was logged at a step, where a ratio is among it."""
        if RATIO not in scalars or LOSS not in scalars:
            return
        while self._points and self._points[-1][0] >= step:  # another fit, or a resumed one
            self._points.pop()
        self._points.append((step, scalars[RATIO], scalars[LOSS]))
        if len(self._points) > 2 * _MOST_POINTS:
            self._points = self._points[::2]


def stability_plot(points: Sequence[tuple[int, float, float]]) -> Figure:
    """Return the ratio of sharpness to threshold over the steps, with a line at 1, and the loss.

    Above the line a quadratic diverges; full-batch training hovers at it (Cohen et al. 2021,
    figure 1; 2022).

    Args:
        points: Step, ratio and loss; two at least.
    """
    steps, ratios, losses = zip(*evenly_chosen(points, _MOST_POINTS), strict=True)
    figure, (above, below) = new_figure(nrows=2, sharex=True, height_ratios=(3, 2))
    marker = "." if len(steps) <= 60 else ""
    above.plot(steps, ratios, color=COLOURS[0], marker=marker)
    above.axhline(1.0, color="0.2", linestyle="--", linewidth=1)
    above.set_ylabel("sharpness / threshold")
    above.set_ylim(bottom=min(0.0, *ratios), top=max(1.2, 1.05 * max(ratios)))
    below.plot(steps, losses, color=COLOURS[1], marker=marker)
    below.set(xlabel="training step", ylabel="loss on the probe")
    if min(losses) > 0:
        below.set_yscale("log")
    quiet_grid(above)
    quiet_grid(below)
    return figure

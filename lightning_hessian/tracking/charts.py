"""Charts that a logger draws itself from numbers, with a pointer over each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_hessian.results import FloatArray
from lightning_hessian.results.base import ArgumentError
from lightning_hessian.statistics.power_law import fit_power_law

_MOST_POINTS = 300
"""Of a line, evenly chosen on the logarithm of the rank: more are closer than a pixel."""


@dataclass(frozen=True)
class Chart:
    """Lines on their way to a logger.

    Attributes:
        key: ``charts/<name>``.
        title: The same at every step: a dashboard keeps one chart, and shows its last numbers.
        x: What the horizontal axis is called; the vertical one is told in the title.
        lines: Points [n, 2] by what the legend calls them.
    """

    key: str
    title: str
    x: str
    lines: Mapping[str, FloatArray]


def rank_chart(prefix: str, leading: FloatArray, step: int) -> Chart | None:
    r"""Return eigenvalue against rank, both as decimal logarithms, with the fitted line.

    The charts that dashboards have ready know no logarithmic axes. The line is that of `rank_plot`,
    lambda_k = lambda_K (K / k)^s.

    Args:
        prefix: Of the measurement, ``"hessian"``.
        leading: Positive eigenvalues [K], descending.
        step: Of the measurement.

    Returns:
        None where there are no two eigenvalues.

    Example:
        >>> chart = rank_chart("hessian", np.array([100.0, 10.0, 1.0]), 7)
        >>> chart.lines["step 7"].round(3).tolist()
        [[0.0, 2.0], [0.301, 1.0], [0.477, 0.0]]
    """
    count = len(leading)
    if count < 2:
        return None
    ranks = np.arange(1, count + 1)
    if count > _MOST_POINTS:
        ranks = np.unique(np.geomspace(1, count, _MOST_POINTS).round().astype(int))
    x = np.log10(ranks)
    lines = {f"step {step}": np.stack([x, np.log10(leading[ranks - 1])], axis=1)}
    try:
        fit = fit_power_law(leading)
    except ArgumentError:  # all are equal: the reason is told beside the scalars
        fit = None
    if fit is not None:
        line = np.log10(fit.cutoff) + fit.slope * (np.log10(count) - x[[0, -1]])
        lines["fitted power law"] = np.stack([x[[0, -1]], line], axis=1)
    what = "Hessian" if prefix == "hessian" else f"{prefix} covariance"
    return Chart(
        f"charts/{prefix}_rank", f"log10 of the eigenvalues, {what}", "log10 of the rank k", lines
    )

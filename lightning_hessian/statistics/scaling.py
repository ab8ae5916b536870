"""Power laws between two quantities: straight lines in the log-log plot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lightning_hessian.results import FloatArray
from lightning_hessian.statistics.correlation import finite_rows, why_undefined


@dataclass(frozen=True)
class ScalingFit:
    """A least-squares line log10(y) = intercept + exponent log10(x); NaN where there is none.

    Attributes:
        exponent: Slope of the line.
        interval: Its 95 % interval, from Student's t.
        intercept: log10 of y at x = 1.
        r: Pearson's r of the logarithms.
        residual_std: Standard deviation around the line, in decades.
        num_points: Points with x and y positive.
        num_sizes: How many different x they have.
        mean_log_x: Mean of log10(x), at which the line is known best.
        spread_log_x: Sum of squared deviations of log10(x).
        reason: Why there is no fit; empty where there is one.
    """

    exponent: float
    interval: tuple[float, float]
    intercept: float
    r: float
    residual_std: float
    num_points: int
    num_sizes: int
    mean_log_x: float = math.nan
    spread_log_x: float = math.nan
    reason: str = ""

    def predict(self, x: ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return the line at ``x`` [m], and both edges of its pointwise 95 % band."""
        log_x = np.log10(np.asarray(x, dtype=np.float64))
        centre = self.intercept + self.exponent * log_x
        quantile = float(stats.t.ppf(0.975, self.num_points - 2))
        variance = 1 / self.num_points + (log_x - self.mean_log_x) ** 2 / self.spread_log_x
        half = quantile * self.residual_std * np.sqrt(variance)
        return 10**centre, 10 ** (centre - half), 10 ** (centre + half)


def fit_scaling(x: ArrayLike, y: ArrayLike) -> ScalingFit:
    """Return how ``y`` scales with ``x``, for example a loss with the number of parameters.

    Points that are not positive have no logarithm and are left out. The interval takes the points
    to be independent with equal scatter in the log-log plot; that the law is one at all it does
    not test.

    Args:
        x: Sizes [n].
        y: Quantities [n].

    Source: `scipy.stats.linregress` on logarithms; HPL figures 12 and 13.

    Example:
        >>> fit = fit_scaling([1e3, 1e4, 1e5, 1e6], [8.0, 4.1, 2.0, 1.0])
        >>> round(fit.exponent, 2), [round(end, 2) for end in fit.interval]
        (-0.3, [-0.31, -0.29])
    """
    sizes, values = finite_rows(x, y)
    positive = (sizes > 0) & (values > 0)
    log_x, log_y = np.log10(sizes[positive]), np.log10(values[positive])
    num_sizes = len(np.unique(log_x))
    reason = why_undefined(log_x, log_y)
    if not reason and num_sizes < 3:
        reason = f"{num_sizes} different sizes of the 3 needed"
    if reason:
        nan = math.nan
        return ScalingFit(nan, (nan, nan), nan, nan, nan, len(log_x), num_sizes, reason=reason)
    line = stats.linregress(log_x, log_y)
    half = float(stats.t.ppf(0.975, len(log_x) - 2)) * float(line.stderr)
    residuals = log_y - line.intercept - line.slope * log_x
    return ScalingFit(
        exponent=float(line.slope),
        interval=(float(line.slope) - half, float(line.slope) + half),
        intercept=float(line.intercept),
        r=float(line.rvalue),
        residual_std=math.sqrt(float(residuals @ residuals) / (len(log_x) - 2)),
        num_points=len(log_x),
        num_sizes=num_sizes,
        mean_log_x=float(log_x.mean()),
        spread_log_x=float(np.sum((log_x - log_x.mean()) ** 2)),
    )

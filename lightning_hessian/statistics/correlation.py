"""Correlation of two series of one training run, with what keeps it honest beside it.

Measurements of one run depend on one another: two falling curves correlate whatever they are.
So Pearson's r stands beside the r of the first differences, in which a common trend cancels,
Spearman's rank correlation, which an outlier cannot carry, and the number of points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from lightning_hessian.results import FloatArray

MIN_POINTS = 4

# Spread, relative to the largest value, that rounding alone can make. It lies above the level
# at which scipy.stats.pearsonr calls its own result inaccurate.
_ROUNDING = 1e-11


@dataclass(frozen=True)
class Correlation:
    """How two series move together; a coefficient that means nothing is NaN.

    Attributes:
        r: Pearson's correlation coefficient.
        num_points: How many rows were used, both values finite.
        r_differences: Pearson's r of the first differences of neighbouring rows.
        spearman: Spearman's rank correlation.
        reason: Why a coefficient is NaN, in words; empty where none is.
    """

    r: float
    num_points: int
    r_differences: float
    spearman: float
    reason: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """Fisher's 95 % interval of ``r``: (low, high), both NaN where ``r`` is.

        It takes the points to be independent and normal. Those of one training run are not, and
        the interval is then too narrow.

        Source: `scipy.stats.pearsonr(...).confidence_interval()`.

        Example:
            >>> found = Correlation(r=0.5, num_points=28, r_differences=0.1, spearman=0.4)
            >>> tuple(round(end, 3) for end in found.interval)
            (0.156, 0.736)
        """
        return fisher_interval(self.r, self.num_points)


def pearson(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Return how two series correlate: Pearson's r, r of first differences, and Spearman's.

    Rows in which either value is None, NaN or infinite are dropped; first differences are then
    taken between neighbours among the rows that are left. Coefficients need 4 points (those of
    the differences 4 differences) and series that vary by more than rounding; otherwise they
    are NaN and ``reason`` says why. With 2 points r would be 1 or -1 whatever they are.

    No p-value is given: the points are not independent.

    Args:
        x: Series [n], in the order of training.
        y: Series [n], row by row beside ``x``.

    Raises:
        ValueError: The series are not one-dimensional and of equal length.

    Source: `scipy.stats.pearsonr`, `scipy.stats.spearmanr`.

    Example:
        >>> found = pearson([1.0, 2.0, 3.0, 4.0, None, 5.0], [9.0, 7.0, 6.0, 2.0, 1.0, 1.0])
        >>> round(found.r, 2), round(found.spearman, 2), found.num_points
        (-0.98, -1.0, 5)
        >>> found.r_differences, found.reason
        (nan, 'r_differences: the first series of differences is constant')
        >>> pearson([1.0, 2.0], [3.0, 5.0]).reason
        'r, spearman: 2 of the 4 points needed; r_differences: 1 of the 4 differences needed'
    """
    first, second = finite_rows(x, y)
    # Correlations know no scale, and at scale 1 no square over- or underflows.
    first, second = unit_scale(first), unit_scale(second)
    reason = why_undefined(first, second)
    r = spearman = r_differences = math.nan
    if not reason:
        r = float(stats.pearsonr(first, second)[0])
        spearman = float(stats.spearmanr(first, second)[0])
    first_steps, second_steps = np.diff(first), np.diff(second)
    reason_differences = why_undefined(
        first_steps, second_steps, series="series of differences", points="differences"
    )
    if not reason_differences:
        r_differences = float(stats.pearsonr(first_steps, second_steps)[0])
    reasons = [
        f"{names}: {text}"
        for names, text in (("r, spearman", reason), ("r_differences", reason_differences))
        if text
    ]
    return Correlation(r, len(first), r_differences, spearman, "; ".join(reasons))


def fisher_interval(
    r: float, num_points: int, confidence: float = 0.95, num_controlled: int = 0
) -> tuple[float, float]:
    """Return Fisher's interval of a correlation coefficient: tanh(artanh r -+ z / sqrt(n - 3)).

    Args:
        r: Pearson's coefficient, or a partial one.
        num_points: The number of points behind it, n.
        confidence: The nominal coverage.
        num_controlled: How many variables a partial coefficient holds fixed; n counts so many less.

    Returns:
        The lower and the upper end; NaN where ``r`` is NaN or there are fewer than 4 points.
    """
    freedom = num_points - num_controlled - 3
    if math.isnan(r) or freedom < 1:
        return math.nan, math.nan
    half = float(stats.norm.ppf(0.5 + confidence / 2)) / math.sqrt(freedom)
    with np.errstate(divide="ignore"):
        centre = float(np.arctanh(r))
    return math.tanh(centre - half), math.tanh(centre + half)


def finite_rows(x: ArrayLike, y: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return the rows of both series in which both values are finite."""
    # float64 turns None into NaN.
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(
            f"two series of equal length are needed, but the shapes are {first.shape} and "
            f"{second.shape}; align them row by row first."
        )
    finite = np.isfinite(first) & np.isfinite(second)
    return first[finite], second[finite]


def unit_scale(series: FloatArray) -> FloatArray:
    """Return the series divided by its largest absolute value."""
    largest = np.abs(series).max(initial=0.0)
    return series / largest if largest > 0 else series


def why_undefined(
    first: FloatArray, second: FloatArray, *, series: str = "series", points: str = "points"
) -> str:
    """Return why series of unit scale (or their differences) have no correlation, or ''."""
    if len(first) < MIN_POINTS:
        return f"{len(first)} of the {MIN_POINTS} {points} needed"
    named = {"first": first, "second": second}
    constant = [name for name, values in named.items() if np.ptp(values) <= _ROUNDING]
    return " and ".join(f"the {name} {series} is constant" for name in constant)

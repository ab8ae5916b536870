"""Power-law and Gaussian tests of many rows at once: what the gradients' entries are like.

SG is "On the Overlooked Structure of Stochastic Gradients" (Xie et al., NeurIPS 2023). One slip
there is not followed: SG section 2 says that p > 0.05 rejects Gaussianity, and eq. 9 calls
z_S^2 + z_K^2 a p-value. That sum is the statistic, chi-squared with two degrees of freedom if the
points are Gaussian; p is its tail, and p < 0.05 rejects. SG's own rates agree with this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_hessian.results import FloatArray, RowTests
from lightning_hessian.statistics.significance import critical_value, exponential_distances

# Elements worked on at a time; 2 MiB in float64 stay in the cache.
_CHUNK = 2**18

MIN_POINTS = 20
"""Points of a row that the normal test needs; its approximation of the kurtosis fails below."""


def row_tests(
    rows: NDArray[Any] | Iterable[NDArray[Any]],
    *,
    num_values: int = 1000,
    num_points: int = 100,
    significance: float = 0.05,
    seed: int = 0,
    first: int = 0,
) -> RowTests:
    """Return the power-law and the Gaussian test of every row.

    A row passes as power-law if the KS distance of the power law fitted to its K largest
    magnitudes is below d_c, and as Gaussian if D'Agostino and Pearson's test of some of its
    points, drawn at random without replacement and anew for each row, has p >= ``significance``.

    Args:
        rows: [R, N], or an iterable of blocks [r, N] of it, which need not fit the memory.
        num_values: K; where rows are shorter, their length.
        num_points: Points of the Gaussian test; where rows are shorter, their length.
        significance: Level of both tests.
        seed: Of the draw of points.
        first: Number of the first row, where these are some of more: which points of a row are
            drawn depends on its number, not on the rows that are tested with it.

    Raises:
        ValueError: Fewer than 2 values or 20 points (the test's normal approximation needs
            them), no rows, rows of unequal length, or a value that is NaN or infinite.

    Sources: SG section 2 and appendix B; `scipy.stats.normaltest`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> gaussian, pareto = rng.normal(size=(50, 2000)), rng.pareto(1.5, (50, 2000)) + 1
        >>> found = row_tests(gaussian)
        >>> found.power_law_rate, round(found.gaussian_rate, 1)
        (0.0, 0.9)
        >>> found = row_tests(pareto)
        >>> round(found.power_law_rate, 1), found.gaussian_rate
        (1.0, 0.0)
    """
    blocks = [rows] if isinstance(rows, np.ndarray) else rows
    distances: list[FloatArray] = []
    p_values: list[FloatArray] = []
    length, number = None, first
    for block in blocks:
        block = np.atleast_2d(np.asarray(block))
        if length is None:
            length = block.shape[1]
            num_values, num_points = min(num_values, length), min(num_points, length)
            _check_counts(num_values, num_points)
        elif block.shape[1] != length:
            raise ValueError(f"rows of {length} and of {block.shape[1]} values do not go together.")
        step = max(1, _CHUNK // length)
        start = 0
        while start < len(block):
            # Rows of one group draw together, by a generator of the group.
            group, place = divmod(number, step)
            part = block[start : start + step - place]
            if not np.isfinite(part).all():
                raise ValueError("a row holds NaN or infinite values, whose rank is unknown.")
            distances.append(ks_distances(part, num_values))
            rng = np.random.default_rng([seed, group])
            columns = _distinct(rng, step, length, num_points)[place : place + len(part)]
            p_values.append(normal_p_values(np.take_along_axis(part, columns, axis=1)))
            start, number = start + len(part), number + len(part)
    if length is None:
        raise ValueError("there are no rows to test.")
    return RowTests(
        ks_distances=np.concatenate(distances),
        critical_value=critical_value(num_values, significance),
        p_values=np.concatenate(p_values),
        num_values=num_values,
        num_points=num_points,
        significance=float(significance),
    )


def ks_distances(rows: NDArray[Any], num_values: int) -> FloatArray:
    """Return d_ks of the power law fitted to the K largest magnitudes of each row [R, N].

    The same as `power_law.fit_power_law` row by row; NaN where fewer than K magnitudes are
    positive, or where all K are equal.

    Source: SG eq. 7 and 8.

    Example:
        >>> ks_distances(np.array([[16.0, -8.0, 4.0, 2.0, 1.0, 0.1]]), 5).round(3)
        array([0.232])
    """
    magnitudes = np.abs(rows)
    if num_values < magnitudes.shape[1]:
        magnitudes.partition(magnitudes.shape[1] - num_values, axis=1)
        magnitudes = magnitudes[:, -num_values:]
    ascending = np.sort(magnitudes, axis=1).astype(np.float64)
    cutoff = ascending[:, :1]
    usable = (cutoff[:, 0] > 0) & (ascending[:, -1] > cutoff[:, 0])
    distances = np.full(len(rows), np.nan)
    if usable.any():
        ascending, cutoff = ascending[usable], cutoff[usable]
        distances[usable] = exponential_distances(np.log1p((ascending - cutoff) / cutoff))
    return distances


def normal_p_values(points: NDArray[Any]) -> FloatArray:
    """Return the p-value of D'Agostino and Pearson's test of each row [R, m].

    The statistic z_S^2 + z_K^2, of skewness and kurtosis, is chi-squared with two degrees of
    freedom for Gaussian points; p is its upper tail, and a small p rejects. Rows are whitened
    first, as SG does: it changes nothing but the range of the numbers. A row whose points are all
    equal has no p-value: NaN.

    Source: `scipy.stats.normaltest`; SG appendix B.2.

    Example:
        >>> points = np.array([np.linspace(-1, 1, 101), np.full(101, 3.0)])
        >>> normal_p_values(points).round(4)  # a uniform distribution is none
        array([ 0., nan])
    """
    points = points.astype(np.float64)
    centre = points.mean(axis=1, keepdims=True)
    spread = points.std(axis=1, keepdims=True)
    varies = (np.ptp(points, axis=1) > 0) & (spread[:, 0] > 0)
    p_values = np.full(len(points), np.nan)
    if varies.any():
        from scipy.stats import normaltest

        white = (points[varies] - centre[varies]) / spread[varies]
        p_values[varies] = normaltest(white, axis=1).pvalue
    return p_values


def _distinct(
    rng: np.random.Generator, num_rows: int, length: int, count: int
) -> NDArray[np.int64]:
    """Return for each row ``count`` different indices below ``length``, each set equally likely.

    Floyd's algorithm (Bentley and Floyd, CACM 30, 1987), all rows in step.
    """
    chosen = np.empty((num_rows, count), dtype=np.int64)
    for i, last in enumerate(range(length - count, length)):
        drawn = rng.integers(0, last + 1, size=num_rows)
        taken = (chosen[:, :i] == drawn[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, last, drawn)
    return chosen


def _check_counts(num_values: int, num_points: int) -> None:
    if num_values < 2:
        raise ValueError(f"num_values={num_values}: a power law needs at least 2 values in a row.")
    if num_points < MIN_POINTS:
        raise ValueError(
            f"{num_points} points of a row were to be tested; the normal test needs at least "
            f"{MIN_POINTS}. Raise num_points, or bring longer rows."
        )

"""Intervals and p-values of correlations, for points that depend on one another or do not.

Neighbouring measurements of one training run resemble one another, so n of them are worth fewer
than n independent ones. Two answers are here: resampling blocks of neighbours instead of points
(`block_interval`), and sliding one series along the other, which leaves each as smooth as it was
(`shift_p_value`). Points that are independent, such as one from each of several runs, can be
permuted one by one (`permutation_p_value`).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from lightning_hessian.results import FloatArray
from lightning_hessian.statistics.correlation import finite_rows, unit_scale, why_undefined

MIN_BLOCK_POINTS = 8
"""Fewer points make a bootstrap of their blocks meaningless."""

_RESAMPLES = 499
_LONGEST = 0.25  # of the series, for a block
_TIES = 1.0 - 1e-12  # a coefficient that rounding alone tells apart counts as equal


@dataclass(frozen=True)
class BlockInterval:
    """What the block bootstrap says of a correlation coefficient.

    Attributes:
        low: Lower end of the interval.
        high: Upper end.
        p_value: Two-sided, of no correlation.
        block_length: How many neighbouring points were drawn together.
    """

    low: float
    high: float
    p_value: float
    block_length: int


UNDEFINED = BlockInterval(math.nan, math.nan, math.nan, 0)


def block_interval(x: ArrayLike, y: ArrayLike, *, confidence: float = 0.95) -> BlockInterval:
    """Return an interval of Pearson's r that allows for autocorrelation.

    Moving blocks are drawn from the pairs; the spread of artanh(r) over the resamples is its
    standard error. Three things keep short and persistent series honest, where the percentiles of
    the resamples cover 73 % instead of 95 % (50 points, two AR(1) series of 0.9):

    - The block length follows Andrews' rule for the Bartlett kernel, from the larger of two first
      autocorrelations: of the influence of each pair on r, and of x times that of y.
    - Blocks forget what links them to their neighbours. The standard error is multiplied by what
      an AR(1) process of this autocorrelation would lose.
    - Few blocks tell little of their spread: Student's t with 3 / (2 b) degrees of freedom,
      b = length / n, widened by 1 / sqrt(1 - b), stands in for the normal quantile.

    Args:
        x: Series [n], in the order of training; rows without both values are dropped.
        y: Series [n].
        confidence: The nominal coverage.

    Returns:
        The interval; NaN where r is undefined or there are fewer than 8 points.

    Source: Kuensch, Annals of Statistics 17, 1989; Andrews, Econometrica 59, 1991;
    Kiefer and Vogelsang, Econometric Theory 21, 2005.

    Example:
        >>> x = np.sin(np.arange(60) / 3)
        >>> found = block_interval(x, x + np.cos(np.arange(60)))
        >>> round(found.low, 1), round(found.high, 1), found.block_length
        (0.6, 0.8, 11)
    """
    x, y = finite_rows(x, y)
    num_points = len(x)
    if num_points < MIN_BLOCK_POINTS or why_undefined(unit_scale(x), unit_scale(y)):
        return UNDEFINED
    first, second = _standardised(x), _standardised(y)
    r = float(np.mean(first * second))
    influence = first * second - r / 2 * (first**2 + second**2)
    persistence = max(
        _persistence(influence), _persistence(first) * _persistence(second)
    )  # not negative: blocks would be no help there
    length = _block_length(num_points, persistence)
    weights = _block_weights(num_points, length)
    moments = weights @ np.column_stack([first, second, first**2, second**2, first * second])
    centre = np.arctanh(np.clip(r, -_TIES, _TIES))
    spread = float(np.std(np.arctanh(np.clip(_coefficients(moments), -_TIES, _TIES)), ddof=1))
    spread *= _forgotten(persistence, length)
    share = length / num_points
    freedom = 1.5 / share
    quantile = float(special.stdtrit(freedom, 0.5 + confidence / 2))  # Student's t
    half = quantile * spread / math.sqrt(1 - share)
    scaled = abs(centre) * math.sqrt(1 - share) / spread if spread > 0 else math.inf
    return BlockInterval(
        low=math.tanh(centre - half),
        high=math.tanh(centre + half),
        p_value=2 * float(special.stdtr(freedom, -scaled)),
        block_length=length,
    )


def shift_p_value(x: ArrayLike, y: ArrayLike) -> float:
    """Return the share of all circular shifts of one series whose abs(r) is at least that seen.

    A shift takes neighbours along, so each series keeps its autocorrelation, which a permutation
    of single points would destroy: those reject two independent AR(1) series of 0.9 in half of
    all cases at the level 0.05. All n shifts are tried, the unshifted one included, so the
    smallest possible value is 1 / n. A series that drifts does not come back to where it began;
    of such a one the differences can be shifted, not the levels.

    Args:
        x: Series [n], in order, rows without both values dropped.
        y: Series [n].

    Returns:
        The p-value; NaN where r is undefined.

    Example:
        >>> x = np.random.default_rng(0).normal(size=40)
        >>> shift_p_value(x, x) == 1 / 40
        True
    """
    x, y = finite_rows(x, y)
    first, second = unit_scale(x), unit_scale(y)
    if why_undefined(first, second):
        return math.nan
    products = _circular_products(_standardised(x), _standardised(y))
    return float(np.mean(np.abs(products) >= np.abs(products[0]) - len(x) * 1e-12))


def permutation_p_value(
    x: ArrayLike, y: ArrayLike, *, resamples: int = 9999, seed: int = 0
) -> float:
    """Return the two-sided p-value of Pearson's r when independent points are permuted.

    All permutations are tried where there are no more than ``resamples``; of random ones the
    observed order counts as one. Twice the smaller tail, as SciPy has it.

    Args:
        x: Values [n] of independent points, rows without both dropped.
        y: Values [n].
        resamples: How many random permutations.
        seed: Of the permutations.

    Returns:
        The p-value; NaN where r is undefined.

    Source: `scipy.stats.permutation_test` with ``permutation_type="pairings"``.

    Example:
        >>> round(permutation_p_value([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.5]), 3)
        0.083
    """
    x, y = finite_rows(x, y)
    first, second = unit_scale(x), unit_scale(y)
    if why_undefined(first, second):
        return math.nan
    first, second = _standardised(x), _standardised(y)
    exact = math.factorial(len(x)) <= resamples
    if exact:
        orders = np.array(list(itertools.permutations(range(len(x)))))
    else:
        rng = np.random.default_rng(seed)
        orders = rng.permuted(np.tile(np.arange(len(x)), (resamples, 1)), axis=1)
    seen = float(first @ second)
    products = first[orders] @ second
    slack = len(x) * 1e-12
    more, less = np.sum(products >= seen - slack), np.sum(products <= seen + slack)
    extra = 0 if exact else 1
    return float(min(1.0, 2 * (min(more, less) + extra) / (len(orders) + extra)))


def partial_correlation(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> float:
    """Return Pearson's r of what is left of two series once a third is regressed out.

    Args:
        x: Series [n], finite.
        y: Series [n], finite.
        given: What is held fixed [n] or [n, k], finite, a constant not included.

    Returns:
        The partial coefficient; NaN where a residual is constant or freedom runs out.

    Example:
        >>> step = np.arange(8.0)
        >>> wiggle = np.array([1, -1, 1, -1, 1, -1, 1, -1.0])
        >>> round(partial_correlation(step + wiggle, -5 * step + wiggle, step), 3)
        1.0
    """
    held = np.asarray(given, dtype=np.float64).reshape(len(np.asarray(x)), -1)
    first, second = (unit_scale(np.asarray(series, dtype=np.float64)) for series in (x, y))
    if why_undefined(first, second) or len(first) - held.shape[1] < 3:
        return math.nan
    basis = np.column_stack([np.ones(len(first)), _columns_at_scale_one(held)])
    both = np.column_stack([first, second])
    residuals = both - basis @ np.linalg.lstsq(basis, both, rcond=None)[0]
    # What is left of a straight line is rounding, at the scale of the line.
    if np.any(np.ptp(residuals, axis=0) <= 1e-11):
        return math.nan
    return float(stats.pearsonr(residuals[:, 0], residuals[:, 1])[0])


@dataclass(frozen=True)
class LeadLag:
    """Where two series agree best when one is moved along the other.

    Attributes:
        lags: The lags tried; at lag k, x at row t stands beside y at row t + k.
        coefficients: Pearson's r at each lag, over the rows that overlap.
        lag: The lag of the largest abs(r); positive where x moves first.
        r: The coefficient there.
        interval: Its block bootstrap interval, at a level that allows for having looked at all.
    """

    lags: tuple[int, ...]
    coefficients: tuple[float, ...]
    lag: int
    r: float
    interval: tuple[float, float]

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the best lag leaves zero out."""
        low, high = self.interval
        return low > 0 or high < 0


def lead_lag(x: ArrayLike, y: ArrayLike) -> LeadLag | None:
    """Return the lag at which two series agree best, None where the series are too short.

    Give first differences: with a trend in both series every lag agrees. Lags of up to a tenth of
    the rows, and at most 10, are tried to either side.

    Args:
        x: Series [n], in order; rows without both values are dropped.
        y: Series [n].

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=80)
        >>> found = lead_lag(x, np.roll(x, 2) + 0.1 * rng.normal(size=80))
        >>> found.lag, found.is_clear
        (2, True)
    """
    x, y = finite_rows(x, y)
    max_lag = min(10, len(x) // 10)
    if len(x) - max_lag < MIN_BLOCK_POINTS or max_lag < 1:
        return None
    lags = range(-max_lag, max_lag + 1)
    pairs = [_moved(x, y, lag) for lag in lags]
    coefficients = [_coefficient(first, second) for first, second in pairs]
    if all(math.isnan(r) for r in coefficients):
        return None
    best = int(np.nanargmax(np.abs(coefficients)))
    found = block_interval(*pairs[best], confidence=1 - 0.05 / len(lags))
    return LeadLag(
        tuple(lags), tuple(coefficients), lags[best], coefficients[best], (found.low, found.high)
    )


def _coefficient(x: FloatArray, y: FloatArray) -> float:
    """Return Pearson's r, which SciPy's own function takes half a millisecond for."""
    first, second = unit_scale(x), unit_scale(y)
    if why_undefined(first, second):
        return math.nan
    r = float(np.mean(_standardised(first) * _standardised(second)))
    return min(max(r, -1.0), 1.0)


def _moved(x: FloatArray, y: FloatArray, lag: int) -> tuple[FloatArray, FloatArray]:
    return (x[: len(x) - lag], y[lag:]) if lag >= 0 else (x[-lag:], y[:lag])


def _standardised(series: FloatArray) -> FloatArray:
    """Return the series at mean 0 and standard deviation 1."""
    centred = unit_scale(series)
    centred = centred - centred.mean()
    result: FloatArray = centred / centred.std()
    return result


def _columns_at_scale_one(columns: FloatArray) -> FloatArray:
    centred = columns - columns.mean(axis=0)
    largest = np.abs(centred).max(axis=0, initial=0.0)
    found: FloatArray = centred / np.where(largest > 0, largest, 1.0)
    return found


def _persistence(series: FloatArray) -> float:
    """Return the first autocorrelation, its bias (1 + 3 rho) / n added back, within [0, 0.97].

    Source: Kendall, Biometrika 41, 1954.
    """
    centred = series - series.mean()
    power = float(centred @ centred)
    if power == 0:
        return 0.0
    rho = float(centred[1:] @ centred[:-1]) / power
    return min(max(rho + (1 + 3 * rho) / len(series), 0.0), 0.97)


def _block_length(num_points: int, persistence: float) -> int:
    alpha = 4 * persistence**2 / ((1 - persistence) ** 2 * (1 + persistence) ** 2)
    length = math.ceil(1.1447 * (alpha * num_points) ** (1 / 3))
    if length > 8:  # steps of an eighth: nearly equal series then share their draws
        step = 2 ** (length.bit_length() - 4)
        length = -(-length // step) * step
    found: int = max(1, min(length, int(num_points * _LONGEST)))
    return found


def _forgotten(persistence: float, length: int) -> float:
    """Return the standard error of an AR(1) mean over what blocks of a length see of it."""
    lags = np.arange(1, length)
    seen = 1 + 2 * float(np.sum((1 - lags / length) * persistence**lags))
    return math.sqrt((1 + persistence) / (1 - persistence) / seen)


@functools.lru_cache(maxsize=32)
def _block_weights(num_points: int, length: int) -> FloatArray:
    """Return [499, n]: the share of each point in each sample of moving blocks."""
    num_blocks = -(-num_points // length)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, num_points - length + 1, size=(_RESAMPLES, num_blocks))
    ends = starts + length
    ends[:, -1] = starts[:, -1] + num_points - (num_blocks - 1) * length  # n points in all
    width = num_points + 1
    rows = np.arange(_RESAMPLES)[:, None] * width
    steps = np.bincount((rows + starts).ravel(), minlength=_RESAMPLES * width)
    steps = steps - np.bincount((rows + ends).ravel(), minlength=_RESAMPLES * width)
    counts = steps.reshape(_RESAMPLES, width).cumsum(axis=1)[:, :num_points]
    return counts / num_points


def _coefficients(moments: FloatArray) -> FloatArray:
    """Return r of each row of weighted means of x, y, x^2, y^2 and xy."""
    x, y, xx, yy, xy = moments.T
    variance = (xx - x**2) * (yy - y**2)
    usable = variance > 1e-20  # a sample may draw one point n times
    return np.where(usable, xy - x * y, 0.0) / np.sqrt(np.where(usable, variance, 1.0))


def _circular_products(first: FloatArray, second: FloatArray) -> FloatArray:
    """Return sum_t first[t] second[t + s] for every circular shift s."""
    spectrum = np.conj(np.fft.rfft(first)) * np.fft.rfft(second)
    return np.fft.irfft(spectrum, len(first))

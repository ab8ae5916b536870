"""Intervals and p-values under dependence: against SciPy, closed forms and simulated coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import signal, stats

from lightning_hessian.statistics.dependence import (
    block_interval,
    lead_lag,
    partial_correlation,
    permutation_p_value,
    shift_p_value,
)


def autoregressive(rng, size, phi, count=1):
    """Returns [count, size] of AR(1) series in their stationary state."""
    noise = rng.normal(size=(count, size + 300))
    return signal.lfilter([1], [1, -phi], noise, axis=1)[:, 300:]


def coverage(size, phi, rho, count, seed=0, interval=block_interval):
    rng = np.random.default_rng(seed)
    x, other = autoregressive(rng, size, phi, count), autoregressive(rng, size, phi, count)
    y = rho * x + math.sqrt(1 - rho**2) * other
    found = [interval(a, b) for a, b in zip(x, y, strict=True)]
    return np.mean([f.low <= rho <= f.high for f in found])


@pytest.mark.parametrize(("size", "phi", "rho"), [(40, 0.8, 0.0), (100, 0.5, 0.6), (100, 0.9, 0.0)])
def test_the_block_interval_covers(size, phi, rho):
    assert 0.90 <= coverage(size, phi, rho, count=400) <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("size", [30, 50, 100, 200, 500])
@pytest.mark.parametrize("phi", [0.0, 0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_the_block_interval_covers_everywhere(size, phi, rho):
    assert 0.90 <= coverage(size, phi, rho, count=1000, seed=1) <= 0.98


def test_fishers_interval_would_not_cover():
    """To know that the simulation can fail."""

    def fisher(x, y):
        low, high = stats.pearsonr(x, y).confidence_interval()
        return type("Interval", (), {"low": low, "high": high})

    assert coverage(100, 0.9, 0.0, 400, interval=fisher) < 0.6


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_without_autocorrelation_the_block_interval_is_near_fishers(rho):
    rng = np.random.default_rng(3)
    x = rng.normal(size=400)
    y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=400)
    found, fisher = block_interval(x, y), stats.pearsonr(x, y).confidence_interval()
    width = fisher.high - fisher.low
    assert found.low == pytest.approx(fisher.low, abs=0.25 * width)
    assert found.high == pytest.approx(fisher.high, abs=0.25 * width)


def test_the_p_value_belongs_to_the_interval():
    rng = np.random.default_rng(4)
    x, y = autoregressive(rng, 80, 0.6, 2)
    p = block_interval(x, y).p_value
    touching = block_interval(x, y, confidence=1 - p)
    assert min(abs(touching.low), abs(touching.high)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_scale_and_order_of_the_pair_do_not_matter(scale):
    x, y = autoregressive(np.random.default_rng(5), 60, 0.7, 2)
    found = block_interval(x, y)
    for other in (block_interval(scale * x + 0.0, y), block_interval(y, x)):
        assert (other.low, other.high) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("x", [np.arange(7.0), np.ones(20)])
def test_no_interval_without_points_or_variation(x):
    found = block_interval(x, np.sin(np.arange(len(x))))
    assert all(math.isnan(value) for value in (found.low, found.high, found.p_value))


def test_equal_series_have_a_point_for_an_interval():
    x = np.random.default_rng(0).normal(size=30)
    found = block_interval(x, 2 * x + 1)
    assert (found.low, found.high) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert found.p_value < 1e-10


def test_shifts_are_those_that_numpy_rolls():
    x, y = autoregressive(np.random.default_rng(6), 37, 0.8, 2)
    rolled = [abs(stats.pearsonr(x, np.roll(y, -s))[0]) for s in range(37)]
    assert shift_p_value(x, y) == pytest.approx(np.mean(np.array(rolled) >= rolled[0] - 1e-12))


def test_shifts_keep_their_level_where_permutations_do_not():
    rng = np.random.default_rng(7)
    pairs = [autoregressive(rng, 60, 0.9, 2) for _ in range(300)]
    by_shift = np.mean([shift_p_value(x, y) <= 0.05 for x, y in pairs])
    by_points = np.mean([permutation_p_value(x, y, resamples=199) <= 0.05 for x, y in pairs])
    assert by_shift < 0.10
    assert by_points > 0.40


@pytest.mark.parametrize("size", [4, 5, 6, 7])
def test_all_permutations_agree_with_scipy(size):
    rng = np.random.default_rng(size)
    x, y = rng.normal(size=size), rng.normal(size=size)
    method = stats.PermutationMethod(n_resamples=math.factorial(7), rng=rng)
    assert permutation_p_value(x, y) == pytest.approx(stats.pearsonr(x, y, method=method).pvalue)


def test_random_permutations_agree_with_scipys():
    rng = np.random.default_rng(8)
    x = rng.normal(size=25)
    y = 0.4 * x + rng.normal(size=25)
    method = stats.PermutationMethod(n_resamples=9999, rng=rng)
    expected = stats.pearsonr(x, y, method=method).pvalue
    assert permutation_p_value(x, y) == pytest.approx(expected, abs=4 * math.sqrt(expected / 9999))


@pytest.mark.parametrize("function", [shift_p_value, permutation_p_value])
def test_constants_have_no_p_value(function):
    assert math.isnan(function(np.ones(10), np.arange(10.0)))
    assert math.isnan(function([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]))


def test_a_partial_coefficient_is_that_of_scipys_residuals():
    rng = np.random.default_rng(9)
    step = np.sort(rng.uniform(0, 1e5, size=50))
    x, y = 1e-4 * step + rng.normal(size=50), -2e-4 * step + rng.normal(size=50)
    left = [s - stats.linregress(step, s).slope * step for s in (x, y)]
    assert partial_correlation(x, y, step) == pytest.approx(stats.pearsonr(*left)[0], abs=1e-9)


def test_a_partial_coefficient_given_groups_is_that_of_centred_groups():
    rng = np.random.default_rng(10)
    labels = rng.integers(0, 3, size=40)
    x, y = labels + rng.normal(size=40), 5 * labels + rng.normal(size=40)
    indicator = np.column_stack([labels == 1, labels == 2]).astype(float)
    means = [np.array([s[labels == k].mean() for k in range(3)]) for s in (x, y)]
    left = [s - m[labels] for s, m in zip((x, y), means, strict=True)]
    assert partial_correlation(x, y, indicator) == pytest.approx(stats.pearsonr(*left)[0])


def test_nothing_is_left_of_a_straight_line():
    step = np.arange(30.0)
    assert math.isnan(partial_correlation(3 * step + 7, np.sin(step), step))
    assert math.isnan(partial_correlation([1, 2, 4], [2, 1, 1], [[1, 0], [0, 1], [0, 0]]))


@pytest.mark.parametrize("lag", [-3, -1, 0, 2, 5])
def test_a_known_lag_is_found_with_its_sign(lag):
    noise = np.random.default_rng(11).normal(size=(2, 100))
    x = noise[0]
    y = np.roll(x, lag) + 0.5 * noise[1]  # y repeats x ``lag`` rows later
    found = lead_lag(x, y)
    assert found.lag == lag
    assert found.is_clear
    expected = [
        stats.pearsonr(x[: 100 - k], y[k:])[0] if k >= 0 else stats.pearsonr(x[-k:], y[:k])[0]
        for k in found.lags
    ]
    assert found.coefficients == pytest.approx(expected)


def test_lags_of_independent_series_are_rarely_clear():
    rng = np.random.default_rng(12)
    clear = [lead_lag(*rng.normal(size=(2, 60))).is_clear for _ in range(200)]
    assert np.mean(clear) < 0.10


def test_short_series_have_no_lag():
    assert lead_lag(np.arange(9.0), np.sin(np.arange(9.0))) is None


def test_every_sample_of_blocks_has_n_points_in_runs_of_neighbours():
    from lightning_hessian.statistics.dependence import _block_weights

    counts = _block_weights(23, 5)[:50] * 23
    assert counts.sum(axis=1) == pytest.approx(23)
    for row in np.rint(counts).astype(int):
        # Of 5 blocks the last is cut to 3: what is drawn is a sum of 4 runs of 5 and one of 3.
        assert any(_is_sum_of_runs(row.copy(), [5] * 4 + [3], last) for last in range(19 + 2))


def _is_sum_of_runs(row, lengths, last):
    row[last : last + lengths[-1]] -= 1
    if len(row[last : last + lengths[-1]]) < lengths[-1] or row.min() < 0:
        return False
    for length, _ in itertools.product([5], range(4)):
        if not row.any():
            return False
        begin = int(np.flatnonzero(row)[0])
        if begin + length > len(row):
            return False
        row[begin : begin + length] -= 1
        if row.min() < 0:
            return False
    return not row.any()

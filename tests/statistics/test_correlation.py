"""Correlations against SciPy, and the cases in which there is none."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from lightning_hessian.statistics.correlation import Correlation, pearson


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("size", [5, 6, 40, 500])
@pytest.mark.parametrize("shift", [0.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_coefficients_are_scipys(size, shift, scale):
    rng = np.random.default_rng(size)
    x = rng.normal(size=size) + shift
    y = 0.3 * x + rng.normal(size=size) ** 3
    found = pearson(x * scale, y)
    assert found.r == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    differences = stats.pearsonr(np.diff(x), np.diff(y))[0]
    assert found.r_differences == pytest.approx(differences, abs=1e-9)
    assert (found.num_points, found.reason) == (size, "")


def test_a_common_trend_is_not_a_correlation_of_steps():
    rng = np.random.default_rng(0)
    falling = np.exp(-np.arange(200) / 300)
    found = pearson(falling + 0.01 * rng.normal(size=200), falling + 0.01 * rng.normal(size=200))
    assert found.r > 0.95
    assert found.spearman > 0.95
    assert abs(found.r_differences) < 0.3


def test_an_outlier_does_not_carry_spearman():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=50), rng.normal(size=50)
    x[7] = y[7] = 1e3
    found = pearson(x, y)
    assert found.r > 0.99
    assert abs(found.spearman) < 0.4


def test_rows_with_a_gap_in_either_series_are_dropped():
    x = [1.0, None, 2.5, math.nan, 3.0, 7.0, math.inf, 4.0, 1.5]
    y = [2.0, 9.0, 1.0, 8.0, None, 3.0, 5.0, -1.0, 0.5]
    kept_x, kept_y = [1.0, 2.5, 7.0, 4.0, 1.5], [2.0, 1.0, 3.0, -1.0, 0.5]
    found = pearson(x, y)
    assert found == pearson(kept_x, kept_y)
    assert found.num_points == 5
    assert found.r == pytest.approx(stats.pearsonr(kept_x, kept_y)[0])
    differences = stats.pearsonr(np.diff(kept_x), np.diff(kept_y))[0]
    assert found.r_differences == pytest.approx(differences)


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_few_points_have_no_coefficient(size):
    found = pearson(np.arange(size), np.arange(size) ** 2)
    assert math.isnan(found.r)
    assert math.isnan(found.spearman)
    assert math.isnan(found.r_differences)
    assert found.num_points == size
    assert f"r, spearman: {size} of the 4 points needed" in found.reason


def test_four_points_have_too_few_differences():
    x, y = [1.0, 2.0, 4.0, 3.0], [3.0, 5.0, 4.0, 1.0]
    found = pearson(x, y)
    assert found.r == pytest.approx(stats.pearsonr(x, y)[0])
    assert found.spearman == pytest.approx(stats.spearmanr(x, y)[0])
    assert math.isnan(found.r_differences)
    assert found.reason == "r_differences: 3 of the 4 differences needed"


VARIED = [1.0, 3.0, 2.0, 5.0, 4.0, 4.5]


@pytest.mark.parametrize(
    "constant",
    [[0.0] * 6, [7.0] * 6, [-1e-300] * 6, [0.1 * 3, 0.3, 0.3, 0.3, 0.3, 0.3], [1e9 + 1e-6] * 6],
)
def test_constants_have_no_coefficient(constant):
    first, second = pearson(constant, VARIED), pearson(VARIED, constant)
    both = pearson(constant, constant)
    for found in (first, second, both):
        assert math.isnan(found.r)
        assert math.isnan(found.spearman)
        assert math.isnan(found.r_differences)
    assert "r, spearman: the first series is constant;" in first.reason
    assert "r, spearman: the second series is constant;" in second.reason
    assert "the first series is constant and the second series is constant" in both.reason


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_straight_line_has_constant_differences(offset):
    # The steps differ by rounding alone, which must not be correlated.
    line = offset + np.linspace(0.0, 1.0, 30)
    found = pearson(line, np.random.default_rng(0).normal(size=30))
    assert math.isfinite(found.r)
    assert math.isnan(found.r_differences)
    assert found.reason == "r_differences: the first series of differences is constant"


def test_relative_changes_just_above_rounding_count():
    x = 1.0 + 1e-9 * np.array(VARIED)
    assert pearson(x, VARIED).r == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("x", "y"), [([1.0, 2.0], [1.0]), ([[1.0, 2.0]], [[1.0, 2.0]]), (1.0, 2.0)]
)
def test_series_must_lie_side_by_side(x, y):
    with pytest.raises(ValueError, match=r"two series of equal length.*align them"):
        pearson(x, y)


def test_a_correlation_is_frozen():
    with pytest.raises(AttributeError):
        Correlation(0.5, 10, 0.1, 0.4).r = 1.0


@pytest.mark.parametrize("size", [4, 5, 30, 500])
@pytest.mark.parametrize("weight", [-3.0, 0.0, 0.4])
def test_the_interval_is_scipys(size, weight):
    rng = np.random.default_rng(size)
    x = rng.normal(size=size)
    y = weight * x + rng.normal(size=size)
    expected = stats.pearsonr(x, y).confidence_interval(0.95)
    assert pearson(x, y).interval == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("x", [[1.0, 2.0, 3.0], [5.0] * 6])
def test_an_undefined_coefficient_has_no_interval(x):
    low, high = pearson(x, np.arange(len(x)) ** 2).interval
    assert math.isnan(low)
    assert math.isnan(high)


def test_the_interval_of_a_straight_line_is_a_point():
    x = np.arange(6.0)
    assert pearson(x, 2 * x).interval == pytest.approx((1.0, 1.0))

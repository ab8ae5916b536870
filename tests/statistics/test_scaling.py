"""Power laws between two quantities: against SciPy's line, and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from lightning_hessian.statistics.scaling import fit_scaling


def test_the_line_is_scipys():
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(3, 7, size=20)
    y = 5 * x**-0.3 * 10 ** rng.normal(scale=0.1, size=20)
    fit, line = fit_scaling(x, y), stats.linregress(np.log10(x), np.log10(y))
    assert fit.exponent == pytest.approx(line.slope)
    assert fit.r == pytest.approx(line.rvalue)
    half = stats.t.ppf(0.975, 18) * line.stderr
    assert fit.interval == pytest.approx((line.slope - half, line.slope + half))
    centre, low, high = fit.predict(x)
    assert centre == pytest.approx(10 ** (line.intercept + line.slope * np.log10(x)))
    assert np.all((low < centre) & (centre < high))


def test_interval_and_band_cover():
    rng = np.random.default_rng(1)
    x = np.repeat([1e3, 1e4, 1e5, 1e6], 3)
    inside, banded = [], []
    for _ in range(1000):
        fit = fit_scaling(x, 2 * x**0.25 * 10 ** rng.normal(scale=0.2, size=12))
        inside.append(fit.interval[0] <= 0.25 <= fit.interval[1])
        _, low, high = fit.predict([3e4])
        banded.append(low[0] <= 2 * 3e4**0.25 <= high[0])
    assert np.mean(inside) == pytest.approx(0.95, abs=0.025)
    assert np.mean(banded) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([1, 2, 3], [1, 2, 3], "3 of the 4 points needed"),
        ([1, 1, 2, 2], [1, 2, 3, 4], "2 different sizes of the 3 needed"),
        ([1, 2, 3, 4], [5, 5, 5, 5], "the second series is constant"),
        ([1, 2, 3, 4], [-1, 2, math.nan, 4], "2 of the 4 points needed"),
    ],
)
def test_why_there_is_no_fit(x, y, reason):
    fit = fit_scaling(x, y)
    assert fit.reason == reason
    assert math.isnan(fit.exponent)

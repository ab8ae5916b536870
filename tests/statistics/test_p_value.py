"""The p-value of a power law, against simulations and the published test."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from scipy import stats
from support.values import pareto

from lightning_hessian.statistics.power_law import (
    fit_power_law,
)
from lightning_hessian.statistics.significance import (
    _null_distances,
    lilliefors_p_value,
)


class TestPValue:
    @pytest.mark.parametrize("size", [3, 5, 20, 100])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_agrees_with_scipys_monte_carlo(self, size, seed):
        values = pareto(2.0, size, seed)
        # expon.fit takes the minimum as location and the mean above it as scale: ours.
        theirs = stats.goodness_of_fit(
            stats.expon,
            np.log(values),
            statistic="ks",
            n_mc_samples=4999,
            random_state=np.random.default_rng(3),
        )
        fit = fit_power_law(values)
        assert fit.ks_distance == pytest.approx(theirs.statistic, abs=1e-12)
        p = theirs.pvalue
        error = math.sqrt(p * (1 - p) * (1 / 4999 + 1 / 9999))
        assert abs(fit.p_value - p) < 4 * error + 1e-3
        # Not at one point alone: the whole null distribution is the same.
        # Rounded, since for small K the distance is often 1/K, but for the last bit.
        ours = _null_distances(size).round(9)
        assert stats.ks_2samp(ours, theirs.null_distribution.round(9)).pvalue > 0.01

    @pytest.mark.parametrize("size", [50, 200, 1000])
    @pytest.mark.parametrize(
        ("significance", "modified"),
        [(0.15, 0.926), (0.1, 0.990), (0.05, 1.094), (0.025, 1.190), (0.01, 1.308)],
    )
    def test_agrees_with_stephens_table(self, significance, modified, size):
        # M. A. Stephens, JASA 69 (1974): (D - 0.2 / n) (sqrt(n) + 0.26 + 0.5 / sqrt(n)).
        root = math.sqrt(size)
        distance = modified / (root + 0.26 + 0.5 / root) + 0.2 / size
        p = lilliefors_p_value(distance, size)
        error = math.sqrt(significance * (1 - significance) / 9999)
        # Stephens' numbers are for a known origin, where one of the K is no cutoff.
        assert abs(p - significance) < 3 * error + 0.05 * significance

    @pytest.mark.parametrize("size", [10, 50, 300])
    def test_is_uniform_under_the_null(self, size):
        fits = [fit_power_law(pareto(1.8, size, seed)) for seed in range(500)]
        p_values = np.array([fit.p_value for fit in fits])
        assert stats.kstest(p_values, "uniform").pvalue > 0.01
        assert stats.binomtest(int((p_values <= 0.05).sum()), 500, 0.05).pvalue > 0.01
        # The paper's critical value is that of a known exponent: it should reject 5 %, too.
        assert sum(fit.ks_distance >= fit.critical_value for fit in fits) < 0.02 * len(fits)

    @pytest.mark.parametrize("size", [50, 1000])
    def test_is_uniform_when_the_largest_of_many_are_fitted(self, size):
        # lambda_K as the cutoff leaves the K - 1 above it a sample from the same law.
        p_values = [
            fit_power_law(pareto(2.0, 5 * size, seed), k=size).p_value for seed in range(300)
        ]
        assert stats.kstest(p_values, "uniform").pvalue > 0.01

    def test_rejects_what_is_no_power_law(self):
        values = np.exp(np.random.default_rng(0).normal(size=1000))
        fit = fit_power_law(values)
        assert fit.p_value == 1 / 10_000
        assert not fit.is_power_law

    def test_rejects_where_the_paper_does_not(self):
        # Quantiles whose logarithms are gamma: d_ks lies between the two critical values.
        logs = stats.gamma(1.42).ppf((np.arange(300) + 0.5) / 300)
        fit = fit_power_law(np.exp(logs))
        assert 1.094 < fit.ks_distance * math.sqrt(300) < 1.36
        assert fit.is_power_law
        assert fit.p_value < 0.05

    def test_two_values_always_fit(self):
        assert fit_power_law([7.0, 3.0]).ks_distance == 0.5
        assert fit_power_law([7.0, 3.0]).p_value == 1.0

    def test_falls_with_the_distance_and_ends_at_its_resolution(self):
        p_values = [lilliefors_p_value(d, 50) for d in np.linspace(0, 1, 200)]
        assert np.all(np.diff(p_values) <= 0)
        assert (p_values[0], p_values[-1]) == (1.0, 1e-4)

    def test_is_the_same_each_time(self):
        first = lilliefors_p_value(0.1, 60)
        _null_distances.cache_clear()
        assert lilliefors_p_value(0.1, 60) == first

    def test_scaling_beyond_the_largest_simulated_size(self):
        size, samples = 8000, 2000
        rng = np.random.default_rng(8)
        steps = np.arange(size + 1) / size
        distances = np.empty(samples)
        for i in range(samples):
            logs = np.sort(rng.standard_exponential(size))
            logs -= logs[0]
            expected = -np.expm1(-logs / logs.mean())
            distances[i] = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
        for level in (0.5, 0.2, 0.05, 0.01):
            p = lilliefors_p_value(float(np.quantile(distances, 1 - level)), size)
            error = math.sqrt(level * (1 - level) * (1 / samples + 1 / 9999))
            assert abs(p - level) < 3 * error

    def test_null_is_quick_and_its_memory_bounded(self):
        _null_distances.cache_clear()
        start = time.perf_counter()
        fit_power_law(pareto(2.0, 1000, seed=0))
        assert time.perf_counter() - start < 3.0  # 0.2 s on two idle cores
        start = time.perf_counter()
        fit_power_law(pareto(2.0, 1000, seed=1))
        assert time.perf_counter() - start < 0.1  # cached: under 1 ms

    @pytest.mark.parametrize(
        ("distance", "size", "message"),
        [(0.1, 1, "k=1"), (-0.1, 50, "-0.1"), (1.1, 50, "1.1"), (math.nan, 50, "nan")],
    )
    def test_errors(self, distance, size, message):
        with pytest.raises(ValueError, match=message):
            lilliefors_p_value(distance, size)

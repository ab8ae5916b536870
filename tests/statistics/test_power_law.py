"""Fits, distances and p-values against powerlaw, SciPy and closed forms."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings

import numpy as np
import powerlaw
import pytest
from scipy import stats
from support.values import pareto

from lightning_hessian.statistics.power_law import (
    exponent_std_error,
    fit_power_law,
    ks_distance_by_cutoff,
    optimal_cutoff,
    slope,
)
from lightning_hessian.statistics.significance import (
    LEAST_FOR_VERDICT,
    critical_value,
)


def powerlaw_fit(values: np.ndarray) -> powerlaw.Power_Law:
    """powerlaw's own fit with the smallest value as cutoff (its default range ends at 3)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return powerlaw.Fit(
            values, xmin=values.min(), parameter_ranges={"alpha": [1.0, 50.0]}, verbose=0
        ).power_law


def scipy_distance(values: np.ndarray, exponent: float) -> float:
    fitted = stats.pareto(b=exponent - 1.0, scale=values.min())
    return stats.ks_1samp(values, fitted.cdf).statistic


SAMPLES = {
    **{
        f"beta={exponent}, K={size}": pareto(exponent, size, seed=1, cutoff=cutoff)
        for exponent, cutoff in ((1.3, 1e-6), (2.0, 1.0), (3.5, 40.0), (8.0, 1.0))
        for size in (2, 5, 50, 1000)
    },
    "tied in fours": np.repeat(pareto(1.7, 50, seed=2), 4),
    "one decimal": np.round(pareto(2.0, 200, seed=3), 1),
    "tied at the cutoff": np.concatenate([np.ones(30), pareto(2.0, 70, seed=4)]),
    "tied at the top": np.concatenate([np.full(30, 1e4), pareto(2.0, 70, seed=5)]),
}


@pytest.mark.parametrize("values", SAMPLES.values(), ids=SAMPLES.keys())
class TestAgainstOthers:
    def test_exponent_and_error_are_those_of_powerlaw(self, values):
        fit, theirs = fit_power_law(values), powerlaw_fit(values)
        assert fit.exponent == pytest.approx(theirs.alpha, rel=1e-9)
        assert fit.exponent_std_error == pytest.approx(theirs.standard_err, rel=1e-9)
        assert fit.cutoff == theirs.xmin

    def test_distance_is_that_of_scipy(self, values):
        fit = fit_power_law(values)
        assert fit.ks_distance == pytest.approx(scipy_distance(values, fit.exponent), abs=1e-12)

    def test_powerlaw_looks_at_one_side_of_each_jump(self, values):
        # powerlaw 2.0 takes the share of values below x for the empirical distribution at x. Its
        # distance misses where data run ahead of the fit, by as much as one jump (1/K, and more
        # at a tie); HPL eq. 15 is the supremum, as SciPy's.
        fit, theirs = fit_power_law(values), powerlaw_fit(values)
        ascending = np.sort(values)
        below = np.searchsorted(ascending, ascending, side="left") / len(values)
        fitted = stats.pareto(b=fit.exponent - 1.0, scale=fit.cutoff).cdf(ascending)
        their_distance = theirs.D
        assert their_distance == pytest.approx(np.abs(fitted - below).max(), abs=1e-9)
        largest_jump = np.unique(values, return_counts=True)[1].max() / len(values)
        assert their_distance - 1e-9 <= fit.ks_distance <= their_distance + largest_jump + 1e-9

    def test_verdict_is_the_comparison(self, values):
        fit = fit_power_law(values)
        assert fit.critical_value == critical_value(len(values), 0.05)
        expected = fit.ks_distance < fit.critical_value
        assert fit.is_power_law == (expected if len(values) >= LEAST_FOR_VERDICT else None)

    def test_scale_and_order_do_not_matter(self, values):
        fit = fit_power_law(values)
        shuffled = np.random.default_rng(0).permutation(values) * 2.0**-40
        other = fit_power_law(shuffled)
        assert dataclasses.replace(other, cutoff=fit.cutoff) == fit
        assert other.cutoff == fit.cutoff * 2.0**-40


def test_exact_geometric_values():
    # ln(lambda_i / lambda_K) = 4, 3, 2, 1, 0 octaves: mean 2, F = 1 - exp(-j / 2).
    fit = fit_power_law([1.0, 2.0, 4.0, 8.0, 16.0])
    assert fit.slope == pytest.approx(2 * math.log(2))
    assert fit.exponent == pytest.approx(1 + 1 / (2 * math.log(2)))
    assert fit.ks_distance == pytest.approx(1 - math.exp(-1) - 0.4)
    assert (fit.num_values, fit.cutoff, fit.significance) == (5, 1.0, 0.05)


def test_exact_zipf_law_is_recovered():
    # lambda_k = k^-s is HPL eq. 3; the maximum-likelihood slope tends to s.
    ranks = np.arange(1.0, 100_001.0)
    fit = fit_power_law(ranks**-1.2, k=100_000)
    assert fit.slope == pytest.approx(1.2, abs=2e-3)
    assert fit.p_value == 1.0


def test_the_k_largest_are_fitted():
    values = np.concatenate([pareto(2.0, 300, seed=6), [0.0, -1.0, -1e9]])
    by_hand = np.sort(values)[::-1][:120]
    assert fit_power_law(values, k=120) == fit_power_law(by_hand) == fit_power_law(values, 120)
    assert fit_power_law(values).num_values == 300
    assert fit_power_law(values, k=np.int64(120)).cutoff == by_hand[-1]


def test_k_counts_through_a_tie_at_the_cutoff():
    fit = fit_power_law([9.0, 4.0, 1.0, 1.0, 1.0], k=3)
    assert (fit.num_values, fit.cutoff) == (3, 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, object])
def test_any_real_array_is_read(dtype):
    values = [1, 2, 4, 8, 16]
    assert fit_power_law(np.array(values, dtype=dtype)) == fit_power_law(values)
    assert fit_power_law(np.array([[16, 8, 4], [2, 1, -1]], dtype=dtype)) == fit_power_law(values)


def test_the_input_is_left_alone():
    values = pareto(2.0, 50, seed=7)
    before = values.copy()
    fit_power_law(values, k=20)
    optimal_cutoff(values)
    np.testing.assert_array_equal(values, before)


def test_extreme_ranges():
    wide = fit_power_law([1e300, 1.0, 1e-300])
    assert wide.slope == pytest.approx((600 + 300) * math.log(10) / 3)
    # Neighbouring floats: ln(1 + eps) = eps to all digits.
    eps = np.finfo(float).eps
    narrow = fit_power_law([1.0 + 2 * eps, 1.0 + eps, 1.0])
    assert narrow.slope == pytest.approx(eps, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, r"none of the 0 values is positive"),
        ([-1.0, 0.0, -3.0], {}, r"none of the 3 values is positive.*check the sign"),
        ([-1.0, 0.0, 2.0], {}, r"only 1 of the 3 values is positive.*compute more"),
        ([3.0, 2.0, 1.0, -1.0], {"k": 4}, r"k=4 .* only 3 of the 4 are positive; lower k"),
        ([3.0, 2.0, 1.0], {"k": 1}, r"k=1 .*at least 2 values"),
        ([3.0, 2.0, 1.0], {"k": 0}, r"k=0 "),
        ([3.0, 2.0, 1.0], {"k": -2}, r"k=-2 "),
        ([5.0, 5.0, 5.0], {}, r"the 3 values to fit are all equal to 5.*larger k"),
        ([5.0, 5.0, 1.0], {"k": 2}, r"the 2 values to fit are all equal to 5"),
        ([1.0, np.nan, 2.0, np.inf], {}, r"2 of the 4 values are NaN or infinite.*leave them out"),
        ([1.0, 2.0, -np.inf], {}, r"1 of the 3 values are NaN or infinite"),
        ([3.0, 2.0, 1.0], {"significance": 0.0}, r"significance=0.0.*not strictly between"),
        ([3.0, 2.0, 1.0], {"significance": 1.0}, r"significance=1.0"),
        ([3.0, 2.0, 1.0], {"significance": 5}, r"significance=5"),
        ([3.0, 2.0, 1.0], {"significance": math.nan}, r"significance=nan"),
    ],
)
def test_errors_name_cause_and_remedy(values, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit_power_law(values, **options)
    assert len(str(caught.value)) <= 200


def test_k_must_be_an_integer():
    with pytest.raises(TypeError, match=r"k=2\.5.*whole number"):
        fit_power_law([3.0, 2.0, 1.0], k=2.5)


class TestClosedForms:
    @pytest.mark.parametrize("exponent", [1.2, 2.0, 3.7])
    @pytest.mark.parametrize("size", [50, 1000])
    def test_standard_error_is_the_scatter_of_the_exponent(self, exponent, size):
        found = np.array(
            [fit_power_law(pareto(exponent, size, seed)).exponent for seed in range(400)]
        )
        # The scatter of 400 draws has itself a standard error of 3.5 %.
        assert found.std() == pytest.approx(exponent_std_error(exponent, size), rel=0.14)

    def test_slope_inverts(self):
        assert slope(2.0) == 1.0
        assert slope(1.5) == 2.0
        with pytest.raises(ValueError, match=r"exponent=1.0 has no slope"):
            slope(1.0)

    @pytest.mark.parametrize("significance", [0.2, 0.15, 0.1, 0.05, 0.01])
    def test_table_is_the_limiting_distribution_to_its_digits(self, significance):
        exact = stats.kstwobign.isf(significance)
        assert critical_value(1, significance) == pytest.approx(exact, abs=0.006)
        assert critical_value(1, significance) != exact
        assert critical_value(1, significance + 1e-16) == critical_value(1, significance)

    @pytest.mark.parametrize("significance", [0.5, 0.02, 1e-6])
    def test_other_levels_are_scipys(self, significance):
        assert critical_value(400, significance) == stats.kstwobign.isf(significance) / 20

    def test_critical_value_of_nothing(self):
        with pytest.raises(ValueError, match="k=0"):
            critical_value(0)


class TestByCutoff:
    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("name", ["beta=2.0, K=50", "one decimal", "tied at the top"])
    def test_every_distance_is_scipys(self, name):
        values = np.sort(SAMPLES[name])[::-1]
        ks, distances = ks_distance_by_cutoff(values)
        assert ks.tolist() == list(range(2, len(values) + 1))
        for k, distance in zip(ks, distances, strict=True):
            top = values[:k]
            if top[0] == top[-1]:
                assert math.isnan(distance)
            else:
                exponent = 1 + 1 / np.log(top / top[-1]).mean()
                assert distance == pytest.approx(scipy_distance(top, exponent), abs=1e-12)

    def test_a_grid_picks_from_the_whole(self):
        values = np.concatenate([pareto(2.0, 100, seed=9), [-1.0, 0.0]])
        ks, distances = ks_distance_by_cutoff(values)
        some, some_distances = ks_distance_by_cutoff(values, [100, 7, 50])
        assert some.tolist() == [100, 7, 50]
        assert some_distances.tolist() == [distances[ks == k].item() for k in some]
        assert len(ks_distance_by_cutoff(values, [])[0]) == 0

    def test_thousand_values_in_well_under_a_second(self):
        values = pareto(2.0, 1000, seed=10)
        start = time.perf_counter()
        ks_distance_by_cutoff(values)
        assert time.perf_counter() - start < 1.0  # 0.03 s on two idle cores

    @pytest.mark.parametrize("grid", [[1, 5], [5, 101], [0]])
    def test_a_grid_out_of_range(self, grid):
        with pytest.raises(ValueError, match=r"100 positive values allow 2 to 100"):
            ks_distance_by_cutoff(pareto(2.0, 100, seed=0), grid)


class TestOptimalCutoff:
    @staticmethod
    def body_and_tail(seed: int) -> np.ndarray:
        """500 values of a power law above 1, and 500 evenly spread below."""
        body = np.random.default_rng(seed).uniform(0.0, 1.0, 500)
        return np.concatenate([body, pareto(2.5, 500, seed)])

    @pytest.mark.parametrize("seed", range(5))
    def test_is_the_smallest_distance(self, seed):
        values = self.body_and_tail(seed)
        fit = optimal_cutoff(values)
        ks, distances = ks_distance_by_cutoff(values)
        assert fit.ks_distance == distances[ks >= 10].min()
        assert fit == fit_power_law(values, k=fit.num_values)

    @pytest.mark.parametrize("seed", range(5))
    def test_finds_the_planted_law(self, seed):
        fit = optimal_cutoff(self.body_and_tail(seed), k_min=50)
        assert 0.9 < fit.cutoff < 2.0
        assert abs(fit.exponent - 2.5) < 4 * fit.exponent_std_error

    @pytest.mark.parametrize("seed", range(3))
    def test_is_no_worse_than_the_cutoff_of_powerlaw(self, seed):
        values = self.body_and_tail(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = powerlaw.Fit(values, parameter_ranges={"alpha": [1.0, 50.0]}, verbose=0)
        tail = values[values >= theirs.xmin]
        at_theirs = fit_power_law(tail)
        assert at_theirs.exponent == pytest.approx(theirs.power_law.alpha, rel=1e-9)
        # The smallest two-sided distance lies between the smallest one-sided one and its fit's.
        ours = optimal_cutoff(values, k_min=2)
        assert theirs.D - 1e-9 <= ours.ks_distance <= at_theirs.ks_distance

    def test_a_cutoff_takes_whole_ties(self):
        values = np.round(pareto(2.0, 300, seed=11), 0)
        fit = optimal_cutoff(values)
        assert fit.num_values == np.count_nonzero(values >= fit.cutoff)

    def test_k_min_is_kept(self):
        values = self.body_and_tail(0)
        assert optimal_cutoff(values, k_min=900).num_values >= 900

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            ([3.0, 2.0, 1.0], {}, r"k_min=10, but 3 positive values allow 2 to 3"),
            ([3.0, 2.0, 1.0], {"k_min": 1}, r"k_min=1"),
            ([2.0] * 20, {}, r"the 20 values to fit are all equal"),
            ([3.0, 2.0, 1.0], {"k_min": 2, "significance": 2}, r"significance=2"),
            ([3.0, np.nan], {"k_min": 2}, r"NaN"),
        ],
    )
    def test_errors(self, values, options, message):
        with pytest.raises(ValueError, match=message):
            optimal_cutoff(values, **options)

"""Too few values have no verdict: in the record, in what is logged, in the metric, in figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_hessian import hessian_spectrum
from lightning_hessian.statistics.power_law import fit_power_law
from lightning_hessian.statistics.significance import LEAST_FOR_VERDICT
from lightning_hessian.tracking.power_law_metric import PowerLawMetric
from lightning_hessian.tracking.scalars import power_law_scalars, spectrum_scalars
from lightning_hessian.tracking.style import verdict


def rejected(draw, k: int, samples: int = 1500) -> float:
    """Returns how often d_c rejects samples of k values; distances by SciPy."""
    rejections = 0
    for seed in range(samples):
        values = np.sort(draw(k, seed))
        logs = np.log(values / values[0])
        distance = stats.kstest(logs, stats.expon(scale=logs.mean()).cdf).statistic
        rejections += distance >= 1.36 / np.sqrt(k)
    return rejections / samples


DRAWS = {
    "lognormal": lambda k, seed: stats.lognorm(1.0).rvs(k, random_state=seed),
    "exponential": lambda k, seed: stats.expon().rvs(k, random_state=seed),
}


@pytest.mark.slow
def test_from_the_least_on_the_alternatives_are_more_likely_caught_than_not():
    least = LEAST_FOR_VERDICT
    error = 3 * 0.5 / np.sqrt(1500)
    assert min(rejected(draw, least) for draw in DRAWS.values()) > 0.5 - error
    assert min(rejected(draw, least - 4) for draw in DRAWS.values()) < 0.5 - error
    assert max(rejected(draw, 5) for draw in DRAWS.values()) < 0.01


@pytest.mark.parametrize("k", [2, 3, 5, 10, LEAST_FOR_VERDICT - 1])
def test_too_few_values_have_no_verdict(k):
    values = stats.pareto(1.0).rvs(k, random_state=k)
    fit = fit_power_law(values)
    assert fit.is_power_law is None
    assert str(k) in fit.reason
    assert str(LEAST_FOR_VERDICT) in fit.reason
    assert "power_law" not in power_law_scalars(fit)
    assert "too few" in verdict(fit)
    metric = PowerLawMetric("power_law")
    with pytest.warns(UserWarning, match="too few"):
        assert torch.isnan(metric(torch.from_numpy(values)))


@pytest.mark.parametrize("k", [LEAST_FOR_VERDICT, 50, 400])
def test_enough_values_have_one(k):
    fit = fit_power_law(stats.pareto(1.0).rvs(k, random_state=k))
    assert fit.reason is None
    assert fit.is_power_law is (fit.ks_distance < fit.critical_value)
    assert power_law_scalars(fit)["power_law"] == float(fit.is_power_law)


def test_two_values_have_no_distance_of_their_own():
    for ratio in (1.01, 2.0, 1e6):
        fit = fit_power_law([ratio, 1.0])
        assert (fit.ks_distance, fit.p_value) == (0.5, 1.0)
        assert not {"d_ks", "d_c", "p_value"} & set(power_law_scalars(fit))


def test_what_is_logged_of_a_small_spectrum_says_why_there_is_no_verdict():
    torch.manual_seed(0)
    batch = (torch.randn(64, 6), torch.randn(64, 3))
    spectrum = hessian_spectrum(
        torch.nn.Linear(6, 3), lambda m, b: torch.nn.functional.mse_loss(m(b[0]), b[1]), [batch],
        num_eigenvalues=5, trace_probes=0,
    )  # fmt: skip
    scalars, absent = spectrum_scalars(spectrum)
    assert "power_law" not in scalars
    assert {"d_ks", "d_c", "p_value", "beta_hat", "s_hat"} <= set(scalars)
    assert any("power_law is left out: 5 values are too few" in reason for reason in absent)

"""Eigengaps against closed forms and linregress."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_hessian import hessian_spectrum
from lightning_hessian.results import ArgumentError
from lightning_hessian.statistics.eigengaps import eigengaps
from lightning_hessian.statistics.power_law import fit_power_law
from lightning_hessian.tracking.drawings import hessian_drawings
from lightning_hessian.tracking.scalars import spectrum_scalars


@pytest.mark.parametrize("s", [0.8, 1.0, 1.5])
def test_gaps_of_zipfs_law(s):
    # HPL eq. 12: delta_k = lambda_k (1 - (k / (k + 1))^s); eq. 13: their slope is s + 1.
    k = np.arange(1.0, 1001.0)
    found = eigengaps(k**-s)
    k = k[:-1]
    np.testing.assert_allclose(found.gaps, k**-s * (1 - (k / (k + 1)) ** s), rtol=1e-9)
    assert found.rank_slope == pytest.approx(s + 1, abs=0.03)
    assert found.fit.slope == pytest.approx(s + 1, abs=0.03)
    assert found.num_zero == 0


@pytest.mark.parametrize("seed", range(4))
def test_both_fits_are_those_of_others(seed):
    rng = np.random.default_rng(seed)
    eigenvalues = np.sort(np.concatenate([rng.pareto(1.2, 200), -rng.pareto(1.2, 20)]))[::-1]
    found = eigengaps(eigenvalues, significance=0.01)
    gaps = eigenvalues[:-1] - eigenvalues[1:]
    line = stats.linregress(np.log(np.arange(1, 220)), np.log(gaps))
    np.testing.assert_array_equal(found.gaps, gaps)
    assert found.rank_slope == pytest.approx(-line.slope, rel=1e-12)
    assert found.rank_slope_std_error == pytest.approx(line.stderr, rel=1e-12)
    assert found.fit == fit_power_law(gaps, significance=0.01)


def test_order_does_not_matter():
    eigenvalues = np.random.default_rng(0).pareto(1.0, 50)
    assert eigengaps(eigenvalues).rank_slope == eigengaps(np.sort(eigenvalues)).rank_slope


def test_zero_gaps_are_counted_and_left_out_but_keep_their_rank():
    found = eigengaps([10.0, 5.0, 5.0, 3.0, 2.0, 2.0, 1.5])
    assert found.gaps.tolist() == [5.0, 0.0, 2.0, 1.0, 0.0, 0.5]
    assert (found.num_zero, found.fit.num_values) == (2, 4)
    line = stats.linregress(np.log([1, 3, 4, 6]), np.log([5.0, 2.0, 1.0, 0.5]))
    assert found.rank_slope == pytest.approx(-line.slope)


@pytest.mark.parametrize(
    ("eigenvalues", "message"),
    [
        ([], "only 0 gaps between 0 eigenvalues are positive, and a fit needs 3; compute more"),
        ([3.0], "only 0 gaps between 1 eigenvalues"),
        ([4.0, 2.0, 2.0, 1.0], "only 2 gaps between 4 eigenvalues"),
        ([4.0, 3.0, 2.0, 1.0], "all 3 positive eigengaps are equal to 1"),
        ([4.0, np.nan, 2.0, 1.0], "1 of the 4 values are NaN"),
    ],
)
def test_errors(eigenvalues, message):
    with pytest.raises(ValueError, match=message):
        eigengaps(eigenvalues)


def test_level_is_checked():
    with pytest.raises(ValueError, match="significance=0"):
        eigengaps([8.0, 4.0, 2.0, 1.0], significance=0)


# Gaps and residual bounds -----------------------------------------------------------------------


@pytest.mark.parametrize("copies", [2, 3, 5])
@pytest.mark.parametrize("noise", [1e-12, 1e-7, 1e-4])
def test_gaps_of_copies_are_rounding_and_left_out(copies, noise):
    """The gaps that are left are those of the exact spectrum, whatever the noise."""
    exact = np.repeat(1 / np.arange(1.0, 41.0), copies)
    rng = np.random.default_rng(copies)
    measured = exact + noise * exact * rng.uniform(-1, 1, len(exact))
    found = eigengaps(measured, noise * exact)
    wanted = eigengaps(exact)
    assert found.num_below_bounds + found.num_zero == wanted.num_zero == 40 * (copies - 1)
    np.testing.assert_array_equal(found.fitted, wanted.fitted)
    # The bounds of neighbours reach noise * exact: relative to the least gap, 40 noise.
    assert found.fit.slope == pytest.approx(wanted.fit.slope, abs=200 * noise)
    assert found.rank_slope == pytest.approx(wanted.rank_slope, abs=200 * noise)


def test_bounds_go_with_their_eigenvalues_in_any_order():
    rng = np.random.default_rng(3)
    values, bounds = rng.pareto(1.0, 60), rng.uniform(0, 0.02, 60)
    order = np.argsort(values)[::-1]
    found, ordered = eigengaps(values, bounds), eigengaps(values[order], bounds[order])
    assert found.fit == ordered.fit
    assert found.num_below_bounds == ordered.num_below_bounds > 0
    gaps, sums = -np.diff(values[order]), bounds[order][:-1] + bounds[order][1:]
    np.testing.assert_array_equal(found.fitted, gaps > sums)


def test_too_few_gaps_above_their_bounds_are_no_fit():
    values = np.repeat([4.0, 2.0, 1.0], 4) + 1e-9 * np.arange(12)
    with pytest.raises(ValueError, match=r"only 2 gaps between 12 eigenvalues.*9 are no larger"):
        eigengaps(values, np.full(12, 1e-8))


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(1, 0.1, 50),
        np.arange(50, 0, -1) * 0.1,
        np.linspace(-3, 5, 1000),
        1e-9 + np.arange(9) / 7,
    ],
)
def test_gaps_that_are_equal_but_for_rounding_are_equal(values):
    with pytest.raises(ValueError, match="positive eigengaps are equal"):
        eigengaps(values)
    noisy = values + np.random.default_rng(0).uniform(-1e-6, 1e-6, len(values))
    with pytest.raises(ValueError, match="positive eigengaps are equal"):
        eigengaps(noisy, np.full(len(values), 1e-6))


@pytest.mark.parametrize("residuals", [[0.1], [0.1, -0.1, 0, 0, 0], [[0.1] * 2] * 3])
def test_bounds_that_do_not_fit_are_refused(residuals):
    with pytest.raises(ArgumentError, match=r"residuals=.*5 bounds >= 0"):
        eigengaps([9.0, 7.0, 4.0, 2.0, 1.0], residuals)


def test_measured_copies_have_the_slope_of_the_exact_spectrum():
    """A linear layer of C outputs under squared error has every eigenvalue C times."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(200, 12) * torch.linspace(1, 3, 12), torch.randn(200, 4)
    exact = np.linalg.eigvalsh((inputs.double().T @ inputs.double() / 400).numpy())[::-1]
    wanted = eigengaps(np.repeat(exact, 4)[:40])
    for seed in range(3):
        spectrum = hessian_spectrum(
            torch.nn.Linear(12, 4, bias=False),
            lambda m, b: torch.nn.functional.mse_loss(m(b[0]), b[1]),
            [(inputs, targets)], num_eigenvalues=40, trace_probes=0, seed=seed,
        )  # fmt: skip
        scalars, absent = spectrum_scalars(spectrum)
        assert not absent
        assert scalars["eigengap_s_hat"] == pytest.approx(wanted.fit.slope, rel=0.02)
        assert scalars["eigengap_num_below_bounds"] >= 25
        figures = hessian_drawings(spectrum, None, [(0, spectrum.eigenvalues)])
        assert "eigengaps" in figures
        figures["eigengaps"]()

"""HPL's theorem 1 and equations 2, 7, 11 to 14, against SciPy, exact sums and dense matrices."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from lightning_hessian import eigengaps, fit_power_law
from lightning_hessian.statistics import theory

SLOPES = [0.5, 0.9, 1.0, 1.4, 3.0]


# Theorem 1 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "cutoff"), [(2.0, 1.0), (1.7, 0.03), (3.5, 20.0)])
def test_the_density_is_that_of_pareto(beta, cutoff):
    x = cutoff * np.array([0.5, 1.0, 1.5, 30.0, 1e4])
    expected = stats.pareto(beta - 1, scale=cutoff).pdf(x)
    np.testing.assert_allclose(theory.max_entropy_density(x, beta, cutoff), expected, rtol=1e-12)


def test_it_has_more_entropy_than_any_other_density():
    """SciPy maximises S_p + beta S_vol over densities on a grid, without knowing the law."""
    beta, edges = 2.2, np.geomspace(1.0, 40.0, 31)
    widths = np.diff(edges)
    logs = [integrate.quad(np.log, a, b)[0] for a, b in pairwise(edges)]
    mean_logs = np.array(logs) / widths

    def negative_entropy(weights):
        shares = special.softmax(weights)  # of the mass, in each bin
        density = shares / widths
        return shares @ np.log(density) + beta * shares @ mean_logs

    found = optimize.minimize(negative_entropy, np.zeros(30), tol=1e-12)
    density = special.softmax(found.x) / widths
    middle = np.exp(mean_logs)  # where the mean of ln lambda over a bin is that of the bin
    expected = theory.max_entropy_density(middle, beta)
    ratio = density / expected
    np.testing.assert_allclose(ratio / ratio[0], 1.0, rtol=2e-4)


@pytest.mark.parametrize(("beta", "cutoff"), [(2.0, 1.0), (1.7, 0.03)])
def test_its_total_entropy_is_the_logarithm_of_its_normalisation(beta, cutoff):
    law = stats.pareto(beta - 1, scale=cutoff)
    volume_entropy = -law.expect(np.log)
    log_z = -np.log(theory.max_entropy_density(cutoff, beta, cutoff) * cutoff**beta)
    assert float(law.entropy() + beta * volume_entropy) == pytest.approx(
        float(log_z), rel=1e-6, abs=1e-9
    )


# Eigenvalues and their gaps -----------------------------------------------------------------------


@pytest.mark.parametrize("slope", SLOPES)
def test_the_trace_and_the_harmonic_sum(slope):
    values = theory.zipf_eigenvalues(700, slope, trace=13.0)
    assert values.sum() == pytest.approx(13.0, rel=1e-12)
    # Euler and Maclaurin: sum k^-s from the zeta function, or from ln n at s = 1.
    if slope > 1:
        z_d = special.zeta(slope, 1) - special.zeta(slope, 701)
        assert values[0] == pytest.approx(13.0 / z_d, rel=1e-10)
    if slope == 1:
        assert values[0] == pytest.approx(13.0 / (special.digamma(701) + np.euler_gamma), rel=1e-10)
    shape = values * np.arange(1, 701) ** slope
    np.testing.assert_allclose(shape, shape[0], rtol=1e-12)


@pytest.mark.parametrize("slope", SLOPES)
def test_equations_11_and_12_are_the_differences(slope):
    values = theory.zipf_eigenvalues(400, slope, trace=2.0)
    expected = -np.diff(values)
    np.testing.assert_allclose(theory.zipf_eigengaps(400, slope, 2.0), expected, rtol=1e-9)
    shuffled = np.random.default_rng(0).permutation(values)
    np.testing.assert_allclose(theory.eigengaps_of_values(shuffled, slope), expected, rtol=1e-9)


@pytest.mark.parametrize("slope", SLOPES)
def test_equation_13_is_a_factor_s_off_at_large_ranks(slope):
    """SciPy's derivative of k^-s is the limit of the exact gap; eq. 13 lacks its factor s."""
    exact, near = theory.zipf_eigengaps(20_000, slope), theory.approximate_eigengaps(20_000, slope)
    assert exact[-1] / near[-1] == pytest.approx(slope, rel=1e-3)
    line = stats.linregress(np.log(np.arange(2, 20_001)), np.log(near))
    assert line.slope == pytest.approx(-(slope + 1), abs=1e-10)


def test_gaps_that_are_measured_have_the_slope_of_equation_13():
    values = theory.zipf_eigenvalues(1000, 1.0)
    found = eigengaps(values)
    assert found.rank_slope == pytest.approx(2.0, abs=0.02)
    assert fit_power_law(values).slope == pytest.approx(1.0, abs=0.01)


# Eigenvectors -------------------------------------------------------------------------------------


def test_equation_14_is_the_bound_of_davis_and_kahan_with_the_gaps_of_equation_13():
    gaps = theory.approximate_eigengaps(50, 1.2, trace=7.0)
    first = theory.zipf_eigenvalues(50, 1.2, trace=7.0)[0]
    found = theory.eigenvector_bound(50, 1.2, 0.01, first)
    np.testing.assert_allclose(found, 2 * 0.01 / gaps, rtol=1e-12)


def test_eigenvectors_of_a_matrix_of_that_spectrum_keep_the_bound():
    rng = np.random.default_rng(0)
    values = theory.zipf_eigenvalues(30, 1.0, trace=30.0)
    basis = stats.ortho_group.rvs(30, random_state=rng)
    noise = rng.standard_normal((30, 30))
    noise = (noise + noise.T) / 2
    noise *= 1e-4 / np.linalg.norm(noise, 2)
    before = np.linalg.eigh(basis @ np.diag(values) @ basis.T)[1][:, ::-1]
    after = np.linalg.eigh(basis @ np.diag(values) @ basis.T + noise)[1][:, ::-1]
    sines = np.sqrt(np.clip(1 - np.square((before * after).sum(0)), 0, None))[:-1]
    bound = theory.eigenvector_bound(30, 1.0, 1e-4, values[0])
    assert (sines < bound).all()
    assert sines[0] > 0


def test_a_steep_slope_does_not_warn():
    assert np.isinf(theory.eigenvector_bound(10, 1e6, 1.0, 1.0)[-1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.max_entropy_density(1.0, 1.0), "beta=1.0 .*above 1"),
        (lambda: theory.zipf_eigenvalues(1, 1.0), "num_eigenvalues=1"),
        (lambda: theory.zipf_eigengaps(5, 0), "slope=0 .*positive"),
        (lambda: theory.eigengaps_of_values([3.0], 1.0), "eigenvalues=.*two"),
        (lambda: theory.eigenvector_bound(5, 1.0, 0.1, -1.0), "lambda_1=-1.0"),
    ],
)
def test_misuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()

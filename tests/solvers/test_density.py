"""Spectral densities against eigenvalues, moments and limiting laws; distances against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.spatial.distance import jensenshannon
from support.allowances import stop_after
from torch import Tensor

from lightning_hessian.linear.operator import MatrixOperator, RestrictedOperator
from lightning_hessian.results import MeasurementError, SpectralDensity
from lightning_hessian.solvers.density import spectral_density
from lightning_hessian.statistics import theory
from lightning_hessian.statistics.heterogeneity import (
    heterogeneity,
    jensen_shannon_distances,
    transformed_densities,
)


def wigner(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (matrix + matrix.T) / np.sqrt(2 * size)


def wishart(size: int, samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, samples, generator=generator, dtype=torch.float64)
    return factor @ factor.T / samples


def density_of(matrix: Tensor, **options) -> SpectralDensity:
    found = spectral_density(MatrixOperator(matrix), **options)
    assert found is not None
    return found


# Quadrature -------------------------------------------------------------------------------------


def test_small_operators_give_their_eigenvalues():
    matrix = wigner(40)
    found = density_of(matrix, num_steps=20, num_probes=2)
    assert found.exact
    assert found.num_products == 40
    np.testing.assert_allclose(found.nodes, torch.linalg.eigvalsh(matrix), atol=1e-12)


def test_moments_are_those_of_the_probes():
    """Gauss quadrature: the moments below 2 m are z^T A^k z / n exactly, for the very probe."""
    matrix = wigner(200)
    found = density_of(matrix, num_steps=5, num_probes=1, seed=3)
    signs = torch.randint(0, 2, (200,), generator=torch.Generator().manual_seed(3))
    probe = (2 * signs - 1).double()
    power = probe.clone()
    for k in range(10):
        assert found.moment(k) == pytest.approx(float(probe @ power) / 200, abs=1e-10)
        power = matrix @ power
    assert found.moment(10) != pytest.approx(float(probe @ power) / 200, abs=1e-6)


def test_moments_are_unbiased():
    matrix = wishart(120, 60)
    runs = [density_of(matrix, num_steps=6, num_probes=4, seed=seed) for seed in range(200)]
    for k in (1, 2, 3):
        expected = float(torch.linalg.eigvalsh(matrix).pow(k).mean())
        values = np.array([run.moment(k) for run in runs])
        assert abs(values.mean() - expected) < 4 * values.std(ddof=1) / np.sqrt(len(runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_extreme_eigenvalues_are_nodes(dtype):
    """With full reorthogonalisation there are no ghosts: each is found once."""
    matrix = torch.diag(torch.cat([torch.tensor([100.0, 50.0, -20.0]), torch.linspace(0, 1, 497)]))
    found = density_of(matrix.to(dtype), num_steps=100, num_probes=1)
    for value in (100.0, 50.0, -20.0):
        near = np.abs(found.nodes - value) < 1e-3
        assert near.sum() == 1
        assert found.weights[near][0] == pytest.approx(1 / 500, rel=1e-3)


def test_an_invariant_subspace_ends_the_run():
    found = density_of(torch.diag(torch.tensor([2.0, 1.0]).repeat(100)), num_steps=30, num_probes=2)
    np.testing.assert_allclose(np.sort(found.nodes), [1, 1, 2, 2], atol=1e-5)
    np.testing.assert_allclose(found.weights, 0.25, atol=1e-5)
    assert found.num_products == 4


def test_zero_operator():
    found = density_of(torch.zeros(100, 100), num_steps=5, num_probes=1)
    assert found.nodes.tolist() == [0.0]
    assert found.weights.tolist() == [1.0]


def test_a_wigner_matrix_follows_the_semicircle():
    found = density_of(wigner(1000), num_steps=30, num_probes=20)
    grid = np.linspace(-2.5, 2.5, 200)
    smooth = np.array(
        [
            integrate.quad(
                lambda t, x=x: theory.semicircle(t) * np.exp(-(((x - t) / 0.2) ** 2) / 2)
                / (0.2 * np.sqrt(2 * np.pi)), -2, 2,
            )[0]
            for x in grid
        ]
    )  # fmt: skip
    np.testing.assert_allclose(found.on_grid(grid, 0.2), smooth, atol=0.02)
    assert integrate.trapezoid(found.on_grid(grid, 0.1), grid) == pytest.approx(1, abs=1e-3)


def test_a_sample_covariance_follows_marchenko_pastur():
    ratio = 0.5
    found = density_of(wishart(600, 1200), num_steps=25, num_probes=20)
    low, high = theory.marchenko_pastur_edges(ratio)
    assert found.nodes.min() == pytest.approx(low, abs=0.05)
    assert found.nodes.max() == pytest.approx(high, abs=0.1)
    for power in (1, 2, 3):
        expected = integrate.quad(
            lambda x, k=power: x**k * theory.marchenko_pastur(x, ratio), low, high
        )[0]
        assert found.moment(power) == pytest.approx(expected, rel=0.03)


def test_a_diagonal_block():
    matrix, chosen = wigner(60), torch.tensor([5, 2, 40, 41, 59])
    block = RestrictedOperator(MatrixOperator(matrix), chosen)
    expected = matrix[chosen][:, chosen]
    torch.testing.assert_close(block.matmat(torch.eye(5, dtype=torch.float64)), expected)
    torch.testing.assert_close(block.matvec(torch.ones(5, dtype=torch.float64)), expected.sum(1))
    found = spectral_density(block)
    assert found is not None
    np.testing.assert_allclose(found.nodes, torch.linalg.eigvalsh(expected), atol=1e-12)


def test_time_up_keeps_the_probes_that_are_done():
    operator = MatrixOperator(wigner(100))
    found = spectral_density(operator, num_steps=10, num_probes=5, allowance=stop_after(12))
    assert found is not None
    assert found.num_products == 10
    assert found.weights.sum() == pytest.approx(1)
    assert spectral_density(operator, num_steps=10, num_probes=5, allowance=stop_after(0)) is None
    assert spectral_density(operator, allowance=stop_after(0)) is None


def test_misuse():
    with pytest.raises(ValueError, match="num_steps=0"):
        spectral_density(MatrixOperator(wigner(10)), num_steps=0)
    for options in ({}, {"num_steps": 2, "num_probes": 1}):
        with pytest.raises(MeasurementError, match="NaN or infinite"):
            spectral_density(MatrixOperator(torch.full((10, 10), float("nan"))), **options)


# Distances --------------------------------------------------------------------------------------


def test_distances_are_scipys():
    rng = np.random.default_rng(0)
    rows = rng.exponential(size=(7, 50)) * (rng.random((7, 50)) < 0.7)
    found = jensen_shannon_distances(rows)
    for i in range(7):
        for j in range(7):
            expected = jensenshannon(rows[i], rows[j], base=2) if i != j else 0
            assert found[i, j] == pytest.approx(expected, abs=1e-7)


def spectrum(values: np.ndarray) -> SpectralDensity:
    values = np.asarray(values, dtype=float)
    return SpectralDensity(values, np.full(len(values), 1 / len(values)), len(values), 0, True)


def test_heterogeneity_sees_scale_and_is_free_of_units():
    rng = np.random.default_rng(1)
    base = rng.exponential(size=400)
    blocks = [spectrum(base * scale) for scale in (1, 1, 3, 100)]
    found = heterogeneity(blocks)
    assert found[0, 1] == pytest.approx(0, abs=1e-7)
    assert 0 < found[0, 2] < found[0, 3] <= 1
    scaled = heterogeneity([spectrum(block.nodes * 1e-5) for block in blocks])
    np.testing.assert_allclose(scaled, found, atol=1e-9)
    assert found.shape == (4, 4)
    assert np.array_equal(found, found.T)


def test_heterogeneity_sees_sign():
    rng = np.random.default_rng(1)
    values = rng.exponential(size=400)
    assert heterogeneity([spectrum(values), spectrum(-values)])[0, 1] > 0.8


def test_densities_over_the_common_axis_have_mass_one():
    grid, rows, unit = transformed_densities([spectrum([0.0, 1.0, 5.0]), spectrum([-3.0, 0.0])])
    np.testing.assert_allclose(integrate.trapezoid(rows, grid, axis=1), 1, atol=1e-3)
    assert unit == pytest.approx(1e-2 * 4)


def test_zero_spectra_are_alike():
    found = heterogeneity([spectrum(np.zeros(3)), spectrum(np.zeros(5))])
    np.testing.assert_allclose(found, 0, atol=1e-7)


def test_heterogeneity_is_checked():
    with pytest.raises(ValueError, match="no density"):
        heterogeneity([])

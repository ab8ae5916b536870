"""The effective dimension against all eigenvalues of a dense Hessian."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.references import cross_entropy, dense_hessian
from torch import nn

from lightning_hessian import ArgumentError, HessianSpectrum, hessian_spectrum
from lightning_hessian.results import SpectralDensity


@pytest.fixture(scope="module")
def case() -> tuple[HessianSpectrum, np.ndarray]:
    """A spectrum with its density, and all eigenvalues of the dense Hessian."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 4)).double()
    batch = torch.randn(60, 9, dtype=torch.float64), torch.randint(4, (60,))
    found = hessian_spectrum(module, cross_entropy, [batch], num_eigenvalues=30, density=True)
    exact = torch.linalg.eigvalsh(dense_hessian(module, cross_entropy, batch)).numpy()
    return found, exact


def expected(eigenvalues: np.ndarray, scale: float) -> float:
    positive = eigenvalues[eigenvalues > 0]
    return float((positive / (positive + scale)).sum())


@pytest.mark.parametrize("scale", [1e-2, 0.1, 1.0])
def test_with_a_density_it_is_that_of_all_eigenvalues(case, scale):
    found, exact = case
    wanted = expected(exact, scale)
    assert found.density is not None
    assert found.effective_dimension(scale) == found.density.effective_dimension(scale)
    assert not found.density.exact  # four random probes
    assert found.effective_dimension(scale) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("scale", [1e-2, 1.0])
def test_without_one_it_is_a_lower_bound(case, scale):
    found, exact = case
    alone = dataclasses.replace(found, density=None)
    assert alone.effective_dimension(scale) == pytest.approx(
        expected(exact[::-1][: found.num_converged], scale), rel=1e-5
    )
    assert alone.effective_dimension(scale) < expected(exact, scale)


def test_negative_eigenvalues_are_left_out():
    density = SpectralDensity(np.array([-1.0, 1.0]), np.array([0.5, 0.5]), 10, 2, False)
    assert density.effective_dimension(1.0) == 2.5


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_a_scale_that_is_none_is_refused(case, scale):
    with pytest.raises(ArgumentError, match="scale"):
        case[0].effective_dimension(scale)

"""Residual bounds hold: for every basis size, precision and structure of the spectrum."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from test_lanczos import allowance, matrix_of, true_residuals

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.solvers.lanczos import lanczos
from lightning_hessian.solvers.storage import BasisStorage

N, K = 160, 8
SPECTRA = {
    "a cluster of ten": np.r_[1 + 1e-6 * np.arange(10), np.linspace(0.9, 0, N - 10)],
    "pairs": np.repeat(1 / np.arange(1, N // 2 + 1.0), 2),
    "triples, a millionth apart": np.repeat(1 / np.arange(1, N // 4 + 1.0), 4)
    + 1e-6 * np.tile([0, 1, 2, 3], N // 4),
    "low rank": np.r_[[3.0, 3.0, 2.0, 2.0, 1.0], np.zeros(N - 5)],
    "negative": -np.repeat(np.arange(1, N // 2 + 1.0), 2),
    "graded": np.logspace(0, -10, N),
}


@lru_cache(maxsize=64)
def matrix(name: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return matrix_of(SPECTRA[name], dtype, seed)


def bounds_hold(name: str, dtype: torch.dtype, seed: int, **options) -> None:
    given = matrix(name, dtype, seed)
    found = lanczos(MatrixOperator(given), K, seed=seed, **options)
    slack = allowance(given)
    assert (true_residuals(given, found) <= found.residuals + slack).all(), (name, seed, options)
    exact = np.linalg.eigvalsh(given.double().numpy())
    nearest = np.abs(found.values[:, None] - exact).min(1)
    assert (nearest <= found.residuals + slack).all()


@pytest.mark.parametrize("extra", [3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_hold_with_every_size_of_the_basis(name, dtype, extra):
    for seed in range(3):
        bounds_hold(name, dtype, seed, max_basis=K + extra, max_products=400)


@pytest.mark.parametrize("num_checks", [0, 3, 60])
@pytest.mark.parametrize("tol", [1e-2, 1e-5])
def test_bounds_hold_however_long_the_search_for_copies(tol, num_checks):
    """What a search gives up at a restart of its own still leans on the vectors found."""
    for name in ("a cluster of ten", "pairs", "triples, a millionth apart"):
        for seed in range(4):
            options = {"max_basis": K + 3, "max_products": 600, "tol": tol}
            bounds_hold(name, torch.float64, seed, num_checks=num_checks, **options)


@pytest.mark.parametrize("bound", [9, 14, 40, 90, 200])
def test_bounds_hold_wherever_a_run_is_cut_short(bound):
    for name in SPECTRA:
        bounds_hold(name, torch.float64, 0, max_basis=K + 3, max_products=bound)


@pytest.mark.parametrize("max_basis", [K + 3, K + 20, 140])
@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_hold_with_a_basis_in_half_the_precision(name, max_basis):
    """The vectors handed back are rounded too: the residual is that of the rounded vector."""
    given = matrix(name, torch.float32, 0)
    storage = BasisStorage(dtype="bfloat16")
    found = lanczos(MatrixOperator(given), K, storage=storage, max_basis=max_basis)
    norm = float(torch.linalg.matrix_norm(given.double(), 2))
    stored = norm * 2.0**-8
    assert (true_residuals(given, found) <= found.residuals + stored).all()
    exact = np.linalg.eigvalsh(given.double().numpy())
    nearest = np.abs(found.values[:, None] - exact).min(1)
    assert (nearest <= found.residuals + allowance(given)).all()

"""Where the whole space is searched, the trace is exact: of singular operators too."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from test_lanczos import matrix_of
from torch import nn

from lightning_hessian import hessian_spectrum
from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.solvers.lanczos import lanczos
from lightning_hessian.solvers.storage import BasisStorage


class Quadratic(nn.Module):
    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(len(matrix), dtype=matrix.dtype))

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.point @ batch[0] @ self.point


def singular(n: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    spectrum = np.r_[np.linspace(-0.5, 2, rank) + 0.01, np.zeros(n - rank)]
    return matrix_of(spectrum, dtype, seed=n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 24, 59, 130])
def test_the_trace_is_exact_where_all_eigenvalues_are_found(n, dtype):
    for rank in {0, 1, min(3, n), n // 2, n - 1, n}:
        matrix = singular(n, rank, dtype)
        for wanted in {n, max(1, n - 1)}:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                found = hessian_spectrum(
                    Quadratic(matrix), lambda m, b: m.loss(b), [matrix[None]], hvp="autograd",
                    num_eigenvalues=wanted,
                )  # fmt: skip
            exact = float(matrix.double().trace())
            assert found.trace_std_error == 0.0, (rank, wanted)
            rounding = 20 * n * torch.finfo(dtype).eps
            assert abs(found.trace - exact) <= rounding
            assert found.trace_of_square_std_error == 0.0
            exact = float(matrix.double().square().sum())
            assert abs(found.trace_of_square - exact) <= 4 * rounding
            assert found.num_hvps <= 2 * n + 10  # no probes


@pytest.mark.parametrize("wanted", [1, 4, 20])
def test_a_search_that_runs_into_the_whole_space_knows_the_trace(wanted):
    matrix = singular(24, 2, torch.float64)
    found = lanczos(MatrixOperator(matrix), wanted, num_checks=100)
    assert found.trace == pytest.approx(float(matrix.trace()), abs=1e-13)
    assert found.trace_of_square == pytest.approx(float(matrix.square().sum()), abs=1e-13)


def test_part_of_the_space_does_not_tell_the_trace():
    matrix = matrix_of(1 / np.arange(1, 201.0))
    assert lanczos(MatrixOperator(matrix), 5).trace is None
    rounded = singular(24, 24, torch.float32)
    storage = BasisStorage(dtype="bfloat16")
    assert lanczos(MatrixOperator(rounded), 24, storage=storage).trace is None

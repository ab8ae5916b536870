"""The papers' protocol, and power iteration, on matrices whose eigenvalues LAPACK knows."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from support.allowances import stop_at_product
from test_lanczos import RANKS, N, Watched, allowance, eigenvalues_of, matrix_of

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.solvers.pooled import copies, pooled_ritz_values

POWER_LAW = RANKS**-1.5


def tridiagonal_of(matrix: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """Returns the Ritz values of a Krylov space, from its basis by QR."""
    columns = [start / np.linalg.norm(start)]
    for _ in range(steps - 1):
        new = matrix @ columns[-1]
        for _ in range(2):
            for column in columns:
                new -= (column @ new) * column
        columns.append(new / np.linalg.norm(new))
    basis = np.stack(columns, 1)
    return scipy.linalg.eigvalsh(basis.T @ matrix @ basis)[::-1]


def test_pooled_values_are_those_of_three_krylov_spaces():
    matrix = matrix_of(POWER_LAW)
    found = pooled_ritz_values(MatrixOperator(matrix), num_runs=3, num_steps=12, seed=4)
    generator = torch.Generator().manual_seed(4)
    starts = [2.0 * torch.randint(0, 2, (N,), generator=generator).numpy() - 1 for _ in range(3)]
    expected = [tridiagonal_of(matrix.numpy(), start, 12) for start in starts]
    for run in range(3):
        np.testing.assert_allclose(found.values[found.runs == run], expected[run], atol=1e-12)
    assert (np.diff(found.values) <= 0).all()
    assert (found.num_products, found.stopped) == (36, "done")


def test_bounds_hold_and_copies_are_counted():
    matrix = matrix_of(POWER_LAW)
    operator = Watched(matrix)
    found = pooled_ritz_values(operator, num_runs=3, num_steps=40, tol=1e-3)
    assert operator.num_products == found.num_products == 120
    exact = eigenvalues_of(matrix)
    nearest = np.abs(found.values[:, None] - exact).min(1)
    assert (nearest <= found.residuals + allowance(matrix)).all()
    # Among the first 30 values, 10 eigenvalues stand three times each.
    assert (found.residuals[:30] <= 1e-3 * found.values[:30]).all()
    assert found.is_copy[:30].sum() == 20
    np.testing.assert_allclose(found.values[:30][~found.is_copy[:30]], exact[:10], rtol=1e-6)


def test_whole_krylov_spaces_give_every_eigenvalue_three_times():
    matrix = matrix_of(np.linspace(-1, 2, 50))
    found = pooled_ritz_values(MatrixOperator(matrix))
    assert len(found.values) == 150
    np.testing.assert_allclose(found.values, np.repeat(eigenvalues_of(matrix), 3), atol=1e-12)
    assert found.is_copy.sum() == 100


def test_neighbours_of_one_run_are_no_copies():
    values = np.array([1.0, 1.0 - 1e-9, 1.0 - 2e-9, 0.5])
    bounds = np.full(4, 1e-8)
    assert copies(values, bounds, np.array([0, 0, 1, 1]), 1e-3).tolist() == [
        False, False, True, False,
    ]  # fmt: skip
    assert not copies(values, np.full(4, 0.1), np.arange(4), 1e-3).any()  # none has converged


def test_the_density_of_the_runs_has_the_moments_of_the_matrix():
    matrix = matrix_of(np.linspace(-1, 2, 300))
    found = pooled_ritz_values(MatrixOperator(matrix), num_runs=30, num_steps=10)
    assert found.density.moment(1) == pytest.approx(0.5, abs=0.02)
    assert found.density.moment(2) == pytest.approx(float(matrix.square().sum()) / 300, abs=0.02)


def test_an_interruption_leaves_what_there_is():
    operator = Watched(matrix_of(POWER_LAW))
    found = pooled_ritz_values(operator, num_steps=20, allowance=stop_at_product(operator, 27))
    assert (found.stopped, found.num_products) == ("interrupted", 27)
    assert np.bincount(found.runs).tolist() == [20, 7]


@pytest.mark.parametrize("options", [{"num_runs": 0}, {"num_steps": 0}])
def test_less_than_one_is_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        pooled_ritz_values(MatrixOperator(torch.eye(3)), **options)

"""The trace: unbiased, with a standard error that means what it says, exact where it can be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from support.allowances import stop_after
from torch import Tensor

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.solvers.trace import trace

N, NUM_SEEDS, NUM_PROBES = 60, 200, 16


def make_matrix(seed: int = 0) -> Tensor:
    """Returns an indefinite matrix with a few large eigenvalues, as Hessians are."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(N, N)))
    spectrum = np.r_[30.0, 20.0, 10.0, 5.0, 4.0, np.linspace(-1, 1.5, N - 5)]
    return torch.from_numpy((rotation * spectrum) @ rotation.T)


def top_pairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = scipy.linalg.eigh(matrix.numpy())
    top = np.arange(N)[::-1][:count]
    return torch.from_numpy(values[top]), torch.from_numpy(vectors[:, top].T.copy())


def some_pairs(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns orthonormal rows that are no eigenvectors, and their Rayleigh quotients."""
    rng = np.random.default_rng(7)
    rows = torch.from_numpy(np.linalg.qr(rng.normal(size=(N, count)))[0].T.copy())
    return torch.einsum("ki,ij,kj->k", rows, matrix, rows), rows


def variance(matrix: Tensor) -> float:
    """Returns the variance of one probe of independent signs: 2 sum over i != j of A_ij^2."""
    return 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())


CASES = [("no pairs", top_pairs, 0), ("top pairs", top_pairs, 5), ("other rows", some_pairs, 8)]


@pytest.mark.parametrize(("name", "pairs", "count"), CASES, ids=[case[0] for case in CASES])
def test_the_estimate_is_unbiased_and_its_standard_error_honest(name, pairs, count):
    matrix = make_matrix()
    exact = float(matrix.trace())
    values, rows = pairs(matrix, count)
    found = [
        trace(MatrixOperator(matrix), values, rows, num_probes=NUM_PROBES, seed=seed)
        for seed in range(NUM_SEEDS)
    ]
    estimates = np.array([estimate.value for estimate in found])
    errors = np.array([estimate.std_error for estimate in found])
    spread = estimates.std(ddof=1)
    assert abs(estimates.mean() - exact) < 4 * spread / math.sqrt(NUM_SEEDS)

    # The variance of NUM_SEEDS estimates is known to sqrt(2 / 199) = 10 %.
    assert 0.6 < (errors**2).mean() / spread**2 < 1.6
    rest = torch.eye(N, dtype=torch.float64) - rows.T @ rows
    closed_form = variance(rest @ matrix @ rest) / NUM_PROBES
    assert (errors**2).mean() == pytest.approx(closed_form, rel=0.15)

    # Student's t with 15 degrees of freedom: 95 % within 2.13, give or take 1.5 %.
    covered = np.mean(np.abs(estimates - exact) < 2.13 * errors)
    assert 0.89 < covered < 0.995


@pytest.mark.parametrize("count", [0, 5])
def test_the_square_is_unbiased_from_the_same_products(count):
    matrix = make_matrix()
    exact = float(matrix.square().sum())
    values, rows = top_pairs(matrix, count)
    found = [
        trace(MatrixOperator(matrix), values, rows, num_probes=NUM_PROBES, seed=seed)
        for seed in range(NUM_SEEDS)
    ]
    estimates = np.array([estimate.square for estimate in found])
    errors = np.array([estimate.square_std_error for estimate in found])
    spread = estimates.std(ddof=1)
    assert abs(estimates.mean() - exact) < 4 * spread / math.sqrt(NUM_SEEDS)
    rest = torch.eye(N, dtype=torch.float64) - rows.T @ rows
    closed_form = variance(rest @ matrix @ matrix @ rest) / NUM_PROBES
    assert (errors**2).mean() == pytest.approx(closed_form, rel=0.15)


def test_top_pairs_take_away_most_of_the_spread():
    matrix = make_matrix()
    without, beside = (
        trace(MatrixOperator(matrix), *top_pairs(matrix, count)).std_error for count in (0, 5)
    )
    assert beside < 0.3 * without


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_whole_space_gives_the_trace_without_a_product(dtype):
    matrix = make_matrix()
    values, rows = top_pairs(matrix, N)
    found = trace(MatrixOperator(matrix.to(dtype)), values, rows.to(dtype))
    assert found.value == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert (found.std_error, found.num_products) == (0.0, 0)


def test_a_subspace_that_holds_all_of_the_operator_is_exact():
    rows = top_pairs(make_matrix(), 3)[1]
    values = torch.tensor([5.0, 2.0, -3.0], dtype=torch.float64)
    matrix = rows.T @ values.diag() @ rows
    found = trace(MatrixOperator(matrix), values, rows)
    assert found.value == pytest.approx(4.0, abs=1e-12)
    assert found.std_error < 1e-12


def test_a_diagonal_matrix_is_exact_with_probes_of_signs():
    diagonal = torch.linspace(-1, 3, N, dtype=torch.float64)
    empty = torch.zeros(0, dtype=torch.float64), torch.zeros(0, N, dtype=torch.float64)
    found = trace(MatrixOperator(diagonal.diag()), *empty)
    assert found.value == pytest.approx(float(diagonal.sum()), abs=1e-12)
    assert found.std_error < 1e-12


def test_single_precision_costs_only_rounding():
    matrix = make_matrix()
    values, rows = top_pairs(matrix, 5)
    in_double = trace(MatrixOperator(matrix), values, rows)
    in_single = trace(MatrixOperator(matrix.float()), values, rows.float())
    assert in_single.value == pytest.approx(in_double.value, rel=1e-5)
    assert in_single.std_error == pytest.approx(in_double.std_error, rel=1e-4)


@pytest.mark.parametrize("num_probes", [2, 5, 16])
def test_each_probe_costs_a_product(num_probes):
    found = trace(
        MatrixOperator(make_matrix()), *top_pairs(make_matrix(), 2), num_probes=num_probes
    )
    assert found.num_products == num_probes


def test_an_interruption_leaves_the_probes_made_so_far():
    matrix = make_matrix()
    pairs = top_pairs(matrix, 2)
    assert trace(MatrixOperator(matrix), *pairs, allowance=stop_after(0)) is None
    found = trace(MatrixOperator(matrix), *pairs, allowance=stop_after(2))
    assert found == trace(MatrixOperator(matrix), *pairs, num_probes=4)


@pytest.mark.parametrize("num_probes", [-1, 0, 1])
def test_fewer_than_two_probes_are_refused(num_probes):
    with pytest.raises(ValueError, match="at least 2"):
        trace(MatrixOperator(make_matrix()), *top_pairs(make_matrix(), 2), num_probes=num_probes)


def test_the_same_seed_gives_the_same_digits_and_no_generator_moves():
    operator, pairs = MatrixOperator(make_matrix()), top_pairs(make_matrix(), 2)
    state = torch.get_rng_state()
    assert trace(operator, *pairs, seed=3) == trace(operator, *pairs, seed=3)
    assert trace(operator, *pairs, seed=3) != trace(operator, *pairs, seed=4)
    assert torch.equal(state, torch.get_rng_state())

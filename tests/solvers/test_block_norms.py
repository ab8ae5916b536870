"""The estimator against plain matrices: exact, unbiased, with honest errors, within its bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from support.allowances import stop_after
from torch import Tensor

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.results import MeasurementError
from lightning_hessian.solvers.block_norms import block_norms, least_probes, least_products

NUM_SEEDS = 200


def symmetric(size: int = 300, rank: int = 40, seed: int = 0) -> Tensor:
    """A matrix whose eigenvalues fall over two decades, of both signs."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    values = torch.logspace(0, -2, rank, dtype=torch.float64)
    values[1::2] *= -1
    return (factor * values) @ factor.T


def scattered(size: int = 300, count: int = 6, seed: int = 1) -> Tensor:
    """Labels in no order, some coordinates in no block."""
    labels = torch.randint(-1, count, (size,), generator=torch.Generator().manual_seed(seed))
    labels[:count] = torch.arange(count)
    return labels


def reference(matrix: Tensor, labels: Tensor) -> np.ndarray:
    count = int(labels.max()) + 1
    return np.array(
        [
            [float(matrix[labels == i][:, labels == j].norm()) for j in range(count)]
            for i in range(count)
        ]
    )


def ratio_of(frobenius: np.ndarray) -> float:
    off = ~np.eye(len(frobenius), dtype=bool)
    return frobenius[off].mean() / np.diagonal(frobenius).mean()


def share_of(frobenius: np.ndarray) -> float:
    return 1 - np.square(np.diagonal(frobenius)).sum() / np.square(frobenius).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_norms(dtype):
    matrix, labels = symmetric(), scattered()
    found = block_norms(MatrixOperator(matrix.to(dtype)), labels, exact=True)
    expected = reference(matrix, labels)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    np.testing.assert_allclose(found.frobenius, expected, rtol=tolerance)
    assert found.ratio == pytest.approx(ratio_of(expected), rel=tolerance)
    assert found.share == pytest.approx(share_of(expected), rel=tolerance)
    assert found.num_products == int((labels >= 0).sum()) == found.num_probes.sum()
    assert found.stopped == "exact"
    assert found.exact.all()
    assert not found.std_error.any()
    assert found.ratio_std_error == found.share_std_error == 0


def test_the_matrix_lies_block_after_block():
    matrix, labels = symmetric(), scattered()
    found = block_norms(MatrixOperator(matrix), labels, return_matrix=True)
    order = torch.argsort(labels, stable=True)[int((labels < 0).sum()) :]
    assert found.matrix is not None
    torch.testing.assert_close(found.matrix, matrix[order][:, order])


@pytest.mark.parametrize("size", [12, 256])
def test_small_operators_are_exact_by_themselves(size):
    matrix, labels = symmetric(size, 5), torch.arange(size) % 3
    found = block_norms(MatrixOperator(matrix), labels)
    assert found.stopped == "exact"
    np.testing.assert_allclose(found.frobenius, reference(matrix, labels), rtol=1e-12)


def test_small_blocks_are_exact_among_large_ones():
    """Where column j is exact, so are the entries (i, j) and (j, i), whatever column i is."""
    matrix = symmetric()
    labels = torch.arange(300) // 60
    labels[-2:] = 5
    assert least_probes(6) == 5
    found = block_norms(MatrixOperator(matrix), labels, exact=False)
    expected = reference(matrix, labels)
    assert found.exact.tolist() == [False] * 5 + [True]
    np.testing.assert_allclose(found.frobenius[5], expected[5], rtol=1e-12)
    np.testing.assert_allclose(found.frobenius[:, 5], expected[:, 5], rtol=1e-12)
    assert not found.std_error[5].any()
    assert found.std_error[:5, :5].all()
    assert found.num_probes[5] == 2


@pytest.fixture(scope="module")
def runs():
    """200 seeds with 16 probes on each block, and the truth."""
    matrix, labels = symmetric(), scattered()
    operator = MatrixOperator(matrix)
    found = [
        block_norms(operator, labels, exact=False, rel_error=0, max_probes=16, seed=seed)
        for seed in range(NUM_SEEDS)
    ]
    return found, reference(matrix, labels)


def assert_standard_normal(z: np.ndarray, spread: float = 0.2) -> None:
    """Mean 0 within four standard errors, variance near 1, and no departure that KS sees."""
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert abs(z.std() - 1) < spread
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_norms_are_unbiased_with_honest_errors(runs):
    """z-scores of every entry over 200 seeds are standard normal."""
    found, expected = runs
    norms = np.array([run.frobenius for run in found])
    z = (norms - expected) / np.array([run.std_error for run in found])
    for i, j in zip(*np.triu_indices(len(expected)), strict=True):
        assert_standard_normal(z[:, i, j])
    upper = np.triu_indices(len(expected))
    # All entries together: no bias above a tenth of a standard error.
    assert abs(z[(slice(None), *upper)].mean()) < 0.1
    assert abs(z[(slice(None), *upper)].std() - 1) < 0.1
    # Against the true standard error, the bias of the mean over 200 seeds is within its own.
    bias = (norms.mean(0) - expected) / (norms.std(0, ddof=1) / np.sqrt(NUM_SEEDS))
    assert np.abs(bias[upper]).max() < 4


def test_ratio_and_share_are_unbiased_with_honest_errors(runs):
    found, expected = runs
    truth = {"ratio": ratio_of(expected), "share": share_of(expected)}
    for name, value in truth.items():
        values = np.array([getattr(run, name) for run in found])
        errors = np.array([getattr(run, f"{name}_std_error") for run in found])
        assert_standard_normal((values - value) / errors)


@pytest.mark.parametrize(("count", "probes"), [(40, 2), (20, 3)])
def test_errors_are_honest_with_the_fewest_probes(count, probes):
    """Two or three probes, blocks of rank one: their squares have the widest scatter there is.

    The scores are skewed then (what is low by chance has a small error too), so they are judged
    by their spread and by how often two standard errors hold the truth.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(400, 1, generator=generator, dtype=torch.float64)
    matrix = vector @ vector.T
    labels = torch.arange(400) // (400 // count)
    assert least_probes(count) == probes
    expected = reference(matrix, labels)
    operator = MatrixOperator(matrix)
    runs = [
        block_norms(operator, labels, exact=False, rel_error=0, max_probes=probes, seed=seed)
        for seed in range(NUM_SEEDS)
    ]
    ratios = np.array([run.ratio for run in runs])
    z = (ratios - ratio_of(expected)) / np.array([run.ratio_std_error for run in runs])
    assert 0.8 < z.std() < 1.3
    assert np.mean(np.abs(z) < 2) > 0.8
    # With two samples the mean diagonal stays low by 2.6 percent, a quarter of the wanted error.
    assert abs(ratios.mean() / ratio_of(expected) - 1) < 0.03
    entries = np.array([(run.frobenius - expected) / run.std_error for run in runs])
    assert np.mean(np.abs(entries) < 2) > 0.85
    # A plain square root would be low by up to a tenth; the jackknife leaves less than two percent.
    off = ~np.eye(count, dtype=bool)
    norms = np.mean([run.frobenius for run in runs], axis=0) / expected
    assert abs(norms[off].mean() - 1) < 0.02


def test_probes_are_added_until_the_error_is_small_enough():
    matrix, labels = symmetric(), scattered()
    operator, spent = MatrixOperator(matrix), []
    for wanted in (0.1, 0.02, 0.01):
        found = block_norms(operator, labels, exact=False, rel_error=wanted, max_probes=1000)
        assert found.stopped == "converged"
        assert found.ratio is not None
        assert found.ratio_std_error is not None
        assert found.ratio_std_error <= wanted * found.ratio
        spent.append(found.num_products)
    assert spent[0] < spent[1] < spent[2]
    # The error falls with the root of the probes, so half of it takes about four times as many.
    assert 2 < spent[2] / spent[1] < 8


def test_probes_go_where_the_ratio_comes_from():
    """One large block among small ones gets most of the further probes."""
    matrix = symmetric()
    matrix[:50] *= 30
    matrix[:, :50] *= 30
    labels = torch.arange(300) // 25
    found = block_norms(MatrixOperator(matrix), labels, exact=False, rel_error=0.02, max_probes=999)
    assert found.num_probes[:2].min() > 3 * found.num_probes[2:].mean()
    assert found.num_probes.min() >= least_probes(12)


def test_the_bound_on_products_holds():
    matrix, labels = symmetric(), scattered()
    least = least_products(torch.bincount(labels[labels >= 0]).tolist())
    assert least == 6 * 5
    for bound in (least, least + 1, 55):
        found = block_norms(MatrixOperator(matrix), labels, rel_error=0, max_products=bound)
        assert found.num_products == bound
        assert found.stopped == "bound"
    with pytest.raises(ValueError, match=r"30 products are the least for 6 blocks.*29.*budget"):
        block_norms(MatrixOperator(matrix), labels, max_products=least - 1)
    with pytest.raises(ValueError, match=r"products are the least.*Raise it"):
        block_norms(MatrixOperator(matrix), labels, exact=True, max_products=200)


def test_time_up():
    matrix, labels = symmetric(), torch.arange(300) // 5  # 60 blocks: more than one chunk
    operator = MatrixOperator(matrix)
    with pytest.raises(MeasurementError, match=r"time was up after 32 products.*least 120"):
        block_norms(operator, labels, exact=False, allowance=stop_after(0))
    with pytest.raises(MeasurementError, match=r"time was up after 32 of 300 columns"):
        block_norms(operator, labels, exact=True, allowance=stop_after(0))
    found = block_norms(operator, labels, exact=False, rel_error=0, allowance=stop_after(6))
    assert found.stopped == "interrupted"
    assert found.num_probes.min() >= 2


def test_one_block_has_no_ratio():
    matrix = symmetric()
    found = block_norms(MatrixOperator(matrix), torch.zeros(300, dtype=torch.int64), exact=False)
    assert found.ratio is None
    assert found.share == 0
    assert abs(found.frobenius[0, 0] - float(matrix.norm())) < 5 * found.std_error[0, 0]


def test_zeros():
    """A zero operator has no ratio, a zero block no error, and nothing is divided by zero."""
    found = block_norms(MatrixOperator(torch.zeros(300, 300)), scattered())
    assert found.ratio is None
    assert found.share is None
    assert not found.frobenius.any()
    matrix = symmetric()
    labels = torch.arange(300) // 100
    matrix[:100, 100:200] = matrix[100:200, :100] = 0
    found = block_norms(MatrixOperator(matrix), labels, exact=False)
    assert found.frobenius[0, 1] == found.frobenius[1, 0] == found.std_error[0, 1] == 0
    assert np.isfinite(found.std_error).all()


def test_not_a_number():
    matrix = symmetric()
    matrix[0, 0] = float("nan")
    for exact in (True, False):
        with pytest.raises(MeasurementError, match="NaN or infinite"):
            block_norms(MatrixOperator(matrix), scattered(), exact=exact)


def test_labels_are_checked():
    operator = MatrixOperator(symmetric())
    with pytest.raises(ValueError, match=r"shape \(3,\); the order is 300"):
        block_norms(operator, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="every value from 0 to B - 1"):
        block_norms(operator, torch.full((300,), 1))
    with pytest.raises(ValueError, match="every value from 0 to B - 1"):
        block_norms(operator, torch.full((300,), -1))


def test_the_same_seed_gives_the_same_norms():
    operator, labels = MatrixOperator(symmetric()), scattered()
    one, two, other = (
        block_norms(operator, labels, exact=False, seed=seed).frobenius for seed in (3, 3, 4)
    )
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)

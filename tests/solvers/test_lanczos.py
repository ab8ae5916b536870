"""Lanczos on matrices of known spectrum, against LAPACK and ARPACK on the very same matrix."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from support.allowances import stop_at_product
from torch import Tensor

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.results import MeasurementError
from lightning_hessian.solvers import storage
from lightning_hessian.solvers.lanczos import RitzPairs, default_bound, lanczos

N = 200
RANKS = np.arange(1, N + 1.0)

SPECTRA = {
    "power law": RANKS**-1.5,
    "indefinite": np.linspace(-1, 1, N) ** 3,
    "negative": -RANKS,
    "low rank": np.r_[5.0, 4.0, 3.0, 2.0, 1.0, np.zeros(N - 5)],
    "zero": np.zeros(N),
    "identity": np.ones(N),
    "condition 1e12": np.logspace(0, -12, N),
    "tiny": 1e-12 * RANKS**-1.0,
    "huge": 1e12 * RANKS**-1.0,
    "order one": np.array([2.5]),
    "order two": np.array([1.0, -3.0]),
}

REPEATED = {
    "repeated": np.r_[[3.0] * 4, [2.0] * 3, [1.0] * 5, np.linspace(0, 0.9, N - 12)],
    "clustered": np.r_[1 + 1e-6 * np.arange(10), np.linspace(0, 0.6, N - 10)],
    "two values": np.r_[np.ones(N // 2), -np.ones(N // 2)],
    "harmonic, nine times each": np.repeat(1 / np.arange(1, 23.0), 9),
    "every one ten times": np.repeat(np.arange(1, 21.0), 10),
    # More eigenvalues are asked for than are positive: the rest are zeros, not the negative ones.
    "low rank, indefinite": np.r_[5.0, 3.0, np.zeros(N - 4), -2.0, -4.0],
}


def matrix_of(spectrum, dtype=torch.float64, seed: int = 0) -> Tensor:
    """Returns a symmetric matrix with a spectrum (up to the rounding of its entries)."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    matrix = (rotation * spectrum) @ rotation.T
    return torch.from_numpy((matrix + matrix.T) / 2).to(dtype)


def eigenvalues_of(matrix: Tensor) -> np.ndarray:
    return scipy.linalg.eigvalsh(matrix.double().numpy())[::-1]


def true_residuals(matrix: Tensor, found: RitzPairs) -> np.ndarray:
    vectors, values = found.vectors.double(), torch.from_numpy(found.values.copy())
    return (vectors @ matrix.double().T - values[:, None] * vectors).norm(dim=1).numpy()


def allowance(matrix: Tensor) -> float:
    """Returns the rounding of a float64 reference and of a vector's storage."""
    norm = float(torch.linalg.matrix_norm(matrix.double(), 2))
    return norm * (len(matrix) * np.finfo(float).eps + torch.finfo(matrix.dtype).eps)


# Spectra ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wanted", "tol"), [(1, 1e-3), (10, 1e-3), (10, 1e-9), (N, 1e-3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_values_residuals_and_vectors(name, dtype, wanted, tol):
    matrix = matrix_of(SPECTRA[name], dtype)
    wanted = min(wanted, len(matrix))
    found = lanczos(MatrixOperator(matrix), wanted, tol=tol)
    exact, slack = eigenvalues_of(matrix), allowance(matrix)

    assert found.values.shape == found.residuals.shape == found.converged.shape == (wanted,)
    assert found.values.dtype == found.residuals.dtype == np.float64
    assert (np.diff(found.values) <= 0).all()
    assert (np.abs(found.values - exact[:wanted]) <= found.residuals + slack).all()

    residuals = true_residuals(matrix, found)
    assert (residuals <= 1.05 * found.residuals + slack).all()
    assert (found.residuals <= 10 * residuals + 50 * slack).all()

    gram = found.vectors.double() @ found.vectors.double().T
    assert float((gram - torch.eye(wanted)).abs().max()) < 50 * torch.finfo(dtype).eps
    assert found.vectors.dtype == dtype
    assert np.array_equal(found.converged, found.residuals <= tol * np.abs(found.values))
    assert (found.stopped == "converged") <= found.converged.all()


@pytest.mark.parametrize("name", ["power law", "indefinite", "negative", "tiny", "huge"])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_what_can_converge_does_and_arpack_agrees(name, dtype, tol):
    matrix = matrix_of(SPECTRA[name], dtype)
    found = lanczos(MatrixOperator(matrix), 10, tol=tol)
    assert found.stopped == "converged"
    assert found.num_products < N
    arpack = scipy.sparse.linalg.eigsh(matrix.double().numpy(), k=10, which="LA")[0][::-1]
    np.testing.assert_allclose(
        found.values, arpack, atol=(found.residuals.max() + allowance(matrix))
    )
    assert (found.residuals <= tol * np.abs(found.values)).all()


@pytest.mark.parametrize("tol", [1e-3, 1e-8])
@pytest.mark.parametrize("name", REPEATED)
def test_every_copy_of_a_repeated_eigenvalue_is_found(name, tol):
    """A single Krylov space holds one direction of each eigenspace; "converged" must mean all."""
    matrix = matrix_of(REPEATED[name])
    exact = eigenvalues_of(matrix)[:10]
    for seed in range(4):
        found = lanczos(MatrixOperator(matrix), 10, tol=tol, seed=seed)
        # A copy that is missed is an error of the size of a gap; a bound may be a cluster's width.
        slack = np.maximum(found.residuals, 1e-5) + allowance(matrix)
        assert (np.abs(found.values - exact) <= slack).all(), f"seed {seed}: {found.values}"


@pytest.mark.parametrize("n", [4, 5, 6, 13])
@pytest.mark.parametrize("wanted", [1, 3])
def test_a_search_that_reaches_the_whole_space_is_over(n, wanted):
    for spectrum in (np.zeros(n), np.r_[2.0, np.zeros(n - 1)], np.arange(n) - 2.0):
        matrix = matrix_of(spectrum)
        found = lanczos(MatrixOperator(matrix), wanted)
        assert found.num_products <= 2 * n
        np.testing.assert_allclose(found.values, eigenvalues_of(matrix)[:wanted], atol=1e-12)


@pytest.mark.parametrize("name", REPEATED)
def test_copies_are_found_with_a_basis_that_holds_hardly_more_than_they(name):
    """The search has to go on through restarts: four vectors are no search."""
    matrix = matrix_of(REPEATED[name])
    exact = eigenvalues_of(matrix)[:10]
    for seed in range(2):
        options = {"tol": 1e-7, "max_basis": 15, "max_products": 9000, "seed": seed}
        found = lanczos(MatrixOperator(matrix), 10, **options)
        slack = np.maximum(found.residuals, 1e-5) + allowance(matrix)
        assert (np.abs(found.values - exact) <= slack).all(), f"seed {seed}: {found.values}"
        assert (true_residuals(matrix, found) <= 1.05 * found.residuals + allowance(matrix)).all()


@pytest.mark.parametrize("name", ["indefinite", "low rank, indefinite", "order two"])
def test_the_lowest_eigenvalue_is_found_beside_the_largest(name):
    matrix = matrix_of((SPECTRA | REPEATED)[name])
    found = lanczos(MatrixOperator(matrix), 2, tol=1e-6)
    lowest = eigenvalues_of(matrix)[-1]
    assert found.lowest_residual < 1e-3
    assert abs(found.lowest - lowest) <= found.lowest_residual + allowance(matrix)


@pytest.mark.parametrize("max_basis", [14, 25])
def test_restarts_do_not_lose_the_lowest_eigenvalue(max_basis):
    matrix = matrix_of(np.r_[np.linspace(0.9, 1, 100), np.zeros(N - 101), -0.5])
    found = lanczos(MatrixOperator(matrix), 10, max_basis=max_basis, max_products=3000)
    assert found.num_products > 2 * max_basis
    assert found.lowest == pytest.approx(-0.5, abs=1e-9)
    assert found.lowest_residual < 1e-3


def test_what_rounding_holds_up_is_not_called_converged():
    matrix = matrix_of(SPECTRA["condition 1e12"], torch.float32)
    found = lanczos(MatrixOperator(matrix), 100, tol=1e-3)
    assert found.stopped == "precision"
    assert found.converged[:20].all()
    assert not found.converged[-20:].any()  # eps * norm is far above 1e-3 of these


def test_a_multiple_of_the_identity_is_searched_anew_from_each_invariant_subspace():
    found = lanczos(MatrixOperator(2 * torch.eye(N, dtype=torch.float64)), 7)
    assert found.values.tolist() == pytest.approx([2.0] * 7, abs=1e-14)
    assert found.num_products < 50


# Bounds and restarts ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_basis", [13, 16, 25, 60])
@pytest.mark.parametrize("name", ["power law", "indefinite", "low rank", "condition 1e12"])
def test_a_bounded_basis_gives_the_same_eigenvalues(name, max_basis, dtype):
    matrix = matrix_of(SPECTRA[name], dtype)
    operator, tol = MatrixOperator(matrix), 1e-4
    bounded = lanczos(operator, 10, tol=tol, max_basis=max_basis, max_products=3000)
    unbounded = lanczos(operator, 10, tol=tol, max_basis=N, max_products=3000)
    difference = np.abs(bounded.values - unbounded.values)
    assert (difference <= bounded.residuals + unbounded.residuals + allowance(matrix)).all()
    assert np.array_equal(bounded.converged, unbounded.converged)
    assert (true_residuals(matrix, bounded) <= 1.05 * bounded.residuals + allowance(matrix)).all()
    gram = bounded.vectors.double() @ bounded.vectors.double().T
    assert float((gram - torch.eye(10)).abs().max()) < 500 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["power law", "indefinite", "every one ten times", "clustered"])
@pytest.mark.parametrize("max_basis", [15, 30])
def test_a_bounded_basis_gives_them_to_a_millionth(name, max_basis):
    matrix = matrix_of((SPECTRA | REPEATED)[name])
    bounded, unbounded = (
        lanczos(MatrixOperator(matrix), 10, tol=1e-7, max_basis=size, max_products=9000)
        for size in (max_basis, N)
    )
    assert bounded.num_products > max_basis  # there were restarts
    assert bounded.stopped == unbounded.stopped == "converged"
    np.testing.assert_allclose(bounded.values, unbounded.values, rtol=1e-6)
    np.testing.assert_allclose(bounded.values, eigenvalues_of(matrix)[:10], rtol=1e-6)


class Watched(MatrixOperator):
    """Counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.num_products = 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.num_products += 1
        return super().matvec(vector)


@pytest.mark.parametrize("max_products", [10, 17, 30])
def test_the_bound_on_products_ends_it_with_honest_flags(max_products):
    matrix = matrix_of(np.linspace(0, 1, N))
    operator = Watched(matrix)
    found = lanczos(operator, 10, max_products=max_products, tol=1e-3)
    assert (found.stopped, found.num_products) == ("bound", max_products)
    assert operator.num_products == max_products
    assert not found.converged.all()
    assert (true_residuals(matrix, found) <= 1.01 * found.residuals).all()
    exact = eigenvalues_of(matrix)
    nearest = np.abs(found.values[:, None] - exact).min(1)
    assert (nearest <= found.residuals).all()
    # A Ritz value of rank i never exceeds the eigenvalue of rank i (Cauchy).
    assert (found.values <= exact[:10] + allowance(matrix)).all()


def test_a_bound_between_restarts_is_kept_too():
    operator = Watched(matrix_of(np.linspace(0, 1, N)))
    found = lanczos(operator, 10, max_basis=20, max_products=47, tol=1e-9)
    assert operator.num_products == found.num_products == 47
    assert found.stopped == "bound"


@pytest.mark.parametrize(("stop_after", "num_values"), [(1, 1), (4, 4), (25, 10)])
def test_an_interruption_gives_what_there_is(stop_after, num_values):
    matrix = matrix_of(np.linspace(0, 1, N))
    operator = Watched(matrix)
    found = lanczos(operator, 10, allowance=stop_at_product(operator, stop_after))
    assert (found.stopped, found.num_products) == ("interrupted", stop_after)
    assert found.values.shape == found.residuals.shape == found.converged.shape == (num_values,)
    assert found.vectors.shape == (num_values, N)
    assert (true_residuals(matrix, found) <= 1.01 * found.residuals).all()


def test_the_number_of_products_is_that_of_the_operator():
    operator = Watched(matrix_of(SPECTRA["power law"]))
    found = lanczos(operator, 10)
    assert found.num_products == operator.num_products <= default_bound(10)


@pytest.mark.parametrize(
    ("wanted", "options", "message"),
    [
        (9, {}, r"9 eigenvalues.*order 8.*1 to 8"),
        (0, {}, "1 to 8"),
        (4, {"max_products": 3}, "at least as many products"),
        (3, {"max_basis": 5}, "at least 6"),
    ],
)
def test_what_cannot_be_found_is_refused(wanted, options, message):
    with pytest.raises(ValueError, match=message):
        lanczos(MatrixOperator(torch.eye(8)), wanted, **options)


def test_a_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        MatrixOperator(torch.zeros(2, 3))


# Products that are not what they should be ------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_product_that_is_not_finite_is_named(bad):
    class Failing(Watched):
        def matvec(self, vector):
            product = super().matvec(vector)
            if self.num_products == 3:
                product[7] = bad
            return product

    with pytest.raises(MeasurementError, match=r"Product 3 .*NaN or infinite"):
        lanczos(Failing(matrix_of(SPECTRA["power law"])), 10)


def asymmetric(spectrum, size: float) -> Tensor:
    """Returns a matrix that departs from symmetry by a skew part of that spectral norm."""
    generator = torch.Generator().manual_seed(3)
    skew = torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)
    skew = skew - skew.T
    return matrix_of(spectrum) + size * skew / torch.linalg.matrix_norm(skew, 2)


@pytest.mark.parametrize("max_basis", [None, 13, 20])
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("name", ["power law", "indefinite"])
def test_the_bound_covers_a_departure_from_symmetry(name, size, max_basis):
    matrix = asymmetric(SPECTRA[name], size)
    found = lanczos(MatrixOperator(matrix), 10, tol=1e-9, max_basis=max_basis)
    residuals = true_residuals(matrix, found)
    assert found.stopped == "precision"  # 1e-9 is out of reach, and it was noticed
    assert not found.converged.any()
    assert (residuals <= 1.05 * found.residuals).all()
    assert residuals.max() > 0.05 * size  # there was something to cover
    assert found.residuals.max() < 100 * size
    # And so the eigenvalues of the symmetric part are within the bound and the departure.
    exact = eigenvalues_of((matrix + matrix.T) / 2)[:10]
    assert (np.abs(found.values - exact) <= found.residuals + size).all()


def test_the_bound_covers_products_with_noise():
    class Noisy(MatrixOperator):
        def matvec(self, vector):
            product = super().matvec(vector)
            return product + 1e-6 * torch.randn(len(product), generator=noise, dtype=torch.float64)

    noise = torch.Generator().manual_seed(1)
    matrix = matrix_of(SPECTRA["power law"])
    found = lanczos(Noisy(matrix), 10, tol=1e-9)
    # Noise of norm 1e-6 sqrt(n) in each product.
    assert (true_residuals(matrix, found) <= found.residuals + 1e-6 * N**0.5).all()
    assert found.stopped == "precision"


# Memory -----------------------------------------------------------------------------------------


def test_a_basis_too_large_for_the_memory_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda device: 2 * 8 * N * 9)
    with pytest.raises(MeasurementError, match=r"8 vectors fit.*num_eigenvalues.*parameters="):
        lanczos(MatrixOperator(matrix_of(SPECTRA["power law"])), 10)


def test_a_basis_is_as_large_as_the_memory_allows(monkeypatch):
    operator = MatrixOperator(matrix_of(np.linspace(-1, 1, N)))
    roomy = lanczos(operator, 10, tol=1e-8)
    monkeypatch.setattr(storage, "free_bytes", lambda device: 2 * 8 * N * 21)
    tight = lanczos(operator, 10, tol=1e-8)
    same = lanczos(operator, 10, tol=1e-8, max_basis=20)
    assert np.array_equal(tight.values, same.values)
    assert tight.num_products == same.num_products > roomy.num_products
    assert tight.vectors.untyped_storage().nbytes() <= 21 * N * 8


# Digits -----------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_digits_and_no_generator_moves():
    operator = MatrixOperator(matrix_of(SPECTRA["indefinite"]))
    state = torch.get_rng_state()
    first, second, other = (lanczos(operator, 10, seed=seed, tol=1e-6) for seed in (4, 4, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(first.values, second.values)
    assert np.array_equal(first.residuals, second.residuals)
    assert torch.equal(first.vectors, second.vectors)
    assert not np.array_equal(first.values, other.values)
    assert (np.abs(first.values - other.values) <= first.residuals + other.residuals).all()

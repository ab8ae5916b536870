"""Bases in other memories and precisions: the same eigenvalues, and honest about what is lost."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import torch
from test_lanczos import Watched, allowance, eigenvalues_of, matrix_of, true_residuals

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.linear.shards import Shard
from lightning_hessian.results import MeasurementError
from lightning_hessian.solvers import basis, storage
from lightning_hessian.solvers.basis import KrylovBasis
from lightning_hessian.solvers.lanczos import lanczos
from lightning_hessian.solvers.projected import Projected
from lightning_hessian.solvers.storage import BasisStorage, placed
from lightning_hessian.solvers.trace import trace

N = 300
SPECTRUM = np.arange(1, N + 1.0) ** -1.5 * np.where(np.arange(N) % 4 == 3, -0.3, 1.0)


def operator_of(size: int, dtype: torch.dtype) -> SimpleNamespace:
    """Return what a basis asks of an operator."""
    return SimpleNamespace(shard=Shard.whole(size), dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_basis", [40, N])
@pytest.mark.parametrize("block_bytes", [1, 7000, 2**25])
def test_a_basis_in_a_file_gives_the_same_eigenpairs(
    tmp_path, monkeypatch, block_bytes, max_basis, dtype
):
    monkeypatch.setitem(basis._BLOCK_BYTES, "cpu", block_bytes)
    monkeypatch.setattr(KrylovBasis, "_at_hand", False, raising=False)
    matrix = matrix_of(SPECTRUM, dtype)
    options = {"max_basis": max_basis, "tol": 1e-4}
    found = lanczos(
        MatrixOperator(matrix), 12, storage=BasisStorage(tier=f"disk:{tmp_path}"), **options
    )
    in_memory = lanczos(MatrixOperator(matrix), 12, **options)
    assert found.stopped == in_memory.stopped == "converged"
    errors = np.abs(found.values - eigenvalues_of(matrix)[:12])
    assert (errors <= found.residuals + allowance(matrix)).all()
    assert (true_residuals(matrix, found) <= 1.05 * found.residuals + allowance(matrix)).all()
    np.testing.assert_allclose(found.values, in_memory.values, rtol=1e-5)
    assert list(tmp_path.iterdir()) == []  # the file has no name


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_elsewhere_are_orthogonalised_against_like_rows_at_hand(streamed, monkeypatch):
    """Against the projection computed from the rows by QR."""
    monkeypatch.setitem(basis._BLOCK_BYTES, "cpu", 4 * 50 * 8)
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(50, 20, generator=generator, dtype=torch.float64))[0].T
    storage = BasisStorage(tier="disk" if streamed else "device")
    room = KrylovBasis(30, operator_of(50, torch.float64), storage)
    room._at_hand = not streamed
    for i, row in enumerate(rows):
        room[i] = row
    for count in (1, 2, 3, 20):
        vector = torch.randn(50, generator=generator, dtype=torch.float64)
        expected = vector - rows[:count].T @ (rows[:count] @ vector)
        left = vector.clone()
        removed, norm = room.orthogonalize(left, count)
        torch.testing.assert_close(left, expected, atol=1e-14, rtol=0)
        torch.testing.assert_close(removed, rows[:count] @ vector, atol=1e-14, rtol=0)
        assert norm == pytest.approx(float(expected.norm()), rel=1e-14)
    rotation = torch.linalg.qr(torch.randn(20, 6, generator=generator, dtype=torch.float64))[0]
    room.rotate(rotation)
    torch.testing.assert_close(room.rows[:6], rotation.T @ rows, atol=1e-14, rtol=0)


def test_a_vector_that_almost_lies_in_the_basis_is_made_orthogonal_to_working_precision():
    """Where one pass of Gram-Schmidt is not enough."""
    room = KrylovBasis(30, operator_of(500, torch.float32))
    generator = torch.Generator().manual_seed(0)
    for i, row in enumerate(torch.linalg.qr(torch.randn(500, 30, generator=generator))[0].T):
        room[i] = row
    vector = room.rows.T @ torch.randn(30, generator=generator)
    vector += 1e-4 * torch.randn(500, generator=generator) / 500**0.5
    _, norm = room.orthogonalize(vector, 30)
    overlaps = room.rows.double() @ vector.double() / vector.double().norm()
    assert float(overlaps.abs().max()) < 3 * torch.finfo(torch.float32).eps
    assert norm == pytest.approx(float(vector.norm()), rel=1e-6)


# bfloat16 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exact", "provable"),
    [
        (np.r_[np.linspace(1, 0.5, 20), 0.45 / np.arange(1, 3981.0)], 20),
        (np.arange(1, 4001.0) ** -1.0, 8),
        (np.arange(1, 4001.0) ** -1.5, 4),
    ],
)
def test_a_basis_in_half_the_precision_keeps_its_bounds(exact, provable):
    """The eigenvalues are known exactly. Small ones are found, but cannot be proved."""
    operator = CosineOperator(exact)
    options = {"tol": 1e-3, "max_basis": 600, "max_products": 600}
    rounded = lanczos(operator, 20, storage=BasisStorage(dtype="bfloat16"), **options)
    whole = lanczos(operator, 20, **options)
    stored = rounded.vectors, whole.vectors
    assert [kept.dtype for kept in stored] == [torch.bfloat16, torch.float32]
    assert stored[0].untyped_storage().nbytes() * 2 == stored[1].untyped_storage().nbytes()
    assert whole.converged.all()
    assert rounded.converged[:provable].all()
    errors = np.abs(rounded.values - exact[:20])
    assert (errors <= rounded.residuals).all()
    assert (errors / exact[:20]).max() < 1e-4
    assert np.diff(rounded.values).max() < 0  # no ghosts, which are copies


def test_a_full_basis_of_rounded_vectors_ends_the_run_with_honest_flags():
    exact = np.arange(1, 4001.0) ** -1.0
    found = lanczos(
        CosineOperator(exact), 20, max_basis=40, tol=1e-3, storage=BasisStorage(dtype="bfloat16")
    )
    assert (found.stopped, found.num_products) == ("memory", 40)
    assert 0 < found.converged.sum() < 20
    nearest = np.abs(found.values[:, None] - exact).min(1)
    assert (nearest <= found.residuals).all()


def test_the_trace_beside_rounded_vectors_is_that_of_the_matrix():
    exact = np.arange(1, 4001.0) ** -1.5
    operator = CosineOperator(exact)
    found = lanczos(operator, 20, max_basis=600, storage=BasisStorage(dtype="bfloat16"))
    estimate = trace(operator, torch.from_numpy(found.values.copy()), found.vectors)
    assert estimate.value == pytest.approx(exact.sum(), abs=4 * estimate.std_error + 1e-4)


class CosineOperator:
    """A matrix with given eigenvalues whose eigenvectors are cosines; products in float32."""

    def __init__(self, diagonal: np.ndarray) -> None:
        self.diagonal = torch.from_numpy(diagonal)
        self.size, self.dtype = len(diagonal), torch.float32
        self.device, self.shard = torch.device("cpu"), Shard.whole(len(diagonal))

    def matvec(self, vector: torch.Tensor) -> torch.Tensor:
        return self.matmat(vector[None])[0]

    def matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        along = self.diagonal.numpy() * scipy.fft.dct(vectors.double().numpy(), norm="ortho")
        return torch.from_numpy(scipy.fft.idct(along, norm="ortho")).float()


# Budgets ----------------------------------------------------------------------------------------


def place(given: BasisStorage, wanted: int, least: int, n: int = 1000, dtype=torch.float32):
    return placed(given, wanted, least, operator_of(n, dtype))


@pytest.mark.parametrize("memory", [1e6, 1e7, 1e9])
def test_a_budget_holds_the_basis_and_its_projected_problem(memory):
    _, count = place(BasisStorage(memory=memory), 10**9, 1)
    assert 4000 * count + 32 * count**2 <= memory < 4000 * (count + 1) + 32 * (count + 1) ** 2


def test_half_the_precision_takes_twice_the_vectors(monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda device: 2 * 4000 * 101)
    assert place(BasisStorage(), 10**9, 1)[1] == 100
    assert place(BasisStorage(dtype="bfloat16"), 10**9, 1)[1] == 201
    assert place(BasisStorage(), 30, 1)[1] == 30


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    monkeypatch.setattr(storage, "free_bytes", lambda device: 2 * 4_000_000 * 51)
    with pytest.raises(MeasurementError) as refused:
        place(BasisStorage(), 4040, 1003, n=1_000_000)
    message = str(refused.value)
    assert "1003 vectors of 1,000,000 numbers takes 4.01 GB" in message
    assert "50 vectors fit into half of the free memory" in message
    assert "`num_eigenvalues` to 47" in message
    assert "basis=BasisStorage(dtype='bfloat16'), 2.01 GB" in message
    assert "basis=BasisStorage(tier='disk:FOLDER'), 4.01 GB" in message
    # And what the message proposes does work.
    assert place(BasisStorage(), 4040, 47 + 3, n=1_000_000)[1] == 50


def test_a_disk_that_is_too_small_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "_free_on_disk", lambda folder: 1e6)
    with pytest.raises(MeasurementError, match=r"0\.001 GB are free in"):
        BasisStorage(tier=f"disk:{tmp_path}").allocate(
            1000, 1000, torch.float32, torch.device("cpu")
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": "tape"}, "tier='tape'.*'disk'"),
        ({"tier": "cpu:0"}, "tier='cpu:0'.*'cpu'"),
        ({"tier": "disk:/no/such/folder"}, "no folder '/no/such/folder'"),
        ({"dtype": "float16"}, "dtype='float16'.*'bfloat16'"),
        ({"memory": 0}, "bytes above 0"),
        ({"memory": float("nan")}, "bytes above 0"),
    ],
)
def test_storage_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BasisStorage(**options)


# The projected problem --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [1, 20])
def test_a_tridiagonal_problem_is_solved_alike(wanted, dtype, monkeypatch):
    """The solver for large problems, on a small one, against LAPACK on the whole matrix."""
    matrix = matrix_of(SPECTRUM, dtype)
    monkeypatch.setattr(Projected.__init__, "__kwdefaults__", {"tridiagonal_from": 0})
    operator = Watched(matrix)
    found = lanczos(operator, wanted, tol=1e-4, max_basis=N)
    assert found.stopped == "converged"
    slack = allowance(matrix)
    assert (np.abs(found.values - eigenvalues_of(matrix)[:wanted]) <= found.residuals + slack).all()
    assert (true_residuals(matrix, found) <= 1.05 * found.residuals + slack).all()
    assert abs(found.lowest - eigenvalues_of(matrix)[-1]) <= found.lowest_residual + slack

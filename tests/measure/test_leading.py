"""The span of leading eigenvectors, against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_hessian.linear.operator import MatrixOperator
from lightning_hessian.linear.preconditioned import PreconditionedOperator
from lightning_hessian.measure.leading import Leading, turn_bound


class Counted(MatrixOperator):
    """A matrix that counts its products."""

    count = 0

    def matvec(self, vector: Tensor) -> Tensor:
        self.count += 1
        return super().matvec(vector)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def curved(order: int = 30) -> Tensor:
    """Return a symmetric matrix with eigenvalues of both signs that fall by a power."""
    vectors = torch.linalg.qr(random(order, order, seed=0)).Q
    values = 10 / torch.arange(1.0, order + 1, dtype=torch.float64)
    values[20:] *= -1
    return vectors @ values.diag() @ vectors.T


def leading_of(matrix: Tensor, count: int) -> Leading:
    values, vectors = torch.linalg.eigh(matrix)
    top = values.flip(0)
    return Leading(
        ("w",),
        tuple(top[:count].tolist()),
        (0.0,) * count,
        vectors.flip(1)[:, :count].T.contiguous(),
        float(top[count]),
    )


def dense_bound(before: Leading, matrix: Tensor) -> float:
    old = before.vectors.T
    middle = old.T @ matrix @ old
    rest = float(torch.linalg.matrix_norm(matrix @ old - old @ middle, 2))
    gap = float(torch.linalg.eigvalsh(middle)[0] - torch.linalg.eigvalsh(matrix)[-1 - len(middle)])
    return math.degrees(math.asin(rest / gap)) if rest < gap else 90.0


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-2, 0.03, 0.1, 0.3, 3.0])
def test_the_bound_of_the_turn_is_that_of_dense_matrices(size: float) -> None:
    """A closed gap ends it before all products are taken, and is the same answer."""
    first = curved()
    change = random(30, 30, seed=1)
    second = first + size * (change + change.T)
    before, now, operator = leading_of(first, 4), leading_of(second, 4), Counted(second)
    expected = dense_bound(before, second)
    assert turn_bound(before, now, operator) == pytest.approx(expected, rel=1e-9)
    assert operator.count == 4 or expected == 90.0
    assert operator.count < 4 or size < 3


def test_both_answers_are_among_those_tried() -> None:
    first, change = curved(), random(30, 30, seed=1)
    bounds = [
        dense_bound(leading_of(first, 4), first + size * (change + change.T))
        for size in (1e-2, 3.0)
    ]
    assert 0 < bounds[0] < 90 == bounds[1]


@pytest.mark.parametrize("kind", ["diagonal", "function"])
def test_under_a_preconditioner_it_is_the_leading_eigenvector_of_what_is_known(kind: str) -> None:
    matrix, spread = curved(), random(30, seed=2).exp()
    full = spread.diag() if kind == "diagonal" else torch.diag(spread) + 0.1 * torch.ones(30, 30)
    found = leading_of(matrix, 6)
    root = spread if kind == "diagonal" else lambda vector: full @ vector
    start = found.under(PreconditionedOperator(MatrixOperator(matrix), root))
    known = found.vectors.T @ torch.tensor(found.values, dtype=torch.float64).diag() @ found.vectors
    expected = torch.linalg.eigh(full @ known @ full)[1][:, -1]
    assert abs(float(start @ expected) / float(start.norm())) == pytest.approx(1, abs=1e-9)


def test_where_all_is_known_it_takes_no_search() -> None:
    """With all eigenvectors of a positive matrix it is the answer itself."""
    vectors = torch.linalg.qr(random(12, 12, seed=3)).Q
    matrix = vectors @ torch.arange(1.0, 13.0, dtype=torch.float64).diag() @ vectors.T
    values, columns = torch.linalg.eigh(matrix)
    whole = Leading(("w",), tuple(values.tolist()), (0.0,) * 12, columns.T.contiguous())
    root = random(12, seed=4).exp()
    start = whole.under(PreconditionedOperator(MatrixOperator(matrix), root))
    under = root.diag() @ matrix @ root.diag()
    top = torch.linalg.eigvalsh(under)[-1]
    torch.testing.assert_close(under @ start, top * start)

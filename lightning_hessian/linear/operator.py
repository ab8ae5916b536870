"""What a solver needs of an operator: its order, and products with vectors."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_hessian.linear.shards import Shard
from lightning_hessian.results import MeasurementError


class SymmetricOperator(Protocol):
    """A symmetric linear operator on vectors of length ``size``.

    Attributes:
        size: Order n of the operator.
        shard: Which entries of a vector this process holds; n_local of them, all n if alone.
        dtype: Precision of the vectors.
        device: Where the vectors live.
    """

    size: int
    shard: Shard
    dtype: torch.dtype
    device: torch.device

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector [n_local], a new tensor [n_local]."""

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of [b, n_local], a new tensor [b, n_local]."""


def check_finite(
    found: Tensor, norm: float = 0.0, what: str = "A product with the operator"
) -> None:
    """Check what came of a product.

    Args:
        found: The product, or what was computed from it.
        norm: Its norm, where it has been computed.
        what: How the message begins.

    Raises:
        MeasurementError: It is NaN or infinite.
    """
    if not (found.isfinite().all() and np.isfinite(norm)):
        raise MeasurementError(
            f"{what} is NaN or infinite. The gradient may overflow in this precision, or an "
            "operation has no finite second derivative."
        )


class MatrixOperator:
    """A symmetric matrix [n, n] as an operator.

    Example:
        >>> operator = MatrixOperator(torch.diag(torch.tensor([3.0, 1.0])))
        >>> operator.matvec(torch.ones(2))
        tensor([3., 1.])
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"The matrix has shape {tuple(matrix.shape)}; it must be square.")
        self.matrix = matrix
        self.shard = Shard.whole(matrix.shape[0])
        self.size, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector [n], a new tensor [n]."""
        return self.matrix @ vector

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of [b, n], a new tensor [b, n]."""
        return vectors @ self.matrix


class RestrictedOperator:
    """The diagonal block of an operator on some of its coordinates.

    Args:
        operator: Symmetric operator of order n.
        coordinates: int64 [m], which of them; vectors of the block are in this order.

    Example:
        >>> matrix = torch.tensor([[1.0, 9.0, 2.0], [9.0, 9.0, 9.0], [2.0, 9.0, 3.0]])
        >>> block = RestrictedOperator(MatrixOperator(matrix), torch.tensor([0, 2]))
        >>> block.matvec(torch.ones(2))
        tensor([3., 5.])
    """

    def __init__(self, operator: SymmetricOperator, coordinates: Tensor) -> None:
        self.operator = operator
        self.shard, local = operator.shard.restricted(coordinates)
        self.coordinates = local.to(operator.device)
        self.size = len(coordinates)
        self.dtype, self.device = operator.dtype, operator.device
        self.engine = getattr(operator, "engine", "")
        self.matrix_kind = getattr(operator, "matrix_kind", "hessian")

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector [m_local], a new tensor [m_local]."""
        return self.matmat(vector[None])[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of [b, m_local], a new tensor [b, m_local]."""
        whole = vectors.new_zeros(len(vectors), self.operator.shard.length)
        whole[:, self.coordinates] = vectors
        return self.operator.matmat(whole)[:, self.coordinates]


class DifferenceOperator:
    """The difference of two symmetric operators of one order.

    Args:
        first: An operator.
        second: What is taken from it, on the same vectors.
        matrix_kind: What it is called in records.

    Example:
        >>> two, one = (MatrixOperator(k * torch.eye(2)) for k in (2.0, 1.0))
        >>> DifferenceOperator(two, one).matvec(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(
        self, first: SymmetricOperator, second: SymmetricOperator, matrix_kind: str = "residual"
    ) -> None:
        if first.size != second.size:
            raise ValueError(f"The orders of the operators differ: {first.size}, {second.size}.")
        self.first, self.second, self.matrix_kind = first, second, matrix_kind
        self.size, self.shard = first.size, first.shard
        self.dtype, self.device = first.dtype, first.device
        engines = (str(getattr(one, "engine", "")) for one in (first, second))
        self.engine = "+".join(dict.fromkeys(engines))

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector [n_local], a new tensor [n_local]."""
        return self.first.matvec(vector) - self.second.matvec(vector)

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of [b, n_local], a new tensor [b, n_local]."""
        return self.first.matmat(vectors) - self.second.matmat(vectors)

"""A symmetric operator as it is seen through a preconditioner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hessian.linear.operator import SymmetricOperator


class PreconditionedOperator:
    """R (s A + W) R for a symmetric R, a sign s and a diagonal W.

    With R = P^-1/2 its eigenvalues are those of P^-1 (s A + W). A product with it is one with A.

    Args:
        operator: A, of order n.
        root: R: its diagonal [n_local], or a function that applies it to a vector [n_local].
        shift: The diagonal of W, [n_local] or one number.
        sign: 1 or -1.

    Example:
        >>> import torch
        >>> from lightning_hessian.linear.operator import MatrixOperator
        >>> plain = MatrixOperator(torch.diag(torch.tensor([8.0, 1.0])))
        >>> PreconditionedOperator(plain, torch.tensor([0.5, 1.0])).matvec(torch.ones(2))
        tensor([2., 1.])
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        root: Tensor | Callable[[Tensor], Tensor],
        shift: Tensor | float = 0.0,
        sign: int = 1,
    ) -> None:
        self.operator, self.root, self.shift, self.sign = operator, root, shift, sign
        self.size, self.shard = operator.size, operator.shard
        self.dtype, self.device = operator.dtype, operator.device

    def through(self, vector: Tensor) -> Tensor:
        """Return R v for a vector [n_local], a new tensor [n_local]."""
        return self.root(vector) if callable(self.root) else self.root * vector

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector [n_local], a new tensor [n_local]."""
        inner = self.through(vector)
        return self.through(self.sign * self.operator.matvec(inner) + self.shift * inner)

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of [b, n_local], a new tensor [b, n_local]."""
        return torch.stack([self.matvec(vector) for vector in vectors])

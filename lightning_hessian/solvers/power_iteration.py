"""Power iteration with deflation: slow, simple, and independent of Lanczos; a cross-check."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_hessian.linear.operator import SymmetricOperator, check_finite
from lightning_hessian.results import FloatArray


@dataclass(frozen=True, eq=False)
class PowerIteration:
    """The eigenvalues of largest magnitude, in the order they were found.

    Attributes:
        values: Rayleigh quotients, float64 [k].
        residuals: norm(A v - lambda v) of each, in the complement of those before it [k].
        vectors: Orthonormal rows, this rank's part [k, n_local].
        num_products: Products with the operator.
    """

    values: FloatArray
    residuals: FloatArray
    vectors: Tensor
    num_products: int


def power_iteration(
    operator: SymmetricOperator,
    num_eigenvalues: int = 1,
    *,
    tol: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
) -> PowerIteration:
    """Return the k eigenvalues of largest magnitude, one after the other.

    v <- A v / norm(A v), made orthogonal to the vectors already found (HPL, figure 19). The error
    shrinks by abs(lambda_2 / lambda_1) in each step, so neighbours of almost equal magnitude take
    very long; Lanczos finds a thousand in the products that this needs for ten.

    Args:
        operator: Symmetric operator of order n.
        num_eigenvalues: k, at most n.
        tol: An eigenvalue is done at residual <= tol * abs(value).
        max_products: Bound on products for each.
        seed: Of the start vectors.

    Raises:
        ValueError: k is not in 1..n.
        MeasurementError: A product is NaN or infinite.

    Example:
        >>> from lightning_hessian.linear.operator import MatrixOperator
        >>> matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0], dtype=torch.float64))
        >>> power_iteration(MatrixOperator(matrix), 2, tol=1e-6).values.round(6)
        array([-3.,  2.])
    """
    if not 1 <= num_eigenvalues <= operator.size:
        raise ValueError(
            f"{num_eigenvalues} eigenvalues were asked of an operator of order {operator.size}; "
            f"ask for 1 to {operator.size}."
        )
    shard = operator.shard
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(num_eigenvalues, shard.length, dtype=operator.dtype, device=operator.device)
    values, residuals, num_products = [], [], 0
    for k in range(num_eigenvalues):
        whole = torch.randn(operator.size, generator=generator, dtype=torch.float64)
        vector = shard.take(whole).to(operator.device, operator.dtype)
        value, residual = 0.0, float("inf")
        for step in range(max_products):
            _deflate(vector, found[:k], operator)
            vector /= shard.norm(vector)
            product = operator.matvec(vector)
            num_products += 1
            check_finite(product)
            # In the complement of what was found, where the power iteration lives.
            _deflate(product, found[:k], operator)
            value = float(shard.dot(vector, product))
            residual = float(shard.norm(product - value * vector))
            length = float(shard.norm(product))
            if residual <= tol * abs(value) or length == 0.0 or step + 1 == max_products:
                break
            vector = product / length
        found[k] = vector
        values.append(value)
        residuals.append(residual)
    return PowerIteration(np.array(values), np.array(residuals), found, num_products)


def _deflate(vector: Tensor, rows: Tensor, operator: SymmetricOperator) -> None:
    """Remove, in place and twice, what lies along the rows."""
    for _ in range(2 if len(rows) else 0):
        vector.addmv_(rows.T, operator.shard.ranks.sum(rows @ vector), alpha=-1)

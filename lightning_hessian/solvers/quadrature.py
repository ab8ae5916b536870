"""One Lanczos run from a given vector, without restart: a Gauss rule for the spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator, check_finite
from lightning_hessian.results import FloatArray, SpectralDensity
from lightning_hessian.solvers.basis import KrylovBasis
from lightning_hessian.solvers.projected import Projected


@dataclass(frozen=True, eq=False)
class GaussRule:
    """The Ritz values of a run as nodes of a quadrature rule.

    Attributes:
        nodes: Ritz values, float64 [m], ascending.
        weights: Squared first components of the projected eigenvectors [m]; their sum is 1.
        residuals: Bounds on the residual norms [m].
        complete: Whether all steps were made, or an invariant subspace was found.
    """

    nodes: FloatArray
    weights: FloatArray
    residuals: FloatArray
    complete: bool


def gauss_rule(
    operator: SymmetricOperator,
    start: Tensor,
    basis: KrylovBasis,
    num_steps: int,
    allowance: Allowance = UNBOUNDED,
) -> GaussRule:
    """Return the rule of m Lanczos steps with full reorthogonalisation, each one product.

    Args:
        operator: Symmetric operator of order n.
        start: Vector to start from, this rank's part [n_local]; not zero.
        basis: Room for m vectors; what it holds is overwritten.
        num_steps: m.
        allowance: Asked after every product whether the time is up, which ends the run with the
            steps made.

    Raises:
        MeasurementError: A product is NaN or infinite.
    """
    shard = operator.shard
    projected = Projected()
    eps = torch.finfo(operator.dtype).eps
    vector, scale, complete = start / shard.norm(start), 0.0, False
    expected = torch.zeros(0, dtype=torch.float64)
    while True:
        count = projected.count + 1
        basis[count - 1] = vector
        product = operator.matvec(vector)
        column, beta = basis.orthogonalize(product, count)
        check_finite(column, beta)
        projected.add(column, expected)
        scale = max(scale, beta, float(column.abs().max()))
        expected = torch.zeros(count, dtype=torch.float64)
        expected[-1] = beta
        # An invariant subspace is all that this vector sees.
        if count == num_steps or beta <= 10 * eps * scale:
            complete = True
            break
        if allowance.is_over():
            break
        vector = product.div_(beta)
    ritz = projected.solve([expected], count, eps=eps, scale=scale, ranks=shard.ranks)
    return GaussRule(
        nodes=ritz.values.numpy(),
        weights=ritz.rotation[0].square().numpy(),
        residuals=ritz.residuals.numpy(),
        complete=complete,
    )


def mean_density(rules: Sequence[GaussRule], size: int, num_products: int) -> SpectralDensity:
    """Return the density that rules give together, each with the same weight."""
    return SpectralDensity(
        nodes=np.concatenate([rule.nodes for rule in rules]),
        weights=np.concatenate([rule.weights for rule in rules]) / len(rules),
        size=size,
        num_products=num_products,
        exact=False,
    )


def random_signs(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Return this rank's part [n_local] of a vector of independent signs."""
    signs = torch.randint(0, 2, (operator.size,), generator=generator)
    return (2 * operator.shard.take(signs) - 1).to(operator.device, operator.dtype)

"""The traces of an operator and its square: exact on a subspace, by probes on the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator

_MOST_TOGETHER = 16
_TOGETHER_BYTES = 256 * 2**20


@dataclass(frozen=True)
class TraceEstimate:
    """A trace with its standard error.

    Attributes:
        value: The estimate.
        std_error: Its standard error; 0 where the subspace was the whole space.
        square: That of the square, the squared Frobenius norm, from the same products.
        square_std_error: Its standard error.
        num_products: Products with the operator spent.
    """

    value: float
    std_error: float
    square: float
    square_std_error: float
    num_products: int


def trace(
    operator: SymmetricOperator,
    ritz_values: Tensor,
    ritz_vectors: Tensor,
    *,
    num_probes: int = 16,
    seed: int = 0,
    allowance: Allowance = UNBOUNDED,
) -> TraceEstimate | None:
    """Return tr(A) and tr(A^2): sums over Ritz values + Hutchinson's estimates on the complement.

    With orthonormal Y and Ritz values theta_i = y_i^T A y_i,
    tr(A) = sum_i theta_i + E[(P z)^T A (P z)], P = I - Y Y^T, z of independent signs. This is
    unbiased for every Y (Meyer et al. 2021, Hutch++, with a Krylov sketch), and the probes' spread
    comes only from what Y has not captured. The same products give
    tr(A^2) = sum_i theta_i^2 + E norm(A P z)^2, which is low by the sum of the squared residual
    norms of the y_i: under tol^2 of the first sum where they have converged.

    Args:
        operator: Symmetric operator of order n.
        ritz_values: [k], may be empty.
        ritz_vectors: Orthonormal rows, this rank's part of them [k, n_local]; on any device.
        num_probes: Probes z, at least 2; each costs one product.
        seed: Of the probes.
        allowance: Asked after 1, 2, 4, 8, 16, 32, ... probes; True ends with those made so far.

    Returns:
        The estimate, or None where fewer than two probes could be made.

    Raises:
        ValueError: Fewer than two probes, which have no standard error.
    """
    if num_probes < 2:
        raise ValueError(f"num_probes={num_probes}; a standard error needs at least 2.")
    captured, captured_square = float(ritz_values.sum()), float(ritz_values.square().sum())
    shard = operator.shard
    if len(ritz_vectors) == operator.size:
        return TraceEstimate(captured, 0.0, captured_square, 0.0, 0)
    generator = torch.Generator().manual_seed(seed)
    samples: list[float] = []
    squares: list[float] = []
    vector_bytes = shard.ranks.share_of(operator.size) * operator.dtype.itemsize
    most = max(1, min(_MOST_TOGETHER, _TOGETHER_BYTES // (3 * vector_bytes)))
    rows_at_once = max(1, _TOGETHER_BYTES // vector_bytes)
    while len(samples) < num_probes:
        # More and more at once: one whose time is up soon has an answer, and is not late.
        together = min(max(1, len(samples)), most, num_probes - len(samples))
        signs = torch.empty(together, shard.length, dtype=operator.dtype, device=operator.device)
        for row in signs:
            whole = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8)
            row.copy_(shard.take(whole)).mul_(2).sub_(1)
        for rows in ritz_vectors.split(rows_at_once):  # they may live elsewhere
            rows = rows.to(signs)
            signs.addmm_(shard.ranks.all_reduce(signs @ rows.T), rows, alpha=-1)
        products = operator.matmat(signs)
        sums = torch.stack([(signs * products).sum(1), products.square().sum(1)])
        first, second = shard.ranks.all_reduce(sums).tolist()
        samples += first
        squares += second
        if allowance.is_over():
            break
    if len(samples) < 2:
        return None
    mean, std_error = _mean(samples)
    square, square_std_error = _mean(squares)
    return TraceEstimate(
        captured + mean, std_error, captured_square + square, square_std_error, len(samples)
    )


def _mean(samples: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent samples, at least two, and its standard error."""
    mean = math.fsum(samples) / len(samples)
    variance = math.fsum((sample - mean) ** 2 for sample in samples) / (len(samples) - 1)
    return mean, math.sqrt(variance / len(samples))

"""Spectral densities by stochastic Lanczos quadrature, of a whole operator or a diagonal block."""

from __future__ import annotations

import numpy as np
import torch

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator, check_finite
from lightning_hessian.results import SpectralDensity
from lightning_hessian.solvers.basis import KrylovBasis
from lightning_hessian.solvers.quadrature import GaussRule, gauss_rule, mean_density, random_signs


def spectral_density(
    operator: SymmetricOperator,
    *,
    num_steps: int = 80,
    num_probes: int = 4,
    seed: int = 0,
    allowance: Allowance = UNBOUNDED,
) -> SpectralDensity | None:
    """Return the density of the eigenvalues, by Lanczos from probes of random signs.

    From each probe, m steps with full reorthogonalisation give m Ritz values and, as the squares
    of the first components of the projected eigenvectors, their weights: a Gauss quadrature whose
    mean over probes is unbiased for all moments below 2 m (Ubaru, Chen and Saad 2017). Where the
    order is at most ``num_steps * num_probes``, the products with all unit vectors cost no more
    and give the eigenvalues themselves.

    Memory: m + 2 vectors, or n^2 numbers if exact. Work: m products for each probe.

    Args:
        operator: Symmetric operator of order n.
        num_steps: m, steps from each probe.
        num_probes: Probes, each with the same weight.
        seed: Of the probes.
        allowance: Asked after every product whether the time is up, which ends with the probes
            completed.

    Returns:
        The density, or None where time was up before the first probe was done.

    Raises:
        ValueError: Fewer than one step or probe.
        MeasurementError: A product is NaN or infinite.

    Example:
        >>> from lightning_hessian.linear.operator import MatrixOperator
        >>> spectral_density(MatrixOperator(torch.diag(torch.tensor([3.0, 1.0])))).nodes
        array([1., 3.])
    """
    if num_steps < 1 or num_probes < 1:
        raise ValueError(f"num_steps={num_steps}, num_probes={num_probes}; each is at least 1.")
    if operator.size <= num_steps * num_probes:
        return _all_eigenvalues(operator, allowance)
    generator = torch.Generator().manual_seed(seed)
    basis = KrylovBasis(num_steps, operator)
    rules: list[GaussRule] = []
    for _ in range(num_probes):
        start = random_signs(operator, generator)
        rule = gauss_rule(operator, start, basis, num_steps, allowance)
        if not rule.complete:
            break
        rules.append(rule)
    num_products = sum(len(rule.nodes) for rule in rules)
    return mean_density(rules, operator.size, num_products) if rules else None


def _all_eigenvalues(operator: SymmetricOperator, allowance: Allowance) -> SpectralDensity | None:
    rows = []
    for unit in torch.eye(operator.size, dtype=operator.dtype, device=operator.device):
        rows.append(operator.shard.gather(operator.matvec(operator.shard.take(unit))))
        if len(rows) < operator.size and allowance.is_over():
            return None
    matrix = torch.stack(rows).to("cpu", torch.float64)
    check_finite(matrix)
    nodes = torch.linalg.eigvalsh((matrix + matrix.T) / 2).numpy()
    weights = np.full(len(nodes), 1 / len(nodes))
    return SpectralDensity(nodes, weights, operator.size, operator.size, True)

"""The papers' protocol: Ritz values of several Lanczos runs, pooled into one list."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.results import FloatArray, SpectralDensity
from lightning_hessian.solvers.basis import KrylovBasis
from lightning_hessian.solvers.quadrature import GaussRule, gauss_rule, mean_density, random_signs
from lightning_hessian.solvers.storage import ANYWHERE, BasisStorage, placed


@dataclass(frozen=True, eq=False)
class PooledRitzValues:
    """Ritz values of several runs in one list, descending.

    Attributes:
        values: float64 [p].
        residuals: Bounds on the residual norms [p].
        runs: Which run each comes from, int64 [p].
        is_copy: Whether a larger or equal entry of another run is the same eigenvalue: both have
            converged, and are apart by no more than their bounds allow; bool [p].
        num_products: Products with the operator.
        stopped: ``"done"``, or ``"interrupted"`` where the last run, or the others, are missing.
        density: The density that the complete runs give, None where there is none.
    """

    values: FloatArray
    residuals: FloatArray
    runs: NDArray[np.int64]
    is_copy: NDArray[np.bool_]
    num_products: int
    stopped: str
    density: SpectralDensity | None


def pooled_ritz_values(
    operator: SymmetricOperator,
    *,
    num_runs: int = 3,
    num_steps: int = 1000,
    tol: float = 1e-3,
    storage: BasisStorage = ANYWHERE,
    seed: int = 0,
    max_products: int | None = None,
    allowance: Allowance = UNBOUNDED,
) -> PooledRitzValues:
    """Return the Ritz values of some runs of m Lanczos steps from vectors of random signs.

    What HPL takes for eigenvalues of Transformers (C.1.5, C.2.2; stochastic Lanczos quadrature
    after PyHessian): no convergence is asked for, and an eigenvalue that every run has found
    stands in the list as often. Reorthogonalisation is full here, so that no run has copies of
    its own.

    Memory: m + 2 vectors, the same for all runs.

    Args:
        operator: Symmetric operator of order n.
        num_runs: How many runs.
        num_steps: m, at most n are made.
        tol: A Ritz value has converged at residual <= tol * abs(value); for telling copies.
        storage: Where the basis may live.
        seed: Of the start vectors.
        max_products: Bound on the products of all runs together.
        allowance: Asked after every product whether the time is up, which ends with the values
            there are.

    Raises:
        ValueError: Fewer than one run or step.
        MeasurementError: A product is NaN or infinite, or the basis does not fit.

    Example:
        >>> from lightning_hessian.linear.operator import MatrixOperator
        >>> matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
        >>> found = pooled_ritz_values(MatrixOperator(matrix), num_runs=2)
        >>> found.values.round(6), int(found.is_copy.sum())
        (array([3., 3., 2., 2., 1., 1.]), 3)
    """
    if num_runs < 1 or num_steps < 1:
        raise ValueError(f"num_runs={num_runs}, num_steps={num_steps}; each is at least 1.")
    steps = min(num_steps, operator.size)
    storage, _ = placed(storage, steps, steps, operator)
    basis = KrylovBasis(steps, operator, storage)
    generator = torch.Generator().manual_seed(seed)
    rules: list[GaussRule] = []
    for run in range(num_runs):
        start = random_signs(operator, generator)
        made = sum(len(rule.nodes) for rule in rules)
        fitting = steps if max_products is None else min(steps, max_products - made)
        rule = gauss_rule(operator, start, basis, fitting, allowance)
        cut = len(rule.nodes) == fitting < steps  # the bound ended it, not an invariant subspace
        rules.append(dataclasses.replace(rule, complete=rule.complete and not cut))
        if not rules[-1].complete or made + len(rule.nodes) == max_products:
            break
        if run + 1 < num_runs and allowance.is_over():
            break
    values = np.concatenate([rule.nodes for rule in rules])
    residuals = np.concatenate([rule.residuals for rule in rules])
    runs = np.repeat(np.arange(len(rules)), [len(rule.nodes) for rule in rules])
    order = np.argsort(-values, kind="stable")
    values, residuals, runs = values[order], residuals[order], runs[order]
    complete = [rule for rule in rules if rule.complete]
    done = len(rules) == num_runs and rules[-1].complete
    return PooledRitzValues(
        values=values,
        residuals=residuals,
        runs=runs,
        is_copy=copies(values, residuals, runs, tol),
        num_products=len(values),
        stopped="done" if done else "interrupted",
        density=mean_density(complete, operator.size, len(values)) if complete else None,
    )


def copies(
    values: FloatArray, residuals: FloatArray, runs: NDArray[np.int64], tol: float
) -> NDArray[np.bool_]:
    """Return which of pooled Ritz values (descending) another run has found too, further up.

    Going down the list, a converged value belongs to the eigenvalue that was met last, if it is
    within both bounds of it and this run has not had its share of that one; else it is a new one.
    """
    found = np.zeros(len(values), dtype=bool)
    converged = residuals <= tol * np.abs(values)
    met: int | None = None
    seen: set[int] = set()
    for i in np.flatnonzero(converged):
        # Bounds near rounding are no wider than the spacing of the last digits.
        allowed = 0.0 if met is None else residuals[met] + residuals[i] + 1e-6 * abs(values[met])
        if met is not None and values[met] - values[i] <= allowed and int(runs[i]) not in seen:
            found[i] = True
            seen.add(int(runs[i]))
        else:
            met, seen = int(i), {int(runs[i])}
    return found

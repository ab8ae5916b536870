"""The two ways to the top of a spectrum: converged eigenvalues, or pooled Ritz values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.measure.options import PooledSLQ
from lightning_hessian.results import FloatArray, SpectralDensity
from lightning_hessian.solvers.density import spectral_density
from lightning_hessian.solvers.lanczos import RitzPairs
from lightning_hessian.solvers.pooled import pooled_ritz_values
from lightning_hessian.solvers.storage import BasisStorage
from lightning_hessian.solvers.trace import TraceEstimate

if TYPE_CHECKING:
    from lightning_hessian.linear.operator import SymmetricOperator

DEFAULT_EIGENVALUES = 50
DEFAULT_POOLED = 1000

_DENSITY_STEPS, _DENSITY_PROBES, _LEAST_DENSITY_STEPS = 80, 4, 10
DENSITY_PRODUCTS = _DENSITY_STEPS * _DENSITY_PROBES
"""What a density of the whole spectrum takes, at most."""


@dataclass(frozen=True, eq=False)
class Top:
    """The top of a spectrum by whatever protocol; ``good`` of the vectors serve for the trace."""

    values: FloatArray
    residuals: FloatArray
    vectors: torch.Tensor
    good: int
    lowest: float | None
    num_products: int
    warnings: tuple[str, ...]
    num_copies: int = 0
    density: SpectralDensity | None = None
    exact_trace: TraceEstimate | None = None  # where the whole space was searched


def ritz_top(ritz: RitzPairs, count: int, tol: float) -> Top:
    """Return the top of a spectrum as Lanczos has found it."""
    # The converged ones before the first that has not; a view, for they may be large.
    good = len(ritz.values) if ritz.converged.all() else int(ritz.converged.argmin())
    lowest_found = ritz.lowest_residual <= tol * abs(ritz.lowest)
    exact = None
    if ritz.trace is not None and ritz.trace_of_square is not None:
        exact = TraceEstimate(ritz.trace, 0.0, ritz.trace_of_square, 0.0, num_products=0)
    return Top(
        values=ritz.values,
        residuals=ritz.residuals,
        vectors=ritz.vectors,
        good=good,
        lowest=ritz.lowest if lowest_found else None,
        num_products=ritz.num_products,
        warnings=_unconverged(ritz, count, tol),
        exact_trace=exact,
    )


def pooled_top(
    operator: SymmetricOperator,
    count: int,
    protocol: PooledSLQ,
    tol: float,
    storage: BasisStorage,
    max_products: int | None,
    allowance: Allowance,
    seed: int,
) -> Top:
    """Return the top of the pooled Ritz values, and what to say of them."""
    found = pooled_ritz_values(
        operator,
        num_runs=protocol.num_runs,
        num_steps=protocol.num_steps,
        tol=tol,
        max_products=max_products,
        storage=storage,
        seed=seed,
        allowance=allowance,
    )
    wanted = protocol.num_runs * min(protocol.num_steps, operator.size)
    said: tuple[str, ...] = ()
    if found.stopped != "done":
        said = (
            f"PooledSLQ pools {found.num_products} Ritz values instead of {wanted}: the budget "
            "ran out. Allow more, or lower num_steps.",
        )
    lowest = float(found.values[-1])
    lowest_found = found.residuals[-1] <= tol * abs(lowest)
    empty = torch.zeros(0, operator.shard.length, dtype=operator.dtype, device=operator.device)
    return Top(
        values=found.values[:count],
        residuals=found.residuals[:count],
        vectors=empty,
        good=0,
        lowest=lowest if lowest_found else None,
        num_products=found.num_products,
        warnings=said,
        num_copies=int(found.is_copy[:count].sum()),
        density=found.density,
    )


def whole_density(
    operator: SymmetricOperator, allowance: Allowance, seed: int
) -> SpectralDensity | None:
    """Return the density of the whole spectrum, None where the budget leaves too little for it."""
    steps = _DENSITY_STEPS
    left = allowance.products_left
    if left is not None:
        steps = min(steps, left // _DENSITY_PROBES)
        if steps < min(_LEAST_DENSITY_STEPS, operator.size):
            return None
    return spectral_density(
        operator, num_steps=steps, num_probes=_DENSITY_PROBES, seed=seed, allowance=allowance
    )


def _unconverged(ritz: RitzPairs, num_eigenvalues: int, tol: float) -> tuple[str, ...]:
    """Return what to say of eigenvalues that have not converged."""
    found = int(ritz.converged.sum())
    if ritz.stopped in ("converged", "exhausted") or found == num_eigenvalues:
        return ()
    reason = {
        "bound": "the bound on products was reached; allow more or lower num_eigenvalues",
        "interrupted": "the time was up; allow more or lower num_eigenvalues",
        "precision": "the others are too small beside lambda_1 for this precision (or zero); "
        "lower num_eigenvalues, raise tol, or use float64 (and a basis in full precision)",
        "memory": "the basis is full, and in bfloat16 it cannot restart; allow it more memory, "
        "or lower num_eigenvalues",
    }[ritz.stopped]
    return (
        f"{found} of {num_eigenvalues} eigenvalues converged to tol={tol:g} after "
        f"{ritz.num_products} products: {reason}.",
    )

"""What a Lanczos run finds, and the vectors that wait to join its basis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_hessian.results import FloatArray


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs at the top of a spectrum, and the lowest eigenvalue.

    Attributes:
        values: Ritz values, float64 [K], descending.
        residuals: Bounds on the residual norms, float64 [K].
        converged: ``residuals <= tol * abs(values)``, bool [K].
        vectors: Orthonormal Ritz vectors, this rank's part [K, n_local], where the basis was and
            in its precision; they share its memory.
        lowest: The lowest Ritz value.
        lowest_residual: Its residual bound.
        num_products: Products with the operator, those before an interruption included.
        stopped: Why the iteration ended: ``"converged"``, ``"exhausted"`` (the whole space was
            searched), ``"precision"`` (what has not converged is held up by rounding),
            ``"memory"`` (a basis that cannot restart is full), ``"bound"`` or ``"interrupted"``
            (by then all may have converged, but the search for missed copies had not ended).
        trace: That of the operator, exact but for rounding, where the basis spans the whole
            space; else None.
    """

    values: FloatArray
    residuals: FloatArray
    converged: NDArray[np.bool_]
    vectors: Tensor
    lowest: float
    lowest_residual: float
    num_products: int
    stopped: str
    trace: float | None = None


@dataclass
class Pending:
    """A unit vector orthogonal to the basis that is to join it.

    ``coupling`` says how the products with the basis vectors lean on it: A v_i = (what lies in
    the basis) + coupling[i] * vector + (the same for the other pending vectors).
    """

    vector: Tensor
    coupling: Tensor
    is_fresh: bool = False  # orthogonal to the basis as it is now, not as it was some steps ago

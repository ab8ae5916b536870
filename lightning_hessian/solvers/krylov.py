"""What a Lanczos run holds between steps (basis, products, pending vectors), and what it finds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.results import FloatArray
from lightning_hessian.solvers.basis import KrylovBasis
from lightning_hessian.solvers.projected import Projected
from lightning_hessian.solvers.storage import BasisStorage


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
        trace_of_square: That of its square, likewise.
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
    trace_of_square: float | None = None


@dataclass
class Pending:
    """A unit vector orthogonal to the basis that is to join it.

    ``coupling`` says how the products with the basis vectors lean on it: A v_i = (what lies in
    the basis) + coupling[i] * vector + (the same for the other pending vectors).
    """

    vector: Tensor
    coupling: Tensor
    is_fresh: bool = False  # orthogonal to the basis as it is now, not as it was some steps ago


class KrylovState:
    """A basis in which an operator is known, as far as its products lie in it.

    The product of a basis vector is the combination of basis vectors that ``projected`` holds,
    and of the pending vectors by their couplings.

    Args:
        operator: Symmetric operator of order n.
        wanted: How many eigenpairs are looked for.
        capacity: How many vectors the basis holds before a restart.
        storage: Where the basis lies.
        num_rows: Room for so many vectors, where fewer than ``capacity`` are needed.

    Attributes:
        shard: Which entries of a vector this rank holds.
        eps: Rounding of the operator's dtype.
        basis: The vectors.
        projected: The operator in the basis.
        pending: Unit vectors on which products lean, not yet in the basis.
        scale: Largest coefficient so far, an estimate of the norm of the operator.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        wanted: int,
        capacity: int,
        storage: BasisStorage,
        num_rows: int | None = None,
    ) -> None:
        self.operator = operator
        self.shard = operator.shard
        self.wanted = wanted
        self.storage = storage
        # A bound on products may need fewer rows, but moves no restart: it may be raised later.
        self.capacity = capacity
        rows = capacity if num_rows is None else min(num_rows, capacity)
        self.basis = KrylovBasis(rows, operator, storage)
        self.eps = torch.finfo(operator.dtype).eps
        # Where vectors are rounded, what is measured with them is less exact than the recurrence.
        self.projected = Projected() if storage.restarts else Projected(tridiagonal_from=0)
        self.pending: list[Pending] = []
        self.scale = 0.0

    @property
    def count(self) -> int:
        """Vectors in the basis; their products are known."""
        return self.projected.count

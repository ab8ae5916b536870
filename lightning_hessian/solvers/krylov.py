"""What a Lanczos run holds between steps: a basis, the products of its vectors, what is pending."""

from __future__ import annotations

import torch

from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.solvers.basis import KrylovBasis
from lightning_hessian.solvers.pairs import Pending
from lightning_hessian.solvers.projected import Projected
from lightning_hessian.solvers.storage import BasisStorage


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
        self.basis = KrylovBasis(
            capacity if num_rows is None else min(num_rows, capacity),
            self.shard, dtype=operator.dtype, device=operator.device, storage=storage,
        )  # fmt: skip
        self.eps = torch.finfo(operator.dtype).eps
        # Where vectors are rounded, what is measured with them is less exact than the recurrence.
        self.projected = Projected() if storage.restarts else Projected(tridiagonal_from=0)
        self.pending: list[Pending] = []
        self.scale = 0.0

    @property
    def count(self) -> int:
        """Vectors in the basis; their products are known."""
        return self.projected.count

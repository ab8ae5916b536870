"""The Krylov basis: one contiguous tensor, worked on by matrix products only."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.operators.memory import free_bytes
from lightning_hessian.results import MeasurementError

_ROTATION_BYTES = 64 * 2**20


class KrylovBasis:
    """Orthonormal vectors as the first rows of one tensor [capacity, n].

    Args:
        capacity: How many vectors fit.
        size: Their length n.
        dtype: Their precision.
        device: Where they live.
    """

    def __init__(
        self, capacity: int, size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.vectors = torch.empty(capacity, size, dtype=dtype, device=device)

    def __getitem__(self, index: int) -> Tensor:
        """Returns one vector [n], a view."""
        return self.vectors[index]

    def orthogonalize(self, vector: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Removes from ``vector``, in place, its part in the span of the first ``count`` rows.

        Classical Gram-Schmidt done twice, which is as good as it gets ("twice is enough"): two
        pairs of matrix-vector products.

        Returns:
            The coefficients that were removed [count], and the norm of what is left, a scalar.
        """
        rows = self.vectors[:count]
        removed = rows @ vector
        vector.addmv_(rows.T, removed, alpha=-1)
        again = rows @ vector
        vector.addmv_(rows.T, again, alpha=-1)
        return removed.add_(again), torch.linalg.vector_norm(vector)

    def rotate(self, coefficients: Tensor) -> None:
        """Replaces the first rows by combinations of them, block of columns by block of columns.

        Args:
            coefficients: [count, kept] with orthonormal columns; the first ``kept`` rows become
                ``coefficients.T @ rows``.
        """
        count, kept = coefficients.shape
        weights = coefficients.T.to(self.vectors)
        width = max(1, _ROTATION_BYTES // (count * self.vectors.element_size()))
        for start in range(0, self.vectors.shape[1], width):
            columns = slice(start, start + width)
            self.vectors[:kept, columns] = weights @ self.vectors[:count, columns]


def fitting_capacity(
    wanted: int, least: int, size: int, *, dtype: torch.dtype, device: torch.device
) -> int:
    """Returns how many basis vectors to hold: ``wanted``, or what fits half the free memory.

    Args:
        wanted: As many as would be good.
        least: As many as there must be.
        size: Length n of a vector.
        dtype: Precision of a vector.
        device: Where the basis will live.

    Raises:
        MeasurementError: Not even ``least`` vectors fit; says how many do.
    """
    vector_bytes = size * torch.empty((), dtype=dtype).element_size()
    fitting = int(free_bytes(device) / 2 / vector_bytes) - 1
    if fitting < least:
        raise MeasurementError(
            f"A basis of {least} vectors of {size:,} parameters takes "
            f"{least * vector_bytes / 1e9:.1f} GB, and {max(fitting, 0)} vectors fit into half of "
            "the free memory. Lower `num_eigenvalues`, or select fewer parameters (`parameters=`)."
        )
    return min(wanted, fitting)

"""The Krylov basis: one contiguous tensor, worked on by matrix products only."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.distributed import Shard
from lightning_hessian.operators.memory import free_bytes
from lightning_hessian.results import MeasurementError

_ROTATION_BYTES = 64 * 2**20


class KrylovBasis:
    """Orthonormal vectors as the first rows of one tensor [capacity, n_local].

    Args:
        capacity: How many vectors fit.
        shard: Which part of them this rank holds.
        dtype: Their precision.
        device: Where they live.
    """

    def __init__(
        self, capacity: int, shard: Shard, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shard = shard
        self.vectors = torch.empty(capacity, shard.length, dtype=dtype, device=device)

    def __getitem__(self, index: int) -> Tensor:
        """Returns this rank's part of one vector [n_local], a view."""
        return self.vectors[index]

    def orthogonalize(self, vector: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Removes from ``vector``, in place, its part in the span of the first ``count`` rows.

        Classical Gram-Schmidt done twice, which is as good as it gets ("twice is enough"): two
        pairs of matrix-vector products, and two sums over the ranks: the second brings the norm
        too, as what is left of the length once the second coefficients are gone.

        Returns:
            The coefficients that were removed [count], and the norm of what is left, a scalar.
        """
        rows = self.vectors[:count]
        removed = self.shard.ranks.sum(rows @ vector)
        vector.addmv_(rows.T, removed, alpha=-1)
        if self.shard.ranks.world == 1:
            again = rows @ vector
            vector.addmv_(rows.T, again, alpha=-1)
            return removed.add_(again), torch.linalg.vector_norm(vector)
        sums = self.shard.ranks.sum(torch.cat([rows @ vector, (vector @ vector).reshape(1)]))
        again, squared = sums[:-1], sums[-1]
        vector.addmv_(rows.T, again, alpha=-1)
        return removed.add_(again), (squared - again @ again).clamp_(min=0).sqrt_()

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
    wanted: int, least: int, shard: Shard, *, dtype: torch.dtype, device: torch.device
) -> int:
    """Returns how many basis vectors to hold: ``wanted``, or what fits half the free memory.

    Args:
        wanted: As many as would be good.
        least: As many as there must be.
        shard: Which part of a vector this rank holds.
        dtype: Precision of a vector.
        device: Where the basis will live.

    Raises:
        MeasurementError: Not even ``least`` vectors fit; says how many do.
    """
    vector_bytes = max(1, shard.length) * torch.empty((), dtype=dtype).element_size()
    fitting = int(free_bytes(device) / 2 / shard.ranks.neighbours / vector_bytes) - 1
    fitting = int(shard.ranks.least(fitting))
    if fitting < least:
        raise MeasurementError(
            f"A basis of {least} vectors of {shard.length:,} numbers takes "
            f"{least * vector_bytes / 1e9:.1f} GB, and {max(fitting, 0)} vectors fit into half of "
            "the free memory. Lower `num_eigenvalues`, or select fewer parameters (`parameters=`)."
        )
    return min(wanted, fitting)

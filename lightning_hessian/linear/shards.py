"""Vectors in shards: which entries each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_hessian.linear.ranks import ALONE, Ranks


@dataclass(frozen=True, eq=False)
class Shard:
    """Which entries of vectors of length ``size`` this rank holds.

    Together the ranks hold every entry once. What a solver draws at random it draws whole, on
    every rank alike, and takes its part: so results do not depend on the number of ranks.

    Attributes:
        size: Length n of a whole vector.
        positions: The entries held: a slice, or their sorted indices, int64 [n_local].
        ranks: Who holds the others.

    Example:
        >>> shard = Shard.whole(3)
        >>> shard.length, shard.norm(torch.tensor([3.0, 4.0, 0.0]))
        (3, tensor(5.))
    """

    size: int
    positions: slice | Tensor
    ranks: Ranks = ALONE

    @classmethod
    def whole(cls, size: int) -> Shard:
        """Return the shard of a process that holds all entries."""
        return cls(size, slice(0, size))

    @classmethod
    def even(cls, size: int, ranks: Ranks) -> Shard:
        """Return this rank's of slices of equal length; the last may be shorter, or empty."""
        width = ranks.share_of(size)
        start = min(ranks.rank * width, size)
        return cls(size, slice(start, min(start + width, size)), ranks)

    @cached_property
    def length(self) -> int:
        """How many entries this rank holds, n_local."""
        if isinstance(self.positions, slice):
            return int(self.positions.stop - self.positions.start)
        return len(self.positions)

    def take(self, whole: Tensor) -> Tensor:
        """Return this rank's part [..., n_local] of whole vectors [..., n]."""
        if isinstance(self.positions, slice):
            return whole[..., self.positions]
        return whole[..., self.positions.to(whole.device)]

    def gather(self, part: Tensor) -> Tensor:
        """Return whole vectors [..., n] on every rank, from the parts [..., n_local]."""
        if self.ranks.world == 1:
            return part
        whole = part.new_zeros(*part.shape[:-1], self.size)
        where = self.positions
        whole[..., where if isinstance(where, slice) else where.to(part.device)] = part
        return self.ranks.all_reduce(whole)

    def dot(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the scalar product of whole vectors, from parts [n_local]."""
        return self.ranks.all_reduce(first @ second)

    def norm(self, part: Tensor) -> Tensor:
        """Return the norm of a whole vector, from its parts [n_local]."""
        norm = torch.linalg.vector_norm(part)
        return norm if self.ranks.world == 1 else self.ranks.all_reduce(norm.square_()).sqrt_()

    def restricted(self, coordinates: Tensor) -> tuple[Shard, Tensor]:
        """Return the shard of vectors on some coordinates only, and where this rank's lie.

        Args:
            coordinates: Positions in the whole vector, int64 [m].

        Returns:
            The shard of vectors [m], and the positions of its entries in this rank's part.
        """
        if self.ranks.world == 1:
            return Shard.whole(len(coordinates)), coordinates
        if isinstance(self.positions, slice):
            local = coordinates - self.positions.start
            held = (local >= 0) & (local < self.length)
        else:
            positions = self.positions.to(coordinates.device)
            local = torch.searchsorted(positions, coordinates)
            within = local.clamp(max=max(self.length - 1, 0))
            held = (
                positions[within] == coordinates
                if self.length
                else torch.zeros_like(coordinates, dtype=torch.bool)
            )
        chosen = held.nonzero().flatten()
        return Shard(len(coordinates), chosen, self.ranks), local[chosen]

"""Gradients whose mini-batches are spread over ranks, and whose entries lie in slices there."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.linear.shards import Shard
from lightning_hessian.operators.gradients.rows import MiniBatchGradients, lengths
from lightning_hessian.probe.parameters import ParameterSpace


class DealtGradients:
    """The gradients of T mini-batches, of which each rank computes its share.

    Gradients are computed whole, and exchanged at once: each rank is left with a slice of the
    parameters of all of them. A share of T n / world numbers can then be stored, inner products
    are sums over slices, and a parameter's values over the iterations lie together.

    Args:
        source: Those that this rank computes: every ``ranks.world``-th, None where there are none.
        num_gradients: T, of all ranks.
        space: The parameters.
        ranks: Who computes, and who holds.
    """

    def __init__(
        self,
        source: MiniBatchGradients | None,
        num_gradients: int,
        space: ParameterSpace,
        ranks: Ranks,
    ) -> None:
        self._source = source
        self._scale: Tensor | None = None
        self.num_gradients, self.size = num_gradients, space.size
        self.shard, self.stride = Shard.even(space.size, ranks), ranks.world
        self.dtype, self.device = space.dtype, space.device

    def precondition(self, scale: Tensor) -> None:
        """Multiply every gradient from now on by ``scale`` [n_local], entry by entry."""
        self._scale = scale

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the slices of gradients ``start`` to ``stop - 1``, [stop - start, n_local].

        All ranks call it together. Each computes those of its mini-batches among them, sends of
        every one to each rank its slice, and so receives its own slice of all.

        Raises:
            RankError: A gradient could not be computed on some rank, or is NaN or infinite.
        """
        world, rank = self.stride, self.shard.ranks.rank
        # Rank r computes t = r, r + world, ...: so many of them lie below start and below stop.
        firsts = [max(0, -(-(start - r) // world)) for r in range(world)]
        counts = [max(0, -(-(stop - r) // world)) - firsts[r] for r in range(world)]
        widths = lengths(self.shard)
        with self.shard.ranks.together():
            if self._source is not None and counts[rank]:
                mine = self._source.rows(firsts[rank], firsts[rank] + counts[rank])
            else:
                mine = torch.empty(0, self.size, dtype=self.dtype, device=self.device)
        shapes = [(count, self.shard.length) for count in counts]
        received = self.shard.ranks.all_to_all(mine.split(widths, dim=1), shapes)
        del mine
        rows = torch.empty(stop - start, self.shard.length, dtype=self.dtype, device=self.device)
        for r, part in enumerate(received):
            rows[(r - start) % world :: world] = part.to(self.device)
        if self._scale is not None:
            rows.mul_(self._scale)
        return rows

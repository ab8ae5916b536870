"""The Krylov basis: one contiguous tensor, worked on by matrix products only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.solvers.storage import BasisStorage

_ROTATION_BYTES = 32 * 2**20
_BLOCK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""How much of a basis that lives elsewhere is brought to the device at once."""

_CACHED_BYTES = 4 * 2**20
_LEAST_CACHED = 4
"""Rows that a processor finds in its cache when it comes to them again: 4 MiB of them, or four,
which read the vector once. Measured at 1000 x 61,706 on one core: 17 ms, all at once 25 ms."""

_ENOUGH_LEFT = 0.7
"""Orthogonalisation is not repeated where at least this share of a vector is left (Daniel,
Gragg, Kaufman and Stewart 1976): then what it has left in the basis is rounding."""

IN_PLACE = BasisStorage(tier="device")


class KrylovBasis:
    """Orthonormal vectors as the first rows of one tensor [capacity, n_local].

    The rows may live elsewhere than the vectors, and in bfloat16 (`BasisStorage`); then they are
    brought to the device block by block. What is written last is kept in full precision too.

    Args:
        capacity: How many vectors fit.
        operator: Whose vectors they are: of its precision, where it computes, in its shards.
        storage: Where the rows live; as a rule where the vectors do.
    """

    def __init__(
        self, capacity: int, operator: SymmetricOperator, storage: BasisStorage = IN_PLACE
    ) -> None:
        shard, dtype, device = operator.shard, operator.dtype, operator.device
        self.shard, self.dtype, self.device = shard, dtype, device
        self.rows = storage.allocate(capacity, shard.length, dtype, device)
        self._at_hand = self.rows.dtype == dtype and self.rows.device == device
        row_bytes = max(1, shard.length) * dtype.itemsize
        self._block = max(1, _BLOCK_BYTES.get(device.type, 2**28) // row_bytes)
        self._cached = max(_LEAST_CACHED, _CACHED_BYTES // row_bytes)
        self.recent: dict[int, Tensor] = {}  # rows by index, exact, where `rows` are not

    def __getitem__(self, index: int) -> Tensor:
        """Return this rank's part of one vector [n_local]; a view, if the rows are at hand."""
        if index in self.recent:
            return self.recent[index]
        return self.rows[index].to(self.device, self.dtype)

    def __setitem__(self, index: int, vector: Tensor) -> None:
        """Store a vector [n_local]."""
        self.rows[index].copy_(vector)
        if not self._at_hand:
            self.recent = {i: row for i, row in self.recent.items() if i == index - 1}
            self.recent[index] = vector.clone()

    def orthogonalize(self, vector: Tensor, count: int) -> tuple[Tensor, float]:
        """Remove from ``vector``, in place, its part in the span of the first ``count`` rows.

        First what lies along the last two rows, which in a Lanczos step is almost all, then
        Gram-Schmidt against all, in blocks, and once more unless most was left ("twice is
        enough"). A Lanczos step thus reads the basis twice, not four times, on one CPU once from
        memory and once from its cache, and the host waits for the device once. Rows that live
        elsewhere are read once for both.

        Returns:
            The coefficients that were removed, float64 [count] on the CPU, and the norm of what
            is left.
        """
        removed = torch.zeros(count, dtype=torch.float64)
        near = slice(max(0, count - 2), count)
        if self._at_hand:
            recent = self.rows[near]
        else:
            recent = torch.stack([self[i] for i in range(near.start, near.stop)])
        along = self.shard.ranks.all_reduce(recent @ vector)
        vector.addmv_(recent.T, along, alpha=-1)
        for _ in range(2):
            found, before, left = self._remove(vector, count, near, recent)
            host = torch.cat([along, found, before, left]).to("cpu", torch.float64)
            removed[near] += host[: len(along)]
            removed += host[len(along) : -2]
            if not host[-1] < _ENOUGH_LEFT * host[-2]:
                break
            along = torch.zeros_like(along)
        return removed, float(host[-1])

    def _remove(
        self, vector: Tensor, count: int, near: slice, recent: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Remove the part along all rows once; return it [count], and the norms around it [1]."""
        if not self._at_hand:
            before = self.shard.norm(vector)
            found = vector.new_empty(count)
            for part, rows in self.blocks(near.start):
                found[part] = self.shard.ranks.all_reduce(rows @ vector)
                vector.addmv_(rows.T, found[part], alpha=-1)
            found[near] = self.shard.ranks.all_reduce(recent @ vector)
            vector.addmv_(recent.T, found[near], alpha=-1)
            return found, before.reshape(1), self.shard.norm(vector).reshape(1)
        rows = self.rows[:count]
        norm = torch.linalg.vector_norm
        if self.shard.ranks.world == 1:
            before, found = norm(vector), vector.new_empty(count)
            # Block after block, each against what the blocks before have left: the second use of
            # its rows finds them in the cache, and rounding is that of modified Gram-Schmidt.
            step = self._cached if self.device.type == "cpu" else max(1, count)
            for start in range(0, count, step):
                block = rows[start : start + step]
                along = block @ vector
                found[start : start + step] = along
                vector.addmv_(block.T, along, alpha=-1)
            return found, before.reshape(1), norm(vector).reshape(1)
        # One sum over the ranks for both; the norm of what is left follows from them.
        sums = self.shard.ranks.all_reduce(torch.cat([rows @ vector, (vector @ vector).reshape(1)]))
        found, squared = sums[:-1], sums[-1:]
        vector.addmv_(rows.T, found, alpha=-1)
        return found, squared.sqrt(), (squared - found @ found).clamp_(min=0).sqrt_()

    def blocks(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the first rows in blocks, on the device and in the precision of vectors.

        From pinned memory, the next block is on its way while one is worked on.
        """
        if self._at_hand:
            yield slice(0, count), self.rows[:count]
            return
        starts = range(0, count, self._block)
        parts = [slice(start, min(start + self._block, count)) for start in starts]
        if self.device.type != "cuda" or self.rows.device.type == "cuda":
            for part in parts:
                yield part, self.rows[part].to(self.device, self.dtype)
            return
        stream = torch.cuda.Stream(self.device)
        ready = [self._fetch(part, stream) for part in parts[:1]]
        for i, part in enumerate(parts):
            rows = ready.pop()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            rows.record_stream(torch.cuda.current_stream(self.device))
            if i + 1 < len(parts):
                ready.append(self._fetch(parts[i + 1], stream))
            yield part, rows.to(self.dtype)

    def _fetch(self, part: slice, stream: torch.cuda.Stream) -> Tensor:
        with torch.cuda.stream(stream):
            return self.rows[part].to(self.device, non_blocking=True)

    def combined(self, weights: Tensor) -> Tensor:
        """Return the combination of the first rows with weights [count], a vector [n_local]."""
        weights = weights.to(self.device, self.dtype)
        vector = torch.zeros(self.rows.shape[1], dtype=self.dtype, device=self.device)
        for part, rows in self.blocks(len(weights)):
            vector.addmv_(rows.T, weights[part])
        return vector

    def rotate(self, coefficients: Tensor) -> None:
        """Replace the first rows by combinations with orthonormal columns [count, kept]."""
        count, kept = coefficients.shape
        weights = coefficients.T.to(self.device, self.dtype)
        self.recent = {}
        width = max(1, _ROTATION_BYTES // ((count + kept) * self.dtype.itemsize))
        for start in range(0, self.rows.shape[1], width):
            columns = slice(start, start + width)
            block = self.rows[:count, columns].to(self.device, self.dtype)
            self.rows[:kept, columns] = (weights @ block).to(self.rows)

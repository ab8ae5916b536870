"""Products with several vectors at once, in chunks whose size is found out while they are made."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hessian.operators.engines import Product
from lightning_hessian.operators.memory import free_bytes
from lightning_hessian.probe.parameters import ParameterSpace

_SIZES = (1, 4, 16)
_WORTH = 0.95
"""A chunk must take at most this share of the time of smaller ones to be preferred."""


class BatchedProducts:
    """Applies the product of a probe batch to several vectors, one by one or by ``torch.vmap``.

    Which is faster depends on the device and on the network: a GPU is idle through most of a
    small product, where a CPU core is busy. On the CPU the loop stays: measured on one thread, its
    time over that of chunks of 4 and of 16 is 1.5 and 0.7 for LeNet with 250 images
    (``autograd``; 0.9 and 0.5 by ``linearize``), 0.8 and 0.6 for a transformer with 1024 tokens
    (1.1 and 1.1), and 3 to 4 only for networks of a hundred parameters; and what is chosen by the
    clock may be another rounding tomorrow. Elsewhere the first vectors are a trial, none of it
    wasted: chunks of 1, 4 and 16 are timed on them, twice each, until a larger one no longer pays
    or does not fit the memory. Where an operation cannot be batched, the loop stays.

    Args:
        space: Of the vectors.
        product_bytes: Returns the memory that one product takes in passing.
        trial: Whether to make the trial; by default not on the CPU.

    Attributes:
        size: How many vectors a chunk has, so far; 1 for a loop.
        settled: Whether that is final.
    """

    def __init__(
        self,
        space: ParameterSpace,
        product_bytes: Callable[[], int],
        *,
        trial: bool | None = None,
    ) -> None:
        self.space = space
        self.size = _SIZES[0]
        self.settled = space.device.type == "cpu" if trial is None else not trial
        self._product_bytes = product_bytes
        self._limit: int | None = None
        self._seconds: dict[int, list[float]] = {size: [] for size in _SIZES}
        self._checked = False

    def __call__(self, product: Product, vectors: Tensor, *, trial: bool = False) -> Tensor:
        """Returns the products [b, n] with the rows of [b, n].

        Args:
            product: Of one probe batch.
            vectors: [b, n].
            trial: Whether to use these for finding the best size; say so for one and the same
                probe batch only.
        """
        parts, start = [], 0
        while start < len(vectors):
            left = len(vectors) - start
            size = self._candidate() if trial and not self.settled else self.size
            timed = trial and not self.settled and size <= left
            size = min(size if timed else self.size, left)
            chunk = vectors[start : start + size]
            began = time.perf_counter()
            parts.append(self._chunk(product, chunk))
            if timed:
                float(parts[-1][0, 0])  # waits for the device
                self._note(size, (time.perf_counter() - began) / size)
            start += size
        return torch.cat(parts)

    def _candidate(self) -> int:
        """Returns the size to try next, having settled where there is none."""
        for size in _SIZES:
            if len(self._seconds[size]) < 2:
                if size > 1 and size > self._most():
                    break
                return size
        self.settled = True
        return self.size

    def _most(self) -> int:
        """Returns how many vectors fit a quarter of the memory that is free."""
        if self._limit is None:
            free = free_bytes(self.space.device) / 4
            self._limit = int(free // max(1, self._product_bytes()))
        return self._limit

    def _note(self, size: int, seconds: float) -> None:
        """Takes down the time of a product, and settles where a larger chunk does not pay."""
        times = self._seconds[size]
        times.append(seconds)
        if size == 1 or len(times) < 2 or self.settled:
            return
        if min(times) <= _WORTH * min(self._seconds[self.size]):
            self.size = size
        else:
            self.settled = True

    def _chunk(self, product: Product, chunk: Tensor) -> Tensor:
        if len(chunk) == 1:
            return self._single(product, chunk[0])[None]
        try:
            with warnings.catch_warnings():
                # Operations without a batching rule are looped over; the trial judges by time.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                whole = getattr(product, "batchable", product)
                found = torch.vmap(lambda vector: self._single(whole, vector))(chunk)
            if self._checked or self._agrees(product, chunk[0], found[0]):
                self._checked = True
                return found
        except (RuntimeError, NotImplementedError, TypeError):
            # An operation that cannot be batched, random draws, or too little memory.
            pass
        self.size, self.settled = 1, True
        return torch.stack([self._single(product, vector) for vector in chunk])

    def _agrees(self, product: Product, vector: Tensor, found: Tensor) -> bool:
        expected = self._single(product, vector)
        error = torch.linalg.vector_norm(found - expected)
        return bool(
            error <= torch.finfo(found.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected)
        )

    def _single(self, product: Product, vector: Tensor) -> Tensor:
        return self.space.flatten(product(self.space.split(vector)))

"""Products with several vectors at once, in chunks whose size follows from what a product costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_hessian.linear.memory import free_bytes
from lightning_hessian.operators.costs import counted
from lightning_hessian.operators.engines import Product
from lightning_hessian.probe.parameters import ParameterSpace


class BatchedProducts:
    """Applies the product of a probe batch to several vectors, one by one or by ``torch.vmap``.

    Which is faster depends on the device and on the network: a GPU is idle through most of a
    small product, where a CPU core is busy. On the CPU the loop stays: measured on one thread, its
    time over that of chunks of 4 and of 16 is 1.5 and 0.7 for LeNet with 250 images
    (``autograd``; 0.9 and 0.5 by ``linearize``), 0.8 and 0.6 for a transformer with 1024 tokens
    (1.1 and 1.1), and 3 to 4 only for networks of a hundred parameters. Elsewhere a chunk is as
    large as `Cost.vectors_at_once` says, in so far as it fits a quarter of the memory that is free:
    a rule, not a trial, because what is chosen by the clock may be another rounding tomorrow. Where
    an operation cannot be batched, the loop stays.

    Args:
        space: Of the vectors.
        product_bytes: Returns the memory that one product takes in passing.
        size: How many vectors a chunk has; by default as above.

    Attributes:
        size: How many vectors a chunk has; 1 for a loop, None while no product has been counted.
    """

    def __init__(
        self, space: ParameterSpace, product_bytes: Callable[[], int], *, size: int | None = None
    ) -> None:
        self.space = space
        self.size = 1 if size is None and space.device.type == "cpu" else size
        self._product_bytes = product_bytes
        self._checked = False

    def __call__(self, product: Product, vectors: Tensor) -> Tensor:
        """Return the products [b, n] of one probe batch with the rows of [b, n]."""
        if self.size is None:
            self.size = self._size_for(product, vectors[0])
        parts, start = [], 0
        while start < len(vectors):
            parts.append(self._chunk(product, vectors[start : start + self.size]))
            start += len(parts[-1])
        return torch.cat(parts)

    def _size_for(self, product: Product, vector: Tensor) -> int:
        """Return how many vectors a chunk has, by the cost of one product."""
        _, cost = counted(lambda: self._single(product, vector))
        fitting = int(free_bytes(self.space.device) / 4 // max(1, self._product_bytes()))
        return max(1, min(cost.vectors_at_once, fitting))

    def _chunk(self, product: Product, chunk: Tensor) -> Tensor:
        if len(chunk) == 1:
            return self._single(product, chunk[0])[None]
        try:
            with warnings.catch_warnings():
                # Operations without a batching rule are looped over.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                whole = getattr(product, "batchable", product)
                found = torch.vmap(lambda vector: self._single(whole, vector))(chunk)
            if self._checked or self._agrees(product, chunk[0], found[0]):
                self._checked = True
                return found
        except (RuntimeError, NotImplementedError, TypeError):
            # An operation that cannot be batched, random draws, or too little memory.
            pass
        self.size = 1
        return torch.stack([self._single(product, vector) for vector in chunk])

    def _agrees(self, product: Product, vector: Tensor, found: Tensor) -> bool:
        expected = self._single(product, vector)
        error = torch.linalg.vector_norm(found - expected)
        return bool(
            error <= torch.finfo(found.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected)
        )

    def _single(self, product: Product, vector: Tensor) -> Tensor:
        return self.space.flatten(product(self.space.split(vector)))

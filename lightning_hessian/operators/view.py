"""A diagonal block of a Hessian, for some of its parameter tensors, as a view of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_hessian.operators.engines import Product
from lightning_hessian.probe.objective import Objective


class Whole(Protocol):
    """What a view needs of the operator that it is a view of.

    Attributes:
        objective: The loss over the probe batches.
        engine: The engine in use.
        products: The product of each batch, in their order.
    """

    objective: Objective
    engine: str
    products: list[Product]

    def count(self, products: int) -> None:
        """Count products that were made."""


class HessianView:
    """The block of a `HessianOperator` that belongs to some of its parameter tensors.

    It shares the graphs that the whole keeps, and computes nothing for the other parameters: a
    product goes no further back than these, and costs what they cost. A linearised product is
    folded once more, for about the price of one product. Products count as those of the whole.

    Args:
        whole: The operator, alive as long as the view.
        names: Of the parameter tensors.

    Attributes:
        size: Order of the block.
        shard: Which entries of a vector this rank holds: all.
        engine: That of the whole.
    """

    def __init__(self, whole: Whole, names: Sequence[str]) -> None:
        objective = whole.objective
        self.whole = whole
        self.space = objective.space.subspace(names)
        self.size, self.dtype, self.device = self.space.size, self.space.dtype, self.space.device
        self.shard = self.space.shard(objective.ranks)
        self.engine = whole.engine
        which, point = objective.space.places(names), objective.point()
        self._products = [_restricted(product, which, point) for product in whole.products]

    def restricted(self, names: Sequence[str]) -> HessianView:
        """Return the block of fewer of the parameter tensors."""
        return HessianView(self.whole, names)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector [n_local], a new tensor [n_local]."""
        tangents = self.space.split(vector)
        total = torch.zeros_like(vector)
        for product, weight in zip(self._products, self.whole.objective.weights, strict=True):
            total.add_(self.space.flatten(product(tangents)), alpha=weight)
        self.whole.count(1)
        return total

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of [b, n_local], a new tensor [b, n_local]."""
        return torch.stack([self.matvec(vector) for vector in vectors])


def _restricted(product: Product, which: Sequence[int], point: Sequence[Tensor]) -> Product:
    """Return a product for some of the parameters; where it cannot be cut down, with zeros."""
    restricted = getattr(product, "restricted", None)
    if restricted is not None:
        found: Product = restricted(which, point)
        return found
    zeros = [torch.zeros_like(value) for value in point]

    def embedded(tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        whole = list(zeros)
        for i, tangent in zip(which, tangents, strict=True):
            whole[i] = tangent
        found = product(tuple(whole))
        return [found[i] for i in which]

    return embedded

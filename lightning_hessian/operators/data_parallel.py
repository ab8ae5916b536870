"""The Hessian over batches that are spread over ranks, on vectors in even shards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.linear.memory import free_bytes
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.linear.shards import Shard
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError


class DataParallelHessian:
    """The Hessian of an `Objective` whose batches are spread over ranks.

    Every rank has all parameters, and the products with the batches that it holds (perhaps none).
    A product takes two collectives whatever the number of batches: the vector is gathered from
    its shards, and the sum of the ranks' products is scattered to them. A failure travels with
    the sum, so that all ranks learn of it at once and none waits for another.

    Args:
        objective: The loss; its ``ranks`` make the products together.
        engine: As in `HessianOperator`. Ranks may come to different ones by ``"auto"``.
        expected_products: As in `HessianOperator`.
        untraceable: As in `HessianOperator`.
        local: Makes the operator over the batches of one rank, with the arguments above and
            ``memory_budget``; that of the Gauss-Newton matrix makes this one of it.

    Attributes:
        shard: Which entries of a vector this rank holds.
        matrix_kind: ``"hessian"``, or what ``local`` makes.
        engine: The engines in use, joined by ``+`` where ranks differ.
        self_check_error: The largest of the ranks'.
        num_products: Products taken so far.
        on_product: Told how many were made, after every call; None for nobody.

    Raises:
        ValueError: Unknown engine.
        MeasurementError: Some rank could not make its operator; says which, and why.
    """

    def __init__(
        self,
        objective: Objective,
        engine: str = "auto",
        *,
        expected_products: int = 200,
        untraceable: set[str] | None = None,
        local: Callable[..., Any] = HessianOperator,
    ) -> None:
        ranks = objective.ranks
        self._lie_over(objective.space, ranks)
        self.num_products = 0
        self.on_product: Callable[[int], None] | None = None
        self._whole: DataParallelHessian = self
        self._local: Any = None
        budget = free_bytes(self.device) / 2 / ranks.neighbours
        with ranks.together():
            if objective.batches:
                self._local = local(
                    objective,
                    engine,
                    memory_budget=budget,
                    expected_products=expected_products,
                    untraceable=untraceable,
                )
        own = self._local
        mine = (own.engine, own.self_check_error, own.matrix_kind) if own else None
        found = [made for made in ranks.all_gather_object(mine) if made is not None]
        self.engine = "+".join(dict.fromkeys(name for name, *_ in found))
        self.self_check_error = max(error for _, error, _ in found)
        self.matrix_kind = found[0][2]

    def _lie_over(self, space: ParameterSpace, ranks: Ranks) -> None:
        """Lay vectors out over the parameters of a space, in even shards."""
        self.space = space
        self.size, self.dtype, self.device = space.size, space.dtype, space.device
        self.shard = Shard.even(self.size, ranks)
        self._width = ranks.share_of(self.size)

    def restricted(self, names: Sequence[str]) -> DataParallelHessian:
        """Return the diagonal block of the named tensors, as a view that shares all graphs."""
        view = copy.copy(self)
        with self.shard.ranks.together():
            if self._local is not None:
                view._local = self._local.restricted(names)
        view._lie_over(self.space.subspace(names), self.shard.ranks)
        return view

    def matvec(self, vector: Tensor) -> Tensor:
        """Return H v for this rank's part of a vector [n_local], a new tensor [n_local]."""
        return self.matmat(vector[None])[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return H v for the rows v of [b, n_local], a new tensor [b, n_local].

        Raises:
            MeasurementError: A product failed, or is NaN or infinite, on some rank; names it.
        """
        count, ranks = len(vectors), self.shard.ranks
        whole = self._all_gather(vectors)
        # One more entry for each rank: how many ranks have failed.
        sent = vectors.new_zeros(ranks.world, count * self._width + 1)
        failure: Exception | None = None
        if self._local is not None:
            try:
                products = self._local.matmat(whole)
                padded = torch.nn.functional.pad(
                    products, (0, ranks.world * self._width - self.size)
                )
                by_rank = padded.view(count, ranks.world, self._width).transpose(0, 1)
                sent[:, :-1] = by_rank.reshape(ranks.world, -1)
                sent[:, -1] = (~products.isfinite()).any()
            except Exception as error:  # noqa: BLE001 - raised below, on all ranks
                failure = error
                sent.zero_()[:, -1] = 1
        del whole
        mine = ranks.reduce_scatter(sent.view(-1))
        if not bool(mine[-1] == 0):
            if failure is None and not bool(sent[0, -1] == 0):
                failure = MeasurementError(
                    "A product with the Hessian is NaN or infinite. The gradient may overflow in "
                    "this precision, or an operation has no finite second derivative."
                )
            ranks.fail(failure)
        self._whole.count(count)
        return mine[:-1].view(count, self._width)[:, : self.shard.length].clone()

    def count(self, products: int) -> None:
        """Count products that were made, by this operator or by a view of it."""
        self.num_products += products
        if self.on_product is not None:
            self.on_product(products)

    def _all_gather(self, vectors: Tensor) -> Tensor:
        """Return whole vectors [b, n] from the ranks' parts."""
        count, world = len(vectors), self.shard.ranks.world
        part = torch.nn.functional.pad(vectors, (0, self._width - vectors.shape[1]))
        parts = self.shard.ranks.all_gather(part.reshape(-1))
        by_row = parts.view(world, count, self._width).transpose(0, 1)
        return by_row.reshape(count, -1)[:, : self.size]

"""The Gauss-Newton matrix of a loss: the curvature of the loss, seen through the network.

G = J^T H_L J, with J the derivative of the network's outputs by the parameters, and H_L the second
derivative of the loss by the outputs. It is the Hessian of the loss of the linearised network, and
what the Hessian lacks of it, sum_k (dL/dz_k) d^2 z_k / d theta^2, vanishes where the residuals do.

Sources: Schraudolph 2002; Martens 2020, "New insights and perspectives on the natural gradient
method", sections 8 and 9 (for softmax cross-entropy and squared error it is the Fisher matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_hessian.linear.memory import (
    OutOfMemoryError,
    explained,
    first_line,
    free_bytes,
)
from lightning_hessian.linear.operator import check_finite
from lightning_hessian.linear.shards import Shard
from lightning_hessian.operators.batched import BatchedProducts
from lightning_hessian.operators.data_parallel import DataParallelHessian
from lightning_hessian.operators.engines import (
    Product,
    derivatives,
    gradients_by,
    retained_bytes,
)
from lightning_hessian.operators.hessian import HessianView, summed
from lightning_hessian.operators.loss_graph import read_graphs
from lightning_hessian.operators.sharded import OverShards
from lightning_hessian.probe.loss_split import Split, split_loss
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.sharding.objective import ShardedObjective
from lightning_hessian.results import MeasurementError

ENGINES = ("autograd", "recompute")
"""Graphs that are kept, or built anew for every product."""

_ROUNDING = 10.0
"""How many times the effect of rounding the parameters an asymmetry must have to be none of it."""


class GaussNewtonOperator:
    """The Gauss-Newton matrix of an `Objective`, as a symmetric operator.

    It is positive semi-definite where the loss is a convex function of the outputs. Products must
    be taken inside ``objective.isolated()``. A product costs one to two gradients
    (``autograd``), or two to four (``recompute``). Symmetry, u.Gv = v.Gu, is checked when it is
    made, by two products.

    Args:
        objective: The loss over the probe batches.
        engine: ``"autograd"`` keeps the graphs of all batches, ``"recompute"`` keeps nothing;
            ``"auto"`` keeps those that fit ``memory_budget``, to the same digits.
        marked: Whether the loss itself says where it begins; see `loss_split.split_loss`.
        memory_budget: Bytes that ``"auto"`` may keep; by default half of what is free.
        expected_products: Not used; a linearisation is never tried.
        untraceable: Not used.

    Attributes:
        size: Order n.
        shard: Which entries of a vector this rank holds: all, unless parameters are sharded.
        matrix_kind: ``"gauss_newton"``.
        engine: The engine in use, ``"autograd+recompute"`` where some graphs are kept.
        self_check_error: Asymmetry that was found, relative.
        products: By batch.
        num_products: Products taken so far, those of the check left out.
        on_product: Told how many were made, after every call; None for nobody.

    Raises:
        ValueError: Another engine.
        MeasurementError: The loss cannot be split or differentiated; says why.
    """

    matrix_kind = "gauss_newton"

    def __init__(
        self,
        objective: Objective,
        engine: str = "auto",
        *,
        marked: bool = False,
        memory_budget: float | None = None,
        expected_products: int = 200,
        untraceable: set[str] | None = None,
    ) -> None:
        if engine not in ("auto", *ENGINES):
            raise ValueError(
                f"hvp={engine!r} does not make products with the Gauss-Newton matrix; choose from "
                f"{['auto', *ENGINES]}."
            )
        self.objective = objective
        self.size = objective.space.size
        self.shard = objective.space.shard(objective.ranks)
        self.dtype, self.device = objective.space.dtype, objective.space.device
        self.num_products = 0
        self.on_product: Callable[[int], None] | None = None
        self._marked = marked
        self._bytes: int | None = None
        self._batched = BatchedProducts(objective.space, self._product_bytes)
        coarsest = {graph.coarsest for graph in read_graphs(objective)}
        halves_first = (torch.bfloat16, torch.float16, torch.float32)
        found = [dtype for dtype in halves_first if objective.anywhere(dtype in coarsest)]
        with explained(_not_differentiable):
            self.products = self._made(engine, memory_budget)
            precision = found[0] if found else torch.float64
            self.self_check_error = self._check_symmetry(torch.finfo(precision).eps)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return G v for a vector [n_local], a new tensor [n_local]."""
        found = self._applied(vector)
        self.count(1)
        return found

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return G v for each row v of [b, n_local], a new tensor [b, n_local].

        A graph that is not kept is built once for all rows.
        """
        total = torch.zeros_like(vectors)
        for product, weight in zip(self.products, self.objective.weights, strict=True):
            kept = product.anew() if isinstance(product, _Recomputed) else product
            total.add_(self._batched(kept, vectors), alpha=weight)
        self.count(len(vectors))
        return total

    def restricted(self, names: Sequence[str]) -> Any:
        """Return the diagonal block of the named tensors, as a view that shares all graphs."""
        return HessianView(self, names)

    def count(self, products: int) -> None:
        """Count products that were made, by this operator or by a view of it."""
        self.num_products += products
        if self.on_product is not None:
            self.on_product(products)

    def _applied(self, vector: Tensor) -> Tensor:
        return summed(self.products, self.objective.weights, self.objective.space, vector)

    def _made(self, engine: str, memory_budget: float | None) -> list[Product]:
        """Return the products of the batches; where memory is short after all, none is kept."""
        try:
            return self._keeping(engine, memory_budget)
        except OutOfMemoryError:
            if engine != "auto":
                raise
        return self._keeping("recompute", None)

    def _keeping(self, engine: str, memory_budget: float | None) -> list[Product]:
        """Return the products of the batches, with as many graphs kept as the engine says."""
        batches = range(len(self.objective.batches))
        fitting = {"autograd": len(batches), "recompute": 0}.get(engine)
        if fitting is None:
            budget = free_bytes(self.device) / 2 if memory_budget is None else memory_budget
            fitting = min(len(batches), self._fitting(budget))
        names = ["autograd"] * fitting + ["recompute"] * (len(batches) - fitting)
        self.engine = "+".join(dict.fromkeys(names))
        kept: list[Product] = [self._graph(index) for index in batches[:fitting]]
        return kept + [self._recomputed(index) for index in batches[fitting:]]

    def _fitting(self, budget: float) -> int:
        """Return how many graphs fit so many bytes."""
        return int(budget // max(1, self._product_bytes()))

    def _graph(self, index: int) -> _Retained:
        return _retained(self.objective, index, marked=self._marked)

    def _recomputed(self, index: int) -> _Recomputed:
        return _Recomputed(lambda: self._graph(index))

    def _product_bytes(self) -> int:
        """Return the memory that the graph of the largest batch holds."""
        if self._bytes is None:
            self._bytes = retained_bytes(self.objective, lambda _, index: self._graph(index))
        return self._bytes

    def _check_symmetry(self, eps: float) -> float:
        """Return by how much u.Gv and v.Gu differ, relative; raise where it is not rounding.

        J v and J^T v are computed in different ways, so an operation whose derivatives are wrong
        (`weight_norm`'s double backward, a custom function that autograd does not see into) makes
        them those of different matrices.
        """
        space, shard = self.objective.space, self.shard
        drawn = torch.randn(2, self.size, generator=torch.Generator().manual_seed(0))
        first, second = shard.take(drawn).to(space.device, space.dtype)
        with_first, with_second = self._applied(first), self._applied(second)
        check_finite(with_second, what="A product with the Gauss-Newton matrix")
        scale = max(_norm(shard, with_first), _norm(shard, with_second))
        difference = _dot(shard, first, with_second) - _dot(shard, second, with_first)
        asymmetry = abs(difference) / scale if scale > 0 else 0.0
        if asymmetry <= eps**0.5:
            return asymmetry
        # Where the loss is flat the curvature is what is left of larger numbers. How much it owes
        # to rounding shows when the parameters are rounded in another way.
        moved = [
            value + eps * value * sign
            for value, sign in zip(self.objective.point(), space.split(first.sign()), strict=True)
        ]
        tangents, again = space.split(second), torch.zeros_like(second)
        for index, weight in enumerate(self.objective.weights):
            product = _retained(self.objective, index, marked=self._marked, at=tuple(moved))
            again.add_(space.flatten(product(tangents)), alpha=weight)
        if asymmetry <= _ROUNDING * _norm(shard, again - with_second) / scale:
            return asymmetry
        raise MeasurementError(
            f"Products with the Gauss-Newton matrix are not symmetric (by {asymmetry:.1e}, "
            "relative): the derivative of some operation is wrong, or hidden from autograd (a "
            "custom autograd.Function, weight_norm). Replace it for measuring, through "
            "loss_fn(module, batch) or `hessian_loss`."
        )


def _not_differentiable(error: Exception) -> MeasurementError:
    """Return what to tell the user of an error in differentiating the network or its loss."""
    return MeasurementError(
        "matrix='gauss_newton' could not differentiate the network or its loss "
        f"({first_line(error)}). Replace the operation for measuring, through "
        "loss_fn(module, batch) or `hessian_loss`."
    )


class ShardedGaussNewton(OverShards, GaussNewtonOperator):
    """The Gauss-Newton matrix of a `ShardedObjective`, on vectors sharded as the parameters are.

    J^T w and what differentiates it go through the all-gather of each unit's shards, so J v sees
    the parts of v of all ranks, and J^T sums over their batches. Arguments as of
    `GaussNewtonOperator`.
    """

    objective: ShardedObjective

    def __init__(
        self, objective: ShardedObjective, engine: str = "auto", *, marked: bool = False
    ) -> None:
        budget = free_bytes(objective.space.device) / 2 / objective.ranks.neighbours
        with objective.ranks.together():
            super().__init__(objective, engine, marked=marked, memory_budget=budget)

    def _made(self, engine: str, memory_budget: float | None) -> list[Product]:
        """Return the products of the batches: the same kind on all ranks."""
        return self._keeping(engine, memory_budget)

    def _fitting(self, budget: float) -> int:
        """Return how many graphs fit on the rank with the least memory."""
        with self.objective.counting() as kept:
            self._graph(0)
        self.objective.ranks.stay_together()
        return int(self.objective.ranks.all_reduce_min(budget // max(1, sum(kept.values()))))


def gauss_newton_operator(
    objective: Objective, engine: str = "auto", *, marked: bool = False
) -> GaussNewtonOperator | DataParallelHessian:
    """Return the Gauss-Newton matrix of an objective, for however many ranks evaluate or hold it.

    Raises:
        ValueError: Another engine than ``"auto"`` or one of `ENGINES`.
        MeasurementError: The loss cannot be split or differentiated; says why.
    """
    if isinstance(objective, ShardedObjective):
        return ShardedGaussNewton(objective, engine, marked=marked)
    if objective.ranks.world == 1:
        return GaussNewtonOperator(objective, engine, marked=marked)
    return DataParallelHessian(objective, engine, local=partial(GaussNewtonOperator, marked=marked))


class _Retained:
    """A product J^T H_L J v of one batch, by graphs that are kept.

    J v comes from the derivative of w -> J^T w, which is linear in w, by w: what is called the
    double backward trick. So nothing needs a forward derivative.
    """

    def __init__(self, split: Split, leaves: tuple[Tensor, ...]) -> None:
        self._leaves = leaves
        self._outputs: list[Tensor] = []
        self._cut: list[Tensor] = []
        self._slopes: list[Tensor] = []  # the gradient of the loss by its inputs
        self._pulled: list[Tensor] = []  # J^T of the probes
        if split.loss.requires_grad:
            self._sort(split)
        self._probes = [torch.zeros_like(z, requires_grad=True) for z in self._outputs]
        if self._outputs:
            self._pulled = derivatives(self._outputs, leaves, self._probes, create_graph=True)

    def _sort(self, split: Split) -> None:
        """Keep what the loss depends on: a term that is computed to be logged has no slope."""
        slopes = gradients_by([split.loss], split.cut, create_graph=True)
        for output, leaf, slope in zip(split.outputs, split.cut, slopes, strict=True):
            if slope is not None:
                self._outputs.append(output)
                self._cut.append(leaf)
                self._slopes.append(slope)

    def __call__(self, tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        return self._product(tangents, range(len(self._leaves)))

    def restricted(self, which: Sequence[int], point: Sequence[Tensor]) -> Product:
        """Return the product of the block of some parameters: autograd goes no further back."""
        return lambda tangents: self._product(tangents, which)

    def _product(self, tangents: tuple[Tensor, ...], which: Sequence[int]) -> Sequence[Tensor]:
        leaves = [self._leaves[i] for i in which]
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        if not self._pulled:
            return zeros
        moved = _along([self._pulled[i] for i in which], self._probes, tangents)
        curved = _along(self._slopes, self._cut, moved)
        return derivatives(self._outputs, leaves, curved, retain_graph=True)


def _along(
    functions: Sequence[Tensor], leaves: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return the derivatives by leaves of the scalar products of functions with vectors."""
    pairs = [(f, v) for f, v in zip(functions, vectors, strict=True) if f.requires_grad]
    if not pairs:  # constants: parameters that no output depends on, a loss that is linear
        return [torch.zeros_like(leaf) for leaf in leaves]
    kept, directions = zip(*pairs, strict=True)
    return derivatives(kept, leaves, directions, retain_graph=True)


def _retained(
    objective: Objective, index: int, *, marked: bool, at: tuple[Tensor, ...] | None = None
) -> _Retained:
    """Return the product of a batch by graphs that are kept; ``at`` are other parameters."""
    leaves = tuple(value.requires_grad_() for value in (objective.point() if at is None else at))
    product = _Retained(split_loss(objective, leaves, index, marked=marked), leaves)
    if objective.is_written():  # by a hook: once more, on copies that it does not reach
        return _retained(objective, index, marked=marked, at=at)
    return product


class _Recomputed:
    """The product of one batch by graphs that are built anew each time."""

    def __init__(self, anew: Callable[[], _Retained]) -> None:
        self.anew = anew

    def __call__(self, tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        return self.anew()(tangents)

    def restricted(self, which: Sequence[int], point: Sequence[Tensor]) -> Product:
        """Return the product of the block of some parameters."""
        return lambda tangents: self.anew().restricted(which, point)(tangents)


def _dot(shard: Shard, first: Tensor, second: Tensor) -> float:
    """Return the scalar product, summed in float64: its rounding would pass for asymmetry."""
    precise = torch.float32 if first.device.type == "mps" else torch.float64
    shard.ranks.stay_together()
    return float(shard.ranks.all_reduce(first.to(precise) @ second.to(precise)))


def _norm(shard: Shard, vector: Tensor) -> float:
    shard.ranks.stay_together()
    return float(shard.norm(vector))

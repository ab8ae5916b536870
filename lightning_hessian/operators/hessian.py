"""The Hessian of a loss as a symmetric operator, whatever engine computes its products."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_hessian.linear.memory import (
    OutOfMemoryError,
    explained,
    free_bytes,
    is_out_of_memory,
)
from lightning_hessian.operators.batched import BatchedProducts
from lightning_hessian.operators.checks import Checks
from lightning_hessian.operators.engines import (
    ENGINES,
    LINEARIZE_TO_GRAPH_MEMORY,
    LINEARIZING_TO_GRAPH_MEMORY,
    Product,
    Restricted,
    autograd,
    finite_difference,
    live_entries,
    not_differentiable,
    retained_bytes,
)
from lightning_hessian.operators.linearize import onednn
from lightning_hessian.operators.loss_graph import read_graphs
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import NoSecondDerivativeError, TimeUpError

CHUNKED_ATTENTION = "chunked_attention"
"""What the name of an engine ends in where attention is computed in chunks: digits differ."""

_MOST_SAVED = 0.5
"""The share of a product by a retained graph that a linearisation saves at most."""


class HessianOperator:
    """The Hessian of an `Objective` at its present parameters, as a symmetric operator.

    Products must be taken inside ``objective.isolated()``, and the parameters must not change
    while the operator is in use. In gradients over the probe batches, a product costs about one
    to two (``linearize``), two (``autograd``, ``finite_difference``) or four (``recompute``).

    A product is checked when it is made, on the first batch of each structure; see `Checks`.

    Args:
        objective: The loss over the probe batches.
        engine: ``"linearize"`` keeps the gradient of each batch linearised (the cheapest
            products, the most memory, and 10 to 30 gradients to build), ``"linearize_onednn"`` does
            so with oneDNN's products of float32 matrices (for AMD processors from Zen 5 on, where
            ``"auto"`` takes it instead), ``"autograd"`` keeps its graph, ``"recompute"`` keeps
            nothing. ``"compile"`` compiles the linearisation (minutes to build).
            ``"finite_difference"`` needs first derivatives only, and is inexact.
            ``"auto"`` takes the one that will be done first among those that work and fit
            ``memory_budget``, by the operations that each runs for one batch, which are counted,
            not timed: the same loss gets the same engine on every call. Where not all graphs fit,
            it keeps as many as do and recomputes the others, to the same digits; where there is no
            second derivative, or a wrong one, it falls back to finite differences, with a warning.
        memory_budget: Bytes that ``"auto"`` may keep; by default half of what is free, so that
            memory is all that can change the choice from one call to the next.
        expected_products: How many products will be taken, about; ``"auto"`` weighs with it
            whether a linearisation repays its making.
        untraceable: The structures of losses of which ``"auto"`` knows that they cannot be traced;
            what it learns is added.

    Attributes:
        size: Order n.
        shard: Which entries of a vector this rank holds: all, unless parameters are sharded.
        matrix_kind: ``"hessian"``.
        engine: The engine in use, ``"autograd+recompute"`` where graphs of some batches are kept;
            it ends in ``"+chunked_attention"`` where attention is computed in chunks of queries.
        self_check_error: Largest relative difference between a product of this engine and of a
            recomputed graph on a batch that was checked (for finite differences, the difference
            between one product and two that add up to it).
        num_products: Products taken so far, those of the checks left out.
        on_product: Told how many were made, after every call; None for nobody.

    Raises:
        ValueError: Unknown engine.
        NoSecondDerivativeError: The loss has no second derivative, or a wrong one; says where.
        MeasurementError: The loss cannot be differentiated twice by this engine; says why.
    """

    matrix_kind = "hessian"

    def __init__(
        self,
        objective: Objective,
        engine: str = "auto",
        *,
        memory_budget: float | None = None,
        expected_products: int = 200,
        untraceable: set[str] | None = None,
    ) -> None:
        if engine not in ("auto", *ENGINES):
            raise ValueError(f"hvp={engine!r} is unknown; choose from {['auto', *ENGINES]}.")
        self.objective = objective
        self.size = objective.space.size
        self.shard = objective.space.shard(objective.ranks)
        self.dtype = objective.space.dtype
        self.device = objective.space.device
        self.num_products = 0
        self.on_product: Callable[[int], None] | None = None
        self.self_check_error = 0.0
        self.engine = engine
        self.products: list[Product] = []
        self._engines: list[str] = []  # of each batch
        self._graph_bytes: int | None = None
        self._untraceable = set() if untraceable is None else untraceable
        self._batched = BatchedProducts(objective.space, self._product_bytes)
        self._checks = Checks(objective, self.shard, read_graphs(objective))
        if engine != "auto":
            self._build([engine] * len(objective.batches))
            return
        budget = free_bytes(self.device) / 2 if memory_budget is None else memory_budget
        short = False
        try:
            self._build_within(budget, expected_products)
        except OutOfMemoryError:
            short = True  # what the error holds is let go of with it
        except NoSecondDerivativeError as error:
            self._build(["finite_difference"] * len(objective.batches))
            warnings.warn(
                f"Finite differences of gradients serve instead of exact products (relative error "
                f"about {self.self_check_error:.0e}): {error}",
                stacklevel=2,
            )
        if short:
            self.products = []
            self._build(["recompute"] * len(objective.batches))

    def matvec(self, vector: Tensor) -> Tensor:
        """Return H v for a vector [n_local], a new tensor [n_local]."""
        found = summed(self.products, self.objective.weights, self.objective.space, vector)
        self.count(1)
        return found

    def restricted(self, names: Sequence[str]) -> Any:
        """Return the diagonal block of the named tensors, as a view that shares all graphs."""
        return HessianView(self, names)

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return H v for each row v of [b, n_local], a new tensor [b, n_local].

        Equal to `matvec` but for rounding. Costs less per vector where `BatchedProducts` makes
        several at once, and where graphs are recomputed: each is built once for all rows.
        """
        if len(vectors) == 1:
            return self.matvec(vectors[0])[None]
        total = torch.zeros_like(vectors)
        for index, weight in enumerate(self.objective.weights):
            engine, product = self._engines[index], self.products[index]
            if engine == "recompute":
                product = autograd(self.objective, index)
            if engine in ("compile", "finite_difference"):
                split, flatten = self.objective.space.split, self.objective.space.flatten
                found = torch.stack([flatten(product(split(vector))) for vector in vectors])
            else:
                found = self._batched(product, vectors)
            total.add_(found, alpha=weight)
        self.count(len(vectors))
        return total

    def count(self, products: int) -> None:
        """Count products that were made, by this operator or by a view of it."""
        self.num_products += products
        if self.on_product is not None:
            self.on_product(products)

    def _product_bytes(self) -> int:
        """Return the memory that a product of the largest batch takes in passing, about."""
        if self._graph_bytes is None:
            self._graph_bytes = retained_bytes(self.objective)
        return self._graph_bytes

    def _build_within(self, budget: float, expected_products: int) -> None:
        """Build the best exact engine within a memory budget."""
        num_batches = len(self.objective.batches)
        with self._explained("autograd"):
            kept = max(1, self._product_bytes())
        fitting = min(num_batches, int(budget // kept))
        graphs = ["autograd"] * fitting + ["recompute"] * (num_batches - fitting)
        made: dict[int, Product] = {}
        finished = (num_batches - 1) * LINEARIZE_TO_GRAPH_MEMORY
        if kept * (finished + LINEARIZING_TO_GRAPH_MEMORY) <= budget:
            # The batch that counts most stands for all.
            heaviest = max(range(num_batches), key=self.objective.weights.__getitem__)
            with self._explained("autograd"):
                made[heaviest] = autograd(self.objective, heaviest)
            if self._linearize_if_it_pays(made[heaviest], heaviest, expected_products):
                return
        self._build(graphs, made)

    def _linearize_if_it_pays(self, graph: Product, index: int, expected_products: int) -> bool:
        """Build linearisations where they cost less than graphs like that of batch ``index``."""
        others = len(self.objective.batches) - 1
        if self._checks.structure(index) in self._untraceable:
            return False
        try:
            retained = self._checks.cost(graph)
            making = retained.seconds_to_linearize
            if expected_products * retained.seconds * _MOST_SAVED <= making:
                return False
            engine = self._linearisation()
            trial = self._traced(engine, index)
            saved = retained.seconds - self._checks.cost(trial).seconds
            if saved <= 0 or (others + 1) * expected_products * saved <= others * making:
                return False
            self._build([engine] * (others + 1), {index: trial}, {index: graph})
        except TimeUpError:
            raise
        except (RuntimeError, NotImplementedError, TypeError):
            # An operation without forward-mode derivative, random draws, or too little memory:
            # the retained graphs serve.
            return False
        return True

    def _traced(self, engine: str, index: int) -> Product:
        """Return a linearised product; that there is none is remembered."""
        try:
            return self._made(engine, index)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if not is_out_of_memory(error) and not isinstance(error, TimeUpError):
                self._untraceable.add(self._checks.structure(index))
            raise

    def _linearisation(self) -> str:
        """Return the engine of linearised products that suits the processor."""
        here = self.device.type == "cpu" and self.dtype == torch.float32
        return "linearize_onednn" if here and onednn.is_faster_here() else "linearize"

    def _build(
        self,
        engines: list[str],
        made: Mapping[int, Product] | None = None,
        graphs: Mapping[int, Product] | None = None,
    ) -> None:
        """Make the product of each batch by its engine, unless it is made, and check each kind.

        ``graphs`` are products by retained graphs, for comparison.
        """
        self.engine, self._engines = "+".join(dict.fromkeys(engines)), engines
        made = made or {}
        with self._explained(self.engine):
            self.products = [
                made[i] if i in made else self._made(engine, i) for i, engine in enumerate(engines)
            ]
            self.self_check_error = self._checks.check(self.products, engines, graphs)
        if self.objective.attention.serves:
            self.engine += f"+{CHUNKED_ATTENTION}"

    def _made(self, engine: str, index: int) -> Product:
        """Return the product of a batch by an engine."""
        if engine in ("autograd", "recompute"):
            return ENGINES[engine](self.objective, index)
        if engine == "finite_difference":
            eps = torch.finfo(self._checks.precision(index)).eps
            product = finite_difference(self.objective, index, eps=eps)
            skips = True  # it moves every entry, whatever backward says of it
        else:
            product = ENGINES[engine](self.objective, index)
            skips = self._checks.skips_rows(index)
        live = live_entries(self.objective, index) if skips else None
        return product if live is None else Restricted(product, live)

    def _explained(self, engine: str) -> AbstractContextManager[None]:
        """Open a block in which errors of differentiating are MeasurementErrors with a remedy."""
        return explained(partial(not_differentiable, engine))


class Whole(Protocol):
    """What a view needs of the operator that it is a block of."""

    matrix_kind: str
    objective: Objective
    engine: str
    products: list[Product]

    def count(self, products: int) -> None:
        """Count products that a view has made."""


class HessianView:
    """The block of a `HessianOperator` that belongs to some of its parameter tensors.

    Or of a `GaussNewtonOperator`.

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
        matrix_kind: That of the whole.
    """

    def __init__(self, whole: Whole, names: Sequence[str]) -> None:
        objective = whole.objective
        self.whole = whole
        self.space = objective.space.subspace(names)
        self.size, self.dtype, self.device = self.space.size, self.space.dtype, self.space.device
        self.shard = self.space.shard(objective.ranks)
        self.engine, self.matrix_kind = whole.engine, whole.matrix_kind
        which, point = objective.space.places(names), objective.point()
        self._products = [_restricted(product, which, point) for product in whole.products]

    def restricted(self, names: Sequence[str]) -> HessianView:
        """Return the block of fewer of the parameter tensors."""
        return HessianView(self.whole, names)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector [n_local], a new tensor [n_local]."""
        found = summed(self._products, self.whole.objective.weights, self.space, vector)
        self.whole.count(1)
        return found

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


def summed(
    products: Sequence[Product], weights: Sequence[float], space: ParameterSpace, vector: Tensor
) -> Tensor:
    """Return the weighted sum of the products of all batches with a vector [n_local]."""
    tangents = space.split(vector)
    total = torch.zeros_like(vector)
    for product, weight in zip(products, weights, strict=True):
        total.add_(space.flatten(product(tangents)), alpha=weight)
    return total

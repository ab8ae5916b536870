"""The Hessian of a loss as a symmetric operator, whatever engine computes its products."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_hessian.operators.batched import BatchedProducts
from lightning_hessian.operators.engines import (
    ENGINES,
    LINEARIZE_TO_GRAPH_MEMORY,
    LINEARIZING_TO_GRAPH_MEMORY,
    Product,
    autograd,
    check_dependence,
    explain,
    finite_difference,
    linearize,
    recompute,
    retained_bytes,
)
from lightning_hessian.operators.linear import check_finite
from lightning_hessian.operators.memory import free_bytes, is_out_of_memory
from lightning_hessian.probe.objective import Objective
from lightning_hessian.results import MeasurementError

_LEAST_TRIAL_SECONDS = 0.5
"""Work on one batch below which the making of a linearisation is not even tried."""

_DIFFERENCE_TOLERANCE = 0.01
"""Relative error at which finite differences are refused."""

_HIDDEN_TOLERANCE = 0.05
"""Relative difference from finite differences at which a custom function is found out."""


class HessianOperator:
    """The Hessian of an `Objective` at its present parameters, as a symmetric operator.

    Products must be taken inside ``objective.isolated()``, and the parameters must not change
    while the operator is in use. In gradients over the probe batches, a product costs about one
    to two (``linearize``), two (``autograd``, ``finite_difference``) or four (``recompute``).

    Args:
        objective: The loss over the probe batches.
        engine: ``"linearize"`` keeps the gradient of each batch linearised (the cheapest
            products, the most memory, and about a second to build), ``"autograd"`` keeps its
            graph, ``"recompute"`` keeps nothing. ``"compile"`` compiles the linearisation (minutes
            to build). ``"finite_difference"`` needs first derivatives only, and is inexact.
            ``"auto"`` takes the one that will be done first among those that work and fit
            ``memory_budget``, by a trial on one batch; where not all graphs fit, it keeps as many
            as do and recomputes the others; where there is no second derivative it falls back to
            finite differences, with a warning.
        memory_budget: Bytes that ``"auto"`` may keep; by default half of what is free.
        expected_products: How many products will be taken, about; ``"auto"`` weighs with it
            whether a linearisation repays its making.

    Attributes:
        size: Order n.
        shard: Which entries of a vector this rank holds: all, unless parameters are sharded.
        engine: The engine in use, ``"autograd+recompute"`` where graphs of some batches are kept.
        self_check_error: Relative difference between a product of this engine and of a retained
            or recomputed graph on the first batch (for finite differences, the difference between
            one product and two that add up to it).
        num_products: Products taken so far.
        on_product: Told their number after every product; None for nobody.

    Raises:
        ValueError: Unknown engine.
        MeasurementError: The loss cannot be differentiated twice by this engine; says why.
    """

    def __init__(
        self,
        objective: Objective,
        engine: str = "auto",
        *,
        memory_budget: float | None = None,
        expected_products: int = 200,
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
        self._products: list[Product] = []
        self._engines: list[str] = []  # of each batch
        self._graph_bytes: int | None = None
        self._batched = BatchedProducts(objective.space, self._product_bytes)
        self._custom = check_dependence(objective)
        if engine != "auto":
            self._build([engine] * len(objective.batches))
            return
        budget = free_bytes(self.device) / 2 if memory_budget is None else memory_budget
        try:
            self._build_within(budget, expected_products)
        except MeasurementError as error:
            if error.__cause__ is None:  # not for want of a derivative
                raise
            self._build(["finite_difference"] * len(objective.batches))
            warnings.warn(
                f"Finite differences of gradients serve instead of exact products (relative error "
                f"about {self.self_check_error:.0e}): {error}",
                stacklevel=2,
            )

    def matvec(self, vector: Tensor) -> Tensor:
        """Returns H v for a vector [n_local], a new tensor [n_local]."""
        tangents = self.objective.space.split(vector)
        total = torch.zeros_like(vector)
        for product, weight in zip(self._products, self.objective.weights, strict=True):
            total.add_(self.objective.space.flatten(product(tangents)), alpha=weight)
        self._count(1)
        return total

    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns H v for each row v of [b, n_local], a new tensor [b, n_local].

        Equal to `matvec` but for rounding. Costs less per vector where `BatchedProducts` finds
        that it pays, and where graphs are recomputed: each is built once for all rows.
        """
        if len(vectors) == 1:
            return self.matvec(vectors[0])[None]
        total = torch.zeros_like(vectors)
        for index, weight in enumerate(self.objective.weights):
            engine, product = self._engines[index], self._products[index]
            if engine == "recompute":
                product = autograd(self.objective, index)
            if engine in ("compile", "finite_difference"):
                split, flatten = self.objective.space.split, self.objective.space.flatten
                found = torch.stack([flatten(product(split(vector))) for vector in vectors])
            else:
                found = self._batched(product, vectors, trial=index == 0)
            total.add_(found, alpha=weight)
        self._count(len(vectors))
        return total

    def _count(self, products: int) -> None:
        self.num_products += products
        if self.on_product is not None:
            self.on_product(self.num_products)

    def _product_bytes(self) -> int:
        """Returns the memory that a product of the largest batch takes in passing, about."""
        if self._graph_bytes is None:
            self._graph_bytes = retained_bytes(self.objective)
        return self._graph_bytes

    def _build_within(self, budget: float, expected_products: int) -> None:
        """Builds the best exact engine within a memory budget."""
        num_batches = len(self.objective.batches)
        try:
            kept = max(1, self._product_bytes())
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, MeasurementError) or is_out_of_memory(error):
                raise
            raise MeasurementError(explain("autograd", error)) from error
        fitting = min(num_batches, int(budget // kept))
        graphs = ["autograd"] * fitting + ["recompute"] * (num_batches - fitting)
        finished = (num_batches - 1) * LINEARIZE_TO_GRAPH_MEMORY
        if kept * (finished + LINEARIZING_TO_GRAPH_MEMORY) <= budget:
            with self._explained("autograd"):
                first = autograd(self.objective, 0)
                paid = self._linearize_if_it_pays(first, expected_products)
            if not paid:
                self._build(graphs, first=first)
        else:
            self._build(graphs)

    def _linearize_if_it_pays(self, graph: Product, expected_products: int) -> bool:
        """Builds linearisations where a trial says that they are faster than retained graphs."""
        before, vector = self._check_vectors()
        retained, reference = self._timed(graph, vector)
        if expected_products * retained < _LEAST_TRIAL_SECONDS:
            return False
        try:
            start = time.perf_counter()
            trial = linearize(self.objective, 0)
            building = time.perf_counter() - start
            first, _ = self._timed(trial, before)
            second, found = self._timed(trial, vector)
            if expected_products * (retained - min(first, second)) <= building:
                return False
            error = self._compared("linearize", found, reference)
            self._build(["linearize"] * len(self.objective.batches), first=trial, error=error)
        except (RuntimeError, NotImplementedError, TypeError):
            # An operation without forward-mode derivative, random draws, or too little memory:
            # the retained graphs serve.
            return False
        return True

    def _timed(self, product: Product, vector: Tensor) -> tuple[float, Tensor]:
        """Returns the time of a product of the first batch, and the product."""
        start = time.perf_counter()
        found = self._first_product(product, vector)
        float(found[:1].sum())  # waits for the device
        return time.perf_counter() - start, found

    def _build(
        self, engines: list[str], first: Product | None = None, error: float | None = None
    ) -> None:
        """Makes the product of each batch by its engine, and checks the first.

        Args:
            engines: Of each batch.
            first: The product of the first batch, where it has been made.
            error: Its `self_check_error`, where it has been checked.
        """
        self.engine, self._engines = "+".join(dict.fromkeys(engines)), engines
        with self._explained(self.engine):
            self._products = [
                first if first and i == 0 else ENGINES[engine](self.objective, i)
                for i, engine in enumerate(engines)
            ]
            self.self_check_error = self._checked(engines[0]) if error is None else error

    @contextmanager
    def _explained(self, engine: str) -> Iterator[None]:
        """A block in which errors of differentiating become a MeasurementError with a remedy."""
        try:
            yield
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if isinstance(error, MeasurementError) or is_out_of_memory(error):
                raise
            raise MeasurementError(explain(engine, error)) from error

    def _check_vectors(self) -> tuple[Tensor, Tensor]:
        """Returns two vectors: a product with the first must not change that with the second."""
        generator = torch.Generator().manual_seed(0)
        drawn = self.shard.take(torch.randn(2, self.size, generator=generator))
        before, vector = drawn.to(self.device, self.dtype)
        return before, vector

    def _checked(self, engine: str) -> float:
        """Returns the difference from another way to the same product of the first batch.

        Raises:
            MeasurementError: The difference is larger than rounding explains.
        """
        before, vector = self._check_vectors()
        self._first_product(self._products[0], before)
        ours = self._first_product(self._products[0], vector)
        if engine == "recompute":
            return self._compared(engine, ours, ours)
        if engine == "finite_difference":
            # Products are linear in v, but the step is not: half the step, for twice the vector,
            # would show nothing, so the vector is turned about its second half.
            half = vector.clone()
            half[len(half) // 2 :] = 0
            rest = vector - half
            parts = [self._first_product(self._products[0], v) for v in (half, rest)]
            return self._compared(engine, ours, parts[0] + parts[1])
        return self._compared(
            engine, ours, self._first_product(recompute(self.objective, 0), vector)
        )

    def _compared(self, engine: str, ours: Tensor, reference: Tensor) -> float:
        """Returns the difference between two ways to the product with the second check vector.

        Raises:
            MeasurementError: The difference is larger than rounding explains.
        """
        differences = engine == "finite_difference"
        tolerance = _DIFFERENCE_TOLERANCE if differences else torch.finfo(self.dtype).eps ** 0.5
        if self._custom and not differences:
            self._check_custom_functions(self._check_vectors()[1], ours)
        check_finite(ours, self._norm(ours), "A product with the Hessian")
        scale = self._norm(reference)
        error = self._norm(ours - reference) / scale if scale > 0 else self._norm(ours)
        if not error <= tolerance:
            remedy = (
                "The loss is too rough for finite differences."
                if differences
                else "The loss may draw random numbers (dropout in mode='train'); use "
                "hvp='autograd'."
            )
            raise MeasurementError(
                f"hvp={engine!r} differs from a second computation of the same product by "
                f"{error:.1e} (relative). {remedy}"
            )
        return error

    def _check_custom_functions(self, vector: Tensor, ours: Tensor) -> None:
        """Compares with finite differences, where these agree among themselves.

        A custom autograd.Function (a Triton kernel, a C++ extension) may compute its backward
        where autograd does not see it: then its share of the Hessian is silently missing.
        """
        coarse, fine = (
            self._first_product(finite_difference(self.objective, 0, shrink=shrink), vector)
            for shrink in (1.0, 4.0)
        )
        scale = self._norm(fine)
        smooth = self._norm(coarse - fine) < 0.2 * _HIDDEN_TOLERANCE * scale
        if smooth and self._norm(ours - fine) > _HIDDEN_TOLERANCE * scale:
            message = (
                f"{', '.join(self._custom)} has no double backward: a part of the second "
                "derivative is hidden from autograd (products differ from finite differences of "
                "gradients). Replace it for measuring, through loss_fn(module, batch) or "
                "`hessian_loss`, or use hvp='finite_difference'."
            )
            raise MeasurementError(message) from RuntimeError("no second derivative")

    def _norm(self, vector: Tensor) -> float:
        return float(self.shard.norm(vector))

    def _first_product(self, product: Product, vector: Tensor) -> Tensor:
        return self.objective.space.flatten(product(self.objective.space.split(vector)))

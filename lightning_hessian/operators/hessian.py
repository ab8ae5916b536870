"""Hessian-vector products behind one operator, by several engines."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_hessian.operators.memory import free_bytes
from lightning_hessian.probe.objective import Objective
from lightning_hessian.results import MeasurementError

Product: TypeAlias = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]
"""Tangents, one for each parameter, to the product of one batch's Hessian with them."""

_LINEARIZE_TO_GRAPH_MEMORY = 4
"""A linearisation holds up to so many times the memory of a retained graph (measured: 3.4)."""

_LEAST_TRIAL_SECONDS = 0.5
"""Work on one batch below which the making of a linearisation is not even tried."""


class HessianOperator:
    """The Hessian of an `Objective` at its present parameters, as a symmetric operator.

    Products must be taken inside ``objective.isolated()``, and the parameters must not change
    while the operator is in use. A product costs about two gradients over the probe batches
    (``linearize``, ``autograd``) or four (``recompute``).

    Args:
        objective: The loss over the probe batches.
        engine: ``"linearize"`` keeps the gradient of each batch linearised (the cheapest
            products, the most memory, and about a second to build), ``"autograd"`` keeps its
            graph, ``"recompute"`` keeps nothing. ``"auto"`` takes the one that will be done first
            among those that work and fit ``memory_budget``, by a trial on one batch.
        memory_budget: Bytes that ``"auto"`` may keep; by default half of what is free.
        expected_products: How many products will be taken, about; ``"auto"`` weighs with it
            whether a linearisation repays its making.

    Attributes:
        size: Order n.
        engine: The engine in use.
        self_check_error: Relative difference between a product of this engine and of
            ``recompute`` on the first batch; 0 for ``recompute`` itself.
        num_products: Products taken so far.

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
            raise ValueError(f"hvp={engine!r} is unknown; choose from 'auto', {list(ENGINES)}.")
        self.objective = objective
        self.size = objective.space.size
        self.dtype = objective.space.dtype
        self.device = objective.space.device
        self.num_products = 0
        self.self_check_error = 0.0
        self.engine = engine
        self._products: list[Product] = []
        if engine != "auto":
            self._build(engine)
            return
        budget = free_bytes(self.device) / 2 if memory_budget is None else memory_budget
        kept = _retained_bytes(objective) * len(objective.batches)
        self._build("autograd" if kept <= budget else "recompute")
        if kept * _LINEARIZE_TO_GRAPH_MEMORY <= budget:
            self._linearize_if_it_pays(expected_products)

    def matvec(self, vector: Tensor) -> Tensor:
        """Returns H v for a vector [n], a new tensor [n]."""
        self.num_products += 1
        tangents = self.objective.space.split(vector)
        total = torch.zeros_like(vector)
        for product, weight in zip(self._products, self.objective.weights, strict=True):
            total.add_(self.objective.space.flatten(product(tangents)), alpha=weight)
        return total

    def matmat(self, vectors: Tensor) -> Tensor:
        """Returns H v for each row v of [b, n], a new tensor [b, n]."""
        return torch.stack([self.matvec(vector) for vector in vectors])

    def _linearize_if_it_pays(self, expected_products: int) -> None:
        """Replaces retained graphs by linearisations where a trial says that this is faster."""
        before = self.engine, self._products, self.self_check_error
        retained = _seconds(self._products[0], self.objective)
        if expected_products * retained < _LEAST_TRIAL_SECONDS:
            return
        try:
            start = time.perf_counter()
            trial = _linearize(self.objective, 0)
            building = time.perf_counter() - start
            saved = retained - _seconds(trial, self.objective)
            if expected_products * saved > building:
                self._build("linearize")
        except (RuntimeError, NotImplementedError, TypeError):
            # An operation without forward-mode derivative, random draws, or too little memory:
            # the retained graphs serve.
            self.engine, self._products, self.self_check_error = before

    def _build(self, engine: str) -> None:
        self.engine = engine
        build = ENGINES[engine]
        try:
            self._products = [build(self.objective, i) for i in range(len(self.objective.batches))]
            self.self_check_error = self._checked()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if isinstance(error, (MeasurementError, torch.OutOfMemoryError)):
                raise
            raise MeasurementError(_explain(engine, error)) from error

    def _checked(self) -> float:
        """Returns the difference from ``recompute`` on one product of the first batch.

        Raises:
            MeasurementError: The difference is larger than rounding explains.
        """
        if self.engine == "recompute":
            return 0.0
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(self.size, generator=generator).to(self.device, self.dtype)
        tangents = self.objective.space.split(vector)
        ours = self.objective.space.flatten(self._products[0](tangents))
        reference = self.objective.space.flatten(_recompute(self.objective, 0)(tangents))
        scale = float(reference.norm())
        error = float((ours - reference).norm()) / scale if scale > 0 else float(ours.norm())
        if not error <= torch.finfo(self.dtype).eps ** 0.5:
            raise MeasurementError(
                f"hvp={self.engine!r} differs from a recomputed product by {error:.1e} (relative). "
                "The loss may draw random numbers (dropout in mode='train'); use hvp='autograd'."
            )
        return error


def _linearize(objective: Objective, index: int) -> Product:
    point = objective.point()
    gradient = torch.func.grad(lambda values: objective.batch_loss(values, index))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
        _, product = torch.func.linearize(gradient, point)
        # The first call folds the constants; random draws in them must be those of `batch_loss`.
        product(tuple(torch.zeros_like(value) for value in point))
    return product


def _autograd(objective: Objective, index: int) -> Product:
    leaves = tuple(value.requires_grad_() for value in objective.point())
    loss = objective.batch_loss(leaves, index)
    if not loss.requires_grad:
        raise MeasurementError(
            "The loss does not depend on any selected parameter (it carries no gradient). Return "
            "the loss as a tensor with its graph, not detached, and select parameters it uses."
        )
    gradient = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    # A parameter in which the loss is linear has a constant gradient: a zero row of the Hessian.
    curved = [i for i, part in enumerate(gradient) if part.requires_grad]

    def product(tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        if not curved:
            return [torch.zeros_like(leaf) for leaf in leaves]
        return torch.autograd.grad(
            [gradient[i] for i in curved],
            leaves,
            [tangents[i] for i in curved],
            retain_graph=True,
            materialize_grads=True,
        )

    return product


def _recompute(objective: Objective, index: int) -> Product:
    return lambda tangents: _autograd(objective, index)(tangents)


ENGINES: dict[str, Callable[[Objective, int], Product]] = {
    "linearize": _linearize,
    "autograd": _autograd,
    "recompute": _recompute,
}


def _seconds(product: Product, objective: Objective) -> float:
    """Returns the time of one product, the better of two."""
    tangents = tuple(torch.ones_like(value) for value in objective.point())
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        float(product(tangents)[0].sum())  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best


def _retained_bytes(objective: Objective) -> int:
    """Returns the memory that a retained graph of the largest batch holds."""
    parameters = {value.untyped_storage().data_ptr() for value in objective.point()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    largest = max(range(len(objective.weights)), key=objective.weights.__getitem__)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            product = _autograd(objective, largest)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, (MeasurementError, torch.OutOfMemoryError)):
            raise
        raise MeasurementError(_explain("autograd", error)) from error
    del product
    return sum(size for address, size in saved.items() if address not in parameters)


def _explain(engine: str, error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "derivative for" in text and "attention" in text:
        return (
            f"Attention ran on a fused kernel, which has no double backward ({text}). The module "
            "forces it; let it choose (`sdpa_kernel`), so that the MATH kernel can serve here."
        )
    if "derivative for" in text or "double backward" in text or "once_differentiable" in text:
        return (
            f"An operation of the loss has no double backward ({text}). Replace it for measuring, "
            "through loss_fn(module, batch) or `hessian_loss`."
        )
    return f"hvp={engine!r} could not differentiate the loss twice: {text}"

"""The engines of Hessian-vector products: each turns one probe batch into a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, fx

from lightning_hessian.isolation.recomputation import REENTRANT, is_reentrant
from lightning_hessian.linear.memory import first_line
from lightning_hessian.operators.linearize.decompose import WrittenOut
from lightning_hessian.operators.linearize.fold import batchable, fold, fold_restricted
from lightning_hessian.operators.linearize.onednn import is_available
from lightning_hessian.operators.linearize.trace import trace
from lightning_hessian.probe.objective import Objective
from lightning_hessian.results import MeasurementError, NoSecondDerivativeError

Product: TypeAlias = Callable[[tuple[Tensor, ...]], Sequence[Tensor]]
"""Tangents, one for each parameter, to the product of one batch's Hessian with them."""

LINEARIZE_TO_GRAPH_MEMORY = 4
"""A linearisation holds up to so many times the memory of a retained graph (measured: 3.2)."""

LINEARIZING_TO_GRAPH_MEMORY = 7
"""While it is being made (measured: 5.9)."""


def linearize(objective: Objective, index: int, *, onednn: bool = False) -> Product:
    """Return a product that keeps the gradient linearised: forward over reverse, traced once.

    What `torch.func.linearize` does, without two of its faults (torch 2.13). Its lazy zero
    tensors end the process with a segmentation fault where a derivative formula scales one
    (``mse_loss``, ``addcmul`` and others; compare pytorch issue 123996): here zeros are zeros. And
    it folds constants that the traced code then changes in place, so that every call gives
    another result (``binary_cross_entropy_with_logits``): here these are made anew in each call.

    Args:
        objective: The loss.
        index: Of the batch.
        onednn: Whether products of matrices in float32 are oneDNN's instead of torch's own.
    """
    point = objective.point()
    gradient = torch.func.grad(lambda values: objective.batch_loss(values, index))

    def derivative(*tangents: Tensor) -> tuple[Tensor, ...]:
        with forward_ad.dual_level(), WrittenOut():
            pairs = zip(point, tangents, strict=True)
            outputs = gradient(tuple(forward_ad.make_dual(value, t) for value, t in pairs))
            unpacked = [forward_ad.unpack_dual(output) for output in outputs]
        return tuple(
            torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in unpacked
        )

    zeros = tuple(torch.zeros_like(value) for value in point)
    traced = trace(derivative, zeros, before_again=objective.is_written)
    objective.is_written()  # puts back what the pass has written to: the trace refers to it
    return _Linearised(fold(traced, onednn=onednn), onednn)


class _Linearised:
    """A folded product; ``batchable`` is the same for ``torch.vmap``."""

    def __init__(self, folded: fx.GraphModule, onednn: bool) -> None:
        self._folded, self._onednn = folded, onednn

    def __call__(self, tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self._folded(*tangents)
        return found

    @cached_property
    def batchable(self) -> Product:
        folded = batchable(self._folded)
        return lambda tangents: folded(*tangents)

    def restricted(self, which: Sequence[int], point: Sequence[Tensor]) -> Product:
        """Return the product of the block of some parameters: nothing else is computed."""
        folded = fold_restricted(self._folded, which, point, onednn=self._onednn)
        return _Linearised(folded, self._onednn)


def linearize_onednn(objective: Objective, index: int) -> Product:
    """Return the linearised product, with oneDNN's products of matrices.

    Raises:
        MeasurementError: This build of torch has none.
    """
    if not is_available():
        raise MeasurementError(
            "hvp='linearize_onednn' needs oneDNN's products of matrices, which this build of torch "
            f"({torch.__version__}) has not. Use hvp='linearize'."
        )
    return linearize(objective, index, onednn=True)


def compiled(objective: Objective, index: int) -> Product:
    """Return the linearised product, compiled by ``torch.compile``."""
    product = torch.compile(linearize(objective, index))
    product(tuple(torch.zeros_like(value) for value in objective.point()))
    return product


def autograd(objective: Objective, index: int, *, at: tuple[Tensor, ...] | None = None) -> Product:
    """Return a product that keeps the graph of the gradient: reverse over reverse.

    ``at`` are values of the parameters, instead of the present ones.
    """
    at = objective.point() if at is None else at
    leaves = tuple(value.requires_grad_() for value in at)
    gradient = gradient_of(objective, index, leaves, create_graph=True)
    curved = [i for i, part in enumerate(gradient) if part.requires_grad]
    flat = [i for i, part in enumerate(gradient) if not part.requires_grad]
    # All ranks ask, and all check: which parts carry no graph may differ between shards.
    if objective.anywhere(any(bool(gradient[i].any()) for i in flat)):
        _check_flat(objective, index, gradient, flat)

    return _Retained(objective, gradient, leaves, curved)


class _Retained:
    """A product by the retained graph of a gradient."""

    def __init__(
        self,
        objective: Objective,
        gradient: Sequence[Tensor],
        leaves: tuple[Tensor, ...],
        curved: Sequence[int],
    ) -> None:
        self._objective, self._gradient, self._leaves = objective, gradient, leaves
        self._curved = curved  # the parts of the gradient that carry a graph

    def __call__(self, tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        return self._product(tangents, range(len(self._leaves)))

    def restricted(self, which: Sequence[int], point: Sequence[Tensor]) -> Product:
        """Return the product of the block of some parameters: autograd goes no further back."""
        return lambda tangents: self._product(tangents, which)

    def _product(self, tangents: tuple[Tensor, ...], which: Sequence[int]) -> Sequence[Tensor]:
        leaves = [self._leaves[i] for i in which]
        pairs = [(self._gradient[i], t) for i, t in zip(which, tangents, strict=True)]
        curved = [pair for i, pair in zip(which, pairs, strict=True) if i in self._curved]
        if not curved:
            return [torch.zeros_like(leaf) for leaf in leaves]
        gradient, vectors = zip(*curved, strict=True)
        found = derivatives(gradient, leaves, vectors, retain_graph=True)
        self._objective.is_written()  # puts back what hooks have written to
        return found


def _check_flat(
    objective: Objective, index: int, gradient: Sequence[Tensor], flat: Sequence[int]
) -> None:
    """Check that gradients without a graph are constant, as where the loss is linear."""
    generator = torch.Generator().manual_seed(0)
    moved = []
    for value in objective.point():
        noise = torch.randn(value.shape, generator=generator).to(value)
        moved.append((value + 0.01 * value.abs().mean() * noise).requires_grad_())
    elsewhere = gradient_of(objective, index, tuple(moved))
    for i in flat:
        if float((elsewhere[i] - gradient[i]).norm()) > 1e-4 * float(gradient[i].norm()):
            raise NoSecondDerivativeError(
                f"The gradient by {objective.space.names[i]!r} carries no graph, yet it is not "
                "constant: an operation of the loss has no double backward (a custom "
                "autograd.Function). Use hvp='finite_difference'."
            )


def recompute(objective: Objective, index: int) -> Product:
    """Return a product that builds the graph anew each time and keeps nothing."""
    return lambda tangents: autograd(objective, index)(tangents)


def finite_difference(
    objective: Objective, index: int, *, shrink: float = 1.0, eps: float | None = None
) -> Product:
    """Return a product by central differences of gradients, for losses without second derivative.

    The step is eps^(1/3) times norm(theta) / norm(v): rounding costs eps / step and the third
    derivative step^2, so about eps^(2/3) (2e-5 in float32) of the product is lost where the loss
    is smooth on that scale.

    Args:
        objective: The loss.
        index: Of the batch.
        shrink: Divides the step.
        eps: Relative rounding of a gradient; by default that of the precision of the vectors.
    """
    size = objective.norm(objective.point()) or 1.0
    eps = torch.finfo(objective.space.dtype).eps if eps is None else eps
    relative = eps ** (1 / 3) / shrink

    def gradient(tangents: tuple[Tensor, ...], step: Tensor) -> Sequence[Tensor]:
        # The point is asked for anew: what hooks have written to it since is put back.
        return _gradient_at(objective, index, objective.point(), tangents, step)

    def product(tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        # The step stays on the device, which the host would have to wait for to read a number.
        # Along a vector of zeros it may be any: both gradients are the same.
        length = objective.length(tangents)
        step = relative * size / torch.where(length == 0, 1.0, length)
        above, below = gradient(tangents, step), gradient(tangents, -step)
        return [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]

    return product


def _gradient_at(
    objective: Objective,
    index: int,
    point: Sequence[Tensor],
    tangents: Sequence[Tensor],
    step: float | Tensor,
) -> Sequence[Tensor]:
    moved = zip(point, tangents, strict=True)
    leaves = tuple((value + step * tangent).requires_grad_() for value, tangent in moved)
    return gradient_of(objective, index, leaves)


def live_entries(objective: Objective, index: int) -> list[Tensor] | None:
    """Return which entries of each parameter the gradient of a batch reaches; None for all.

    Some entries move the loss and get no gradient: the padding row of an embedding, a part that is
    detached. A gradient that is zero around a point has a row of zeros in the Hessian, so, as that
    is symmetric, a column of zeros too. What moves such entries (differences of gradients, tangents
    of forward mode) must leave them out, or its matrix has a column without the row.

    The gradient is looked at in two random points close by: an entry that is zero at the point
    alone (weights after a layer that starts from zero) is none of these.
    """
    point = objective.point()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(v.shape, generator=generator).to(v) for v in point]
    eps = torch.finfo(objective.space.dtype).eps
    step = eps ** (1 / 3) * (objective.norm(point) or 1.0) / (objective.norm(noise) or 1.0)
    above, below = (_gradient_at(objective, index, point, noise, s) for s in (step, -step))
    live = [(a != 0) | (b != 0) for a, b in zip(above, below, strict=True)]
    return None if all(bool(part.all()) for part in live) else live


class Restricted:
    """A product on some entries only: those of the vector and of the result are zero elsewhere."""

    def __init__(self, product: Product, live: Sequence[Tensor]) -> None:
        self._product, self._live = product, live

    def __call__(self, tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        """Return the product on these entries."""
        return self._within(self._product, tangents)

    @property
    def batchable(self) -> Product:
        """The same for ``torch.vmap``."""
        product = getattr(self._product, "batchable", self._product)
        return lambda tangents: self._within(product, tangents)

    def _within(self, product: Product, tangents: tuple[Tensor, ...]) -> Sequence[Tensor]:
        given = tuple(t * part for t, part in zip(tangents, self._live, strict=True))
        return [found * part for found, part in zip(product(given), self._live, strict=True)]


ENGINES: dict[str, Callable[[Objective, int], Product]] = {
    "linearize": linearize,
    "linearize_onednn": linearize_onednn,
    "autograd": autograd,
    "recompute": recompute,
    "compile": compiled,
    "finite_difference": finite_difference,
}
TRACED = ("linearize", "linearize_onednn", "compile")
"""Engines whose activations are the constants of a trace."""


def retained_bytes(
    objective: Objective, make: Callable[[Objective, int], Product] = autograd
) -> int:
    """Return the memory that a retained graph of the largest batch holds.

    ``make`` makes a product that keeps its graph.
    """
    parameters = {value.untyped_storage().data_ptr() for value in objective.point()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        # An operation that saves its own output (tanh, softmax) would own itself through C++,
        # where gc does not look, if the output itself came back: torch keeps it with its graph.
        return tensor.detach()

    largest = max(range(len(objective.weights)), key=objective.weights.__getitem__)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        product = make(objective, largest)
    del product
    return sum(size for address, size in saved.items() if address not in parameters)


def not_differentiable(engine: str, error: Exception) -> MeasurementError:
    """Return what to tell the user of an error in building or applying an engine."""
    exact = engine not in (*TRACED, "finite_difference")
    return (NoSecondDerivativeError if exact else MeasurementError)(_explanation(engine, error))


def _explanation(engine: str, error: Exception) -> str:
    text = first_line(error)
    if "attention" in text and ("derivative for" in text or "forward AD" in text):
        return (
            f"Attention ran on a fused kernel, which has no double backward ({text}). The module "
            "forces it; let it choose (`sdpa_kernel`), so that the MATH kernel can serve here, or "
            "use hvp='finite_difference'."
        )
    if any(sign in text for sign in ("derivative for", "double backward", "once_differentiable")):
        return (
            f"An operation of the loss has no double backward ({text}). Replace it for measuring, "
            "through loss_fn(module, batch) or `hessian_loss`, or use hvp='finite_difference'."
        )
    remedy = "hvp='autograd'" if engine in TRACED else "hvp='finite_difference'"
    return f"hvp={engine!r} could not differentiate the loss twice ({text}). Use {remedy}."


def gradient_of(
    objective: Objective,
    index: int,
    leaves: tuple[Tensor, ...] | None = None,
    *,
    create_graph: bool = False,
) -> Sequence[Tensor]:
    """Return the gradient of the loss of a batch, with zeros where it depends on nothing.

    ``leaves`` are values of the parameters that require grad; by default the present ones.
    """
    if leaves is None:
        leaves = tuple(value.requires_grad_() for value in objective.point())
    loss = objective.batch_loss(leaves, index)
    if not loss.requires_grad:  # this batch uses none of the parameters
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradient = derivatives([loss], leaves, create_graph=create_graph)
    if objective.is_written():  # by a hook: once more, on copies that it does not reach
        return gradient_of(objective, index, leaves, create_graph=create_graph)
    return gradient


def derivatives(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    vectors: Sequence[Tensor] | None = None,
    **options: bool,
) -> list[Tensor]:
    """Return what ``torch.autograd.grad`` does, dense, with zeros where nothing depends on a leaf.

    Its own ``materialize_grads`` makes zeros that require grad in torch 2.6.

    Raises:
        MeasurementError: A part of the loss is under reentrant activation checkpointing.
    """
    pairs = zip(gradients_by(outputs, leaves, vectors, **options), leaves, strict=True)
    return [torch.zeros_like(leaf) if part is None else _dense(part) for part, leaf in pairs]


def gradients_by(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    vectors: Sequence[Tensor] | None = None,
    **options: bool,
) -> Sequence[Tensor | None]:
    """Return what ``torch.autograd.grad`` does, with None for leaves that nothing depends on."""
    try:
        return torch.autograd.grad(outputs, leaves, vectors, allow_unused=True, **options)
    except RuntimeError as error:
        if is_reentrant(error):
            raise MeasurementError(REENTRANT) from None
        raise


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient that has a number for each entry: ``F.embedding(sparse=True)`` has not."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()

"""Where the network ends and its loss begins: the split that the Gauss-Newton matrix rests on.

A loss is a function of the network's outputs z. While it is evaluated, the inputs of torch's loss
functions are taken for these outputs: each is recorded, and a copy without graph goes on in its
place. What comes out is the loss as a function of the copies alone, whatever was done with the
terms afterwards (sums, weights, powers). That nothing else depends on a parameter is checked on
the graph, so a loss that does not split this way is never measured as if it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary
from torch.utils._pytree import tree_map

from lightning_hessian.probe.loss import LossFunction
from lightning_hessian.probe.objective import Objective
from lightning_hessian.results import MeasurementError

_OF_LOG_PROBABILITIES = (F.nll_loss, F.kl_div)
"""These are linear in what they are given, log-probabilities: their curvature is that of the
softmax before them."""

_LOSSES = frozenset(
    {
        F.cross_entropy, F.mse_loss, F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
        F.huber_loss, F.smooth_l1_loss, F.l1_loss, F.poisson_nll_loss, F.soft_margin_loss,
        *_OF_LOG_PROBABILITIES,
    }
)  # fmt: skip

_GIVEN = (
    "LossOptions(outputs_and_loss=...), a function (module, batch) -> (outputs, loss_of_outputs) "
    "whose outputs hold all that the loss takes from the network"
)


@dataclass(frozen=True)
class Split:
    """The loss of one batch in two parts.

    Attributes:
        outputs: What the network gives to the loss, with their graph to the parameters.
        cut: Leaves of the same values, which the loss is a function of.
        loss: A function of these alone.
    """

    outputs: tuple[Tensor, ...]
    cut: tuple[Tensor, ...]
    loss: Tensor


def split_loss(
    objective: Objective, leaves: Sequence[Tensor], index: int, *, marked: bool = False
) -> Split:
    """Return the split of the loss of a batch.

    Args:
        objective: The loss.
        leaves: Values of the parameters, which require grad.
        index: Of the batch.
        marked: Whether only what `network_output` marks is cut, not the inputs of torch's losses.

    Raises:
        MeasurementError: The loss depends on parameters in another way too; says what to give.
    """
    with _Cuts(marked) as cuts:
        loss = objective.batch_loss(leaves, index)
    if depends_on(loss, leaves):
        raise MeasurementError(_unsplit(marked, bool(cuts.leaves)))
    return Split(tuple(cuts.outputs), tuple(cuts.leaves), loss)


def _unsplit(marked: bool, some: bool) -> str:
    if marked:
        return (
            "The loss that outputs_and_loss returns depends on parameters other than through its "
            "outputs. Return everything that the loss takes from the network as outputs: tensors, "
            "or tuples, lists or dicts of them."
        )
    names = ", ".join(sorted(function.__name__ for function in _LOSSES))
    how = (
        "depends on parameters other than through the inputs of torch's loss functions (a penalty "
        "on the weights, or a term written out by hand)"
        if some
        else "is not made of torch's loss functions"
    )
    return (
        "matrix='gauss_newton' needs the split between network and loss, and this loss "
        f"{how}. Compute it by functions of torch.nn.functional ({names}), or give {_GIVEN}."
    )


def depends_on(tensor: Tensor, leaves: Iterable[Tensor]) -> bool:
    """Return whether a tensor's graph reaches one of these leaves."""
    wanted = {id(leaf) for leaf in leaves}
    if tensor.grad_fn is None:
        return id(tensor) in wanted
    seen: set[Any] = set()
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        stack.extend(after for after, _ in node.next_functions)
    return False


def network_output(tensor: Tensor) -> Tensor:
    """Return the tensor itself; while a loss is split, this is where."""
    if has_torch_function_unary(tensor):
        found: Tensor = handle_torch_function(network_output, (tensor,), tensor)
        return found
    return tensor


def marked_loss(outputs_and_loss: Callable[[Any, Any], Any]) -> LossFunction:
    """Return the loss function that a split given by the user amounts to.

    Args:
        outputs_and_loss: ``(module, batch) -> (outputs, loss_of_outputs)``: tensors, or tuples,
            lists or dicts of them, and a function of these that returns the mean loss.

    Example:
        >>> def outputs_and_loss(module, batch):
        ...     return module(batch), lambda outputs: outputs.square().mean()
        >>> loss_fn = marked_loss(outputs_and_loss)
        >>> loss_fn(torch.nn.Identity(), torch.tensor([1.0, 3.0]))
        tensor(5.)
    """

    def loss_fn(module: Any, batch: Any) -> Tensor:
        found = outputs_and_loss(module, batch)
        if not isinstance(found, tuple) or len(found) != 2 or not callable(found[1]):
            raise MeasurementError(
                f"outputs_and_loss returned {type(found).__name__}. Return (outputs, "
                "loss_of_outputs), a pair whose second part is a function of the first."
            )
        outputs, loss_of_outputs = found
        loss: Tensor = loss_of_outputs(
            tree_map(
                lambda part: network_output(part) if isinstance(part, Tensor) else part, outputs
            )
        )
        return loss

    return loss_fn


class _Cuts(TorchFunctionMode):
    """A block in which what a loss function is given is recorded and cut off from its graph."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._marked = marked

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run a function; a loss function on leaves instead of outputs of the network."""
        kwargs = kwargs or {}
        if func is network_output:
            return self._cut(args[0])
        if self._marked or func not in _LOSSES:
            return func(*args, **kwargs)
        # The target and the weights may come from the network too, as those of a Siamese one do.
        first, *args = tree_map(self._cut, args)
        kwargs = tree_map(self._cut, kwargs)
        if func in _OF_LOG_PROBABILITIES and any(first is leaf for leaf in self.leaves):
            first = _renormalised(func, first)
        return func(first, *args, **kwargs)

    def _cut(self, value: Any) -> Any:
        """Return a leaf in the place of an output of the network, and all else as it is."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        for output, leaf in zip(self.outputs, self.leaves, strict=True):
            if value is output:
                return leaf
        if depends_on(value, self.leaves):  # a loss of a loss: this is a part of it
            return value
        self.outputs.append(value)
        self.leaves.append(value.detach().requires_grad_())
        return self.leaves[-1]


def _renormalised(func: Callable[..., Tensor], values: Tensor) -> Tensor:
    """Return log-probabilities as the log-softmax of themselves, which they are.

    ``nll_loss(log_softmax(z))`` is linear after the softmax, so a split there would leave no
    curvature. The softmax is a part of the loss. It need not be looked for in the network: it
    changes nothing of what is normalised already, and since its second derivative diag(p) - p p^T
    maps the constant vector to zero, J^T H_L J is the same for z and for log_softmax(z).

    Raises:
        MeasurementError: They are not normalised over classes.
    """
    if func is F.nll_loss:
        dims = [0 if values.ndim == 1 else 1]
    else:
        dims = [-1, 1] if values.ndim > 1 else [-1]
    for dim in dims:
        total = values.detach().logsumexp(dim)
        if bool((total.abs() <= torch.finfo(values.dtype).eps ** 0.5).all()):
            return values.log_softmax(dim)
    raise MeasurementError(
        f"matrix='gauss_newton': what {func.__name__} is given are not log-probabilities that add "
        "up to 1 over the classes, so that its curvature is not told by them. Give log_softmax's "
        f"output or use cross_entropy, or give {_GIVEN}."
    )

"""Cross-entropy of a last linear layer that never holds the logits of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_hessian.linear.nesting import refuse_forward_over_forward
from lightning_hessian.losses import chunked_cross_entropy as kernels
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    checked,
    instance_of,
    one_of,
    optional,
    real_number,
    whole_number,
)

_MOST = 2**62
_TENSOR = instance_of(Tensor, "Give a tensor.")
_RULES = {
    "hidden": _TENSOR,
    "weight": _TENSOR,
    "targets": _TENSOR,
    "bias": optional(_TENSOR),
    "ignore_index": whole_number(least=-_MOST, most=_MOST),
    "label_smoothing": real_number("Give a share from 0 to 1.", least=0.0, most=1.0),
    "reduction": one_of("mean", "sum"),
    "chunk_size": optional(whole_number(least=1), "for as many as have 2**23 logits"),
}


@checked(_RULES)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Return ``F.cross_entropy(F.linear(hidden, weight, bias), targets)`` in little memory.

    The logits of a chunk of tokens are computed, used and forgotten: in the loss, in its gradient
    and in its second derivative, where each is computed anew. So memory grows with the number of
    tokens and with the number of entries, never with their product. All engines of Hessian-vector
    products and `torch.func` differentiate it, exactly, up to the second derivative.

    In half precision, and under autocast, the logits are computed in half precision and the rest
    in float32, as Hugging Face's losses do; the loss is float32 then.

    Args:
        hidden: Hidden states of the tokens, [..., width].
        weight: Of the last layer, [entries, width].
        targets: Which entry is right for each token, integers [...].
        bias: Of the last layer, [entries]; None for none.
        ignore_index: The target of tokens that do not count.
        label_smoothing: The share of the target that is spread over all entries, from 0 to 1.
        reduction: ``"mean"`` over the tokens that count (NaN where none does), or ``"sum"``.
        chunk_size: Tokens whose logits are held at a time; None for as many as have 2**23.

    Raises:
        ArgumentError: Shapes that do not fit, targets that are no integers, or an option out of
            its range.
        NotImplementedError: Forward mode is nested in forward mode.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(100, 8)
        >>> targets = torch.randint(100, (2, 5))
        >>> plain = torch.nn.functional.cross_entropy((hidden @ weight.T).mT, targets)
        >>> bool(torch.isclose(linear_cross_entropy(hidden, weight, targets), plain))
        True
    """
    _check(hidden, weight, targets, bias)
    refuse_forward_over_forward("linear_cross_entropy")
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    # What F.linear does under autocast; autograd differentiates the casts.
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    options = ignore_index, label_smoothing, chunk_size or kernels.chunk_size_for(len(weight))
    total: Tensor = _Total.apply(rows, weight, bias, labels, *options)[0]  # type: ignore[no-untyped-call]
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raise an ArgumentError where shapes or kinds do not fit."""
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        wanted = "Give hidden [..., width] and weight [entries, width]."
        raise ArgumentError("hidden", tuple(hidden.shape), f"{wanted} {tuple(weight.shape)=}.")
    if targets.shape != hidden.shape[:-1]:
        shape = list(hidden.shape[:-1])
        raise ArgumentError("targets", tuple(targets.shape), f"Give one for each token: {shape}.")
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise ArgumentError("targets", targets.dtype, "Give the number of the right entry.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ArgumentError("bias", tuple(bias.shape), f"Give one for each entry: {len(weight)}.")


class _Total(Function):
    """The sum of the losses, and the logsumexp of each token, which counts as a constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return both; see the kernel."""
        return kernels.loss(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep what the derivatives need: nothing of the size of the logits."""
        *point, ctx.ignore_index, ctx.smoothing, ctx.chunk_size = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*point, output[1])
        ctx.save_for_forward(*point, output[1])

    @staticmethod
    def backward(ctx: Any, *scales: Any) -> Any:
        """Return the gradient by hidden states, weight and bias."""
        if scales[0] is None:
            return (None,) * 7
        wanted = tuple(ctx.needs_input_grad[:3])
        parts = _Gradient.apply(*ctx.saved_tensors, *_options(ctx), *wanted)  # type: ignore[no-untyped-call]
        found = [
            scales[0] * part if want else None for part, want in zip(parts, wanted, strict=True)
        ]
        return *found, *(None,) * 4

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the change of the sum along a direction."""
        directions = tangents[:3]
        wanted = tuple(d is not None for d in directions)
        parts = _Gradient.apply(*ctx.saved_tensors, *_options(ctx), *wanted)  # type: ignore[no-untyped-call]
        pairs = zip(parts, directions, strict=True)
        moved = [(part * d).sum() for part, d in pairs if d is not None]
        return (sum(moved[1:], moved[0]) if moved else None), None


class _Gradient(Function):
    """The gradient of the sum; a part that is not wanted is empty.

    Its derivative is a symmetric matrix, so forward and backward mode ask for the same product.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return it by hidden states, weight and bias; see the kernel."""
        return kernels.gradient(*inputs[:-3], list(inputs[-3:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the point."""
        *point, ctx.ignore_index, ctx.smoothing, ctx.chunk_size = inputs[:-3]
        ctx.wanted = inputs[-3:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*point)
        ctx.save_for_forward(*point)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Return the product of the curvature with cotangents."""
        wanted = tuple(ctx.needs_input_grad[:3])
        parts = _curved(ctx, cotangents, wanted)
        found = [part if want else None for part, want in zip(parts, wanted, strict=True)]
        return *found, *(None,) * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the product of the curvature with tangents."""
        return _curved(ctx, tangents[:3], ctx.wanted)


class _Curvature(Function):
    """The product of the curvature with directions [b, ...]; it has no derivative itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return it; see the kernel."""
        return kernels.curvature(*inputs[:-3], list(inputs[-3:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""


def _options(ctx: Any) -> tuple[int, float, int]:
    return ctx.ignore_index, ctx.smoothing, ctx.chunk_size


def _curved(ctx: Any, directions: Sequence[Tensor | None], wanted: Sequence[bool]) -> Any:
    """Return the product of the curvature; None, or an empty tensor, is a direction of zeros."""
    given = [None if d is None or not d.numel() else d[None] for d in directions]
    parts = _Curvature.apply(*ctx.saved_tensors, *given, *_options(ctx), *wanted)  # type: ignore[no-untyped-call]
    return tuple(part[0] for part in parts)

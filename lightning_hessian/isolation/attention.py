"""Attention that can be differentiated twice in memory that grows with the length, not its square.

The MATH kernel, the only one of torch that has a second derivative, holds a matrix [length, length]
for each head, and more of them in each derivative. In chunks of queries only a few rows are held at
a time, and computed anew where a derivative needs them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lightning_hessian.isolation import attention_kernels as kernels
from lightning_hessian.linear.nesting import refuse_forward_over_forward

AttentionForm: TypeAlias = Literal["auto", "plain", "chunks"]

_KEPT = 4
"""Matrices [queries, keys] of each head that the graph of a gradient needs under the MATH kernel:
three are kept (measured: 3.1), and others come and go."""


class AttentionMode:
    """A block in which `F.scaled_dot_product_attention` may be computed in chunks of queries.

    The name in `torch.nn.functional` is replaced, by which `nn.MultiheadAttention` and the models
    of Hugging Face call it: a `TorchFunctionMode` would not see the call within
    `F.multi_head_attention_forward`.

    Which calls are: those that draw no dropout, and whose mask does not depend on parameters.

    Args:
        form: ``"plain"`` leaves all calls alone, ``"chunks"`` takes all that it can. ``"auto"``
            does so until every batch has been seen, and then goes on only if the graph of the
            plain gradient of the largest would not have fitted: what is chosen follows from shapes
            and from memory, never from a clock.
        budget: Bytes that such a graph may take.
        num_batches: How many batches there are.

    Attributes:
        in_chunks: Whether calls are computed in chunks at present.
        calls: How many were, so far.
    """

    def __init__(self, form: AttentionForm, budget: float = math.inf, num_batches: int = 1) -> None:
        self.in_chunks = form != "plain"
        self.calls = 0
        self._undecided = form == "auto"
        self._budget, self._num_batches = budget, num_batches
        self._bytes: dict[int, float] = {}  # of the plain matrices, by batch
        self._batch = 0
        self._before: list[Callable[..., Any]] = []

    @property
    def serves(self) -> bool:
        """Whether some call was computed in chunks, and the next one will be."""
        return self.in_chunks and self.calls > 0

    def begin(self, batch: int) -> None:
        """Note which batch is evaluated from now on."""
        self._batch = batch
        if self._undecided:
            self._bytes[batch] = 0.0

    def end(self) -> None:
        """Note that its evaluation is over, and decide where all have been seen."""
        if self._undecided and len(self._bytes) >= self._num_batches:
            self._undecided = False
            self.in_chunks = _KEPT * max(self._bytes.values()) > self._budget

    def __enter__(self) -> None:
        """Take the place of the function."""
        self._before.append(F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = self._attend

    def __exit__(self, *failure: object) -> None:
        """Put back what stood there."""
        F.scaled_dot_product_attention = self._before.pop()

    def _attend(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns, in chunks where that is wanted and possible."""
        if self.in_chunks:
            given = _Call(*args, **kwargs)
            if given.can_be_cut:
                if self._undecided:
                    self._bytes[self._batch] += given.matrix_bytes
                self.calls += 1
                return given.in_chunks()
        return self._before[-1](*args, **kwargs)


class _Call:
    """The arguments of a call of `F.scaled_dot_product_attention`."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self.query, self.key, self.value, self.mask = query, key, value, attn_mask
        self.dropout, self.causal, self.grouped = dropout_p, is_causal, enable_gqa
        self.scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale

    @property
    def can_be_cut(self) -> bool:
        """Whether this can be computed in chunks."""
        parts = self.query, self.key, self.value
        plain = all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_nested for t in parts)
        leading = self.query.shape[:-2]
        fits = all(
            part.shape[:-2] == leading or (self.grouped and part.ndim == self.query.ndim)
            for part in parts[1:]
        )
        constant = self.mask is None or (self.mask.ndim >= 2 and _is_constant(self.mask))
        both = self.causal and self.mask is not None  # an error, which torch explains
        return plain and fits and constant and not both and self.dropout == 0.0

    @property
    def matrix_bytes(self) -> float:
        """The memory of a matrix of scores [..., queries, keys]."""
        rows = math.prod(self.query.shape[:-1])
        return float(rows * self.key.shape[-2] * self.query.element_size())

    def in_chunks(self) -> Tensor:
        """Return the value, computed in chunks."""
        key, value = self.key, self.value
        if self.grouped:  # heads of queries share those of keys
            heads = self.query.shape[-3]
            key, value = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (key, value))
        return attention_in_chunks(
            self.query, key, value, self.mask, causal=self.causal, scale=self.scale
        )


def _is_constant(mask: Tensor) -> bool:
    """Return whether nothing is differentiated by a mask."""
    if not mask.is_floating_point():
        return True
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(mask)
    return not (wrapped or mask.requires_grad or forward_ad.unpack_dual(mask).tangent is not None)


def attention_in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float,
    entries: int = kernels.ENTRIES_OF_A_CHUNK,
) -> Tensor:
    """Return softmax(scale Q K^T + mask) V, exact to the second derivative.

    Args:
        query: Queries [..., L, E].
        key: Keys [..., S, E].
        value: Values [..., S, V].
        mask: Broadcasts to [..., L, S]: a bool that is True where a key is seen, or numbers that
            are added; it is a constant to autograd.
        causal: Whether query i sees the keys up to i alone.
        scale: Of the scores.
        entries: How many scores are held at a time.

    Raises:
        NotImplementedError: Forward mode is nested in forward mode.
    """
    refuse_forward_over_forward("Attention in chunks")
    options = mask, causal, scale, entries
    found: Tensor = _Attention.apply(query, key, value, *options)  # type: ignore[no-untyped-call]
    return found


class _Attention(Function):
    """The value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return it; see the kernel."""
        return kernels.attention(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep queries, keys and values, and none of their products."""
        _keep(ctx, inputs[:4], inputs[4:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Return the gradient by queries, keys and values."""
        if cotangents[0] is None:
            return (None,) * 7
        *point, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        parts = _Gradient.apply(*point, cotangents[0], mask, *ctx.options, *wanted)  # type: ignore[no-untyped-call]
        return *_known(parts, wanted), *(None,) * 4

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the change along a direction."""
        *point, mask = ctx.saved_tensors
        return _Change.apply(*point, *tangents[:3], mask, *ctx.options)  # type: ignore[no-untyped-call]


class _Change(Function):
    """The change of the value along a direction, differentiable in reverse mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return it; see the kernel."""
        return kernels.change(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the point and the direction."""
        _keep(ctx, inputs[:7], inputs[7:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Return the gradient of <cotangent, change> by the point and by the direction."""
        if cotangents[0] is None:
            return (None,) * 10
        *given, mask = ctx.saved_tensors
        point, directions = given[:3], given[3:]
        wanted, moved = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:6]
        by_point = _curved(ctx, point, cotangents[0], (*directions, None), mask, wanted)
        by_direction = _Gradient.apply(*point, cotangents[0], mask, *ctx.options, *moved)  # type: ignore[no-untyped-call]
        return *_known(by_point, wanted), *_known(by_direction, moved), *(None,) * 4


class _Gradient(Function):
    """The gradient of <cotangent, value>; a part that is not wanted is empty."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return it by queries, keys and values; see the kernel."""
        return kernels.gradient(*inputs[:-3], list(inputs[-3:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the point and the cotangent."""
        _keep(ctx, inputs[:5], inputs[5:8])
        ctx.wanted = inputs[8:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """Return the gradient of <cotangents, gradient>: curvature and change, by symmetry."""
        *point, cotangent, mask = ctx.saved_tensors
        directions = [None if c is None or not c.numel() else c for c in cotangents]
        wanted = ctx.needs_input_grad[:3]
        found = list(
            _known(_curved(ctx, point, cotangent, (*directions, None), mask, wanted), wanted)
        )
        by_cotangent = None
        if ctx.needs_input_grad[3]:
            by_cotangent = _Change.apply(*point, *directions, mask, *ctx.options)  # type: ignore[no-untyped-call]
        return *found, by_cotangent, *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Return the change of the gradient along a direction."""
        *point, cotangent, mask = ctx.saved_tensors
        return _curved(ctx, point, cotangent, tangents[:4], mask, ctx.wanted)


class _Curvature(Function):
    """The change of the gradient along a direction; it has no derivative itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Return it; see the kernel."""
        return kernels.curvature(*inputs[:-3], list(inputs[-3:]))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""


def _keep(ctx: Any, tensors: Sequence[Tensor | None], options: Sequence[Any]) -> None:
    ctx.options = tuple(options)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _curved(
    ctx: Any,
    point: Sequence[Tensor],
    cotangent: Tensor,
    directions: Sequence[Tensor | None],
    mask: Tensor | None,
    wanted: Sequence[bool],
) -> Any:
    return _Curvature.apply(*point, cotangent, *directions, mask, *ctx.options, *wanted)  # type: ignore[no-untyped-call]


def _known(parts: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [part if want else None for part, want in zip(parts, wanted, strict=True)]

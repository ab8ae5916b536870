"""The kernels of `linear_cross_entropy`: loss, gradient and curvature in chunks of tokens.

Each is one operator to torch, registered as ``torch.ops.lightning_hessian``. So a trace of a
product holds one node instead of the operations of every chunk, and nothing of the size of the
logits is taken for a constant that is worth keeping (`operators.linearize`).

For a token with hidden state h, logits z = W h + b, target distribution q and p = softmax(z):

    loss       = logsumexp(z) - q.z
    gradient   : r = p - q,                    by h: W^T r,         by W: r h^T
    curvature  : s = p * (dz - p.dz),          by h: W^T s + dW^T r,  by W: s h^T + r dh^T

where dz = W dh + dW h + db is the change of the logits along a direction (dh, dW, db). The
curvature is that of the loss as a function of hidden states, weight and bias together: symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENTRIES_OF_A_CHUNK = 2**23
"""Logits of a chunk: 32 MiB in float32, and a product holds two such matrices at a time."""


class _Chunk(NamedTuple):
    """Some tokens, and their part of what there is for each."""

    rows: slice
    hidden: Tensor
    targets: Tensor


def chunk_size_for(vocabulary: int) -> int:
    """Return how many tokens a chunk has by default."""
    return max(1, ENTRIES_OF_A_CHUNK // vocabulary)


def _chunks(hidden: Tensor, targets: Tensor, size: int) -> Iterator[_Chunk]:
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        yield _Chunk(rows, hidden[rows], targets[rows])


def _precision(hidden: Tensor) -> torch.dtype:
    """Return the precision of losses and probabilities: at least float32."""
    return torch.float32 if hidden.dtype in (torch.float16, torch.bfloat16) else hidden.dtype


def _buffer(hidden: Tensor, weight: Tensor, chunk_size: int) -> Tensor:
    """Return memory for a matrix of the size of a chunk's logits, used for one chunk after another.

    Taken anew for each chunk, pages would have to be cleared each time, and glibc keeps what is
    freed of up to 32 MiB.
    """
    rows = min(chunk_size, len(hidden))
    return hidden.new_empty((rows, len(weight)), dtype=_precision(hidden))


def _product(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Return hidden weight^T in the precision of the buffer, within it."""
    found = buffer[: len(hidden)]
    if hidden.dtype == found.dtype:
        return torch.mm(hidden, weight.mT, out=found)
    return found.copy_(hidden @ weight.mT)


def _logits(chunk: _Chunk, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    found = _product(chunk.hidden, weight, buffer)
    return found if bias is None else found.add_(bias)


def _probabilities(
    chunk: _Chunk, weight: Tensor, bias: Tensor | None, shift: Tensor, buffer: Tensor
) -> Tensor:
    """Return softmax(logits), given their logsumexp; zeros for tokens that do not count.

    Their logsumexp is infinite, so that no pass over the chunk is needed to blank them.
    """
    return _logits(chunk, weight, bias, buffer).sub_(shift[chunk.rows, None]).exp_()


def _residuals(
    chunk: _Chunk, probabilities: Tensor, shift: Tensor, ignore_index: int, smoothing: float
) -> Tensor:
    """Turn probabilities into p - q, where they lie."""
    counts = shift[chunk.rows].isfinite().to(probabilities.dtype)
    if smoothing:
        probabilities.sub_(counts[:, None], alpha=smoothing / probabilities.shape[1])
    places = torch.where(chunk.targets == ignore_index, 0, chunk.targets)
    return probabilities.scatter_add_(1, places[:, None], counts[:, None] * (smoothing - 1.0))


# The kernels ----------------------------------------------------------------------------------


@torch.library.custom_op(
    "lightning_hessian::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, "
    "float smoothing, int chunk_size) -> (Tensor, Tensor)",
)
def loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    smoothing: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses, and the logsumexp of each token (inf where it is ignored)."""
    dtype = _precision(hidden)
    total = hidden.new_zeros((), dtype=dtype)
    shift = hidden.new_empty(len(hidden), dtype=dtype)
    buffer = _buffer(hidden, weight, chunk_size)
    for chunk in _chunks(hidden, targets, chunk_size):
        logits = _logits(chunk, weight, bias, buffer)
        ignored = chunk.targets == ignore_index
        found = logits.logsumexp(1)
        shift[chunk.rows] = found.masked_fill(ignored, torch.inf)
        places = torch.where(ignored, 0, chunk.targets)
        aim = logits.gather(1, places[:, None])[:, 0]
        if smoothing:
            aim = (1.0 - smoothing) * aim + smoothing * logits.mean(1)
        total += (found - aim).masked_fill_(ignored, 0.0).sum()
    return total, shift


@torch.library.custom_op(
    "lightning_hessian::linear_cross_entropy_gradient",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor shift, "
    "int ignore_index, float smoothing, int chunk_size, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
)
def gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shift: Tensor,
    ignore_index: int,
    smoothing: float,
    chunk_size: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the sum by hidden states, weight and bias; empty if not wanted."""
    found = _outputs(hidden, weight, wanted)
    by_hidden, by_weight, by_bias = found
    buffer = _buffer(hidden, weight, chunk_size)
    for chunk in _chunks(hidden, targets, chunk_size):
        p = _probabilities(chunk, weight, bias, shift, buffer)
        r = _residuals(chunk, p, shift, ignore_index, smoothing).to(hidden.dtype)
        if wanted[0]:
            torch.mm(r, weight, out=by_hidden[chunk.rows])
        if wanted[1]:
            by_weight.addmm_(r.mT, chunk.hidden)
        if wanted[2]:
            by_bias += r.sum(0)
    return found


@torch.library.custom_op(
    "lightning_hessian::linear_cross_entropy_curvature",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor shift, "
    "Tensor? d_hidden, Tensor? d_weight, Tensor? d_bias, int ignore_index, float smoothing, "
    "int chunk_size, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def curvature(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    shift: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    ignore_index: int,
    smoothing: float,
    chunk_size: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the change of the gradient of the sum along directions; empty if not wanted.

    Directions have a leading dimension [b, ...], and so have the results: the logits of a chunk
    are computed once for all. None stands for a direction of zeros.
    """
    b = next((len(d) for d in (d_hidden, d_weight, d_bias) if d is not None), 1)
    found = _outputs(hidden, weight, wanted, b)
    by_hidden, by_weight, by_bias = found
    buffer, moved = (_buffer(hidden, weight, chunk_size) for _ in range(2))
    for chunk in _chunks(hidden, targets, chunk_size):
        rows = chunk.rows
        p = _probabilities(chunk, weight, bias, shift, buffer)
        for i in range(b):
            dz = _moved(chunk, weight, _entry(d_hidden, i), _entry(d_weight, i), moved)
            if d_bias is not None:
                dz.add_(d_bias[i])
            # Row by row the mean of dz under p; einsum holds no product of the two.
            dz.sub_(torch.einsum("tv,tv->t", p, dz)[:, None])
            s = dz.mul_(p).to(hidden.dtype)
            if wanted[0]:
                by_hidden[i, rows].addmm_(s, weight)
            if wanted[1]:
                by_weight[i].addmm_(s.mT, chunk.hidden)
            if wanted[2]:
                by_bias[i] += s.sum(0)
        crossed = (wanted[0] and d_weight is not None) or (wanted[1] and d_hidden is not None)
        if not crossed:
            continue
        r = _residuals(chunk, p, shift, ignore_index, smoothing).to(hidden.dtype)
        for i in range(b):
            if wanted[0] and d_weight is not None:
                by_hidden[i, rows].addmm_(r, d_weight[i])
            if wanted[1] and d_hidden is not None:
                by_weight[i].addmm_(r.mT, d_hidden[i, rows])
    return found


def _moved(
    chunk: _Chunk,
    weight: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    buffer: Tensor,
) -> Tensor:
    """Return the change of the logits of a chunk along a direction, but for that of the bias."""
    same = chunk.hidden.dtype == buffer.dtype
    if d_hidden is not None:
        moved = _product(d_hidden[chunk.rows], weight, buffer)
    else:
        moved = buffer[: len(chunk.hidden)].zero_()
    if d_weight is not None and same:
        moved.addmm_(chunk.hidden, d_weight.mT)
    elif d_weight is not None:
        moved += chunk.hidden @ d_weight.mT
    return moved


def _entry(directions: Tensor | None, i: int) -> Tensor | None:
    return None if directions is None else directions[i]


def _outputs(
    hidden: Tensor, weight: Tensor, wanted: Sequence[bool], *leading: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return zeros in the shapes of hidden states, weight and bias; empty where not wanted."""
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    made = (
        hidden.new_zeros((*leading, *(shape if want else (0,))))
        for shape, want in zip(shapes, wanted, strict=True)
    )
    return next(made), next(made), next(made)


# What torch is told about them ------------------------------------------------------------------


@loss.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = _precision(hidden)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(len(hidden), dtype=dtype)


@gradient.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(hidden, weight, rest[-1])


@curvature.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    b = next((len(d) for d in rest[3:6] if d is not None), 1)
    return _outputs(hidden, weight, rest[-1], b)


def _one_by_one(kernel: Any, info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    """Return what a kernel gives for every entry of a batch of arguments, and where it lies."""
    found = []
    for i in range(info.batch_size):
        taken = [
            a if dim is None or not isinstance(a, Tensor) else a.select(dim, i)
            for a, dim in zip(arguments, in_dims, strict=True)
        ]
        found.append(kernel(*taken))
    stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
    return stacked, (0,) * len(stacked)


@loss.register_vmap
def _(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    return _one_by_one(loss, info, in_dims, *arguments)


@gradient.register_vmap
def _(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    return _one_by_one(gradient, info, in_dims, *arguments)


@curvature.register_vmap
def _(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
    point, directions, rest = arguments[:5], arguments[5:8], arguments[8:]
    if any(isinstance(dim, int) for dim in in_dims[:5]):
        return _one_by_one(curvature, info, in_dims, *arguments)
    # Directions alone are many: they share the logits, as rows of the leading dimension.
    size = info.batch_size
    rows = []
    for d, dim in zip(directions, in_dims[5:8], strict=True):
        if d is not None:
            d = d.expand(size, *d.shape) if dim is None else d.movedim(dim, 0)
            d = d.reshape(-1, *d.shape[2:])
        rows.append(d)
    found = curvature(*point, *rows, *rest)
    parts = (part.reshape(size, len(part) // size, *part.shape[1:]) for part in found)
    return tuple(parts), (0, 0, 0)


def flops_of_loss(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Return the floating point operations of the loss: one product with the weight."""
    found: int = 2 * len(hidden) * weight.numel()
    return found


def flops_of_gradient(hidden: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Return those of the gradient: the logits, and one product for each part that is wanted."""
    parts: int = 1 + sum(map(bool, rest[-1][:2]))
    return flops_of_loss(hidden, weight) * parts


def flops_of_curvature(hidden: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Return those of the curvature, for all directions."""
    d_hidden, d_weight, d_bias = rest[3:6]
    by_hidden, by_weight = map(bool, rest[-1][:2])
    b = next((len(d) for d in (d_hidden, d_weight, d_bias) if d is not None), 1)
    along = (d_hidden is not None) + (d_weight is not None)
    crossed = (by_hidden and d_weight is not None) + (by_weight and d_hidden is not None)
    products: int = 1 + b * (along + by_hidden + by_weight + crossed)
    return flops_of_loss(hidden, weight) * products


CURVATURE = torch.ops.lightning_hessian.linear_cross_entropy_curvature.default

FLOPS: dict[Any, Any] = {
    torch.ops.lightning_hessian.linear_cross_entropy: flops_of_loss,
    torch.ops.lightning_hessian.linear_cross_entropy_gradient: flops_of_gradient,
    CURVATURE.overloadpacket: flops_of_curvature,
}
"""What counts the multiplications of each operator, as `torch.utils.flop_counter` does."""

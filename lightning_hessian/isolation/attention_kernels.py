"""The kernels of attention in chunks of queries: value, gradient, change and curvature.

Each is one operator to torch, for the reasons that `losses.chunked_cross_entropy` gives. With
S = scale Q K^T (masked), P = softmax(S) and out = P V, and a cotangent G of out:

    change     dS = scale (dQ K^T + Q dK^T),  dP = P * (dS - rowsum(P * dS)),  d out = dP V + P dV
    gradient   C = G V^T,  E = P * (C - rowsum(P * C)):
               by V: P^T G,  by Q: scale E K,  by K: scale E^T Q
    curvature  the change of the gradient, with dC = dG V^T + G dV^T and
               dE = dP * (C - rowsum(P * C)) + P * (dC - rowsum(dP * C + P * dC)):
               by V: dP^T G + P^T dG,  by Q: scale (dE K + E dK),  by K: scale (dE^T Q + E^T dQ)

Rows of S belong to queries and are independent of one another, so that a few are held at a time.
Queries, keys and values are [..., length, width], and a mask broadcasts to [..., queries, keys].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ENTRIES_OF_A_CHUNK = 2**22
"""Entries of S that are held at a time, over all heads: 16 MiB in float32, up to five times."""

_COMMON = "Tensor? mask, bool causal, float scale, int entries"
_POINT = "Tensor query, Tensor key, Tensor value"


@dataclass(frozen=True)
class _Chunk:
    """Some queries, with the keys that they may see.

    Attributes:
        rows: Which queries.
        end: How many keys; the others come later, under a causal mask.
        p: Their attention, [n, rows, end].
    """

    rows: slice
    end: int
    p: Tensor


class _Point:
    """Queries, keys and values as [n, length, width], and memory for matrices of a chunk."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        entries: int,
    ) -> None:
        self.leading = query.shape[:-2]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value = (self.flat(part) for part in (query, key, value))
        self.mask, self.causal, self.scale = mask, causal, scale
        n, self.length, _ = self.query.shape
        self.num_keys = self.key.shape[1]
        self.size = max(1, min(self.length, entries // max(1, n * self.num_keys)))
        self._buffers: dict[str, Tensor] = {}

    def flat(self, tensor: Tensor) -> Tensor:
        """Return [n, length, width], in the precision that is computed in."""
        return tensor.reshape(-1, *tensor.shape[-2:]).to(self.dtype)

    def given(self, direction: Tensor | None) -> Tensor | None:
        """Return a direction likewise; None is one of zeros."""
        return None if direction is None else self.flat(direction)

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Return memory of that name, used for one chunk after another."""
        if name not in self._buffers:
            most = len(self.query) * self.size * self.num_keys
            self._buffers[name] = self.query.new_empty(most)
        return self._buffers[name][: math.prod(shape)].view(shape)

    def product(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        """Return first second^T in the buffer of that name."""
        found = self.buffer(name, len(first), first.shape[1], second.shape[1])
        return torch.bmm(first, second.mT, out=found)

    def chunks(self) -> Iterator[_Chunk]:
        """Yield the chunks, each with its attention."""
        for start in range(0, self.length, self.size):
            stop = min(self.length, start + self.size)
            end = min(self.num_keys, stop) if self.causal else self.num_keys
            rows = slice(start, stop)
            scores = self.product("p", self.query[:, rows], self.key[:, :end]).mul_(self.scale)
            if self.causal and end > start:
                above = torch.ones(
                    stop - start, end - start, dtype=torch.bool, device=scores.device
                )
                scores[:, :, start:end].masked_fill_(above.triu_(1), -torch.inf)
            dead = None if self.mask is None else self._mask(scores, self.mask, rows)
            torch.softmax(scores, -1, out=scores)
            if dead is not None:
                scores.view(*self.leading, *scores.shape[1:]).masked_fill_(dead, 0.0)
            yield _Chunk(rows, end, scores)

    def _mask(self, scores: Tensor, mask: Tensor, rows: slice) -> Tensor:
        """Mask scores, and return which queries see nothing: their attention is zero."""
        part = mask[..., rows, :] if mask.shape[-2] > 1 else mask
        whole = scores.view(*self.leading, *scores.shape[1:])
        if mask.dtype == torch.bool:
            whole.masked_fill_(~part, -torch.inf)
            return ~part.any(-1, keepdim=True)
        whole.add_(part)
        return (part == -torch.inf).all(-1, keepdim=True)


def _centred(p: Tensor, x: Tensor) -> Tensor:
    """Turn x into x - rowsum(p * x), where it lies, without holding p * x."""
    return x.sub_(torch.einsum("nls,nls->nl", p, x)[..., None])


# The kernels ------------------------------------------------------------------------------------


@torch.library.custom_op(
    "lightning_hessian::attention", mutates_args=(), schema=f"({_POINT}, {_COMMON}) -> Tensor"
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    entries: int,
) -> Tensor:
    """Return softmax(scale Q K^T) V."""
    point = _Point(query, key, value, mask, causal, scale, entries)
    found = point.value.new_empty(*point.query.shape[:2], value.shape[-1])
    for chunk in point.chunks():
        found[:, chunk.rows] = chunk.p @ point.value[:, : chunk.end]
    return found.view(*query.shape[:-1], value.shape[-1]).to(query.dtype)


@torch.library.custom_op(
    "lightning_hessian::attention_change",
    mutates_args=(),
    schema=f"({_POINT}, Tensor? d_query, Tensor? d_key, Tensor? d_value, {_COMMON}) -> Tensor",
)
def change(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_query: Tensor | None,
    d_key: Tensor | None,
    d_value: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    entries: int,
) -> Tensor:
    """Return the change of the value along a direction."""
    point = _Point(query, key, value, mask, causal, scale, entries)
    dq, dk, dv = map(point.given, (d_query, d_key, d_value))
    found = point.value.new_zeros(*point.query.shape[:2], value.shape[-1])
    for chunk in point.chunks():
        rows, end = chunk.rows, chunk.end
        dp = _changed(point, chunk, dq, dk)
        if dp is not None:
            found[:, rows] = dp @ point.value[:, :end]
        if dv is not None:
            found[:, rows] += chunk.p @ dv[:, :end]
    return found.view(*query.shape[:-1], value.shape[-1]).to(query.dtype)


def _changed(point: _Point, chunk: _Chunk, dq: Tensor | None, dk: Tensor | None) -> Tensor | None:
    """Return dP; None where it is zero."""
    if dq is None and dk is None:
        return None
    rows, end = chunk.rows, chunk.end
    if dq is not None:
        ds = point.product("ds", dq[:, rows], point.key[:, :end])
        if dk is not None:
            ds.baddbmm_(point.query[:, rows], dk[:, :end].mT)
    elif dk is not None:
        ds = point.product("ds", point.query[:, rows], dk[:, :end])
    return _centred(chunk.p, ds).mul_(chunk.p).mul_(point.scale)


@torch.library.custom_op(
    "lightning_hessian::attention_gradient",
    mutates_args=(),
    schema=f"({_POINT}, Tensor cotangent, {_COMMON}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cotangent: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    entries: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of <cotangent, value> by Q, K and V; empty if not wanted."""
    point = _Point(query, key, value, mask, causal, scale, entries)
    g = point.flat(cotangent)
    by_query, by_key, by_value = (
        part.new_zeros(part.shape if want else (0,))
        for part, want in zip((point.query, point.key, point.value), wanted, strict=True)
    )
    for chunk in point.chunks():
        rows, end = chunk.rows, chunk.end
        if wanted[2]:
            by_value[:, :end].baddbmm_(chunk.p.mT, g[:, rows])
        if not (wanted[0] or wanted[1]):
            continue
        c = point.product("c", g[:, rows], point.value[:, :end])
        e = _centred(chunk.p, c).mul_(chunk.p).mul_(scale)
        if wanted[0]:
            by_query[:, rows] = e @ point.key[:, :end]
        if wanted[1]:
            by_key[:, :end].baddbmm_(e.mT, point.query[:, rows])
    return _shaped((by_query, by_key, by_value), (query, key, value), wanted)


@torch.library.custom_op(
    "lightning_hessian::attention_curvature",
    mutates_args=(),
    schema=f"({_POINT}, Tensor cotangent, Tensor? d_query, Tensor? d_key, Tensor? d_value, "
    f"Tensor? d_cotangent, {_COMMON}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def curvature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cotangent: Tensor,
    d_query: Tensor | None,
    d_key: Tensor | None,
    d_value: Tensor | None,
    d_cotangent: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    entries: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the change of the gradient by Q, K and V along a direction; empty if not wanted."""
    point = _Point(query, key, value, mask, causal, scale, entries)
    g = point.flat(cotangent)
    dq, dk, dv, dg = map(point.given, (d_query, d_key, d_value, d_cotangent))
    by_query, by_key, by_value = (
        part.new_zeros(part.shape if want else (0,))
        for part, want in zip((point.query, point.key, point.value), wanted, strict=True)
    )
    for chunk in point.chunks():
        rows, end, p = chunk.rows, chunk.end, chunk.p
        dp = _changed(point, chunk, dq, dk)
        if wanted[2] and dp is not None:
            by_value[:, :end].baddbmm_(dp.mT, g[:, rows])
        if wanted[2] and dg is not None:
            by_value[:, :end].baddbmm_(p.mT, dg[:, rows])
        if not (wanted[0] or wanted[1]):
            continue
        c = _centred(p, point.product("c", g[:, rows], point.value[:, :end]))
        de = _changed_e(point, chunk, g, (dp, dv, dg), c)
        e = c.mul_(p).mul_(scale)
        if wanted[0]:
            by_query[:, rows] = de @ point.key[:, :end]
            if dk is not None:
                by_query[:, rows] += e @ dk[:, :end]
        if wanted[1]:
            by_key[:, :end].baddbmm_(de.mT, point.query[:, rows])
            if dq is not None:
                by_key[:, :end].baddbmm_(e.mT, dq[:, rows])
    return _shaped((by_query, by_key, by_value), (query, key, value), wanted)


def _changed_e(
    point: _Point,
    chunk: _Chunk,
    g: Tensor,
    directions: tuple[Tensor | None, Tensor | None, Tensor | None],
    c: Tensor,
) -> Tensor:
    """Return scale dE, given C with its row sums under P taken off; dP is written over."""
    dp, dv, dg = directions
    rows, end, p = chunk.rows, chunk.end, chunk.p
    if dg is not None:
        dc = point.product("dc", dg[:, rows], point.value[:, :end])
        if dv is not None:
            dc.baddbmm_(g[:, rows], dv[:, :end].mT)
    elif dv is not None:
        dc = point.product("dc", g[:, rows], dv[:, :end])
    else:
        dc = point.buffer("dc", *p.shape).zero_()
    _centred(p, dc).mul_(p)
    if dp is not None:
        # rowsum(dP * C) is that of dP and the centred C: the rows of dP sum to zero.
        across = torch.einsum("nls,nls->nl", dp, c)[..., None]
        dc.add_(dp.mul_(c)).addcmul_(across, p, value=-1)
    return dc.mul_(point.scale)


def _shaped(
    found: Sequence[Tensor], like: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return results in the shapes and precision of Q, K and V."""
    parts = [
        part.view(own.shape).to(own.dtype) if want else own.new_empty(0)
        for part, own, want in zip(found, like, wanted, strict=True)
    ]
    return parts[0], parts[1], parts[2]


# What torch is told about them ------------------------------------------------------------------


def _as_value(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _as_point(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    parts = [
        part.new_empty(part.shape if want else (0,))
        for part, want in zip((query, key, value), rest[-1], strict=True)
    ]
    return parts[0], parts[1], parts[2]


def _over_a_batch(kernel: Any, place_of_mask: int) -> Any:
    """Return what `torch.vmap` does of a kernel: one more leading dimension."""

    def batched(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        taken = []
        for place, (value, dim) in enumerate(zip(arguments, in_dims, strict=True)):
            if not isinstance(value, Tensor) or (place == place_of_mask and dim is None):
                taken.append(value)  # a mask that is the same for all broadcasts
                continue
            moved = value.expand(info.batch_size, *value.shape) if dim is None else value
            moved = moved if dim is None else moved.movedim(dim, 0)
            if place == place_of_mask:
                missing = arguments[0].ndim - (in_dims[0] is not None) - (moved.ndim - 1)
                moved = moved.reshape(info.batch_size, *(1,) * missing, *moved.shape[1:])
            taken.append(moved)
        found = kernel(*taken)
        if isinstance(found, Tensor):
            return found, 0
        size = info.batch_size
        parts = (part if part.numel() else part.new_empty(size, 0) for part in found)
        return tuple(parts), (0,) * len(found)

    return batched


for _kernel, _fake, _mask in (
    (attention, _as_value, 3),
    (change, _as_value, 6),
    (gradient, _as_point, 4),
    (curvature, _as_point, 8),
):
    _kernel.register_fake(_fake)
    _kernel.register_vmap(_over_a_batch(_kernel, _mask))


def _flops(products: float) -> Any:
    def counted(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(2 * products * query.numel() * key.shape[-2])

    return counted


CURVATURE = torch.ops.lightning_hessian.attention_curvature.default

FLOPS: dict[Any, Any] = {
    torch.ops.lightning_hessian.attention: _flops(2),
    torch.ops.lightning_hessian.attention_change: _flops(5),
    torch.ops.lightning_hessian.attention_gradient: _flops(5),
    CURVATURE.overloadpacket: _flops(12),
}
"""What counts the multiplications of each operator: products of two matrices, at most."""

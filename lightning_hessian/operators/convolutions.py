"""Rules for convolutions and the pooling after them: the same results in a faster form.

A convolution of constant images (a first layer) may become a matrix product with their patches,
and a gradient by weights may be faster with the channels last in memory; a trial decides. The
maximum of a window stands at a constant position: masks are applied to what has been selected, a
gradient is written straight to where its maximum stood, and of constant images only the patches
that have led to a maximum need to be looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from lightning_hessian.operators.linear_graph import LinearGraph

aten = torch.ops.aten

_TRIALS = 2


class _Form(NamedTuple):
    """Another way to a result: what stands in whose place, and what it is given."""

    replaced: fx.Node
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]


def choose_form(graph: LinearGraph, node: fx.Node) -> None:
    """Puts the fastest form in the place of a convolution, or of a gradient by its weights."""
    given: Any = node.args
    if node.target is aten.convolution.default:
        *_, transposed, _, groups = given
        weight, forms = given[1], _forward_forms
    elif node.target is aten.convolution_backward.default:
        *_, transposed, _, groups, wanted = given
        weight, forms = given[2], _gradient_forms
        if list(wanted) != [False, True, False] or len(node.users) != 1:
            return
    else:
        return
    if (
        graph.device.type != "cpu"
        or len(graph.kinds[weight].shape) != 4
        or transposed
        or groups != 1
    ):
        return
    old: Any = node.target
    examples = _examples(graph, given)
    best, fewest = None, _seconds(lambda: old(*examples))
    for form in forms(graph, node):
        if not graph.is_contiguous(form.replaced):  # what all forms return
            continue
        tried = (*_examples(graph, form.arguments), graph.kinds[form.replaced].shape)
        seconds = _seconds(partial(form.function, *tried))
        if seconds < fewest:
            best, fewest = form, seconds
    if best is not None:
        shape = graph.kinds[best.replaced].shape
        graph.replace(best.replaced, best.function, *best.arguments, shape)
    graph.forget_unused()


def _forward_forms(graph: LinearGraph, node: fx.Node) -> Iterator[_Form]:
    """Yields the forms of a convolution."""
    images, weight, bias, *geometry = cast("tuple[Any, ...]", node.args)[:6]
    seen = _Seen.by(graph, images, weight, geometry)
    patches = seen and seen.patches(graph)
    if seen is None or patches is None:
        return
    yield _Form(node, _convolved, (patches, weight, bias))
    viewed = next(iter(node.users), node)
    chosen = next(iter(viewed.users), viewed)
    if (viewed.target, chosen.target) != (aten.view.default, aten.gather.default):
        return
    _, dim, positions = chosen.args
    if len(node.users) == len(viewed.users) == 1 and dim == -1:
        selected = seen.selected(graph, positions)
        if selected is not None:
            yield _Form(chosen, _convolved_selected, (selected, weight, bias))


def _gradient_forms(graph: LinearGraph, node: fx.Node) -> Iterator[_Form]:
    """Yields the forms of a gradient by the weights of a convolution."""
    gradient, images, weight, _, *geometry = cast("tuple[Any, ...]", node.args)[:7]
    (reader,) = node.users
    last = (_channels_last(graph, gradient), _channels_last(graph, images))
    yield _Form(reader, _with_channels_last, (*last, weight, *geometry))
    seen = _Seen.by(graph, images, weight, geometry)
    if seen is None:
        return
    if gradient.target is scattered and graph.is_settled(gradient.args[2]):
        selected = seen.selected(graph, gradient.args[1])
        if selected is not None:
            yield _Form(reader, _by_selected, (selected, gradient.args[2]))
            return
    patches = seen.patches(graph)
    if patches is not None:
        yield _Form(reader, _by_patches, (patches, gradient))


@dataclass(frozen=True)
class _Seen:
    """What a convolution sees of constant images.

    Attributes:
        images: The images [N, C, H, W].
        kernel: Its height and width.
        geometry: Stride, padding and dilation.
    """

    images: fx.Node
    kernel: tuple[int, ...]
    geometry: tuple[tuple[int, ...], ...]

    @classmethod
    def by(
        cls, graph: LinearGraph, images: fx.Node, weight: fx.Node, geometry: Sequence[Any]
    ) -> _Seen | None:
        """Returns it, or None where the images change."""
        if images not in graph.constants:
            return None
        return cls(images, graph.kinds[weight].shape[2:], tuple(map(tuple, geometry)))

    def patches(self, graph: LinearGraph) -> fx.Node | None:
        """Returns the constant patches [N, C k k, L], if there is room for them."""
        images = graph.constants[self.images]
        stride, padding, dilation = self.geometry
        return graph.derived(
            self,
            images.nbytes * math.prod(self.kernel) // math.prod(stride),
            lambda: nn.functional.unfold(images, self.kernel, dilation, padding, stride),
        )

    def selected(self, graph: LinearGraph, positions: Any) -> fx.Node | None:
        """Returns the constant [O, C k k, N M] of the patches at positions [N, O, M], if so."""
        if positions not in graph.constants:
            return None
        where, images = graph.constants[positions], graph.constants[self.images]
        length = images.shape[1] * math.prod(self.kernel)
        num_bytes = where.numel() * length * images.element_size()
        if not graph.has_derived((self, positions)) and self.patches(graph) is None:
            return None

        def make() -> Tensor:
            whole = graph.constants[cast("fx.Node", self.patches(graph))]
            value = whole.new_empty(where.shape[1], length, len(where) * where.shape[2])
            for found, at in zip(value, where.unbind(1), strict=True):
                chosen = whole.gather(2, at[:, None].expand(-1, length, -1))
                found.view(length, len(where), -1).copy_(chosen.transpose(0, 1))
            return value

        return graph.derived((self, positions), num_bytes, make)


def mask_what_is_selected(graph: LinearGraph, node: fx.Node) -> None:
    """Applies the mask of a rectifier after a selection by constant positions, not before."""
    if node.target is not aten.gather.default or node.args[2] not in graph.constants:
        return
    seen, dim, positions = cast("tuple[Any, ...]", node.args)
    if seen.target is not aten.view.default or len(seen.users) != 1:
        return
    masked, shape = seen.args
    if masked.target is not aten.threshold_backward.default or len(masked.users) != 1:
        return
    values, mask, threshold = masked.args
    if mask not in graph.constants or not graph.is_settled(values, masked):
        return
    selected = graph.constants[mask].reshape(shape).gather(dim, graph.constants[positions])
    before = graph.put(node, seen.target, values, shape, like=seen)
    chosen = graph.put(node, node.target, before, dim, positions, like=node)
    graph.replace(node, masked.target, chosen, graph.constant(selected), threshold)


def write_where_maxima_stood(graph: LinearGraph, node: fx.Node) -> None:
    """Writes the gradient of a pooling by maxima into memory that is zero everywhere else.

    Where windows do not overlap, every product writes to the same positions. A mask that follows is
    applied first, to fewer numbers.
    """
    if node.target is not aten.max_pool2d_with_indices_backward.default:
        return
    gradient, _, kernel, stride, _, _, _, positions = cast("tuple[Any, ...]", node.args)
    if positions not in graph.constants or graph.device.type != "cpu":
        return
    # What is written to later must not be kept: it would not be zero in the next product.
    if not graph.is_settled(node, gradient, *node.users) or not graph.is_contiguous(node):
        return
    if any(s < k for s, k in zip(stride or kernel, kernel, strict=True)):
        return
    kind = graph.kinds[node]
    where = graph.constants[positions].flatten(-2)
    reader = next(iter(node.users))
    masks = reader.target is aten.threshold_backward.default and len(node.users) == 1
    if masks and reader.args[1] in graph.constants and graph.is_contiguous(gradient):
        _, mask, threshold = cast("tuple[Any, ...]", reader.args)
        selected = graph.constants[mask].flatten(-2).gather(-1, where)
        selected = selected.view(graph.kinds[gradient].shape)
        small = (gradient, graph.constant(selected), threshold)
        gradient, node = graph.put(reader, reader.target, *small, like=gradient), reader
    kept = graph.constant(torch.zeros(kind.shape, dtype=kind.dtype).flatten(-2))
    written = graph.replace(node, scattered, kept, graph.constant(where), gradient, kind.shape)
    last = {len(kind.shape) - 2, len(kind.shape) - 1}
    for user in list(written.users):  # zeros need not be added up
        if user.target is aten.sum.dim_IntList and last <= set(cast("Any", user.args[1])):
            user.replace_input_with(written, gradient)


def scattered(kept: Tensor, positions: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns values at their positions in memory that is kept, and zero at all others."""
    return kept.scatter_(-1, positions, values.flatten(-2)).view(shape)


def scattered_anew(kept: Tensor, positions: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns the same in new memory."""
    return kept.scatter(-1, positions, values.flatten(-2)).view(shape)


def _examples(graph: LinearGraph, arguments: tuple[Any, ...]) -> Any:
    return fx.node.map_arg(arguments, graph.example)


def _channels_last(graph: LinearGraph, node: Any) -> fx.Node:
    """Returns a constant with its channels last in memory, and other nodes as they are."""
    if node not in graph.constants:
        return node
    value, last = graph.constants[node], torch.channels_last
    made = graph.derived((node, last), value.nbytes, lambda: value.contiguous(memory_format=last))
    return node if made is None else made


def _convolved(patches: Tensor, weight: Tensor, bias: Tensor | None, shape: Any) -> Tensor:
    """Returns the convolution [N, O, ...] of images whose patches are [N, C k k, L]."""
    rows = weight.reshape(1, weight.shape[0], -1).expand(len(patches), -1, -1)
    if bias is None:
        return torch.bmm(rows, patches).view(shape)
    return torch.baddbmm(bias[None, :, None], rows, patches).view(shape)


def _by_patches(patches: Tensor, gradient: Tensor, shape: Any) -> Tensor:
    """Returns the derivative [O, C, k, k] by the weights, from that by the outputs."""
    return torch.bmm(gradient.flatten(2), patches.mT).sum(0).view(shape)


def _convolved_selected(
    selected: Tensor, weight: Tensor, bias: Tensor | None, shape: Any
) -> Tensor:
    """Returns what a convolution gives at the positions of the patches [O, C k k, N M]."""
    rows = weight.reshape(len(weight), 1, -1)
    found = torch.bmm(rows, selected)
    if bias is not None:
        found = found.add_(bias[:, None, None])
    return found.view(len(weight), -1, shape[2]).transpose(0, 1).contiguous()


def _by_selected(selected: Tensor, values: Tensor, shape: Any) -> Tensor:
    """Returns the derivative [O, C, k, k] by the weights, from that by what was selected."""
    rows = values.flatten(2).transpose(0, 1).reshape(len(selected), 1, -1)
    return torch.bmm(rows, selected.mT).view(shape)


def _with_channels_last(
    gradient: Tensor, images: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any,
    shape: Any,
) -> Tensor:  # fmt: skip
    """Returns the same by the kernel for images whose channels lie last."""
    last = torch.channels_last
    found = aten.convolution_backward(
        gradient.contiguous(memory_format=last), images.contiguous(memory_format=last), weight,
        None, stride, padding, dilation, False, [0, 0], 1, [False, True, False],
    )[1]  # fmt: skip
    return found.contiguous().view(shape)


def _seconds(work: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(_TRIALS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best

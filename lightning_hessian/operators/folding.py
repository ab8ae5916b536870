"""Makes a traced product cheap: constants are evaluated once, and the rest follows simpler rules.

The rules change no result beyond rounding. Sums with a zero fall away; products that are added up
are accumulated where they lie; results are written over operands that nobody else reads; and
convolutions of constant images (first layers) become matrix products with their patches, where a
trial says that this is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_hessian.operators.linear_graph import LinearGraph

aten = torch.ops.aten

_PRODUCTS: dict[Any, Any] = {
    aten.mm.default: aten.addmm_.default,
    aten.bmm.default: aten.baddbmm_.default,
}
"""Matrix products, and what adds one to a tensor in place."""

_POINTWISE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Scalar: aten.div_.Scalar,
}
"""Operations of each entry alone, and what writes their result over the first operand."""

_FRESH = {
    *_PRODUCTS,
    *_POINTWISE,
    aten.clone.default,
    aten.convolution.default,
    aten.embedding.default,
    aten.gather.default,
    aten.gelu_backward.default,
    aten.max_pool2d_with_indices_backward.default,
    aten.sigmoid_backward.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
    aten.where.self,
}
"""Operations whose result lies in memory of its own."""

_WRITING = {*_PRODUCTS.values(), *_POINTWISE.values(), aten.addcmul_.default}
_VIEWS = {
    aten._unsafe_view.default,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}
_ELSEWHERE = {
    aten.addmm_.default: aten.addmm.default,
    aten.baddbmm_.default: aten.baddbmm.default,
    aten.addcmul_.default: aten.addcmul.default,
}
_TRIALS = 2

_PATCHES_BYTES = 2**24
_PATCHES_TO_MEMORY = 2
"""Patches may take so many bytes, or so many times what all other constants hold."""


def fold(traced: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Returns the traced function with its constants evaluated and the rest simplified.

    Args:
        traced: A graph of ATen operations, linear in its inputs.
        inputs: What to evaluate it at, to learn the shapes.
    """
    with torch.no_grad():
        graph = LinearGraph(traced, inputs)
        for rule in (_drop_zero, _accumulate, _overwrite, _use_patches):
            for node in graph.operations:
                rule(graph, node)
            graph.sweep()
    return graph.module()


def batchable(product: fx.GraphModule) -> fx.GraphModule:
    """Returns the same with products added up in new memory, as ``torch.vmap`` can do at once.

    It has no rule for doing so in place, and would go through the vectors one by one.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(product.graph, {}))
    for node in graph.nodes:
        node.target = _ELSEWHERE.get(node.target, node.target)
    return fx.GraphModule(product, graph)


def _is_spare(node: Any) -> bool:
    """Whether a tensor may be written over by its only reader."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if node.target in _VIEWS or node.target in _WRITING:
        return _is_spare(node.args[0])
    return node.target in _FRESH


# Rules: each takes a node, and changes the graph where it finds something cheaper ----------------


def _drop_zero(graph: LinearGraph, node: fx.Node) -> None:
    """Leaves out the adding of zeros."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or not graph.is_settled(node):
        return
    first, second = node.args
    left: Any = None
    if graph.is_zero(second):
        left = first
    elif node.target is aten.add.Tensor and not node.kwargs and graph.is_zero(first):
        left = second
    if left is not None and graph.alike(node, left):
        node.replace_all_uses_with(left)


def _accumulate(graph: LinearGraph, node: fx.Node) -> None:
    """Adds a product to the other summand where that lies, without a sum of its own."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return
    for other, product in (node.args, node.args[::-1]):
        if not isinstance(product, fx.Node) or len(product.users) != 1 or other is product:
            continue
        if not graph.is_settled(node, other, *product.args):  # these are read later than before
            continue
        spare = _is_spare(other)
        if product.target in _PRODUCTS and spare and graph.alike(node, other, product):
            graph.replace(node, _PRODUCTS[product.target], other, *product.args)
            return
        if product.target is aten.mul.Tensor and graph.alike(node, other, *product.args):
            target = aten.addcmul_.default if spare else aten.addcmul.default
            graph.replace(node, target, other, *product.args)
            return


def _overwrite(graph: LinearGraph, node: fx.Node) -> None:
    """Writes a result over an operand that has no other reader: no memory is taken anew."""
    if node.target not in _POINTWISE or not graph.is_settled(node, *node.args):
        return
    first, *rest = node.args
    commutes = node.target in (aten.add.Tensor, aten.mul.Tensor) and not node.kwargs
    if _is_spare(first) and graph.alike(node, first):
        graph.replace(node, _POINTWISE[node.target], first, *rest, **node.kwargs)
    elif commutes and _is_spare(rest[0]) and graph.alike(node, rest[0]):
        graph.replace(node, _POINTWISE[node.target], rest[0], first)


def _use_patches(graph: LinearGraph, node: fx.Node) -> None:
    """Makes a convolution of constant images a product with their patches, if a trial favours it.

    The images of a first layer have few channels, with which convolution kernels do badly.
    """
    given: list[Any] = list(node.args)
    target: Any
    if node.target is aten.convolution.default:
        images, weight, bias, *geometry, transposed, _, groups = given
        arguments: tuple[Any, ...] = (weight, bias)
        target, reader = _convolved, node
    elif node.target is aten.convolution_backward.default:
        gradient, images, weight, _, *geometry, transposed, _, groups, wanted = given
        readers = list(node.users)
        if list(wanted) != [False, True, False] or len(readers) != 1:
            return
        arguments, target, reader = (gradient,), _weight_gradient, readers[0]
    else:
        return
    value = graph.constants.get(images)
    if value is None or value.ndim != 4 or value.device.type != "cpu" or transposed or groups != 1:
        return
    shape = graph.kinds[weight].shape
    allowed = max(_PATCHES_BYTES, _PATCHES_TO_MEMORY * graph.constant_bytes)
    if value.nbytes * shape[2] * shape[3] > allowed:
        return
    patches, result = _patches(graph, images, shape, *geometry), graph.kinds[reader].shape
    old: Any = node.target
    old_given, new_given = fx.node.map_arg((given, (patches, *arguments)), graph.example)
    if _seconds(lambda: target(*new_given, result)) < _seconds(lambda: old(*old_given)):
        graph.replace(reader, target, patches, *arguments, result)


def _patches(graph: LinearGraph, images: fx.Node, weight: Sequence[int], *geometry: Any) -> Any:
    """Returns the constant [N, C k k, L] of the patches that a convolution sees."""
    stride, padding, dilation = geometry
    key = (images, tuple(weight[2:]), *map(tuple, geometry))
    if key not in graph.derived:
        value = nn.functional.unfold(
            graph.constants[images], tuple(weight[2:]), dilation, padding, stride
        )
        graph.derived[key] = graph.constant(value)
    return graph.derived[key]


def _convolved(patches: Tensor, weight: Tensor, bias: Tensor | None, shape: Any) -> Tensor:
    """Returns the convolution [N, O, ...] of images whose patches are [N, C k k, L]."""
    rows = weight.reshape(1, weight.shape[0], -1).expand(len(patches), -1, -1)
    if bias is None:
        return torch.bmm(rows, patches).view(shape)
    return torch.baddbmm(bias[None, :, None], rows, patches).view(shape)


def _weight_gradient(patches: Tensor, gradient: Tensor, shape: Any) -> Tensor:
    """Returns the derivative [O, C, k, k] by the weights, from that by the outputs."""
    return torch.bmm(gradient.flatten(2), patches.mT).sum(0).view(shape)


def _seconds(work: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(_TRIALS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best

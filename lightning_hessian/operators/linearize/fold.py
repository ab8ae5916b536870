"""Makes a traced product cheap: what is left of it follows simpler rules.

The rules change no result beyond rounding. Sums with a zero fall away; products that are added up
are accumulated where they lie; results are written over operands that nobody else reads. Which rule
applies follows from the graph alone, so that the same loss always gives the same digits.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lightning_hessian.isolation import attention_kernels
from lightning_hessian.losses import chunked_cross_entropy
from lightning_hessian.operators.linearize.graph import BY_RULE, LinearGraph, graph_module
from lightning_hessian.operators.linearize.onednn import (
    matrix_product,
    multiply_by_onednn,
    sum_with_product,
)
from lightning_hessian.operators.linearize.trace import trace

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
    aten.select.int,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}
_ELSEWHERE: dict[Any, Any] = {
    aten.addmm_.default: aten.addmm.default,
    aten.baddbmm_.default: aten.baddbmm.default,
    aten.addcmul_.default: aten.addcmul.default,
    matrix_product: aten.mm.default,
    sum_with_product: aten.addmm.default,
}
"""What ``torch.vmap`` has no rule for, and what does the same in memory of its own."""

_SUMS: dict[Any, Any] = {
    **{target: product for product, target in _PRODUCTS.items()},
    aten.addcmul_.default: aten.mul.Tensor,
    aten.addcmul.default: aten.mul.Tensor,
    sum_with_product: aten.mm.default,
}
"""What `_accumulate` makes of a sum with a product, and that product."""

_NARROWING: set[Any] = {chunked_cross_entropy.CURVATURE, attention_kernels.CURVATURE}
"""Operators of our own, which are told what to leave out.

They take directions, named ``d_...``, of which None stands for zeros, and last of all which of
their results are wanted. Each result lies in memory of its own."""

_APART = {target: plain for plain, target in _POINTWISE.items()} | {matrix_product: aten.mm.default}
"""What `_overwrite` or oneDNN makes of an operation, and that operation."""


def fold(graph: LinearGraph, *, onednn: bool = False) -> fx.GraphModule:
    """Return a traced function with its graph simplified, ready to be called.

    Args:
        graph: Linear in its inputs; it is changed.
        onednn: Whether products of matrices in float32 are oneDNN's.
    """
    rules = (
        _drop_zero,
        _narrow,
        _accumulate,
        _overwrite,
        *((multiply_by_onednn,) if onednn else ()),
    )
    with torch.no_grad():
        for rule in rules:
            for node in graph.operations:
                rule(graph, node)
            graph.sweep()
    return graph.module()


def fold_restricted(
    product: fx.GraphModule,
    which: Sequence[int],
    point: Sequence[Tensor],
    *,
    onednn: bool = False,
) -> fx.GraphModule:
    """Return a folded product restricted to some of its inputs and the outputs of the same places.

    The other inputs are zero, and so is all that follows from them alone: it is folded away. What
    was added up in place is taken apart before: an operation that writes to memory would keep what
    no output of the restricted product needs.

    Args:
        product: What `fold` returned; linear, with an output for each input.
        which: Places of the inputs that are kept.
        point: A tensor in the shape of each input.
        onednn: As in `fold`.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(product.graph, {}))
    _take_apart(graph)
    zeros = [torch.zeros_like(value) for value in point]
    run = fx.Interpreter(product, graph=graph).run

    def restricted(*given: Tensor) -> list[Tensor]:
        inputs = list(zeros)
        for i, value in zip(which, given, strict=True):
            inputs[i] = value
        outputs = run(*inputs)
        return [outputs[i] for i in which]

    with torch.no_grad():
        traced = trace(restricted, [zeros[i] for i in which])
    return fold(traced, onednn=onednn)


def _take_apart(graph: fx.Graph) -> None:
    """Undo what the rules have put in place; what the traced code itself writes is left alone."""
    for node in list(graph.nodes):
        if not node.meta.get(BY_RULE):
            continue
        with graph.inserting_before(node):
            if node.target in _SUMS:
                other, *factors = node.args
                product = graph.call_function(_SUMS[node.target], tuple(factors))
                new = graph.call_function(aten.add.Tensor, (other, product))
            else:
                new = graph.call_function(_APART[node.target], node.args, node.kwargs)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def batchable(product: fx.GraphModule) -> fx.GraphModule:
    """Return the same with products added up in new memory, as ``torch.vmap`` can do at once.

    It has no rule for doing so in place, or for oneDNN's products, and would go through the vectors
    one by one.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(product.graph, {}))
    for node in graph.nodes:
        node.target = _ELSEWHERE.get(node.target, node.target)
    return graph_module(product, graph)


def _is_spare(node: Any) -> bool:
    """Return whether a tensor may be written over by its only reader."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if node.target in _VIEWS or node.target in _WRITING:
        return _is_spare(node.args[0])
    if node.target is operator.getitem:
        return node.args[0].target in _NARROWING  # type: ignore[union-attr]
    return node.target in _FRESH


# Rules: each takes a node, and changes the graph where it finds something cheaper ----------------


def _drop_zero(graph: LinearGraph, node: fx.Node) -> None:
    """Leave out the adding of zeros."""
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


def _narrow(graph: LinearGraph, node: fx.Node) -> None:
    """Tell an operator which of its directions are zero, and which of its results nobody reads."""
    if node.target not in _NARROWING:
        return
    given: Any = node.args[:-1]
    wanted: Any = node.args[-1]
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    read = {user.args[1] for user in node.users}
    node.args = (
        *(
            None if name.startswith("d_") and graph.is_zero(value) else value
            for name, value in zip(names, given, strict=False)
        ),
        [want and place in read for place, want in enumerate(wanted)],
    )


def _accumulate(graph: LinearGraph, node: fx.Node) -> None:
    """Add a product to the other summand where that lies, without a sum of its own."""
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
    """Write a result over an operand that has no other reader: no memory is taken anew."""
    if node.target not in _POINTWISE or not graph.is_settled(node, *node.args):
        return
    first, *rest = node.args
    commutes = node.target in (aten.add.Tensor, aten.mul.Tensor) and not node.kwargs
    if _is_spare(first) and graph.alike(node, first):
        graph.replace(node, _POINTWISE[node.target], first, *rest, **node.kwargs)
    elif commutes and _is_spare(rest[0]) and graph.alike(node, rest[0]):
        graph.replace(node, _POINTWISE[node.target], rest[0], first)

"""Records what a function of tensors does: each ATen operation that ran, as a graph."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from lightning_hessian.operators.linearize.graph import graph_module
from lightning_hessian.operators.linearize.layout import (
    CONVOLUTIONS,
    POOLING,
    are_channels_last,
    is_viewable,
    wants_channels_last,
)

aten = torch.ops.aten


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Return the graph of what a function does with some inputs, on tensors without derivative.

    As `torch.fx.experimental.proxy_tensor.make_fx` with real tensors, in a third of its time: that
    notes for every tensor what a compiler needs to know.

    Convolutions are given their images in another layout, see `layout`. Where the function writes
    to what would be a view in the plain one, it is traced in that.

    Args:
        function: Takes the inputs one by one; may differentiate inside.
        inputs: What it is called with.

    Raises:
        RuntimeError: It turns a tensor into a number, on which the graph would then depend, or it
            draws from a random generator of its own.
    """
    try:
        return _recorded(_Recorder(moves_channels=True), function, inputs)
    except _WrittenViewError:
        return _recorded(_Recorder(moves_channels=False), function, inputs)


def _recorded(
    recorder: _Recorder, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
) -> fx.GraphModule:
    placeholders = [recorder.graph.placeholder(f"input_{i}") for i in range(len(inputs))]
    given = [tensor.detach() for tensor in inputs]
    for tensor, node in zip(given, placeholders, strict=True):
        recorder.nodes[tensor] = node
    with recorder:
        outputs = function(*given)
    recorder.graph.output([recorder.node_of(output) for output in outputs])
    return graph_module(recorder.root, recorder.graph)


class _WrittenViewError(Exception):
    """Memory is written to that a view shares in the plain layout, and a copy does not."""


class _Recorder(TorchDispatchMode):
    """Writes down each operation.

    Args:
        moves_channels: Whether convolutions are given images with their channels last.
    """

    def __init__(self, *, moves_channels: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.root = nn.Module()  # holds the tensors that come from outside
        self.nodes: Any = WeakIdKeyDictionary()  # by tensor, what made it, or wrote to it last
        self._numbers = itertools.count()
        self._moves_channels = moves_channels
        self._copied: set[int] = set()  # memory of views that had to be copies, and of their bases

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor; for one from outside a new one."""
        if tensor not in self.nodes:
            name = f"constant_{next(self._numbers)}"
            self.root.register_buffer(name, tensor.detach())
            self.nodes[tensor] = self.graph.create_node("get_attr", name)
        found: fx.Node = self.nodes[tensor]
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and write it down."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten._efficientzerotensor.default:
            kwargs.pop("pin_memory", None)
            func = aten.zeros.default
        with self:
            composed = func.decompose(*args, **kwargs)
        if composed is not NotImplemented:
            return composed
        if torch.Tag.data_dependent_output in func.tags:
            raise RuntimeError(f"{func} turns a tensor into a number; it cannot be traced.")
        if self._moves_channels:
            args = self._laid_out(func, args)
        noted = tree_map(self._noted, (args, kwargs))
        outputs = func(*args, **kwargs)
        self._note(self.graph.call_function(func, *noted), outputs)
        return outputs

    def _laid_out(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments in the layout in which an operation is fast, or possible at all."""
        if self._copied and func._schema.is_mutable:
            given = (value for value in tree_iter(args) if isinstance(value, Tensor))
            if any(_memory(value) in self._copied for value in given):
                raise _WrittenViewError
        if func in CONVOLUTIONS or (func in POOLING and are_channels_last(args[1])):
            return tuple(self._with_channels_last(value) for value in args)
        if func is aten.view.default and not is_viewable(*args):
            # The code would view the plain layout, and meets what a convolution has left.
            copied = self._copy(args[0], torch.contiguous_format)
            self._copied |= {_memory(args[0]), _memory(copied)}
            return copied, *args[1:]
        return args

    def _with_channels_last(self, value: Any) -> Any:
        if wants_channels_last(value):
            return self._copy(value, torch.channels_last)
        return value

    def _copy(self, value: Tensor, layout: torch.memory_format) -> Tensor:
        """Return a copy of a tensor in another layout, and write that down."""
        keywords: dict[str, Any] = {"memory_format": layout}
        node = self.graph.call_function(aten.clone.default, (self.node_of(value),), keywords)
        copied: Tensor = aten.clone.default(value, **keywords)
        self._note(node, copied)
        return copied

    def _noted(self, value: Any) -> Any:
        if isinstance(value, torch.Generator):
            raise RuntimeError("The loss draws from a generator of its own; it cannot be traced.")
        return self.node_of(value) if isinstance(value, Tensor) else value

    def _note(self, node: fx.Node, outputs: Any) -> None:
        if isinstance(outputs, Tensor):
            self.nodes[outputs] = node
        elif isinstance(outputs, (tuple, list)):
            for i, output in enumerate(outputs):
                self._note(self.graph.call_function(operator.getitem, (node, i)), output)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""Records what a function of tensors does: each ATen operation that ran, as a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from lightning_hessian.operators.linearize.graph import graph_module

aten = torch.ops.aten


def trace(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """Return the graph of what a function does with some inputs, on tensors without derivative.

    As `torch.fx.experimental.proxy_tensor.make_fx` with real tensors, in a third of its time: that
    notes for every tensor what a compiler needs to know.

    Args:
        function: Takes the inputs one by one; may differentiate inside.
        inputs: What it is called with.

    Raises:
        RuntimeError: It turns a tensor that depends on the inputs, or on a draw, into a number, on
            which the graph would then depend, or it draws from a random generator of its own.
    """
    recorder = _Recorder()
    placeholders = [recorder.graph.placeholder(f"input_{i}") for i in range(len(inputs))]
    given = [tensor.detach() for tensor in inputs]
    for tensor, node in zip(given, placeholders, strict=True):
        recorder.nodes[tensor] = node
        recorder.varying.add(_memory(tensor))
    with recorder:
        outputs = function(*given)
    recorder.graph.output([recorder.node_of(output) for output in outputs])
    return graph_module(recorder.root, recorder.graph)


def _memory(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor shares with its views."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    """Writes down each operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.root = nn.Module()  # holds the tensors that come from outside
        self.nodes: Any = WeakIdKeyDictionary()  # by tensor, what made it, or wrote to it last
        self.varying: set[int] = set()  # memory that other inputs, or another draw, would change

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor; for one from outside a new one."""
        if tensor not in self.nodes:
            name = f"constant_{len(list(self.root.buffers()))}"
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
        given = [_memory(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        varies = not self.varying.isdisjoint(given)
        if torch.Tag.data_dependent_output in func.tags:
            if varies:
                raise RuntimeError(f"{func} turns a tensor into a number; it cannot be traced.")
            return func(*args, **kwargs)  # of constants: the same in every call
        noted = tree_map(self._noted, (args, kwargs))
        outputs = func(*args, **kwargs)
        made = {_memory(t) for t in tree_iter(outputs) if isinstance(t, Tensor)}
        if varies or torch.Tag.nondeterministic_seeded in func.tags:
            self.varying |= made
            if func._schema.is_mutable:
                self.varying.update(given)
        else:
            self.varying -= made  # an address may have belonged to something else before
        self._note(self.graph.call_function(func, *noted), outputs)
        return outputs

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

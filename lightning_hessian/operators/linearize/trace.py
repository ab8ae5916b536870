"""Records what a function of tensors does: each ATen operation that depends on its inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from lightning_hessian.operators.linearize.graph import LinearGraph, copied
from lightning_hessian.operators.linearize.layout import LaidOut, WrittenViewError, targets
from lightning_hessian.operators.linearize.memories import Memories, place

aten = torch.ops.aten

_SHAPE_ONLY = {aten.new_zeros.default, aten.ones_like.default, aten.zeros_like.default}
"""Operations that ask for no more than the shape of their operand."""


def trace(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    *,
    before_again: Callable[[], object] = lambda: None,
) -> LinearGraph:
    """Return the graph of what a function does with some inputs, on tensors without derivative.

    What does not depend on the inputs is computed once, here, and its results are the constants of
    the graph: of the derivative of a gradient that is the larger part, the gradient itself. So the
    function runs once, where `torch.fx.experimental.proxy_tensor.make_fx` would note all of it for
    an evaluation afterwards.

    Convolutions are given their images in another layout, see `layout`. Where the function writes
    to what would be a view in the plain one, it is traced in that.

    Args:
        function: Takes the inputs one by one; may differentiate inside.
        inputs: What it is called with.
        before_again: Called before the function is run a second time: it may have written to what
            it reads.

    Raises:
        RuntimeError: It turns a tensor that depends on the inputs, or on a draw, into a number, on
            which the graph would then depend, or it draws from a random generator of its own.
    """
    moves_channels = True
    copies_inputs = False
    while True:
        recorder = _Recorder(moves_channels=moves_channels)
        try:
            return _recorded(recorder, function, inputs, copies_inputs=copies_inputs)
        except WrittenViewError:
            moves_channels = False
        except _WrittenInputError:
            copies_inputs = True
        before_again()


def _recorded(
    recorder: _Recorder,
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    *,
    copies_inputs: bool,
) -> LinearGraph:
    graph = recorder.graph
    given = [tensor.detach().clone() for tensor in inputs]
    for tensor in given:
        recorder.take_input(tensor)
    with recorder:
        if copies_inputs:
            given = [tensor.clone() for tensor in given]
        outputs = function(*given)
    graph.graph.output([recorder.node_of(output) for output in outputs])
    return graph


class _WrittenInputError(Exception):
    """An input is written to: the graph must begin with copies."""


class _Recorder(LaidOut):
    """Runs each operation, and writes down those that depend on the inputs or on a draw.

    Args:
        moves_channels: Whether convolutions are given images with their channels last.
    """

    def __init__(self, *, moves_channels: bool) -> None:
        super().__init__()
        self.graph = LinearGraph()
        self.nodes: Any = WeakIdKeyDictionary()  # by tensor that varies, what made or wrote it last
        self._moves_channels = moves_channels
        self._inputs = Memories()
        self._bases = Memories()  # made as constants, written to by what varies: all that is there
        self._held = Memories()  # of constants: their nodes
        self._moments = Memories()  # of constants that are written to: copies since the last time

    def take_input(self, tensor: Tensor) -> None:
        """Let a tensor be the next input."""
        self.nodes[tensor] = self.graph.input(tensor)
        self._inputs[tensor] = True

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor; for one that does not vary, a constant."""
        if tensor in self.nodes:
            found: fx.Node = self.nodes[tensor]
            return found
        if tensor in self._bases:
            return self._shown(tensor)
        if tensor in self._moments:
            # It may be written to again, and buffers are put back after the pass: a copy is held.
            copies = self._moments[tensor]
            if place(tensor) not in copies:
                copies[place(tensor)] = copied(tensor.detach())
            return self.graph.constant(copies[place(tensor)])
        node = self.graph.constant(tensor.detach())
        if tensor not in self._held:
            self._held[tensor] = set()
        self._held[tensor].add(node)
        return node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation in its simplest parts."""
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
            if not self._vary(args, kwargs):
                return func(*args, **kwargs)  # of constants: the same in every call
            raise RuntimeError(f"{func} turns a tensor into a number; it cannot be traced.")
        if self._moves_channels:
            args = self.laid_out(func, args)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and write it down where it varies."""
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        varies = drawn or (func not in _SHAPE_ONLY and self._vary(args, kwargs))
        if func._schema.is_mutable:
            for tensor in targets(func, args, kwargs):
                self._before_writing(tensor, varies)
        if not varies:
            return func(*args, **kwargs)
        given, named = tree_map(self._noted, (args, kwargs))
        outputs = func(*args, **kwargs)
        self._note(self.graph.call(func, *given, **named), outputs)
        return outputs

    def _vary(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a tensor among the arguments depends on the inputs."""
        return any(
            tensor in self.nodes or tensor in self._bases
            for tensor in tree_iter((args, kwargs))
            if isinstance(tensor, Tensor)
        )

    def _before_writing(self, tensor: Tensor, varies: bool) -> None:
        """Keep what was noted of a memory right, which is about to be written to."""
        if tensor in self._inputs:
            raise _WrittenInputError
        self.forget(tensor)
        if tensor in self.nodes or tensor in self._bases:
            return
        for node in self._held.pop(tensor) or ():
            self.graph.keep_apart(node)
        if not varies:
            self._moments[tensor] = {}
            return
        # Each call of the graph begins with a copy, and whatever lies there is a view of that.
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        everything = tensor.detach().as_strided([size], [1], 0).clone()
        copy = self.graph.call(aten.clone.default, self.graph.constant(everything))
        self.graph.is_of_kind(copy, everything)
        self._bases[tensor] = (copy, tensor.dtype)

    def _shown(self, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor whose memory was a constant at first."""
        base, dtype = self._bases[tensor]
        if tensor.dtype != dtype:
            raise RuntimeError("Memory is read in two precisions; it cannot be traced.")
        node = self.graph.call(
            aten.as_strided.default, base, list(tensor.shape), list(tensor.stride()),
            tensor.storage_offset(),
        )  # fmt: skip
        self._note(node, tensor)
        return node

    def _noted(self, value: Any) -> Any:
        if isinstance(value, torch.Generator):
            raise RuntimeError("The loss draws from a generator of its own; it cannot be traced.")
        return self.node_of(value) if isinstance(value, Tensor) else value

    def _note(self, node: fx.Node, outputs: Any) -> None:
        if isinstance(outputs, Tensor):
            self.nodes[outputs] = node
            self.graph.is_of_kind(node, outputs)
        elif isinstance(outputs, (tuple, list)):
            for i, output in enumerate(outputs):
                self._note(self.graph.call(operator.getitem, node, i), output)

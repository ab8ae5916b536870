"""Records what a function of tensors does: each ATen operation that depends on its inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from lightning_hessian.operators.linearize.graph import LinearGraph, copied
from lightning_hessian.operators.linearize.layout import (
    CONVOLUTIONS,
    POOLING,
    are_channels_last,
    is_viewable,
    wants_channels_last,
)

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
        except _WrittenViewError:
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


class _WrittenViewError(Exception):
    """Memory is written to that a view shares in the plain layout, and a copy does not."""


class _WrittenInputError(Exception):
    """An input is written to: the graph must begin with copies."""


class _Memories:
    """A set of memories of tensors, each with a value; another one at the same address is none.

    Args:
        least: From so many memories on, those that are gone are looked for and left out: each time
            that the number has doubled, which takes a constant time for each.
    """

    def __init__(self, least: int = 1024) -> None:
        self._kept: dict[int, tuple[StorageWeakRef, Any]] = {}
        self._least = self._next = least

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._kept

    def __getitem__(self, tensor: Tensor) -> Any:
        return self._kept[tensor.untyped_storage()._cdata][1]

    def __setitem__(self, tensor: Tensor, value: Any) -> None:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            self._kept[storage._cdata] = (StorageWeakRef(storage), value)
            if len(self._kept) >= self._next:
                self._kept = {k: v for k, v in self._kept.items() if not v[0].expired()}
                self._next = max(self._least, 2 * len(self._kept))

    def __bool__(self) -> bool:
        return bool(self._kept)

    def pop(self, tensor: Tensor) -> Any:
        """Take a memory out, and return its value, None where it is not in."""
        if tensor not in self:
            return None
        return self._kept.pop(tensor.untyped_storage()._cdata)[1]


class _Recorder(TorchDispatchMode):
    """Runs each operation, and writes down those that depend on the inputs or on a draw.

    Args:
        moves_channels: Whether convolutions are given images with their channels last.
    """

    def __init__(self, *, moves_channels: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = LinearGraph()
        self.nodes: Any = WeakIdKeyDictionary()  # by tensor that varies, what made or wrote it last
        self._moves_channels = moves_channels
        self._inputs = _Memories()
        self._bases = _Memories()  # made as constants, written to by what varies: all that is there
        self._held = _Memories()  # of constants: their nodes
        self._moments = _Memories()  # of constants that are written to: copies since the last time
        self._moved = _Memories(8)  # copies with channels last, let go of with what they copy
        self._untied = _Memories()  # views that had to be copies, and their bases

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
            if _place(tensor) not in copies:
                copies[_place(tensor)] = copied(tensor.detach())
            return self.graph.constant(copies[_place(tensor)])
        node = self.graph.constant(tensor.detach())
        if tensor not in self._held:
            self._held[tensor] = set()
        self._held[tensor].add(node)
        return node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and write it down where it varies."""
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
            args = self._laid_out(func, args)
        return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        varies = drawn or (func not in _SHAPE_ONLY and self._vary(args, kwargs))
        if func._schema.is_mutable:
            for tensor in _targets(func, args, kwargs):
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
        self._moved.pop(tensor)
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

    def _laid_out(self, func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return arguments in the layout in which an operation is fast, or possible at all."""
        if self._untied and func._schema.is_mutable:
            given = (value for value in tree_iter(args) if isinstance(value, Tensor))
            if any(value in self._untied for value in given):
                raise _WrittenViewError
        if func in CONVOLUTIONS or (func in POOLING and are_channels_last(args[1])):
            return tuple(self._with_channels_last(value) for value in args)
        if func is aten.view.default and not is_viewable(*args):
            # The code would view the plain layout, and meets what a convolution has left.
            made = self._run(
                aten.clone.default, args[:1], {"memory_format": torch.contiguous_format}
            )
            self._untied[args[0]] = self._untied[made] = True
            return made, *args[1:]
        return args

    def _with_channels_last(self, value: Any) -> Any:
        """Return an operand of a convolution with its channels last, copied once if at all."""
        if not wants_channels_last(value):
            return value
        if value not in self._moved:
            self._moved[value] = {}
        copies, place = self._moved[value], _place(value)
        if place not in copies:
            copies[place] = self._run(
                aten.clone.default, (value,), {"memory_format": torch.channels_last}
            )
        return copies[place]

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


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return which part of its memory a tensor shows."""
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _targets(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            found += (value for value in tree_iter(given) if isinstance(value, Tensor))
    return found

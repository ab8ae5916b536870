"""The graph of a linear function: what follows from constants is computed, the rest can be changed.

Tracing the derivative of a gradient with parameters and data held fixed gives a graph of which
the larger part, the gradient itself, is the same in every product.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten

_PASSING = {operator.getitem, aten._unsafe_view.default}
"""Operations that pass on memory without saying so."""

_SHAPE_ONLY = {aten.new_zeros.default, aten.ones_like.default, aten.zeros_like.default}
"""Operations that ask for no more than the shape of their operand."""


_LEAST_ROOM = 2**24
_ROOM_TO_CONSTANTS = 4
"""Constants made of others may take so many bytes, or so many times what was there before."""


class _Kind(NamedTuple):
    """What an operation may rely on of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class LinearGraph:
    """A traced linear function, with all that does not depend on its inputs evaluated.

    Args:
        traced: A graph of ATen operations; what it holds (parameters, data) is constant.
        inputs: What to evaluate it at, to learn the shapes.

    Attributes:
        graph: The graph; constants are its ``get_attr`` nodes.
        constants: Their values, by node.
        kinds: Shape, strides and precision of every tensor, by node.
        device: Where it all happens.
    """

    def __init__(self, traced: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self.graph = fx.Graph()
        self.constants: dict[fx.Node, Tensor] = {}
        self.kinds: dict[fx.Node, _Kind] = {}
        self.device = inputs[0].device
        self._numbers = itertools.count()
        self._room: int | None = None
        self._derived: dict[Any, fx.Node] = {}
        self._nodes: dict[tuple[Any, ...], fx.Node] = {}
        self._owners: dict[fx.Node, fx.Node] = {}
        self._written: set[fx.Node] = set()
        self._evaluate(traced, iter(inputs))

    def _evaluate(self, traced: fx.GraphModule, inputs: Iterator[Tensor]) -> None:
        """Runs the graph once, and copies what is not constant."""
        anew = _made_anew(traced.graph)
        values: dict[fx.Node, Any] = {}
        copies: dict[fx.Node, Any] = {}
        varying: set[fx.Node] = set()
        last_reader = {read: node for node in traced.graph.nodes for read in node.all_input_nodes}
        done: dict[fx.Node, list[fx.Node]] = {}
        for read, node in last_reader.items():
            done.setdefault(node, []).append(read)

        def copy_of(node: fx.Node) -> Any:
            if node not in copies:  # a constant; a number that was one is written into the graph
                value = values[node]
                copies[node] = self.constant(value) if isinstance(value, Tensor) else value
            return copies[node]

        for node in traced.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], copy_of))
                break
            if node.op == "placeholder":
                values[node] = next(inputs)
                varying.add(node)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(traced)
            else:
                arguments, keywords = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*arguments, **keywords)
                varies = not varying.isdisjoint(node.all_input_nodes)
                varies &= node.target not in _SHAPE_ONLY
                if varies or node in anew or _writes(node) or node.is_impure():
                    varying.add(node)
            if node in varying:
                copies[node] = self.graph.node_copy(node, copy_of)
                self._note_owner(copies[node])
                if isinstance(values[node], Tensor):
                    self.kinds[copies[node]] = _kind(values[node])
            for read in done.get(node, () if node.users else (node,)):
                del values[read]

    def _note_owner(self, node: fx.Node) -> None:
        """Notes whose memory a node of the trace shares, and whose it writes to."""
        if (source := _aliased(node)) is not None:
            self._owners[node] = self._owners.get(source, source)
        if (target := _aliased(node, writing=True)) is not None:
            self._written.add(self._owners.get(target, target))

    def is_settled(self, *nodes: Any) -> bool:
        """Whether the traced code never writes to any of these, so that order does not matter."""
        found = (self._owners.get(node, node) for node in nodes if isinstance(node, fx.Node))
        return self._written.isdisjoint(found)

    def constant(self, value: Tensor) -> fx.Node:
        """Returns the node, before all others, that holds a constant; the same for the same one."""
        kind = _kind(value)
        key = (value.data_ptr(), kind)
        if key not in self._nodes:
            first = next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(first):
                node = self.graph.create_node("get_attr", f"constant_{next(self._numbers)}")
            self._nodes[key] = node
            self.constants[node] = value
            self.kinds[node] = kind
        return self._nodes[key]

    def put(self, node: fx.Node, target: Any, *arguments: Any, like: fx.Node) -> fx.Node:
        """Puts an operation before a node; its result is of the same kind as another."""
        with self.graph.inserting_before(node):
            new = self.graph.call_function(target, arguments)
        self.kinds[new] = self.kinds[like]
        return new

    def replace(self, node: fx.Node, target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
        """Puts another operation, with the same kind of result, in the place of a node."""
        new = self.put(node, target, *arguments, like=node)
        new.kwargs = keywords
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new

    def is_zero(self, node: Any) -> bool:
        """Whether a node is a constant full of zeros."""
        return node in self.constants and not bool(self.constants[node].any())

    def alike(self, *nodes: Any) -> bool:
        """Whether all are tensors of the same shape, strides and precision."""
        kinds = [self.kinds.get(node) if isinstance(node, fx.Node) else None for node in nodes]
        return None not in kinds and all(kind == kinds[0] for kind in kinds)

    def is_contiguous(self, node: fx.Node) -> bool:
        """Whether a tensor lies row by row."""
        kind = self.kinds[node]
        return torch.empty(kind.shape, device="meta").stride() == kind.strides

    def example(self, node: fx.Node) -> Tensor:
        """Returns a constant, or a tensor of the kind that a node makes, to try a rule on."""
        if node in self.constants:
            return self.constants[node]
        return torch.ones(self.kinds[node].shape, dtype=self.kinds[node].dtype)

    def derived(self, key: Any, num_bytes: int, make: Callable[[], Tensor]) -> fx.Node | None:
        """Returns a constant that is made of others; None where it would take too much memory.

        Args:
            key: What it is made of, and how: it is made once.
            num_bytes: How much memory it takes.
            make: Makes it.
        """
        if self._room is None:
            self._room = max(_LEAST_ROOM, _ROOM_TO_CONSTANTS * self.constant_bytes)
        if key not in self._derived:
            taken = sum(self.constants[node].nbytes for node in self._derived.values())
            if taken + num_bytes > self._room:
                return None
            self._derived[key] = self.constant(make())
        return self._derived[key]

    def has_derived(self, key: Any) -> bool:
        """Whether a constant is there that has been made of others."""
        return key in self._derived

    def forget_unused(self) -> None:
        """Lets go of the derived constants that nothing reads."""
        for key, node in list(self._derived.items()):
            if not node.users:
                del self._derived[key]
                self._forget(node)

    def _forget(self, node: fx.Node) -> None:
        value = self.constants.pop(node)
        del self._nodes[value.data_ptr(), self.kinds.pop(node)]
        self.graph.erase_node(node)

    @property
    def constant_bytes(self) -> int:
        """The memory that the constants hold."""
        storages = [value.untyped_storage() for value in self.constants.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def operations(self) -> list[fx.Node]:
        """The nodes that compute something, in their order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def sweep(self) -> None:
        """Removes what nothing reads."""
        self.forget_unused()
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and not _writes(node):
                self.graph.erase_node(node)
        for node in [node for node in self.constants if not node.users]:
            self._forget(node)

    def module(self) -> fx.GraphModule:
        """Returns the graph with its constants, ready to be called."""
        root = nn.Module()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                root.register_buffer(node.target, self.constants[node])
        return fx.GraphModule(root, self.graph)


def _made_anew(graph: fx.Graph) -> set[fx.Node]:
    """Returns the nodes whose memory is written to later, which must not be folded.

    A constant or an input that is written to is replaced by a copy.
    """
    owners = set()
    for node in graph.nodes:
        if _aliased(node, writing=True) is not None:
            owner = node
            while (source := _aliased(owner)) is not None:
                owner = source
            owners.add(owner)
    fresh = set()
    for owner in owners:
        if owner.op == "call_function":
            fresh.add(owner)
            continue
        with graph.inserting_after(owner):
            copied = graph.call_function(torch.ops.aten.clone.default, (owner,))
        owner.replace_all_uses_with(copied, delete_user_cb=lambda user, c=copied: user is not c)
        fresh.add(copied)
    return fresh


def _aliased(node: fx.Node, *, writing: bool = False) -> fx.Node | None:
    """Returns the argument whose memory the result of a node shares, or that it writes to."""
    if node.target in _PASSING and not writing:
        return node.all_input_nodes[0]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for position, argument in enumerate(node.target._schema.arguments):
        alias = argument.alias_info
        if alias is None or (writing and not alias.is_write):
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(given, fx.Node):
            return given
    return None


def _kind(tensor: Tensor) -> _Kind:
    """Returns what an operation may rely on of a tensor."""
    return _Kind(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _writes(node: fx.Node) -> bool:
    """Whether an operation writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

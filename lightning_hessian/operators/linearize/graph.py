"""The graph of a linear function: what follows from constants is computed, the rest can be changed.

Tracing the derivative of a gradient with parameters and data held fixed gives a graph of which
the larger part, the gradient itself, is the same in every product.
"""

from __future__ import annotations

import itertools
import linecache
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten

_PASSING = {
    operator.getitem,
    aten._unsafe_view.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
}
"""Operations that pass on memory without saying so.

Recurrent cells write their activations into the parts that an unsafe split returns. A schema that
does not say so would let the split be folded, and each product would then change the next.
"""

BY_RULE = "by rule"
"""Among the ``meta`` of a node: it was put there by `LinearGraph.replace`, and can be undone."""


class _Kind(NamedTuple):
    """What an operation may rely on of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def graph_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """Return a graph that can be called, without a copy of its source text that outlives it.

    torch.fx writes a graph as Python code, and keeps the text for tracebacks until the process
    ends: 0.2 MB for each measurement of a small attention layer (torch 2.13).

    Args:
        root: Holds the constants of the graph.
        graph: What to run.
    """
    module = fx.GraphModule(root, graph)
    name = type(module).forward.__code__.co_filename
    fx.graph_module._loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)
    return module


class LinearGraph:
    """A linear function as a graph of ATen operations, in which only what varies is computed.

    `trace` puts into it, one by one, the operations that depend on the inputs.

    Attributes:
        graph: The graph; constants are its ``get_attr`` nodes.
        constants: Their values, by node.
        kinds: Shape, strides and precision of every tensor, by node.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.constants: dict[fx.Node, Tensor] = {}
        self.kinds: dict[fx.Node, _Kind] = {}
        self._numbers = itertools.count()
        self._nodes: dict[tuple[Any, ...], fx.Node] = {}
        self._owners: dict[fx.Node, fx.Node] = {}
        self._written: set[fx.Node] = set()

    def input(self, value: Tensor) -> fx.Node:
        """Return the node of a further input of this kind; all come before the operations."""
        node = self.graph.placeholder(f"input_{next(self._numbers)}")
        self.kinds[node] = _kind(value)
        return node

    def call(self, target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
        """Return the node of a further operation."""
        node = self.graph.call_function(target, arguments, keywords)
        self._note_owner(node)
        return node

    def is_of_kind(self, node: fx.Node, value: Tensor) -> None:
        """Note what the result of a node is like."""
        self.kinds[node] = _kind(value)

    def _note_owner(self, node: fx.Node) -> None:
        """Note whose memory a node of the trace shares, and whose it writes to."""
        if (source := _aliased(node)) is not None:
            self._owners[node] = self._owners.get(source, source)
        self._written.update(self._owners.get(target, target) for target in _targets(node))

    def is_settled(self, *nodes: Any) -> bool:
        """Return whether the traced code never writes to any of these: order does not matter."""
        found = (self._owners.get(node, node) for node in nodes if isinstance(node, fx.Node))
        return self._written.isdisjoint(found)

    def constant(self, value: Tensor) -> fx.Node:
        """Return the node, before all others, that holds a constant; the same for the same one."""
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

    def keep_apart(self, node: fx.Node) -> None:
        """Let a constant have memory of its own, because the memory that it has is written to."""
        value = self.constants[node]
        del self._nodes[value.data_ptr(), self.kinds[node]]
        apart = copied(value)
        self.constants[node] = apart
        self._nodes[apart.data_ptr(), self.kinds[node]] = node

    def replace(self, node: fx.Node, target: Any, *arguments: Any, **keywords: Any) -> None:
        """Put another operation, with the same kind of result, in the place of a node."""
        with self.graph.inserting_before(node):
            new = self.graph.call_function(target, arguments, keywords)
        self.kinds[new] = self.kinds[node]
        new.meta[BY_RULE] = True
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def is_zero(self, node: Any) -> bool:
        """Return whether a node is a constant full of zeros."""
        return node in self.constants and not bool(self.constants[node].any())

    def alike(self, *nodes: Any) -> bool:
        """Return whether all are tensors of the same shape, strides and precision."""
        kinds = [self.kinds.get(node) if isinstance(node, fx.Node) else None for node in nodes]
        return None not in kinds and all(kind == kinds[0] for kind in kinds)

    @property
    def operations(self) -> list[fx.Node]:
        """The nodes that compute something, in their order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def sweep(self) -> None:
        """Remove what nothing reads."""
        for node in reversed(list(self.graph.nodes)):
            if node.op == "call_function" and not node.users and not _writes(node):
                self.graph.erase_node(node)
        for node in [node for node in self.constants if not node.users]:
            value = self.constants.pop(node)
            del self._nodes[value.data_ptr(), self.kinds.pop(node)]
            self.graph.erase_node(node)

    def module(self) -> fx.GraphModule:
        """Return the graph with its constants, ready to be called."""
        root = nn.Module()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                root.register_buffer(node.target, self.constants[node])
        return graph_module(root, self.graph)


def _aliased(node: fx.Node) -> fx.Node | None:
    """Return the argument whose memory the result of a node shares."""
    if node.target in _PASSING:
        return node.all_input_nodes[0]
    found = _arguments(node, lambda alias: True)
    return found[0] if found else None


def _targets(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that an operation writes to."""
    return _arguments(node, lambda alias: alias.is_write)


def _arguments(node: fx.Node, wanted: Callable[[Any], bool]) -> list[fx.Node]:
    """Return the tensors among the arguments whose alias in the schema is wanted."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    found = []
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not wanted(argument.alias_info):
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(given, fx.Node):
            found.append(given)
        elif isinstance(given, (list, tuple)):
            found += [entry for entry in given if isinstance(entry, fx.Node)]
    return found


def copied(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides."""
    copy = tensor.clone()
    if copy.stride() == tensor.stride():
        return copy
    everything = tensor.as_strided([tensor.untyped_storage().nbytes() // tensor.itemsize], [1], 0)
    return everything.clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _kind(tensor: Tensor) -> _Kind:
    """Return what an operation may rely on of a tensor."""
    return _Kind(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _writes(node: fx.Node) -> bool:
    """Return whether an operation writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

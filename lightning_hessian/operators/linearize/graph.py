"""The graph of a linear function: what follows from constants is computed, the rest can be changed.

Tracing the derivative of a gradient with parameters and data held fixed gives a graph of which
the larger part, the gradient itself, is the same in every product.
"""

from __future__ import annotations

import itertools
import linecache
import operator
from collections.abc import Callable, Iterator, Sequence
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

_SHAPE_ONLY = {aten.new_zeros.default, aten.ones_like.default, aten.zeros_like.default}
"""Operations that ask for no more than the shape of their operand."""


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
    """A traced linear function, with all that does not depend on its inputs evaluated.

    Args:
        traced: A graph of ATen operations; what it holds (parameters, data) is constant.
        inputs: What to evaluate it at, to learn the shapes.

    Attributes:
        graph: The graph; constants are its ``get_attr`` nodes.
        constants: Their values, by node.
        kinds: Shape, strides and precision of every tensor, by node.
    """

    def __init__(self, traced: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        self.graph = fx.Graph()
        self.constants: dict[fx.Node, Tensor] = {}
        self.kinds: dict[fx.Node, _Kind] = {}
        self._numbers = itertools.count()
        self._nodes: dict[tuple[Any, ...], fx.Node] = {}
        self._owners: dict[fx.Node, fx.Node] = {}
        self._written: set[fx.Node] = set()
        self._evaluate(traced, iter(inputs))

    def _evaluate(self, traced: fx.GraphModule, inputs: Iterator[Tensor]) -> None:
        """Run the graph once, and copy what is not constant.

        A constant that the traced code writes to is evaluated with all its writes, in their order.
        What is not constant and reads it in between is given a copy of it as it is then.
        """
        memory = _Memory(traced.graph)
        values: dict[fx.Node, Any] = {}
        copies: dict[fx.Node, Any] = {}
        last_reader = {read: node for node in traced.graph.nodes for read in node.all_input_nodes}
        done: dict[fx.Node, list[fx.Node]] = {}
        for read, node in last_reader.items():
            done.setdefault(node, []).append(read)

        def copy_of(node: fx.Node) -> Any:
            if node not in copies:  # a constant; a number that was one is written into the graph
                value = values[node]
                if isinstance(value, Tensor):
                    copies[node] = self.constant(value.clone() if memory.changes(node) else value)
                else:
                    copies[node] = value
            return copies[node]

        for node in traced.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], copy_of))
                break
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(traced)
            else:
                arguments, keywords = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*arguments, **keywords)
            if node in memory.varying:
                copies[node] = self.graph.node_copy(node, copy_of)
                self._note_owner(copies[node])
                if isinstance(values[node], Tensor):
                    self.kinds[copies[node]] = _kind(values[node])
            else:
                for changed in memory.written_by(node):
                    copies.pop(changed, None)
            for read in done.get(node, () if node.users else (node,)):
                del values[read]

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


class _Memory:
    """Which nodes of a traced graph share memory, and which of them depend on the inputs.

    A constant or an input that the graph writes to is replaced by a copy.

    Attributes:
        varying: The nodes that another input, or another draw, would change. Where such a value is
            written to memory, all that lies in this memory varies.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._roots = _roots(graph)
        written = {self._roots[target] for node in graph.nodes for target in _targets(node)}
        for root in written:
            if root.op != "call_function":
                _copy_first(graph, root)
        self._roots = _roots(graph)
        self.varying = _varying(graph, self._roots)
        self._views: dict[fx.Node, list[fx.Node]] = {}
        self._writes_left: dict[fx.Node, int] = {}
        for node, root in self._roots.items():
            self._views.setdefault(root, []).append(node)
            for target in _targets(node):
                owner = self._roots[target]
                self._writes_left[owner] = self._writes_left.get(owner, 0) + 1

    def changes(self, node: fx.Node) -> bool:
        """Return whether the memory of a node is still to be written to."""
        return self._writes_left.get(self._roots[node], 0) > 0

    def written_by(self, node: fx.Node) -> list[fx.Node]:
        """Note that a node has run, and return the nodes in the memory that it wrote to."""
        owners = [self._roots[target] for target in _targets(node)]
        for owner in owners:
            self._writes_left[owner] -= 1
        return [view for owner in owners for view in self._views[owner]]


def _roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return for each node the one that made the memory in which its result lies."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = _aliased(node)
        roots[node] = node if source is None else roots[source]
    return roots


def _copy_first(graph: fx.Graph, node: fx.Node) -> None:
    """Let all readers of a node, and what writes to it, have a copy of it."""
    with graph.inserting_after(node):
        copied = graph.call_function(aten.clone.default, (node,))
    node.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)


def _varying(graph: fx.Graph, roots: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on the inputs or on random draws."""
    varying: set[fx.Node] = set()
    while True:
        before = len(varying)
        for node in graph.nodes:
            depends = not varying.isdisjoint(node.all_input_nodes)
            depends &= node.target not in _SHAPE_ONLY
            drawn = node.op == "placeholder" or _is_impure(node)
            if depends or drawn or roots[node] in varying:
                varying.add(node)
                varying.update(roots[target] for target in _targets(node))
        if len(varying) == before:
            return varying


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


def _is_impure(node: fx.Node) -> bool:
    """Return whether an operation draws random numbers, or does more than return a result."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.is_impure()
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return random or (node.is_impure() and not _writes(node))


def _kind(tensor: Tensor) -> _Kind:
    """Return what an operation may rely on of a tensor."""
    return _Kind(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _writes(node: fx.Node) -> bool:
    """Return whether an operation writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

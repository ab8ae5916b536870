"""All that a module holds, with every digit of it, to be put back after a measurement."""

from __future__ import annotations

import copy
import functools
import operator
import types
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hessian.isolation.held import (
    DEEPEST,
    INTERNAL,
    equal_bits,
    has_digits,
    is_own,
    local_part,
    put,
    shallow,
    slots_of,
)
from lightning_hessian.linear.rng import GENERATORS, restorer

_MOST_VISITED = 100_000
"""Objects within a module's attributes beyond which the walk ends: no model holds so many."""


class Snapshot:
    """All that a module holds, with a copy of every digit, to be put back after a measurement.

    It covers what no copy made for an evaluation can: what the backward passes write to, and what
    is written to behind the module's back. It takes the memory of one copy of the parameters,
    where the Krylov basis takes a hundred of them or more.

    Attributes:
        hidden: Modules that it holds in attributes, containers or objects, unregistered.
    """

    def __init__(self, module: nn.Module) -> None:
        self.hidden: list[nn.Module] = []
        self._undo: list[Callable[[], None]] = []
        self._shared: list[_Digits] = []
        self._seen: dict[int, Any] = {}
        for part in module.modules():
            self._module(part)
        self._attributes(module.modules())
        self._attributes(self.hidden)  # grows while it is walked

    def is_written(self) -> bool:
        """Return whether parameters have other digits than when this was taken."""
        # Tracing and vmap look on while this compares tensors that they know nothing of.
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            return any(digits.differ() for digits in self._shared)

    def put_back(self) -> None:
        """Give the parameters the digits that they had."""
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            for digits in self._shared:
                digits.put_back()

    def restore(self) -> None:
        """Put everything back: digits in place, the same objects in the same places."""
        with torch.inference_mode(False), torch.no_grad():
            for undo in reversed(self._undo):
                undo()

    def _first_visit(self, value: Any) -> bool:
        if id(value) in self._seen or len(self._seen) > _MOST_VISITED:
            return False
        self._seen[id(value)] = value
        return True

    def _module(self, part: nn.Module) -> None:
        if not self._first_visit(part):
            return
        state, mode = shallow(vars(part)), part.training
        self._undo.append(lambda: put(vars(part), state | {"training": mode}))
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            self._visit(tensor, 1)

    def _attributes(self, parts: Iterable[nn.Module]) -> None:
        for part in parts:
            for name, value in vars(part).items():
                if name not in INTERNAL:
                    self._visit(value, DEEPEST)

    def _visit(self, value: Any, depth: int) -> None:
        plain = (str, bytes, int, float, type(None))
        if depth == 0 or isinstance(value, plain) or not self._first_visit(value):
            return
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray):
            content = value.copy()
            self._undo.append(lambda: _put_array(value, content))
        elif isinstance(value, nn.Module):
            del self._seen[id(value)]
            for part in value.modules():
                if id(part) not in self._seen:
                    self.hidden.append(part)
                    self._module(part)
        elif isinstance(value, GENERATORS):
            self._undo.append(restorer(value))
        elif isinstance(value, (list, dict, set, deque)):
            self._undo.append(_container_undo(value))
        for part in self._within(value):
            self._visit(part, depth - 1)

    def _within(self, value: Any) -> Iterable[Any]:
        """Return what a value holds, having noted which attributes it holds it in."""
        found: list[Any] = []
        if isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (list, tuple, deque)):
            found += value
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                found += self._cell(cell)
        elif isinstance(value, functools.partial):
            found += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            found.append(value.__self__)
        if is_own(value):
            slots = slots_of(value)
            if slots:
                self._undo.append(lambda: _put_slots(value, slots))
            held = getattr(value, "__dict__", {})
            self._undo.append(_container_undo(held))
            found += [*slots.values(), *held.values()]
        return found

    def _cell(self, cell: types.CellType) -> list[Any]:
        try:
            content = cell.cell_contents
        except ValueError:  # empty so far
            return []
        self._undo.append(lambda: setattr(cell, "cell_contents", content))
        return [content]

    def _tensor(self, tensor: Tensor) -> None:
        digits = _Digits(tensor)
        if isinstance(tensor, nn.Parameter):
            self._shared.append(digits)
        self._undo.append(digits.put_back)
        if tensor.is_leaf:
            needed, gradient = tensor.requires_grad, tensor.grad
            self._undo.append(lambda: _put_gradient(tensor, needed, gradient))
            if gradient is not None and self._first_visit(gradient):
                self._undo.append(_Digits(gradient).put_back)


class _Digits:
    """A tensor, where its memory lies, and a copy of that."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        # `.data` shares the memory but not the version counter, so that graphs do not complain.
        self._place = tensor.data
        local = local_part(tensor)
        self._copy = local.detach().clone() if has_digits(local) else None

    def differ(self) -> bool:
        """Return whether some bit has changed."""
        return self._copy is not None and not equal_bits(local_part(self._tensor), self._copy)

    def put_back(self) -> None:
        """Write the copy back, where that changes anything."""
        if self._copy is None:
            return
        if local_part(self._tensor).data_ptr() != local_part(self._place).data_ptr():
            self._tensor.data = self._place
        if self.differ():
            with torch.inference_mode(self._tensor.is_inference()):
                local_part(self._tensor).data.copy_(self._copy)


def _put_array(array: Any, content: Any) -> None:
    if array.tobytes() != content.tobytes():
        array[...] = content


def _put_slots(value: Any, slots: dict[str, Any]) -> None:
    for name, content in slots.items():
        object.__setattr__(value, name, content)


def _put_gradient(tensor: Tensor, needed: bool, gradient: Tensor | None) -> None:
    if tensor.requires_grad != needed:
        tensor.requires_grad_(needed)
    if tensor.grad is not gradient:
        tensor.grad = gradient


def _container_undo(container: Any) -> Callable[[], None]:
    """Return what gives a container the entries that it has now, if it has others then."""
    before = copy.copy(container)

    def undo() -> None:
        if isinstance(container, set):
            same = container == before
        elif isinstance(container, dict):
            same = list(container) == list(before) and all(
                map(operator.is_, container.values(), before.values())
            )
        else:
            same = len(container) == len(before) and all(map(operator.is_, container, before))
        if not same:
            container.clear()
            add = container.update if isinstance(container, (set, dict)) else container.extend
            add(before)

    return undo

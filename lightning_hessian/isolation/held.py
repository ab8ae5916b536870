"""What a module holds: copied for an evaluation to write to, and put in place again later."""

from __future__ import annotations

import copy
import functools
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hessian.linear.rng import GENERATORS

INTERNAL = frozenset(vars(nn.Module()))
"""Attributes that torch keeps in every module: registries, hooks, the mode."""

_REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
_FOREIGN = (
    sys.stdlib_module_names - {"argparse", "collections", "types"}
    | {"lightning", "lightning_hessian", "numpy", "pytorch_lightning", "torch", "wandb"}
)  # fmt: skip
_NOT_WRITTEN_TO = ("lightning.", "pytorch_lightning.", "torch.optim.", "torch.utils.data.")
"""Where classes come from whose objects no forward pass writes to: they may hold all the data."""

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
DEEPEST = 12


def is_own(value: Any) -> bool:
    """Return whether a value is an object of the user's own, such as a meter."""
    if isinstance(value, (nn.Module, type, types.ModuleType, *_FUNCTIONS)):
        return False
    if type(value).__module__.partition(".")[0] in _FOREIGN:
        return False
    if any(f"{kind.__module__}.".startswith(_NOT_WRITTEN_TO) for kind in type(value).__mro__):
        return False
    return hasattr(value, "__dict__") or bool(slots_of(value))


def slots_of(value: Any) -> dict[str, Any]:
    """Return what an object holds in slots, by name; no code of its class runs."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            slot = vars(kind).get(name)
            if isinstance(slot, types.MemberDescriptorType):
                with suppress(AttributeError):  # it has no value yet
                    found[name] = slot.__get__(value)
    return found


class Copier:
    """Copies what an evaluation might write to; what is held twice is copied once.

    Tensors keep their values only, not the graph they came from. Modules, functions and the
    objects of libraries are passed on as they are.

    Args:
        given: What stands for a tensor, by the ``id`` of the tensor: an attribute that holds a
            parameter, perhaps in a list, must see the one that the loss is a function of.
        parameters: Whether parameters that nothing stands for are copied too.
        flags: Whether copies of tensors that require grad do so too. What is computed again must
            save as many tensors for its backward pass as at first.
    """

    def __init__(
        self,
        given: dict[int, Any] | None = None,
        *,
        parameters: bool = False,
        flags: bool = False,
    ) -> None:
        self._flags = flags
        self._copies: dict[int, tuple[Any, Any]] = {}
        self._given = given or {}
        self._parameters = parameters

    def __call__(self, value: Any, depth: int = DEEPEST) -> Any:
        """Return a copy of a value, with copies of what it holds down to a depth."""
        if id(value) in self._given:
            return self._given[id(value)]
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        if depth == 0 or isinstance(value, (str, bytes, int, float, type(None))):
            return value
        return self._made(value, depth - 1)

    def _noted(self, value: Any, made: Any) -> Any:
        self._copies[id(value)] = (value, made)  # the value is kept, so that its id stays its own
        return made

    def _made(self, value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return self._noted(value, self._tensor(value))
        if isinstance(value, np.ndarray):
            return self._noted(value, value.copy())
        if isinstance(value, GENERATORS):
            if isinstance(value, torch.Generator):  # no deep copy of one works within torch.func
                return self._noted(value, value.clone_state())
            return self._noted(value, copy.deepcopy(value))
        if isinstance(value, tuple):
            entries = [self(entry, depth) for entry in value]
            if all(map(operator.is_, entries, value)):
                return value
            kind: Any = type(value)
            made = kind(*entries) if hasattr(kind, "_fields") else kind(entries)
            return self._noted(value, made)
        if isinstance(value, (list, dict, set, deque)) or is_own(value):
            return self._container(value, depth)
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        if isinstance(value, nn.Parameter) and not self._parameters:
            return value
        made = value.detach().clone()
        return made.requires_grad_() if self._flags and value.requires_grad else made

    def _container(self, value: Any, depth: int) -> Any:
        try:
            made = self._noted(value, copy.copy(value))
        except (TypeError, AttributeError, NotImplementedError, copy.Error):
            return self._noted(value, value)  # what cannot be copied: `Snapshot` puts it back
        if made is value:  # a class may say that its objects are not copied
            return value
        if isinstance(made, dict):
            for key, entry in list(made.items()):
                made[key] = self(entry, depth)
        elif isinstance(made, (list, deque)):
            for i, entry in enumerate(list(made)):
                made[i] = self(entry, depth)
        elif not isinstance(made, set):
            for name, entry in slots_of(made).items():
                object.__setattr__(made, name, self(entry, depth))
        if hasattr(made, "__dict__"):
            attributes = vars(made)
            attributes.update({name: self(part, depth) for name, part in attributes.items()})
        return made


class ModuleState:
    """What the parts of a module hold at a moment, to be put in place again later for a while.

    Args:
        parts: The modules.
        given: Tensors that are referred to and not copied, by their ``id``.
        parameters: Whether parameters are copied too.
        earlier: The same at an earlier moment; buffers with the same digits are held only once.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        *,
        given: dict[int, Any] | None = None,
        parameters: bool = False,
        earlier: ModuleState | None = None,
    ) -> None:
        self._given, self._parameters = given, parameters
        copied = Copier(given, parameters=parameters, flags=True)
        self._parts: list[tuple[nn.Module, dict[str, Any]]] = []
        for i, part in enumerate(parts):
            before = {} if earlier is None else earlier._parts[i][1]["_buffers"]
            buffers = part._buffers.items()
            kept = {id(b): before[n] for n, b in buffers if n in before and _alike(before[n], b)}
            self._parts.append((part, self._of(vars(part), copied, kept)))

    def _of(
        self, held: dict[str, Any], copied: Copier, kept: dict[int, Tensor] | None = None
    ) -> dict[str, Any]:
        """Return the attributes of a part, its registries as new dictionaries."""
        state = {name: value if name in INTERNAL else copied(value) for name, value in held.items()}
        for name in _REGISTRIES:
            state[name] = copy.copy(held[name])
        for name, buffer in held["_buffers"].items():
            found = (kept or {}).get(id(buffer))
            state["_buffers"][name] = copied(buffer) if found is None else found
        if self._parameters:
            parts = {name: copied(part) for name, part in held["_parameters"].items()}
            state["_parameters"].update(parts)
        return state

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Open a block in which the module holds a copy of this; it is as before afterwards."""
        copied = Copier(self._given, parameters=self._parameters, flags=True)
        with kept([part for part, _ in self._parts]):
            for part, state in self._parts:
                put(vars(part), self._of(state, copied))
            yield


def _alike(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    return has_digits(first) and has_digits(second) and equal_bits(first, second)


@contextmanager
def kept(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Open a block after which modules hold the same objects as before, whatever is in these."""
    before = [(part, shallow(vars(part))) for part in parts]
    try:
        yield
    finally:
        for part, state in before:
            put(vars(part), state)


@contextmanager
def entries_kept(dictionaries: Iterable[dict[Any, Any]]) -> Iterator[None]:
    """Open a block after which dictionaries have the same entries as before, in their order."""
    before = [(held, dict(held)) for held in dictionaries]
    try:
        yield
    finally:
        for held, entries in before:
            held.clear()
            held.update(entries)


@contextmanager
def without_hooks(parts: Iterable[nn.Module], rests: Callable[[Any], bool]) -> Iterator[None]:
    """Open a block in which some of the forward hooks of modules rest; all others stay."""
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    registries = [vars(part)[kind] for part in parts for kind in kinds]
    with entries_kept(registries):
        for registry in registries:
            for key in [key for key, hook in registry.items() if rests(hook)]:
                del registry[key]
        yield


def shallow(held: dict[str, Any]) -> dict[str, Any]:
    """Return what a module holds, with copies of the registries but not of what is in them."""
    return held | {name: copy.copy(held[name]) for name in _REGISTRIES}


def put(held: dict[str, Any], state: dict[str, Any]) -> None:
    """Make a module hold a state; its registries stay the same dictionaries, with other entries."""
    registries = {name: held[name] for name in _REGISTRIES}
    held.clear()
    held.update(state)
    for name, entries in registries.items():
        held[name] = entries
        if entries is not state[name]:
            entries.clear()
            entries.update(state[name])


@contextmanager
def untouched(
    module: nn.Module,
    *,
    hidden: Sequence[nn.Module] = (),
    given: dict[int, Any] | None = None,
    parameters: bool = False,
) -> Iterator[None]:
    """Open a block after which every attribute of ``module`` and its submodules is as before.

    A ``training_step`` may append to lists, update metrics and set buffers. Inside the block it
    does so to copies: of tensors, of arrays, of random generators, and of containers and objects
    of the user's own with what they hold of these. What it registers is taken out again. In-place
    changes of the module's registered parameters and buffers are not covered: pass in copies of
    them (`torch.func.functional_call`).

    Args:
        module: The module that an evaluation may write to.
        hidden: Modules that it holds without having them registered (`Snapshot.hidden`), whose
            buffers are copied too.
        given: What stands for a parameter that an attribute holds, see `Copier`.
        parameters: Whether the parameters of hidden modules are copied too.
    """
    copied = Copier(given, parameters=parameters)
    parts = [*module.modules(), *hidden]
    with kept(parts):
        for part in parts:
            for name, value in list(vars(part).items()):
                if name not in INTERNAL:
                    vars(part)[name] = copied(value)
        for part in hidden:
            for registry in (part._buffers, part._parameters):
                registry.update({name: copied(value) for name, value in registry.items()})
        yield


def local_part(tensor: Any) -> Any:
    """Return what of a tensor lies here, if it is distributed."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def has_digits(tensor: Tensor) -> bool:
    """Return whether a tensor lies in memory row by row, in bits that can be compared."""
    return not tensor.is_meta and tensor.layout == torch.strided and not tensor.is_quantized


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def equal_bits(first: Any, second: Any) -> bool:
    """Return whether two tensors have the same bits; -0 is not 0 here, and NaN is NaN."""
    first, second = first.detach(), second.detach()
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.is_complex():
        first, second = torch.view_as_real(first), torch.view_as_real(second)
    bits = _BITS.get(first.element_size())
    if bits is not None and first.dtype != torch.bool:
        first, second = first.view(bits), second.view(bits)
    return torch.equal(first, second)

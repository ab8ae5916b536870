"""What a data set can remember: the state within reach of it, and a print of it to compare.

Reading samples changes a data set that counts, caches or moves a cursor. The state is not only in
attributes: methods also reach their class, module globals, closures and default arguments. All of
it is looked at without running any code of the data set's own.
"""

from __future__ import annotations

import array
import io
import mmap
import operator
import os
import sys
import types
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_hessian.isolation.held import slots_of
from lightning_hessian.linear.rng import GENERATORS

_ATOMS = (
    bool, int, float, complex, str, bytes, type(None), type(...), PurePath, Enum, torch.dtype,
    torch.device, torch.Size, np.generic,
)  # fmt: skip
_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None)})
_BUFFERS = (bytearray, memoryview, array.array, mmap.mmap)
_ITERATORS = ("builtins", "itertools", "collections")
_PLAIN_STDLIB = frozenset({"argparse", "collections", "multiprocessing", "queue", "threading",
                           "types"})  # fmt: skip
_KNOWN = frozenset(
    {*sys.stdlib_module_names, "torch", "numpy", "lightning", "pytorch_lightning",
     "lightning_utilities", "torchmetrics"}
) - {"__main__"}  # fmt: skip
_MOST_VISITED = 5_000_000
_CHUNK = 1 << 17  # numbers of eight bytes
_EXACT_BYTES = 1 << 26


@dataclass
class Reachable:
    """All that was found from some roots.

    Attributes:
        prints: What is compared of each thing, by its id; unequal prints mean changed state.
        names: How to speak of a thing, by its id.
        arrays: Tensors and arrays.
        generators: Random number generators.
        files: Open files.
        flat: Lists and dicts that hold numbers and texts only.
        others: All other things that have state of their own.
    """

    prints: dict[int, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    arrays: list[Any] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    files: list[Any] = field(default_factory=list)
    flat: list[Any] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)

    def change(self, later: Reachable) -> str | None:
        """Return the name of something whose print is another one later, None for nothing."""
        for number, before in self.prints.items():
            after = later.prints.get(number, before)
            if before != after:
                return self.names[number] + _which(before, after)
        return None


def reachable(roots: Iterable[Any]) -> Reachable:
    """Return the state within reach of some objects, the roots.

    Of the classes and functions of installed libraries only the attributes of instances are
    followed: a library's own caches are not the data set's. A Trainer ends the search, and so do
    the parameters of a LightningModule.
    """
    found = Reachable()
    stack = list(roots)
    checked: dict[int, int] = {}  # checksums by address of the memory, which views share
    shown: Any
    more: list[Any]
    while stack and len(found.prints) < _MOST_VISITED:
        value = stack.pop()
        if id(value) in found.prints or isinstance(value, _ATOMS):
            continue
        if isinstance(value, Tensor) or (
            isinstance(value, np.ndarray) and not value.dtype.hasobject
        ):
            shown, more = _checksum(value, checked), []
            found.arrays.append(value)
        elif isinstance(value, GENERATORS):
            shown, more = _generator_print(value), []
            found.generators.append(value)
        elif isinstance(value, io.IOBase):
            shown, more = _position(value), []
            found.files.append(value)
        else:
            shown, more = _parts(value)
            flat = type(value) in (list, dict) and not more
            (found.flat if flat else found.others).append(value)
        found.prints[id(value)] = shown
        found.names[id(value)] = _name(value)
        stack += more
    return found


def belongs_to_lightning(value: Any, name: str) -> bool:
    """Return whether an object is Lightning's ``name`` or of a class derived from it."""
    return any(
        kind.__name__ == name and kind.__module__.startswith(("lightning.", "pytorch_lightning."))
        for kind in type(value).__mro__
    )


def _parts(value: Any) -> tuple[Any, list[Any]]:
    """Return what is compared of a value, and what else can be reached through it."""
    if isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
        return None, []
    if isinstance(value, np.ndarray):
        return _of_sequence(value.ravel().tolist())
    if isinstance(value, _BUFFERS):
        return zlib.crc32(bytes(value)), []
    if isinstance(value, types.FunctionType):
        return _of_names(_of_function(value))
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        here = None if frame is None else frame.f_lasti
        shown, more = _of_names({} if frame is None else dict(frame.f_locals))
        return (here, shown), more
    if isinstance(value, type):
        return _of_names(_of_class(value))
    if type(value).__module__ in _ITERATORS and hasattr(type(value), "__next__"):
        text = repr(value) if type(value).__name__ in ("count", "repeat") else ""
        return (operator.length_hint(value, -1), text), []
    return _of_instance(value)


def _of_instance(value: Any) -> tuple[Any, list[Any]]:
    """Return the same of an object, which may be a container too."""
    if type(value) in (list, tuple):
        return _of_sequence(value)
    if type(value) is dict:
        keys, key_objects = _of_sequence(value)
        values, objects = _of_sequence(value.values())
        return (keys, values), key_objects + objects
    shown: Any
    shown, more = _of_names(_attributes(value))
    if isinstance(value, dict):
        keys, key_objects = _of_sequence(dict.keys(value))
        values, objects = _of_sequence(dict.values(value))
        shown, more = (shown, keys, values), more + key_objects + objects
    elif isinstance(value, (list, tuple, deque)):
        entries, others = _of_sequence(value)
        shown, more = (shown, entries), more + others
    elif isinstance(value, (set, frozenset)):
        more = more + list(value)
        shown = shown, hash(frozenset(map(_token, value)))
    return shown, [*more, type(value)]


def _of_sequence(values: Iterable[Any]) -> tuple[Any, list[Any]]:
    objects = [v for v in values if not _is_fixed(v)]
    if not objects:
        return hash(tuple(values)), objects
    return hash(tuple(map(_token, values))), objects


def _of_names(named: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    shown = {name: _token(value) for name, value in named.items()}
    return shown, [value for value in named.values() if not _is_fixed(value)]


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes that are an object's own; none of what cannot be state of data."""
    root = type(value).__module__.partition(".")[0]
    if isinstance(value, partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, types.MethodType):
        return {"self": value.__self__, "function": value.__func__}
    if isinstance(value, (staticmethod, classmethod)):
        return {"function": value.__func__}
    if isinstance(value, property):
        return {"get": value.fget, "set": value.fset}
    if belongs_to_lightning(value, "Trainer"):
        return {}
    if root in sys.stdlib_module_names and root not in ("builtins", *_PLAIN_STDLIB):
        return dict(os.environ) if value is os.environ else {}
    try:
        own = dict(object.__getattribute__(value, "__dict__"))
    except (AttributeError, TypeError):
        own = {}
    if belongs_to_lightning(value, "LightningModule"):  # what trains changes as it trains
        own = {name: v for name, v in own.items() if name not in vars(nn.Module())}
    return slots_of(value) | own


def _of_class(kind: type) -> dict[str, Any]:
    """Return the attributes of a class and its ancestors, methods among them."""
    found: dict[str, Any] = {}
    for ancestor in reversed(kind.__mro__):
        if _is_known(ancestor.__module__):
            continue
        library = _is_library(ancestor.__module__)
        for name, value in vars(ancestor).items():
            code = isinstance(value, (types.FunctionType, staticmethod, classmethod, property))
            if (code and library) or (name.startswith("__") and not code) or name == "_abc_impl":
                continue
            found[f"{ancestor.__name__}.{name}"] = value
    return found


def _of_function(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function keeps and which globals it names."""
    found: dict[str, Any] = dict(vars(function))
    if _is_known(function.__module__ or "") or _is_library(function.__module__ or ""):
        names: set[str] = set()
    else:
        names = set(_names(function.__code__))
    found |= {f"default {i}": v for i, v in enumerate(function.__defaults__ or ())}
    found |= function.__kwdefaults__ or {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    for name, cell in cells:
        try:
            found[name] = cell.cell_contents
        except ValueError:  # it has no value yet
            continue
    known = function.__globals__
    for name in names & known.keys():
        value = known[name]
        if not isinstance(value, types.ModuleType):
            found[f"global {name}"] = value
        elif value is os or not (_is_known(value.__name__) or _is_library(value.__name__)):
            own = vars(value)
            found |= {f"{name}.{n}": own[n] for n in names & own.keys()}
    if known.get("__name__") != "os" and "environ" in names:
        found["os.environ"] = os.environ
    return found


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the global names and attributes that code mentions, those of inner functions too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_known(module: str) -> bool:
    """Return whether a module is Python's, torch's or one of those around it."""
    return module.partition(".")[0] in _KNOWN


def _is_library(module: str) -> bool:
    path = getattr(sys.modules.get(module.partition(".")[0]), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path


def _token(value: Any) -> Any:
    """Return what stands for a value where it is kept: itself, or which object it is."""
    return value if _is_fixed(value) else id(value)


def _is_fixed(value: Any) -> bool:
    """Return whether a value has no state: a number, a text, a tuple of these."""
    kind = type(value)
    if kind is tuple:
        return _PLAIN.issuperset(map(type, value))
    return kind in _PLAIN or isinstance(value, _ATOMS)


def _generator_print(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return zlib.crc32(value.get_state().numpy().data)
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    return repr(value.get_state() if hasattr(value, "get_state") else value.getstate())


def _position(file: io.IOBase) -> Any:
    try:
        return file.tell()
    except (OSError, ValueError):  # closed, a pipe, or within its own iteration
        return file.closed


def _checksum(value: Any, checked: dict[int, int]) -> Any:
    """Return a checksum of an array's memory; of the whole storage of a tensor."""
    if isinstance(value, np.ndarray):
        if isinstance(value, np.memmap) and value.mode == "r":
            return None  # cannot be written to, and may be larger than memory
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        place = value.__array_interface__["data"][0]
        return value.shape, _sum(torch.from_numpy(raw.copy() if not raw.flags.writeable else raw))
    try:
        storage = value.untyped_storage()
        place = storage.data_ptr()
        if place not in checked:
            data = torch.empty(0, dtype=torch.uint8, device=value.device)
            checked[place] = _sum(data.set_(storage))
        return _version(value), tuple(value.shape), checked[place]
    except (RuntimeError, NotImplementedError, AttributeError):  # sparse, quantised, fake
        return _version(value)


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _sum(data: Tensor) -> int:
    """Return a checksum of bytes; of very many one that reads at the speed of memory."""
    if data.numel() > _EXACT_BYTES:
        rest = data.numel() % (8 * _CHUNK)
        numbers = data[: data.numel() - rest].view(torch.int64).view(-1, _CHUNK)
        sums = numbers.sum(1).cpu().numpy().tobytes()
        return zlib.crc32(sums + bytes(data[data.numel() - rest :].cpu().numpy()))
    return zlib.crc32(data.cpu().numpy().data)


def _name(value: Any) -> str:
    if isinstance(value, (type, types.FunctionType)):
        return value.__qualname__
    kind = type(value)
    article = "an" if kind.__name__[0].lower() in "aeiou" else "a"
    return kind.__qualname__ if kind.__module__ != "builtins" else f"{article} {kind.__name__}"


def _which(before: Any, after: Any) -> str:
    """Return which attribute differs, as a suffix; empty where that is not known."""
    while isinstance(before, tuple) and before and isinstance(before[0], dict):
        before, after = before[0], after[0]
    if isinstance(before, dict) and isinstance(after, dict):
        names = [n for n in {**before, **after} if before.get(n, ...) != after.get(n, ...)]
        return f" ({names[0]})" if names else ""
    return ""

"""A data set to read from in place of the user's own, which must not notice.

What is read is a deep copy. Where one cannot be made, or where the original changes all the same
(state that the copy shares with it), the data are refused: training would differ.
"""

from __future__ import annotations

import _thread
import copy
import io
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_hessian.isolation.context import preserved_generators
from lightning_hessian.isolation.reachable import Reachable, belongs_to_lightning, reachable
from lightning_hessian.results import ArgumentError
from lightning_hessian.results.base import text_of

_COPIED_BYTES = 256 * 2**20
"""Tensors and arrays are copied up to so many bytes in all; above, the large ones are shared."""

_LARGE_BYTES = 2**20

_LOCKS = (_thread.LockType, _thread.RLock)

_REMEDY = (
    "Training would see other data than without the callback. Give data=[...], a list of batches "
    "drawn by yourself (data=[next(iter(a_loader_of_its_own))]), or keep the state in the data "
    "set's own attributes, where it can be copied."
)


class StatefulDataError(ArgumentError):
    """Data that cannot be read without changing what training reads."""

    def __init__(self, data: object, reason: str) -> None:
        super().__init__("data", data, f"{reason} {_REMEDY}")


@contextmanager
def copied(
    data: object, parts: tuple[Any, ...], seed: int
) -> Iterator[tuple[tuple[Any, ...], Callable[[Any], Any]]]:
    """Open a block in which copies of ``parts`` may be read; the originals are as before after it.

    It is given the copies, and a function that takes a batch out of the originals' memory.

    Tensors and arrays above 256 MiB in all are not copied but shared, arrays as read-only views;
    whether they were written to is seen from checksums. Random number generators start from the
    seed inside, and those of the originals end as before.

    Args:
        data: What the user gave, to be named in an error.
        parts: A data set, a sampler, a function that collates.
        seed: Of the generators within reach.

    Raises:
        StatefulDataError: No copy can be made, or reading it has changed the originals.
    """
    before = reachable(parts)
    files: list[Any] = []
    memo = _shared(before, files)
    kept = set(memo)
    try:
        try:
            copies = copy.deepcopy(parts, memo)
        except Exception as error:
            what = f"{_kind(parts[0])} cannot be copied ({type(error).__name__}: {text_of(error)})"
            raise StatefulDataError(data, f"{what}, and reading it may change it.") from error
        for number, value in memo.items():
            if number not in kept:
                _without_destructor(value)
        with warnings.catch_warnings(), preserved_generators([before.generators, copies], seed):
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            try:
                yield copies, partial(_apart, [_span(array) for array in before.arrays])
            except ValueError as error:
                if "read-only" in str(error):
                    raise StatefulDataError(
                        data, f"{_kind(parts[0])} writes to an array too large to be copied."
                    ) from error
                raise
    finally:
        for file in files:
            file.close()
    changed = before.change(reachable(parts))
    if changed is not None:
        raise StatefulDataError(
            data, f"Reading a copy of {_kind(parts[0])} has changed {changed}, which they share."
        )


def _apart(places: list[tuple[int, int]], batch: Any) -> Any:
    """Return a batch with copies of those tensors and arrays that lie in one of some places."""

    def own(value: Any) -> Any:
        start, _ = _span(value)
        inside = any(first <= start < last for first, last in places)
        if isinstance(value, np.ndarray):
            return value.copy() if inside else value
        return value.detach().clone() if inside else value

    return apply_to_collection(batch, (Tensor, np.ndarray), own)


def _span(value: Any) -> tuple[int, int]:
    """Return where the memory of a tensor or array begins and ends."""
    if isinstance(value, np.ndarray):
        address = value.__array_interface__["data"][0]
        reach = [(n - 1) * stride for n, stride in zip(value.shape, value.strides, strict=True)]
        last = address + sum(max(0, r) for r in reach) + value.itemsize
        return address + sum(min(0, r) for r in reach), last if value.size else address
    try:
        storage = value.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return 0, 0


def _shared(found: Reachable, files: list[Any]) -> dict[int, Any]:
    """Return the memo of a deep copy: what stands in a copy for things that are not copied."""
    memo: dict[int, Any] = {}
    for value in found.others:
        whole = isinstance(value, (*_LOCKS, types.ModuleType))
        if whole or any(belongs_to_lightning(value, x) for x in ("Trainer", "LightningModule")):
            memo[id(value)] = value
    for value in found.flat:  # entries without state: the same as a deep copy, and at once
        memo[id(value)] = value.copy()
    for file in found.files:
        with suppress(OSError, ValueError):  # then the copy fails, and says so
            memo[id(file)] = _reopened(file)
            files.append(memo[id(file)])
    spans = {_span(array) for array in found.arrays}
    scarce = sum(last - first for first, last in spans) > _COPIED_BYTES
    for value in found.arrays:
        first, last = _span(value)
        read_only = isinstance(value, np.memmap) and value.mode == "r"
        if read_only or (scarce and last - first > _LARGE_BYTES):
            memo[id(value)] = _view(value)
        elif isinstance(value, Tensor) and not value.is_leaf:
            memo[id(value)] = value.detach().clone()
    return memo


def _view(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    view = value.view()
    view.flags.writeable = False
    return view


def _reopened(file: Any) -> Any:
    """Return another handle to an open file, at the same place.

    A copy that shared the handle would move its position, and close it when it goes.
    """
    if file.closed or not isinstance(file.name, (str, bytes)) or not file.readable():
        raise ValueError("not a named file open for reading")
    if file.writable():
        raise ValueError("a file open for writing")
    position = file.tell()
    how: dict[str, Any] = {"mode": "rb", "buffering": 0 if isinstance(file, io.RawIOBase) else -1}
    if hasattr(file, "encoding"):
        how = {"encoding": file.encoding, "errors": file.errors}
    fresh = open(file.name, **how)  # noqa: SIM115 - closed when the copy is read
    fresh.seek(position)
    return fresh


def _without_destructor(value: Any) -> None:
    """Take ``__del__`` from a copy: it would close or delete what belongs to the original."""
    kind = type(value)
    if not isinstance(getattr(kind, "__del__", None), types.FunctionType):
        return
    quiet = type(kind.__name__, (kind,), {"__slots__": (), "__del__": lambda _: None})
    with suppress(TypeError):  # a layout that cannot change; such classes are written in C
        value.__class__ = quiet


def _kind(value: Any) -> str:
    return type(value).__qualname__.rpartition("<locals>.")[2]

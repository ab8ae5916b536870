"""How much memory a measurement may take, and what to say where that, or a derivative, fails."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from lightning_hessian.results import MeasurementError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_SIGNS_OF_SHORT_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""How the allocators of torch say that there is too little memory, in lower case."""


class OutOfMemoryError(MeasurementError):
    """There is too little memory for the measurement; says what to do."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that there was too little memory, on whatever device.

    The CPU allocator of torch raises a plain RuntimeError ("DefaultCPUAllocator: can't allocate
    memory" on Linux, "not enough memory" on Windows), and not `torch.OutOfMemoryError` as that of
    CUDA does. NumPy and Python raise MemoryError. The errors that led to this one are asked too.
    """
    while error is not None:
        if isinstance(error, (MemoryError, OutOfMemoryError, torch.OutOfMemoryError)):
            return True
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(s in text for s in _SIGNS_OF_SHORT_MEMORY):
            return True
        error = error.__cause__
    return False


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def short_of_memory(error: BaseException) -> OutOfMemoryError:
    """Return what to raise where nothing cheaper is left: it says memory, and what to do."""
    return OutOfMemoryError(
        f"The measurement ran out of memory ({first_line(error)}). Give the same samples as more "
        "and smaller batches (each is worked on as a whole), use hvp='recompute', select fewer "
        "`parameters`, or let the basis lie elsewhere (`basis=BasisStorage(tier='disk')`)."
    )


@contextmanager
def explained(explain: Callable[[Exception], MeasurementError]) -> Iterator[None]:
    """Open a block in which errors of differentiating are MeasurementErrors with a remedy.

    Args:
        explain: Returns what to tell the user of such an error.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if isinstance(error, MeasurementError):
            raise
        if is_out_of_memory(error):
            raise short_of_memory(error) from None
        raise explain(error) from error


def memory_explained(measure: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return a measurement that says so where it runs out of memory, whatever the device."""

    @functools.wraps(measure)
    def measured(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return measure(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MeasurementError) or not is_out_of_memory(error):
                raise
            raise short_of_memory(error) from error

    return measured


def free_bytes(device: torch.device) -> float:
    """Return the memory that is free on a device, in bytes; 4e9 where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + cached)
    try:
        with open("/proc/meminfo") as file:
            sizes = dict(line.split(":") for line in file)
        return float(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not a POSIX system either
        return 4e9


def most_bytes() -> float:
    """Return the largest memory of any device here, used or free, in bytes; inf if unknown."""
    sizes = []
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        sizes = [float(torch.cuda.get_device_properties(i).total_memory) for i in devices]
    try:
        sizes.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return float("inf")
    return max(sizes)

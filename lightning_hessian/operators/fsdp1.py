"""Modules under ``FullyShardedDataParallel`` (FSDP1): made whole for the time of a measurement."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_hessian.operators.memory import free_bytes
from lightning_hessian.results import MeasurementError

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def on_whole_modules(
    measure: Callable[Concatenate[nn.Module, _Rest], _Result],
) -> Callable[Concatenate[nn.Module, _Rest], _Result]:
    """Returns a measurement whose first argument may be a module under FSDP1."""

    @functools.wraps(measure)
    def measured(model: nn.Module, *args: Any, **kwargs: Any) -> _Result:
        with whole(model) as plain:
            return measure(plain, *args, **kwargs)

    return measured


@contextmanager
def whole(module: nn.Module) -> Iterator[nn.Module]:
    """A block in which a module under FSDP1 is whole on every rank, and a plain module.

    FSDP's forward has no double backward. So all parameters are gathered, and the wrappers are
    taken out of the tree of modules; afterwards they are back, and the gathered parameters are
    dropped, not written back. Other modules pass through untouched.

    Args:
        module: The root: all ranks enter the block together.

    Yields:
        The module, or what it wraps.

    Raises:
        MeasurementError: The whole parameters do not fit half of the free memory.
    """
    wrappers = [part for part in module.modules() if isinstance(part, FullyShardedDataParallel)]
    if not wrappers:
        yield module
        return
    _check_memory(wrappers)
    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        places = [
            (parent, name, part)
            for parent in module.modules()
            for name, part in parent._modules.items()
            if isinstance(part, FullyShardedDataParallel)
        ]
        try:
            for parent, name, part in places:
                parent._modules[name] = part.module
            yield module.module if isinstance(module, FullyShardedDataParallel) else module
        finally:
            for parent, name, part in places:
                parent._modules[name] = part


def _check_memory(wrappers: list[FullyShardedDataParallel]) -> None:
    flat = [wrapper._flat_param for wrapper in wrappers if wrapper._flat_param is not None]
    if not flat:
        return
    needed = sum(part._unpadded_unsharded_size.numel() * part.element_size() for part in flat)
    free = free_bytes(flat[0].device)
    if needed > free / 2:
        raise MeasurementError(
            f"FSDP1 cannot be differentiated twice in shards, and the whole parameters take "
            f"{needed / 1e9:.1f} GB, more than half of the {free / 1e9:.1f} GB that are free. Use "
            "`fully_shard` (FSDP2, ModelParallelStrategy), which is measured in shards."
        )

"""Modules under ``FullyShardedDataParallel`` (FSDP1): made plain for the time of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_hessian.isolation.held import entries_kept
from lightning_hessian.linear.memory import free_bytes
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.probe.sharding.bundles import FlatShards, Piece
from lightning_hessian.probe.sharding.kinds import is_wrapper
from lightning_hessian.probe.sharding.tensor_parallel import without_tensor_parallelism

if TYPE_CHECKING:
    from torch.distributed.fsdp import FullyShardedDataParallel


@contextmanager
def whole(module: nn.Module) -> Iterator[nn.Module]:
    """Open a block in which a module under FSDP1 is a plain module, without its wrappers.

    FSDP's forward has no double backward. So the wrappers are taken out of the tree of modules, and
    all parameters are gathered, where that takes no more than half of the memory that is free on
    every rank. Elsewhere each parameter is the `Piece` of it that this rank holds, which
    `ShardedObjective` makes whole unit by unit. Afterwards all is as before; what was gathered is
    dropped, not written back. Modules under tensor parallelism: see `without_tensor_parallelism`.
    Others pass through untouched.

    Args:
        module: The root: all ranks enter the block together.

    Yields:
        The module, or what it wraps.

    Raises:
        ValueError: Parameters must stay in shards, and do not lie in memory row by row.
    """
    wrappers = [part for part in module.modules() if is_wrapper(part)]
    if not wrappers:
        with without_tensor_parallelism(module):
            yield module
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with ExitStack() as stack:
        if _fits(wrappers):
            stack.enter_context(
                FullyShardedDataParallel.summon_full_params(module, writeback=False)
            )
        else:
            stack.enter_context(_in_pieces(wrappers))
        stack.enter_context(_unwrapped(module))
        yield module.module if is_wrapper(module) else module


@contextmanager
def _unwrapped(module: nn.Module) -> Iterator[None]:
    """Open a block in which what is wrapped stands in the places of the wrappers below the root."""
    parents = list(module.modules())
    with entries_kept(parent._modules for parent in parents):
        for parent in parents:
            for name, part in parent._modules.items():
                if is_wrapper(part):
                    parent._modules[name] = part.module
        yield


def _fits(wrappers: list[FullyShardedDataParallel]) -> bool:
    """Return whether the whole parameters fit half of the free memory of every rank."""
    flat = [wrapper._flat_param for wrapper in wrappers if wrapper._flat_param is not None]
    if not flat:
        return True
    ranks = Ranks.of(wrappers[0].process_group, flat[0].device)
    needed = sum(part._unpadded_unsharded_size.numel() * part.element_size() for part in flat)
    return not ranks.any(needed * ranks.neighbours > free_bytes(flat[0].device) / 2)


@contextmanager
def _in_pieces(wrappers: list[FullyShardedDataParallel]) -> Iterator[None]:
    """Open a block in which the parameters of the wrapped modules are the pieces held here."""
    wrappers = [wrapper for wrapper in wrappers if wrapper._handle is not None]  # with parameters
    pieces = {k: v for w in wrappers for k, v in _pieces(w.module, w._handle).items()}
    parts = {*(wrapper.module for wrapper in wrappers), *(part for part, _ in pieces)}
    with entries_kept(held for part in parts for held in (part._parameters, vars(part))):
        for wrapper in wrappers:
            wrapper.module._parameters.pop("_flat_param", None)
        for (part, name), piece in pieces.items():
            vars(part).pop(name, None)  # a view of what was whole in the last forward
            part._parameters[name] = piece
        yield


def _pieces(unit: nn.Module, handle: Any) -> dict[tuple[nn.Module, str], Piece]:
    """Return what this rank holds of the parameters of a flat one, by their places."""
    from torch.distributed.device_mesh import DeviceMesh

    flat = handle.flat_param
    mesh = DeviceMesh.from_group(handle.process_group, handle.device.type)
    # Before the first forward there is no other than the present one.
    shard = getattr(flat, "_local_shard", flat).detach().to(handle.device)
    shards = FlatShards(unit, mesh, len(shard))
    filling = zip(handle._get_flat_param_offsets(), flat._is_padding_mask, strict=True)
    offsets = [first for (first, _), is_padding in filling if not is_padding]
    pieces: dict[tuple[nn.Module, str], Piece] = {}
    for i, (name, part, _) in enumerate(flat._param_infos):
        if not flat._contiguities[i]:
            raise ValueError(
                f"Parameter {flat._fqns[i]!r} does not lie in memory row by row (channels_last?), "
                "so it cannot be measured in shards, and the whole parameters do not fit half of "
                "the free memory. Use `fully_shard` (FSDP2), or a contiguous memory format."
            )
        lies = flat._shard_param_infos[i]
        start, count = (lies.offset_in_shard, lies.numel_in_shard) if lies.in_shard else (0, 0)
        trained = flat.requires_grad if flat._params is None else flat._params[i].requires_grad
        piece = Piece(shard[start : start + count], requires_grad=trained)
        first = lies.intra_param_start_idx or 0
        piece.positions = torch.arange(first, first + count)
        piece.whole_shape, piece.flat = flat._shapes[i], shards
        piece.offset, piece.held_at = offsets[i], start
        pieces[part, name] = piece
    for name, part, _, first_name, first_part, _ in flat._shared_param_infos:
        pieces[part, name] = pieces[first_part, first_name]
    return pieces

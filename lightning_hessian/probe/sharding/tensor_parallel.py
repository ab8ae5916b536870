"""Modules under tensor parallelism: plain modules in shards, for the time of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_hessian.isolation.held import entries_kept, without_hooks
from lightning_hessian.probe.parameters import local
from lightning_hessian.probe.sharding.bundles import FlatShards, Piece
from lightning_hessian.probe.sharding.kinds import is_distributed_tensor, is_fully_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@contextmanager
def without_tensor_parallelism(module: nn.Module) -> Iterator[None]:
    """Open a block, on all ranks, in which a module under tensor parallelism computes as on one.

    The hooks that turn inputs and outputs into distributed tensors rest. Parameters in shards stay
    as they are, and of all others each rank holds a `Piece`: so `ShardedObjective` gathers every
    parameter where it is used, and the ranks share out the batches instead of the layers. Modules
    without tensor parallelism, or with ``fully_shard`` too, pass through untouched.
    """
    mesh = _mesh_of(module)
    if mesh is None:
        yield
        return
    parts = list(module.modules())
    kept = entries_kept([part._parameters for part in parts])
    with without_hooks(parts, _is_of_tensors), kept:
        pieces: dict[nn.Parameter, Piece] = {}
        for part in parts:
            for name, parameter in part._parameters.items():
                if parameter is None or _is_in_shards(parameter):
                    continue
                if parameter not in pieces:
                    pieces[parameter] = _piece(part, parameter, mesh)
                part._parameters[name] = pieces[parameter]
        yield


def _mesh_of(module: nn.Module) -> DeviceMesh | None:
    """Return the mesh of a module's parameters, where it is a line for tensor parallelism alone.

    What lies in another way is left as it is, to be refused.
    """
    if any(is_fully_sharded(part) for part in module.modules()):
        return None
    if any(isinstance(parameter, Piece) for parameter in module.parameters()):
        return None  # it stands in such a block already
    distributed = [part for part in module.parameters() if is_distributed_tensor(part)]
    meshes = {part.device_mesh for part in distributed}
    alone = all(len(p.placements) == 1 and not p.placements[0].is_partial() for p in distributed)
    return meshes.pop() if alone and len(meshes) == 1 else None


def _is_in_shards(parameter: Tensor) -> bool:
    """Return whether a parameter is distributed along one of its dimensions."""
    return is_distributed_tensor(parameter) and parameter.placements[0].is_shard()


def _piece(part: nn.Module, parameter: nn.Parameter, mesh: DeviceMesh) -> Piece:
    """Return this rank's share of a parameter that every rank holds."""
    whole = local(parameter.detach()).reshape(-1)
    width = -(-len(whole) // mesh.size())
    start = min(mesh.get_local_rank() * width, len(whole))
    held = whole[start : start + width]
    piece = Piece(held, requires_grad=parameter.requires_grad)
    piece.whole_shape, piece.flat = parameter.shape, FlatShards(part, mesh, width)
    piece.positions = torch.arange(start, start + len(held))
    piece.offset = piece.held_at = 0
    return piece


def _is_of_tensors(hook: Any) -> bool:
    """Return whether a hook is one of tensor parallelism's own."""
    function = getattr(hook, "func", hook)
    return getattr(function, "__module__", "").startswith("torch.distributed.tensor")

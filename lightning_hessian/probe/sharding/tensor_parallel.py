"""Modules under tensor parallelism: plain modules in shards, for the time of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_hessian.probe.parameters import local
from lightning_hessian.probe.sharding.bundles import FlatShards, Piece
from lightning_hessian.probe.sharding.kinds import is_distributed_tensor, is_fully_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def untied_from_tensors(module: nn.Module) -> Iterator[None]:
    """Open a block in which a module under tensor parallelism computes as on one device.

    The hooks that turn inputs and outputs into distributed tensors rest. Parameters in shards stay
    as they are, and of all others each rank holds a `Piece`: so `ShardedObjective` gathers every
    parameter where it is used, and the ranks share out the batches instead of the layers. Modules
    without tensor parallelism, or with ``fully_shard`` too, pass through untouched.

    Args:
        module: The root: all ranks enter the block together.
    """
    mesh = _mesh_of(module)
    if mesh is None:
        yield
        return
    saved = [(part, dict(part._parameters)) for part in module.modules()]
    hooks = [(vars(part)[kind], dict(vars(part)[kind])) for part, _ in saved for kind in _HOOKS]
    try:
        for registry, before in hooks:
            for key in [key for key, hook in before.items() if _is_of_tensors(hook)]:
                del registry[key]
        pieces: dict[nn.Parameter, Piece] = {}
        for part, parameters in saved:
            for name, parameter in parameters.items():
                if parameter is None or _is_in_shards(parameter):
                    continue
                if parameter not in pieces:
                    pieces[parameter] = _piece(part, parameter, mesh)
                part._parameters[name] = pieces[parameter]
        yield
    finally:
        for part, parameters in saved:
            part._parameters.clear()
            part._parameters.update(parameters)
        for registry, before in hooks:
            registry.clear()
            registry.update(before)


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
    """Whether a parameter is distributed along one of its dimensions."""
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
    """Whether a hook is one of tensor parallelism's own."""
    function = getattr(hook, "func", hook)
    return getattr(function, "__module__", "").startswith("torch.distributed.tensor")

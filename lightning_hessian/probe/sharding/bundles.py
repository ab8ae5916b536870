"""Parameters in shards, by what one collective makes whole: one (FSDP2), or many (FSDP1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_hessian.probe.parameters import local
from lightning_hessian.probe.sharding.kinds import is_distributed_tensor, is_fully_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Place = tuple[nn.Module, str]
"""Where a parameter is registered: a module and an attribute of it."""


class Piece(nn.Parameter):
    """What this rank holds of a parameter that lies in a flat one with others: a vector [m].

    Attributes:
        whole_shape: The parameter's.
        positions: Which of its entries, row by row, are held: sorted, int64 [m].
        flat: The flat parameter.
        offset: Where the parameter begins in it.
        held_at: Where the piece begins in this rank's shard of it.
    """

    whole_shape: torch.Size
    positions: Tensor
    flat: FlatShards
    offset: int
    held_at: int


@dataclass(eq=False)
class FlatShards:
    """A flat parameter in equal shards, one a rank.

    Attributes:
        unit: The module in whose forward it is whole.
        mesh: The ranks.
        length: Of a shard, with what fills up the last one.
    """

    unit: nn.Module
    mesh: DeviceMesh
    length: int


@dataclass(eq=False)
class Bundle:
    """Parameters that one collective makes whole: here one, a distributed tensor (FSDP2).

    Attributes:
        unit: The module in whose forward they are whole.
        mesh: The ranks.
        members: What this rank holds of each.
        places: Where each is registered.
    """

    unit: nn.Module
    mesh: DeviceMesh
    members: list[Any] = field(default_factory=list)
    places: list[list[Place]] = field(default_factory=list)

    @property
    def numel(self) -> int:
        """How many numbers the whole takes."""
        return self.distributed(self.joined([local(member) for member in self.members])).numel()

    def place(self, tensors: Sequence[Tensor]) -> None:
        """Register a tensor for each member."""
        for tensor, places in zip(tensors, self.places, strict=True):
            for part, attribute in places:
                part._parameters[attribute] = tensor  # type: ignore[assignment]

    def joined(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return this rank's shard, from what it holds of each member."""
        return leaves[0]

    def distributed(self, shard: Tensor) -> DTensor:
        """Return the whole as the ranks hold it."""
        from torch.distributed.tensor import DTensor

        (member,) = self.members
        whole = {"shape": member.shape, "stride": member.stride()}
        return DTensor.from_local(shard, self.mesh, member.placements, run_check=False, **whole)

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Return the members, views of the whole."""
        return [whole]

    def outside(self, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return what stands in the members' places while they are not whole."""
        return [self.distributed(leaves[0])]


class FlatBundle(Bundle):
    """The parameters that lie in a flat one (FSDP1)."""

    def joined(self, leaves: Sequence[Tensor]) -> Tensor:
        """Return the shard of the flat parameter, with zeros where no parameter lies."""
        filled, parts = 0, []
        for member, leaf in sorted(
            zip(self.members, leaves, strict=True), key=lambda pair: pair[0].held_at
        ):
            if len(leaf):
                parts += [leaf.new_zeros(member.held_at - filled), leaf]
                filled = member.held_at + len(leaf)
        rest = leaves[0].new_zeros(self.members[0].flat.length - filled)
        return torch.cat([*parts, rest])

    def distributed(self, shard: Tensor) -> DTensor:
        """Return the flat parameter."""
        from torch.distributed.tensor import DTensor, Shard

        whole = torch.Size([self.mesh.size() * len(shard)])
        return DTensor.from_local(
            shard, self.mesh, [Shard(0)], run_check=False, shape=whole, stride=(1,)
        )

    def parts(self, whole: Tensor) -> list[Tensor]:
        """Return the whole parameters."""
        return [
            whole.narrow(0, member.offset, member.whole_shape.numel()).view(member.whole_shape)
            for member in self.members
        ]

    def outside(self, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the pieces."""
        return leaves


def bundles_of(module: nn.Module) -> list[Bundle]:
    """Return the bundles of a module's parameters, in the order of its submodules.

    A parameter that is not in shards is in no bundle.
    """
    units = dict(_units_of(module))
    bundles: dict[object, Bundle] = {}
    numbers: dict[nn.Parameter, int] = {}
    for part in module.modules():
        for attribute, parameter in part._parameters.items():
            if isinstance(parameter, Piece):
                flat = parameter.flat
                bundle = bundles.setdefault(flat, FlatBundle(flat.unit, flat.mesh))
            elif is_distributed_tensor(parameter):
                unit = units.get(part, part)
                bundle = bundles.setdefault(parameter, Bundle(unit, parameter.device_mesh))
            else:
                continue
            if parameter not in numbers:
                numbers[parameter] = len(bundle.members)
                bundle.members.append(parameter)
                bundle.places.append([])
            bundle.places[numbers[parameter]].append((part, attribute))
    for bundle in bundles.values():
        users = {part for places in bundle.places for part, _ in places}
        if bundle.unit in users and len(users) > 1:  # tied, and each user a unit by itself
            bundle.unit = module
    return list(bundles.values())


def _units_of(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield every submodule with the innermost unit of ``fully_shard`` that it belongs to."""
    parts = dict(module.named_modules())
    units = {name: part for name, part in parts.items() if is_fully_sharded(part)}
    for name, part in parts.items():
        above = [u for u in units if u in ("", name) or name.startswith(f"{u}.")]
        if above:
            yield part, parts[max(above, key=len)]

"""Parameters in shards (FSDP2, FSDP1): the loss as a function of this rank's shards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_hessian.isolation.held import without_hooks
from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.probe.loss import LossFunction, checked_loss
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.parameters import ParameterSpace, local, upcast
from lightning_hessian.probe.sharding.bundles import Piece, bundles_of
from lightning_hessian.probe.sharding.kinds import is_distributed_tensor, is_fully_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def ranks_of(module: nn.Module, device: torch.device) -> Ranks | None:
    """Return the ranks that a module's parameters are sharded over; None where they are not.

    Raises:
        ValueError: Parameters are distributed in several ways, or over several meshes.
    """
    found = [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if is_distributed_tensor(parameter) or isinstance(parameter, Piece)
    ]
    if not found:
        return None
    units = [name for name, part in module.named_modules() if is_fully_sharded(part)]
    mesh = _mesh_of(found[0][1])
    for name, parameter in found:
        in_unit = any(name.startswith(f"{unit}." if unit else "") for unit in units)
        alike = in_unit or not units or isinstance(parameter, Piece)
        if not alike or _mesh_of(parameter) != mesh:
            raise ValueError(
                f"Parameter {name!r} is distributed over {_mesh_of(parameter)} and others in "
                "another way (tensor parallelism beside `fully_shard`, or several meshes). Such "
                "parameters cannot be measured; use one of both, or measure a checkpoint on one "
                "device."
            )
    return Ranks.of(mesh.get_group(), device)


def _mesh_of(parameter: DTensor | Piece) -> DeviceMesh:
    return parameter.flat.mesh if isinstance(parameter, Piece) else parameter.device_mesh


class ShardedObjective(Objective):
    """The mean loss over all probe samples, as a function of this rank's shards of the parameters.

    Every rank evaluates the same number of batches, and its losses carry their weights, so that
    the derivative by a shard is that of the mean: differentiating through the all-gather sums over
    ranks. The shards of one unit (what ``fully_shard`` or a wrapper of FSDP1 was put around) are
    gathered when its forward begins and let go when it ends. What autograd would save of them for
    the backward passes is gathered again when it is needed, so that no more than a unit is ever
    whole, and what belongs to the root module itself.

    The hooks of FSDP itself have no double backward; they rest while the loss is evaluated.

    Every collective, in forward and backward passes alike, is preceded by a flag: a rank that fails
    in between leaves (`Ranks.together`), and the others learn of it instead of waiting for it.

    Args:
        module: A module under ``fully_shard``, or one whose parameters are pieces (`fsdp1.whole`).
        loss_fn: As in `Objective`.
        batches: All batches, the same on every rank.
        space: The parameters to differentiate by.
        ranks: Those of the shards.
        **options: Further arguments of `Objective`.

    Raises:
        ValueError: As in `Objective`, or a selected parameter that is not sharded.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None,
        batches: Iterable[Any],
        space: ParameterSpace,
        *,
        ranks: Ranks,
        **options: Any,
    ) -> None:
        whole = list(batches)
        # A rank without a batch of its own goes along with one that does not count.
        rounds = ranks.share_of(len(whole))
        spare = whole[:1] * (rounds * ranks.world - len(whole))
        super().__init__(module, loss_fn, whole + spare, space, ranks=ranks, **options)
        counted = [i * ranks.world + ranks.rank < len(whole) for i in range(rounds)]
        weights = [w * self.num_samples * c for w, c in zip(self.weights, counted, strict=True)]
        self.num_samples = ranks.all_reduce_number(math.fsum(weights))
        self._shares = [weight / self.num_samples for weight in weights]
        self.weights = (1.0,) * rounds  # the losses carry their own
        self._whole: dict[int, tuple[StorageWeakRef, _View]] = {}
        self._kept: dict[int, int] | None = None
        self._plan()

    def _plan(self) -> None:
        """Note what is gathered in the forward of which unit."""
        self._bundles = bundles_of(self._module)
        self._units: dict[nn.Module, list[int]] = {}
        for i, bundle in enumerate(self._bundles):
            self._units.setdefault(bundle.unit, []).append(i)
        sharded = {member for bundle in self._bundles for member in bundle.members}
        named = dict(self._module.named_parameters(remove_duplicate=False))
        self._selected = [named[name] for name in self.space.names]
        for name, parameter in zip(self.space.names, self._selected, strict=True):
            if parameter not in sharded:
                raise ValueError(
                    f"Parameter {name!r} is not sharded while others are, so ranks do not agree "
                    "on its gradient. Shard the root module too, or leave it out (`parameters=`)."
                )

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Open the block in which all evaluations take place: FSDP's own hooks rest."""
        with ExitStack() as stack:
            stack.enter_context(super().isolated())
            units = filter(is_fully_sharded, self._module.modules())
            stack.enter_context(without_hooks(units, _is_of_fsdp))
            # Around backward passes too: what they save for the second one is of the same kind.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            yield

    @contextmanager
    def counting(self) -> Iterator[dict[int, int]]:
        """Open a block that counts what autograd keeps: bytes by the address of the memory."""
        self._kept = {}
        try:
            yield self._kept
        finally:
            self._kept = None

    def norm(self, parts: Sequence[Tensor]) -> float:
        """Return the norm of all shards of all ranks together."""
        self.ranks.stay_together()
        return math.sqrt(self.ranks.all_reduce_number(super().norm(parts) ** 2))

    def length(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the same as a scalar on the device; ranks wait for one another to find it."""
        return super().length(parts).fill_(self.norm(parts))

    def anywhere(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank."""
        self.ranks.stay_together()
        return self.ranks.any(flag)

    def loss(self, parameters: Sequence[Tensor], batch: Any, index: int) -> Tensor:
        """Return the weighted loss of this rank's batch at the given shards."""
        buffers = {name: upcast(buffer) for name, buffer in self._buffers().items()}
        call = self._prepared(batch, index)
        with self._whole_units(parameters):
            loss = self._called(buffers, parameters, call)
            return checked_loss(loss, index) * self._shares[index // self.ranks.world]

    @contextmanager
    def _whole_units(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Open a block in which the forward of a unit gathers its parameters, and lets them go."""
        given = dict(zip(self._selected, parameters, strict=True))

        def leaf(member: nn.Parameter) -> Tensor:
            return given[member] if member in given else upcast(local(member.detach()))

        leaves = [[leaf(member) for member in bundle.members] for bundle in self._bundles]
        with ExitStack() as stack:
            for unit, bundles in self._units.items():
                stack.enter_context(self._gathering(unit, bundles, leaves))
            yield

    @contextmanager
    def _gathering(
        self, unit: nn.Module, numbers: Sequence[int], leaves: Sequence[Sequence[Tensor]]
    ) -> Iterator[None]:
        """Open a block in which a unit's forward finds whole parameters, and others find shards."""
        bundles = {i: self._bundles[i] for i in numbers}
        outside = {i: bundle.outside(leaves[i]) for i, bundle in bundles.items()}

        def gather(*_: Any) -> None:
            for i, bundle in bundles.items():
                shard = bundle.joined(leaves[i])
                whole = self._all_gather(shard, i)
                self._note(whole, shard.detach(), i)
                bundle.place(bundle.parts(whole))

        def let_go(*_: Any) -> None:
            for i, bundle in bundles.items():
                bundle.place(outside[i])

        # The loss need not call the module itself: a `training_step` does not.
        hooked = self._call if unit is self._module else unit
        before = hooked.register_forward_pre_hook(gather, prepend=True)
        after = hooked.register_forward_hook(let_go, always_call=True)
        let_go()
        try:
            yield
        finally:
            before.remove()
            after.remove()
            for bundle in bundles.values():
                bundle.place(bundle.members)

    def _all_gather(self, shard: Tensor, i: int) -> Tensor:
        """Return a whole bundle; its derivative is summed over ranks and scattered."""
        from torch.distributed.tensor import Partial, Replicate

        distributed = self._bundles[i].distributed(_Asking.apply(shard, self.ranks))  # type: ignore[no-untyped-call]
        whole = distributed.redistribute(placements=[Replicate()])
        found: Tensor = _Passing.apply(whole.to_local(grad_placements=[Partial()]), self.ranks)  # type: ignore[no-untyped-call]
        return found

    def _note(self, tensor: Tensor, shard: Tensor, i: int) -> None:
        """Remember that the memory of a tensor holds a whole bundle, while it lives."""
        for address in [a for a, (alive, _) in self._whole.items() if alive.expired()]:
            del self._whole[address]
        storage = StorageWeakRef(tensor.untyped_storage())
        self._whole[storage.cdata] = (storage, _View(i, shard))

    def _pack(self, tensor: Tensor) -> Any:
        """Return what autograd keeps of a tensor: of a whole parameter, only which view it is."""
        if type(tensor) is not Tensor and not isinstance(tensor, nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        noted = self._whole.get(storage._cdata)
        if noted is None:
            if self._kept is not None:
                self._kept[storage.data_ptr()] = storage.nbytes()
            return tensor
        view = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return dataclasses.replace(noted[1], view=view)

    def _unpack(self, kept: Tensor | _View) -> Tensor:
        """Return what was kept; gather the parameter again where only the view was."""
        if not isinstance(kept, _View):
            return kept
        with torch.no_grad():
            whole = self._all_gather(kept.shard, kept.bundle)
        self._note(whole, kept.shard, kept.bundle)
        return whole.as_strided(*kept.view)


class _Asking(torch.autograd.Function):
    """Stands before a collective: asks whether all ranks are still there."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        """Return the tensor."""
        ctx.ranks = ranks
        ranks.stay_together()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Comes after the collective of a backward pass, and so before that of the next."""
        return _Passing.apply(gradient, ctx.ranks), None  # type: ignore[no-untyped-call]


class _Passing(torch.autograd.Function):
    """Stands behind a collective: asks in the backward pass, where the order is reversed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        """Return the tensor."""
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Comes before the collective of a backward pass."""
        return _Asking.apply(gradient, ctx.ranks), None  # type: ignore[no-untyped-call]


@dataclass(frozen=True, eq=False)
class _View:
    """A view (shape, stride, offset) of a whole bundle that is not at hand, by its shard."""

    bundle: int
    shard: Tensor
    view: tuple[tuple[int, ...], tuple[int, ...], int] = ((), (), 0)


def _is_of_fsdp(hook: Any) -> bool:
    """Return whether a hook is a method of FSDP's state of a module, perhaps wrapped."""
    while hook is not None:
        owner = getattr(hook, "__self__", None)
        if any(kind.__name__ == "FSDPState" for kind in type(owner).__mro__):
            return True
        hook = getattr(hook, "__wrapped__", None)
    return False


def objective_over(
    group: ProcessGroup | None,
    module: nn.Module,
    loss_fn: LossFunction | None,
    batches: Iterable[Any],
    space: ParameterSpace,
    **options: Any,
) -> Objective:
    """Return the objective that fits how the module lies: whole or in shards, on how many ranks.

    Args:
        group: Processes that evaluate together. Where parameters are sharded, theirs.
        module: As in `Objective`, like all that follows.
        loss_fn: ``loss_fn(module, batch) -> mean loss``.
        batches: All batches, the same on every rank.
        space: The parameters to differentiate by.
        **options: Further arguments of `Objective`.

    Raises:
        ValueError: As in `Objective` and `ranks_of`.
    """
    ranks = ranks_of(module, space.device)
    if ranks is not None:
        return ShardedObjective(module, loss_fn, batches, space, ranks=ranks, **options)
    ranks = Ranks.of(group, space.device)
    return Objective(module, loss_fn, batches, space, ranks=ranks, **options)

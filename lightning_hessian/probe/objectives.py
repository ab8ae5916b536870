"""The objective that fits how a module lies: whole or in shards, on how many ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.probe.objective import LossFunction, Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.probe.sharding.objective import ShardedObjective, ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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

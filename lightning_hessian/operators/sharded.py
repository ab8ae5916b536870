"""The Hessian over parameters that are sharded over ranks, and the one that fits an objective."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hessian.linear.memory import free_bytes
from lightning_hessian.linear.operator import RestrictedOperator
from lightning_hessian.linear.ranks import RankError
from lightning_hessian.operators.data_parallel import DataParallelHessian
from lightning_hessian.operators.engines import autograd
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.sharding.objective import ShardedObjective
from lightning_hessian.results import NoSecondDerivativeError

ENGINES = ("autograd", "recompute", "finite_difference")
"""Those that need no tracing: collectives stand in the middle of the derivative."""


class OverShards:
    """What makes an operator one over a `ShardedObjective`: all ranks make each product together.

    A mixin; the operator stands behind it.
    """

    objective: ShardedObjective

    def matvec(self, vector: Tensor) -> Tensor:
        """Return H v for this rank's part of a vector [n_local], a new tensor [n_local].

        Raises:
            RankError: The product failed on some rank; names it.
        """
        with self.objective.ranks.together():
            found: Tensor = super().matvec(vector)  # type: ignore[misc]
        return found

    def restricted(self, names: Sequence[str]) -> RestrictedOperator:
        """Return the diagonal block of some parameter tensors; a product costs one of the whole.

        Collectives stand in the middle of the derivative, unit by unit, so that no part of it can
        be left out on one rank alone.
        """
        space = self.objective.space
        ends = list(itertools.accumulate(space.sizes, initial=0))
        parts = [torch.arange(ends[i], ends[i + 1]) for i in space.places(names)]
        return RestrictedOperator(self, torch.cat(parts))  # type: ignore[arg-type]

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return H v for each row v of [b, n_local], one after the other: collectives in order."""
        return torch.stack([self.matvec(vector) for vector in vectors])


class ShardedHessian(OverShards, HessianOperator):
    """The Hessian of a `ShardedObjective`, on vectors that are sharded as the parameters are.

    Exact: differentiating twice through the all-gather of each unit's shards. All ranks make the
    same engine. ``"auto"`` keeps the graphs of as many batches as fit on the rank with the least
    memory, and recomputes the others.

    Args:
        objective: The loss.
        engine: ``"auto"`` or one of `ENGINES`.
        expected_products: Not used; a linearisation is never tried.

    Raises:
        ValueError: An engine that is not for sharded parameters.
        MeasurementError: The loss cannot be differentiated twice by this engine; says why.
    """

    objective: ShardedObjective

    def __init__(
        self, objective: ShardedObjective, engine: str = "auto", *, expected_products: int = 200
    ) -> None:
        if engine not in ("auto", *ENGINES):
            raise ValueError(
                f"hvp={engine!r} does not work on sharded parameters; choose from "
                f"{['auto', *ENGINES]}."
            )
        budget = free_bytes(objective.space.device) / 2 / objective.ranks.neighbours
        with objective.ranks.together():
            super().__init__(
                objective, engine, memory_budget=budget, expected_products=expected_products
            )

    def _build_within(self, budget: float, expected_products: int) -> None:
        """Keep as many graphs as fit on every rank."""
        try:
            with self.objective.ranks.together():
                self._keep_graphs(budget)
        except RankError as error:
            if error.everywhere and isinstance(error.__cause__, NoSecondDerivativeError):
                raise error.__cause__ from error.__cause__.__cause__
            raise error from None

    def _keep_graphs(self, budget: float) -> None:
        num_batches = len(self.objective.batches)
        with self._explained("autograd"), self.objective.counting() as kept:
            autograd(self.objective, 0)
        self.objective.ranks.stay_together()
        fitting = int(self.objective.ranks.all_reduce_min(budget // max(1, sum(kept.values()))))
        fitting = min(num_batches, fitting)
        self._build(["autograd"] * fitting + ["recompute"] * (num_batches - fitting))


def hessian_operator(
    objective: Objective,
    engine: str = "auto",
    *,
    expected_products: int = 200,
    untraceable: set[str] | None = None,
) -> HessianOperator | DataParallelHessian:
    """Return the Hessian of an objective, for however many ranks evaluate or hold it."""
    if isinstance(objective, ShardedObjective):
        return ShardedHessian(objective, engine, expected_products=expected_products)
    kind = HessianOperator if objective.ranks.world == 1 else DataParallelHessian
    return kind(objective, engine, expected_products=expected_products, untraceable=untraceable)

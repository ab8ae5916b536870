"""The Hessian operator that fits an objective, for however many ranks evaluate or hold it."""

from __future__ import annotations

from lightning_hessian.operators.data_parallel import DataParallelHessian
from lightning_hessian.operators.hessian import HessianOperator
from lightning_hessian.operators.sharded import ShardedHessian
from lightning_hessian.probe.objective import Objective
from lightning_hessian.probe.sharding.objective import ShardedObjective


def hessian_operator(
    objective: Objective, engine: str = "auto", *, expected_products: int = 200
) -> HessianOperator | DataParallelHessian:
    """Return the Hessian of an objective, for however many ranks evaluate or hold it."""
    if isinstance(objective, ShardedObjective):
        return ShardedHessian(objective, engine, expected_products=expected_products)
    kind = HessianOperator if objective.ranks.world == 1 else DataParallelHessian
    return kind(objective, engine, expected_products=expected_products)

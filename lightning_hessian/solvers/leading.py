"""The leading eigenpair alone, from a vector that is close to it: a few products."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.solvers.krylov import Pending, RitzPairs
from lightning_hessian.solvers.storage import ANYWHERE, placed
from lightning_hessian.solvers.thick_restart import ThickRestart

LEAST_PRODUCTS = 3
"""Before a pair is believed: a start vector near another eigenvector converges at once, to that."""

_LEAST_ROWS = 4  # of a basis that restarts


class _Eager(ThickRestart):
    """A run that looks at its result after every product: each costs more than a look."""

    def _steps_to_check(self, ritz: object) -> int:
        return 1


def leading_pair(
    operator: SymmetricOperator,
    start: Tensor,
    *,
    tol: float,
    max_products: int,
    noise: float = 0.0,
    least: int = LEAST_PRODUCTS,
    seed: int = 0,
    allowance: Allowance = UNBOUNDED,
) -> RitzPairs:
    """Return the largest (algebraic) eigenvalue of an operator, and its vector.

    The same iteration as `lanczos`, with the same residual bounds, but begun from a given vector
    instead of a random one, and ended as soon as the pair has converged, without a search for
    copies: that the value is the largest one is as sure as the vector is close.

    Args:
        operator: Symmetric operator of order n.
        start: A vector [n_local]; a zero one stands for a random one.
        tol: The pair has converged at residual <= tol * abs(Ritz value).
        max_products: Bound on products, at least 1; so many vectors are held.
        noise: Length of a random vector that is added to the start, beside which it has length 1:
            an eigenvector that the start is orthogonal to is found only so.
        least: Products before a pair is believed.
        seed: Of random vectors.
        allowance: Asked after every product whether the time is up.

    Example:
        >>> from lightning_hessian.linear.operator import MatrixOperator
        >>> matrix = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
        >>> near = torch.tensor([0.0, 0, 0, 0, 0, 0, 0.1, 1.0], dtype=torch.float64)
        >>> found = leading_pair(MatrixOperator(matrix), near, tol=1e-6, max_products=5)
        >>> found.values.round(6), found.num_products
        (array([8.]), 3)
    """
    shard = operator.shard
    wanted = min(max_products + 1, operator.size)
    storage, rows = placed(ANYWHERE, wanted, min(_LEAST_ROWS, wanted), operator)
    run = _Eager(operator, 1, tol, rows, seed, storage, rows)
    run.next_check = min(least, max_products, operator.size)
    vector = start.to(operator.device, operator.dtype, copy=True)
    length = float(shard.norm(vector))
    if length > 0:
        vector.div_(length)
        if noise > 0:
            vector.add_(run.random_vector().vector, alpha=noise)
            vector.div_(float(shard.norm(vector)))
        run.pending.append(Pending(vector, torch.zeros(0, dtype=torch.float64)))
    return run.run(max_products, 0, allowance, None, on_stop=lambda: None)

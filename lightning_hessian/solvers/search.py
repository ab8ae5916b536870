"""The search for missed copies goes on through restarts: what it keeps, and what it owes."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hessian.solvers.krylov import KrylovState, Pending


def make_room(run: KrylovState) -> None:
    """Make room for a search to go on in a full basis; what was found stays as it is.

    The first rows are the wanted vectors and the lowest; of the space that the search has
    built beside them, the best third is kept.
    """
    fixed, m = run.wanted + 1, run.count
    _, rotation = torch.linalg.eigh(run.projected.numbers[fixed:m, fixed:m], UPLO="U")
    rotation = run.shard.ranks.broadcast(rotation)
    kept = max(1, (m - fixed) // 3)
    whole = torch.zeros(m, fixed + kept, dtype=torch.float64)
    whole[range(fixed), range(fixed)] = 1
    whole[fixed:, fixed:] = rotation[:, -kept:].flip(1)
    given_up = _given_up(run, fixed, rotation[:, :-kept])
    run.basis.rotate(whole)
    run.projected.compress(whole)
    for pending in run.pending:
        pending.coupling = pending.coupling @ whole
        pending.is_fresh = False
    if given_up:
        leaning = [bool(p.coupling[:fixed].any()) for p in run.pending]
        older = [p for p, leans in zip(run.pending, leaning, strict=True) if leans]
        newer = [p for p, leans in zip(run.pending, leaning, strict=True) if not leans]
        run.pending = newer + _merged(run, older + given_up)


def _given_up(run: KrylovState, fixed: int, rotation: Tensor) -> list[Pending]:
    """Return the directions that a search gives up but products with found vectors lean on.

    A search takes in part of what the older pending vectors hold of the residuals. Given up
    without more ado, that part would be missing from the bounds, and from the run. ``rotation``
    [m - fixed, d] is what is given up, in terms of the vectors after the ``fixed`` ones.
    """
    m, kept = run.count, run.count - rotation.shape[1]
    leaning = run.projected.numbers[:fixed, fixed:m] @ rotation
    left, sizes, right = torch.linalg.svd(leaning, full_matrices=False)
    left, sizes, right = (run.shard.ranks.broadcast(part) for part in (left, sizes, right))
    found = []
    for size, along, weights in zip(sizes.tolist(), left.T, right, strict=True):
        coupling = torch.zeros(m, dtype=torch.float64)
        coupling[:fixed] = size * along
        if size > 10 * run.eps * run.scale:
            weights = torch.cat([torch.zeros(fixed, dtype=torch.float64), rotation @ weights])
            found.append(Pending(run.basis.combined(weights), coupling[:kept]))
        else:
            run.projected.lose(coupling)
    return found


def _merged(run: KrylovState, pending: list[Pending]) -> list[Pending]:
    """Return as few pending vectors as say the same of the products."""
    couplings = torch.stack([p.coupling for p in pending])
    left, sizes, right = torch.linalg.svd(couplings, full_matrices=False)
    left, sizes, right = (run.shard.ranks.broadcast(part) for part in (left, sizes, right))
    merged = []
    for weights, size, coupling in zip(left.T, sizes.tolist(), right, strict=True):
        if size <= 10 * run.eps * run.scale:
            run.projected.lose(size * coupling)
            continue
        vector = torch.zeros_like(pending[0].vector)
        for weight, old in zip(weights.tolist(), pending, strict=True):
            vector.add_(old.vector, alpha=weight)
        length = float(run.shard.norm(vector))
        merged.append(Pending(vector.div_(length), length * size * coupling))
    return merged

"""The span of the leading eigenvectors: what lies in it, and how far it turns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.linear.operator import SymmetricOperator
from lightning_hessian.linear.preconditioned import PreconditionedOperator
from lightning_hessian.linear.shards import Shard

NUM_LEADING = 10
"""So many leading eigenvectors of a whole spectrum are kept for the next measurements."""

MOST_BYTES = 2**30
"""Of the vectors that are kept between measurements, on each rank; one is kept in any case."""


@dataclass(frozen=True, eq=False)
class Leading:
    """The leading eigenpairs of a Hessian as they were found, kept on the CPU.

    Attributes:
        names: The parameters that it is over.
        values: Eigenvalues [k], descending.
        residuals: Their residual bounds [k].
        vectors: Orthonormal eigenvectors, this rank's part [k, n_local].
        beyond: No eigenvalue but these is larger; None where that is not known.
    """

    names: tuple[str, ...]
    values: tuple[float, ...]
    residuals: tuple[float, ...]
    vectors: Tensor
    beyond: float | None = None

    def share_of(self, vector: Tensor, shard: Shard) -> float | None:
        """Return which share of the squared length of a vector [n_local] lies in the span.

        None stands for a vector of length 0.
        """
        vector = vector.to(self.vectors.device, self.vectors.dtype)
        within = _summed(self.vectors @ vector, shard)
        whole = float(shard.norm(vector.to(shard.ranks.device))) ** 2
        return min(1.0, float(within.square().sum()) / whole) if whole > 0 else None

    def under(self, operator: PreconditionedOperator) -> Tensor:
        """Return about where the leading eigenvector of R A R is, A the operator of these pairs.

        It is that of R V^T diag(values) V R, with the eigenvectors V that are known in the place of
        all. With B = R V^T it is B D e, D the roots of the values and e the leading eigenvector of
        D B^T B D, of order k. So it takes no product with A. All ranks call it together.

        Args:
            operator: R A R, for a positive sign.

        Returns:
            A vector [n_local] of any length, zero where R or all values are.
        """
        shard = operator.shard
        vectors = self.vectors.to(operator.device, operator.dtype)
        rows = torch.stack([operator.through(vector) for vector in vectors])
        roots = torch.tensor(self.values, dtype=torch.float64).clamp(min=0).sqrt()
        gram = roots[:, None] * _summed(rows @ rows.T, shard) * roots
        weights = shard.ranks.broadcast(roots * torch.linalg.eigh(gram)[1][:, -1])
        return weights.to(rows) @ rows

    def angle_to(self, other: Leading, shard: Shard) -> float:
        """Return the largest principal angle between two spans, in degrees.

        Where one of them has more vectors than the other, its first ones count.
        """
        count = min(len(self.vectors), len(other.vectors))
        first, second = self.vectors[:count], other.vectors[:count].to(self.vectors.dtype)
        common = _summed(first @ second.T, shard)
        outside = first - common.to(first.dtype) @ second
        gram = _summed(outside @ outside.T, shard)
        sine = math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1])))
        cosine = float(torch.linalg.svdvals(common)[-1])
        return math.degrees(math.atan2(sine, cosine))


def turn_bound(before: Leading, now: Leading, operator: SymmetricOperator) -> float | None:
    """Return the most that a span of leading eigenvectors can have turned, in degrees.

    By the theorem of Davis and Kahan (1970) in its residual form: with U the vectors before, H the
    operator now, M = U^T H U and R = H U - U M, the sine of the largest angle between U and the k
    leading eigenvectors of H is at most norm(R) / (smallest eigenvalue of M - lambda_{k+1}), the
    latter of H. HPL eq. 7 says the same of one eigenvector and a change E of H, with 2 norm(E)
    and the gaps beside it; R is what of E the span feels, so that E itself need not be known.

    It takes at most k products, begun with the last vector, which turns most. The gap only falls
    and norm(R) only grows as vectors join, so that a closed gap ends it: often after one product.
    All ranks call it together.

    Returns:
        Degrees; 90, which says nothing, where the gap is closed; None where lambda_{k+1} is not
        known, or the spans are of unlike dimensions.

    Source: G. W. Stewart and J. Sun, "Matrix perturbation theory" (1990), theorem V.3.6.
    """
    if now.beyond is None or len(before.vectors) != len(now.vectors):
        return None
    shard = operator.shard
    vectors = before.vectors.to(operator.device, operator.dtype).flip(0)
    middle = torch.zeros(len(vectors), 0, dtype=torch.float64)
    rest = vectors[:0]
    gap, residual = math.inf, 0.0
    for row, vector in enumerate(vectors):
        product = operator.matvec(vector)
        column = _summed(vectors @ product, shard)
        rest = torch.cat([rest, (product - column.to(product) @ vectors)[None]])
        middle = torch.cat([middle, column[:, None]], dim=1)
        inner = middle[: row + 1]  # the part of M on the vectors so far
        least = torch.linalg.eigvalsh((inner + inner.T) / 2)[0]
        square = torch.linalg.eigvalsh(_summed(rest @ rest.T, shard))[-1].clamp(min=0)
        found = shard.ranks.broadcast(torch.stack([least - now.beyond, square.sqrt()]))
        gap, residual = found.tolist()
        if gap <= residual:
            return 90.0
    return math.degrees(math.asin(residual / gap))


def kept(vectors: Tensor, most: int, operator: SymmetricOperator) -> Tensor:
    """Return a copy on the CPU of as many rows [k, n_local] as may be kept, ``most`` or fewer.

    All ranks keep as many, in the precision of the operator.
    """
    shard = operator.shard
    row_bytes = shard.ranks.share_of(shard.size) * operator.dtype.itemsize
    count = max(1, min(most, MOST_BYTES // row_bytes))
    return vectors[:count].to("cpu", operator.dtype, copy=True)


def _summed(part: Tensor, shard: Shard) -> Tensor:
    """Return the sum of the ranks' small matrices, in float64 on the CPU."""
    return shard.ranks.all_reduce(part.cpu().double().to(shard.ranks.device)).cpu()

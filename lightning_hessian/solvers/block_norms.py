"""Frobenius norms of all blocks of an operator, from probes that live on one block each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.operator import SymmetricOperator, check_finite
from lightning_hessian.results import FloatArray, MeasurementError
from lightning_hessian.solvers.jackknife import BlockEstimate

DENSE_ORDER = 256
"""Up to so many coordinates, all columns are computed rather than probed."""

_KEPT_ORDER = 2048
"""Up to this order the matrix is kept where all its columns are there."""

_LEAST_DEGREES = 24
"""Degrees of freedom of the first standard error of the ratio, if all blocks weigh alike."""

_CHUNK_BYTES = 256 * 2**20
_MOST_IN_CHUNK = 32


@dataclass(frozen=True, eq=False)
class BlockNorms:
    """Frobenius norms of the B x B blocks of a symmetric operator.

    Attributes:
        frobenius: norm_F(H_ij), float64 [B, B], symmetric.
        std_error: Their standard errors [B, B]; 0 where exact.
        ratio: Mean norm off the diagonal over mean norm on it; None for one block, or where the
            diagonal is zero.
        ratio_std_error: Its standard error.
        share: Share of the squared norm that lies off the diagonal; None where H is zero.
        share_std_error: Its standard error.
        num_probes: Products spent on each block column [B].
        exact: Whether a column was computed rather than probed, bool [B].
        num_products: Products with the operator.
        stopped: Why there are no more probes: ``"exact"``, ``"converged"``, ``"bound"`` or
            ``"interrupted"``.
        matrix: The operator on the coordinates of all blocks, block after block, [n, n] on the
            CPU; where it was asked for, or all columns were computed and n is at most 2048.
    """

    frobenius: FloatArray
    std_error: FloatArray
    ratio: float | None
    ratio_std_error: float | None
    share: float | None
    share_std_error: float | None
    num_probes: NDArray[np.int64]
    exact: NDArray[np.bool_]
    num_products: int
    stopped: str
    matrix: Tensor | None = None


def block_norms(
    operator: SymmetricOperator,
    labels: Tensor,
    *,
    rel_error: float = 0.1,
    max_probes: int = 64,
    max_products: int | None = None,
    exact: bool | None = None,
    return_matrix: bool = False,
    seed: int = 0,
    allowance: Allowance = UNBOUNDED,
) -> BlockNorms:
    """Return the Frobenius norms of the blocks that ``labels`` cut a symmetric operator into.

    A probe z_j of random signs on block j and zeros elsewhere gives the whole block column at
    once: E norm(H_ij z_j)^2 = norm_F(H_ij)^2, Hutchinson's estimate of the trace of
    H_ij^T H_ij. The estimates of (i, j) and (j, i) are averaged. The root of an unbiased estimate
    is biased low: the jackknife over probes corrects this to second order, and gives the standard
    errors. Those of ratio and share take into account that a probe enters its whole column.

    Every block gets `least_probes` of them. Until the standard error of the ratio is
    ``rel_error`` of it, and rests on 12 degrees of freedom, those blocks get one more whose
    columns weigh most in the ratio for the probes they have had. A block of no more coordinates
    than the least probes has its columns computed instead, which is exact. So have all blocks
    where that takes no more products, or where there are at most 256 coordinates.

    Memory: up to 32 vectors of length n, in 256 MB if n allows; k B^2 numbers for k probes.

    Args:
        operator: Symmetric operator of order n.
        labels: int64 [n], the block 0..B-1 of each coordinate, or -1 for none.
        rel_error: Wanted standard error of the ratio, relative to it.
        max_probes: Bound on probes for each block, at least 2.
        max_products: Bound on products.
        exact: Compute all columns (True), none that can be probed (False), or choose (None).
        return_matrix: Whether to return the matrix too; all columns are computed.
        seed: Of the probes.
        allowance: Asked after every chunk of products; True ends with the probes made.

    Raises:
        ValueError: Labels that do not fit the operator, or a bound too small for the least probes.
        MeasurementError: A product is NaN or infinite, or time was up before two probes on each.

    Source: HBS, cases 2 to 4, for the ratios.

    Example:
        >>> from lightning_hessian.linear.operator import MatrixOperator
        >>> matrix = torch.tensor([[3.0, 4.0, 1.0], [4.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
        >>> block_norms(MatrixOperator(matrix), torch.tensor([0, 0, 1])).frobenius.round(3)
        array([[6.403, 1.   ],
               [1.   , 2.   ]])
    """
    columns = _Columns(operator, _members(labels, operator.size), seed, allowance)
    sizes = columns.sizes
    dense = _dense_columns(sizes, max_products, True if return_matrix else exact)
    small = bool(dense.all()) and sum(sizes) <= _KEPT_ORDER
    matrix = columns.compute(dense, keep=return_matrix or small)
    probed = [int(j) for j in np.flatnonzero(~dense)]
    on_time = True
    for _ in range(least_probes(len(sizes))):
        on_time = on_time and columns.probe(probed)
    if min((len(columns.samples[j]) for j in probed), default=2) < 2:
        raise MeasurementError(
            f"The time was up after {columns.num_products} products; norms of {len(sizes)} blocks "
            f"take at least {least_products(sizes)}. Allow more time, or cut fewer blocks."
        )
    estimate = BlockEstimate(columns.exact_squares, columns.samples, dense)
    while not estimate.is_known_to(rel_error):
        left = len(sizes) if max_products is None else max_products - columns.num_products
        chosen = estimate.worth_more(max_probes)[:left]
        if not on_time or not chosen:
            break
        on_time = columns.probe(chosen)
        estimate = BlockEstimate(columns.exact_squares, columns.samples, dense)
    if not probed:
        stopped = "exact"
    elif estimate.is_known_to(rel_error):
        stopped = "converged"
    else:
        stopped = "bound" if on_time else "interrupted"
    ratio, ratio_std_error = estimate.ratio()
    share, share_std_error = estimate.share()
    return BlockNorms(
        frobenius=estimate.frobenius,
        std_error=estimate.std_error,
        ratio=ratio,
        ratio_std_error=ratio_std_error,
        share=share,
        share_std_error=share_std_error,
        num_probes=np.where(dense, sizes, estimate.counts),
        exact=dense,
        num_products=columns.num_products,
        stopped=stopped,
        matrix=matrix,
    )


def least_probes(num_blocks: int) -> int:
    """Return how many probes every block gets at least."""
    return max(2, 1 + -(-_LEAST_DEGREES // num_blocks))


def least_products(sizes: Sequence[int]) -> int:
    """Return how many products the norms take at least, for blocks of the given sizes."""
    return sum(min(size, least_probes(len(sizes))) for size in sizes)


def _members(labels: Tensor, size: int) -> list[Tensor]:
    """Return the coordinates of each block."""
    if labels.shape != (size,):
        raise ValueError(f"The labels have shape {tuple(labels.shape)}; the order is {size}.")
    count = int(labels.max()) + 1 if size else 0
    if bool((labels.diff() >= 0).all()):  # as layers are
        order = torch.arange(size)
    else:
        order = torch.argsort(labels, stable=True)
    order = order[int((labels < 0).sum()) :]
    sizes = torch.bincount(labels[labels >= 0], minlength=count).tolist()
    if not sizes or min(sizes) == 0:
        raise ValueError("The labels must take every value from 0 to B - 1, and B be at least 1.")
    return list(torch.split(order, sizes))


def _dense_columns(
    sizes: Sequence[int], max_products: int | None, exact: bool | None
) -> NDArray[np.bool_]:
    """Return which block columns to compute rather than to probe."""
    bound = max_products if max_products is not None else float("inf")
    least = least_products(sizes)
    order = sum(sizes)
    if exact is None:
        exact = order <= max(DENSE_ORDER, least) and order <= bound
    needed = order if exact else least
    if needed > bound:
        raise ValueError(
            f"{needed} products are the least for {len(sizes)} blocks of {order} parameters; the "
            f"bound is {max_products}. Raise it (`budget`), or cut fewer blocks (`blocks`)."
        )
    return np.array(sizes) <= (order if exact else least_probes(len(sizes)))


class _Columns:
    """Makes products with vectors on one block, and keeps their squared norms by block."""

    def __init__(
        self,
        operator: SymmetricOperator,
        members: list[Tensor],
        seed: int,
        allowance: Allowance,
    ) -> None:
        self.operator = operator
        self.sizes = [len(part) for part in members]
        self.generator = torch.Generator().manual_seed(seed)
        self.allowance = allowance
        self.num_products = 0
        self.exact_squares = np.zeros((len(members), len(members)))  # row i, column j
        self.samples: list[list[FloatArray]] = [[] for _ in members]  # of column j, [B] each
        order = torch.cat(members)
        self.held, local = operator.shard.restricted(order)  # of what lies block after block
        in_order = len(local) == operator.shard.length and bool((local.diff() == 1).all())
        self.order = None if in_order else local.to(operator.device)
        self.parts = [operator.shard.restricted(part) for part in members]
        # Alike on all ranks, whose parts may differ by an entry.
        share = operator.shard.ranks.share_of(operator.size)
        vector_bytes = share * operator.dtype.itemsize
        self.chunk = max(1, min(_MOST_IN_CHUNK, _CHUNK_BYTES // (2 * vector_bytes)))

    def compute(self, dense: NDArray[np.bool_], *, keep: bool) -> Tensor | None:
        """Take the products with all unit vectors of the dense columns."""
        jobs = [(j, i) for j in np.flatnonzero(dense) for i in range(self.sizes[j])]
        rows = []
        for start in range(0, len(jobs), self.chunk):
            chunk = jobs[start : start + self.chunk]
            vectors = self._zeros(len(chunk))
            for row, (j, i) in enumerate(chunk):
                held, local = self.parts[j]
                vectors[row, local[held.take(torch.arange(self.sizes[j])) == i]] = 1
            products = self._products(vectors)
            for (j, _), squares in zip(chunk, self._squares(products), strict=True):
                self.exact_squares[:, j] += squares
            if keep:
                rows.append(self.held.gather(products).cpu())
            if start + self.chunk < len(jobs) and self.allowance.is_over():
                raise MeasurementError(
                    f"The time was up after {self.num_products} of {len(jobs)} columns. Allow more "
                    "time, or let probes do it (exact=False)."
                )
        return torch.cat(rows) if keep else None

    def probe(self, probed: Sequence[int]) -> bool:
        """Add a sample for each of the given columns; return whether there is time for more."""
        for start in range(0, len(probed), self.chunk):
            chunk = list(probed[start : start + self.chunk])
            vectors = self._zeros(len(chunk))
            for row, j in enumerate(chunk):
                bits = torch.randint(0, 2, (self.sizes[j],), generator=self.generator)
                held, local = self.parts[j]
                vectors[row, local.to(vectors.device)] = (2 * held.take(bits) - 1).to(vectors)
            for j, squares in zip(chunk, self._squares(self._products(vectors)), strict=True):
                self.samples[j].append(squares)
            if self.allowance.is_over():
                return False
        return True

    def _zeros(self, count: int) -> Tensor:
        like = torch.empty(0, dtype=self.operator.dtype, device=self.operator.device)
        return like.new_zeros(count, self.operator.shard.length)

    def _products(self, vectors: Tensor) -> Tensor:
        """Return the products, restricted to the blocks' coordinates, block after block."""
        products = self.operator.matmat(vectors)
        self.num_products += len(vectors)
        return products if self.order is None else products[:, self.order]

    def _squares(self, products: Tensor) -> FloatArray:
        """Return the squared norms of the blocks of each row, [b, B]."""
        precise = torch.float64 if products.device.type != "mps" else torch.float32
        parts = torch.split(products, [held.length for held, _ in self.parts], dim=1)
        norms = [torch.linalg.vector_norm(part, dim=1, dtype=precise) for part in parts]
        squares = self.held.ranks.all_reduce(torch.stack(norms, dim=1).square_())
        squares = squares.to("cpu", torch.float64)
        check_finite(squares, what=f"One of the first {self.num_products} products")
        return squares.numpy()

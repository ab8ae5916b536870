"""Exact spectra of the gradients' second moment and covariance, from their T x T Gram matrix.

The n x n matrices sum g_t g_t^T and, for gradients less their mean, its centred like have the
same non-zero eigenvalues as the T x T matrices of inner products g_s . g_t. So T gradients give
all of them, to rounding, without an iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.ranks import ALONE, Ranks
from lightning_hessian.operators.gradients.history import GradientHistory
from lightning_hessian.operators.gradients.rows import (
    GradientRows,
    accumulator,
    bytes_of_row,
    pieces,
    summed,
)
from lightning_hessian.results import FloatArray, MeasurementError

_CONVERTED_BYTES = 16 * 2**20
"""Slices of gradients converted to float64 at a time."""

_RECOMPUTED_BYTES = 16 * 2**20
"""Gradients computed anew at a time."""

_TILE = 512
"""Rows of the Gram matrix worked on at a time, so that its upper half need not be computed."""


def gram_matrix(
    gradients: GradientRows,
    *,
    memory_budget: float,
    allowance: Allowance = UNBOUNDED,
) -> Tensor:
    """Return the inner products g_s . g_t of T gradients, float64 [T, T].

    Products and sums are in float64, whatever the gradients' precision: an eigenvalue is then
    good to the rounding of the gradients themselves. Gradients that are computed when asked for
    are held in blocks of what ``memory_budget`` allows, and the earlier ones computed anew for
    each further block: with b blocks each gradient is computed (b + 1) / 2 times on average.

    Several ranks multiply their slices of the gradients, and the products are summed at the end.

    Cost: T^2 n multiplications and the gradients. Memory: 8 T^2 bytes and the blocks.

    Args:
        gradients: Stored or computed.
        memory_budget: Bytes of gradients held at a time, beside the Gram matrix; where they are
            computed, the same on all ranks.
        allowance: Asked after every piece; True ends with the Gram matrix of the first
            gradients, as many as are complete. All ranks must be told the same.

    Raises:
        MeasurementError: The budget does not hold two gradients.
    """
    ranks = gradients.shard.ranks
    if isinstance(gradients, GradientHistory):  # ranks need not keep in step
        with ranks.together():
            gram = _products(gradients, memory_budget, lambda: False, nullcontext)
    else:
        gram = _products(gradients, memory_budget, allowance.is_over, ranks.together)
    return _mirrored(summed(gram, ranks))


def _products(
    gradients: GradientRows,
    memory_budget: float,
    stop_now: Callable[[], bool],
    together: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Return the inner products of this rank's slices, on and below the diagonal tiles."""
    total = gradients.num_gradients
    block, piece = _plan(gradients, memory_budget)
    with together():
        gram = torch.zeros(total, total, dtype=torch.float64, device=accumulator(gradients.device))
    for start in range(0, total, block):
        stop = min(start + block, total)
        held, stop = _held(gradients, start, stop, piece, stop_now)
        cut = stop < min(start + block, total)
        if cut and start:
            return gram[:start, :start]
        with together():
            _add_products(gram[start:stop, start:stop], held, held)
        for first in range(0, start, piece):
            last = min(first + piece, start)
            others = gradients.rows(first, last)
            with together():
                _add_products(gram[start:stop, first:last], held, others)
            del others
            if stop_now():
                return gram[:start, :start]
        if cut:
            return gram[:stop, :stop]
        del held
    return gram


def _plan(gradients: GradientRows, memory_budget: float) -> tuple[int, int]:
    """Return how many gradients are held, and how many are computed anew at a time."""
    if isinstance(gradients, GradientHistory) and gradients.at_hand:
        return gradients.num_gradients, gradients.num_gradients
    row, stride = bytes_of_row(gradients), gradients.stride
    piece = max(1, min(int(memory_budget / 8), _RECOMPUTED_BYTES) // (row * stride)) * stride
    # Beside the held block and a piece: the slices converted to float64, and what all_to_all takes.
    pieces_at_once = 1 if stride == 1 else 3
    left = memory_budget - min(_CONVERTED_BYTES, memory_budget / 2)
    block = int(left // row) - pieces_at_once * piece
    if block < 1:
        raise MeasurementError(
            f"memory_budget leaves {memory_budget / 1e9:.2g} GB for gradients of "
            f"{gradients.size:,} parameters, which does not hold two of them. Raise it, lower "
            "num_gradients, or select fewer `parameters`."
        )
    return min(block, gradients.num_gradients), piece


def _held(
    gradients: GradientRows, start: int, stop: int, piece: int, stop_now: Callable[[], bool]
) -> tuple[Tensor, int]:
    """Return gradients ``start`` to the second value - 1, fewer than asked where time is up."""
    if isinstance(gradients, GradientHistory):
        return gradients.rows(start, stop), stop
    shape = (stop - start, gradients.shard.length)
    with gradients.shard.ranks.together():
        held = torch.empty(shape, dtype=gradients.dtype, device=gradients.device)
    for first in range(start, stop, piece):
        last = min(first + piece, stop)
        held[first - start : last - start] = gradients.rows(first, last)
        if last < stop and stop_now():
            return held[: last - start], last
    return held, stop


def _add_products(target: Tensor, rows: Tensor, others: Tensor) -> None:
    """Add ``rows @ others.T`` to ``target`` in float64, slice of parameters by slice.

    Where both are the same, what lies above the diagonal tiles is left out.
    """
    same = others is rows
    size = rows.shape[1]
    width = min(max(size, 1), max(256, _CONVERTED_BYTES // (8 * (len(rows) + len(others)))))
    # Two buffers for all slices: making them anew for each would scatter the memory.
    buffers = [target.new_empty(len(part), width) for part in ((rows,) if same else (rows, others))]
    for start in range(0, size, width):
        stop = min(start + width, size)
        left = buffers[0][:, : stop - start].copy_(rows[:, start:stop])
        if not same:
            right = buffers[1][:, : stop - start].copy_(others[:, start:stop])
            target.addmm_(left, right.T)
            continue
        for top in range(0, len(rows), _TILE):
            end = min(top + _TILE, len(rows))
            target[top:end, :end].addmm_(left[top:end], left[:end].T)


def _mirrored(gram: Tensor) -> Tensor:
    """Copy what lies below the diagonal above it, in place, and return the matrix."""
    for start in range(0, len(gram), _TILE):
        stop = start + _TILE
        gram[:start, start:stop] = gram[start:stop, :start].T
        tile = gram[start:stop, start:stop]
        tile.copy_(tile.tril() + tile.tril(-1).T)
    return gram


@dataclass(frozen=True, eq=False)
class GramSpectra:
    """What the Gram matrix of T gradients says of their second moment and covariance.

    Attributes:
        second_moment: Eigenvalues of sum g_t g_t^T / T, float64 [K_m], descending.
        covariance: Eigenvalues of sum (g_t - g)(g_t - g)^T / (T - 1), float64 [K_c], descending.
        second_moment_trace: The whole trace, whatever K.
        covariance_trace: Likewise.
        mean_norm: Norm of the mean gradient g.
        weights: [k, T] with orthonormal rows; ``weights @ G`` are the first eigenvectors of the
            covariance, but for their norms. None where they were not asked for.
    """

    second_moment: FloatArray
    covariance: FloatArray
    second_moment_trace: float
    covariance_trace: float
    mean_norm: float
    weights: Tensor | None


def spectra(
    gram: Tensor, num_eigenvalues: int, size: int, num_vectors: int = 0, *, ranks: Ranks = ALONE
) -> GramSpectra:
    """Return the largest eigenvalues of second moment and covariance, exact to rounding.

    Args:
        gram: g_s . g_t, float64 [T, T], T >= 2; overwritten.
        num_eigenvalues: K at most: there are no more than min(T, n) of the second moment and
            min(T - 1, n) of the covariance.
        size: n.
        num_vectors: For how many eigenvectors of the covariance to return ``weights``.
        ranks: Who have the same Gram matrix; the first solves one problem, the last the other.

    Raises:
        ValueError: Fewer than two gradients.

    Example:
        >>> gradients = torch.tensor([[3.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
        >>> found = spectra(gradients @ gradients.T, 2, size=2)
        >>> found.second_moment.round(6), found.covariance.round(6)
        (array([5.302776, 1.697224]), array([4.]))
    """
    total = len(gram)
    if total < 2:
        raise ValueError(f"{total} gradients have no covariance; take at least 2.")
    second_moment_trace = float(gram.trace()) / total
    # What another rank solves stays zero here, and the sum over the ranks is its solution: so all
    # have the same numbers, also where their LAPACKs differ.
    second = torch.zeros(min(num_eigenvalues, total, size), dtype=torch.float64)
    values = torch.zeros(min(num_eigenvalues, total - 1, size), dtype=torch.float64)
    weights = gram.new_zeros(min(num_vectors, total - 1, size), total) if num_vectors else None
    with ranks.together():
        if ranks.rank == 0:
            second[:] = torch.from_numpy(_eigenvalues(gram)[: len(second)]) / total
        # The Gram matrix of g_t - g, from the row means and the mean of all entries.
        means = gram.mean(dim=1)
        mean = means.mean()
        gram.sub_(means).sub_(means.unsqueeze(1)).add_(mean)
        traces = [float(gram.trace()) / (total - 1), second_moment_trace]
        scalars = torch.tensor([*traces, float(mean)], dtype=torch.float64)
        if ranks.rank == ranks.world - 1:
            if weights is None:
                found = torch.from_numpy(_eigenvalues(gram))
            else:
                ascending, vectors = torch.linalg.eigh(gram)
                found = ascending.flip(0).cpu()
                weights[:] = vectors.T.flip(0)[: len(weights)]
            values[:] = found[: len(values)] / (total - 1)
    covariance_trace, second_moment_trace, square = ranks.broadcast(scalars).tolist()
    return GramSpectra(
        second_moment=summed(second, ranks).numpy(),
        covariance=summed(values, ranks).numpy(),
        second_moment_trace=second_moment_trace,
        covariance_trace=covariance_trace,
        mean_norm=math.sqrt(max(square, 0.0)),
        weights=None if weights is None else summed(weights, ranks),
    )


def _eigenvalues(gram: Tensor) -> FloatArray:
    """Return the eigenvalues, descending, and leave the matrix as it was.

    On the CPU by SciPy, which works in place: torch copies the matrix twice.
    """
    if gram.device.type != "cpu":
        result: FloatArray = torch.linalg.eigvalsh(gram).flip(0).cpu().numpy()
        return result
    from scipy.linalg import eigh

    diagonal = gram.diagonal().clone()
    values = eigh(
        gram.numpy().T, eigvals_only=True, overwrite_a=True, check_finite=False, driver="ev"
    )
    # LAPACK has used up the diagonal and what lies above it.
    gram.diagonal().copy_(diagonal)
    _mirrored(gram)
    found: FloatArray = values[::-1].copy()
    return found


def combinations(gradients: GradientRows, weights: Tensor) -> Tensor:
    """Return ``weights @ G`` with rows brought to norm 1, [k, n]: eigenvectors of the covariance.

    Args:
        gradients: Read once; all ranks get whole eigenvectors of them.
        weights: [k, T], those of `spectra`. They sum to zero, so that the mean gradient cancels.
    """
    shard = gradients.shard
    shape = (len(weights), shard.length)
    rows = torch.zeros(shape, dtype=gradients.dtype, device=gradients.device)
    for start, stop in pieces(gradients):
        if start >= weights.shape[1]:
            break
        stop = min(stop, weights.shape[1])
        part = gradients.rows(start, stop)
        rows.addmm_(weights[:, start:stop].to(part), part)
    whole = shard.gather(rows.to(shard.ranks.device)) if shard.ranks.world > 1 else rows
    return torch.nn.functional.normalize(whole.to(gradients.device), dim=1)

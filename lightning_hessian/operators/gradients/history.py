"""The gradient history matrix G, stored: in memory, or mapped from a file where it does not fit."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hessian.linear.allowance import UNBOUNDED, Allowance
from lightning_hessian.linear.memory import free_bytes
from lightning_hessian.linear.shards import Shard
from lightning_hessian.operators.gradients.rows import (
    GradientRows,
    accumulator,
    lengths,
    pieces,
    summed,
)
from lightning_hessian.results import MeasurementError

_BLOCK_BYTES = 64 * 2**20
"""What an iterator over G hands out at a time."""


class GradientHistory:
    """T gradients of n numbers as the rows of one array, in main memory or in a temporary file.

    Several ranks hold slices of the parameters, each of all T gradients: so inner products are
    sums over the ranks, and a parameter can be looked at over the iterations where it lies.

    Args:
        values: [T, n_local], float32 or float64.
        device: Where `rows` puts gradients.
        shard: Which parameters they are of; all of them by default.

    Attributes:
        values: The array; a `numpy.memmap` where it lies in a file, which vanishes with it.
    """

    stride = 1

    def __init__(
        self, values: NDArray[Any], device: torch.device | None = None, shard: Shard | None = None
    ) -> None:
        self.values = values
        self.num_gradients = len(values)
        self.shard = Shard.whole(values.shape[1]) if shard is None else shard
        self.size = self.shard.size
        self.device = torch.device("cpu") if device is None else device
        self.dtype = torch.from_numpy(values[:0]).dtype

    @classmethod
    def collect(
        cls,
        gradients: GradientRows,
        *,
        memory_budget: float | None = None,
        directory: str | Path | None = None,
        allowance: Allowance = UNBOUNDED,
    ) -> GradientHistory:
        """Return all T gradients, each computed once.

        Args:
            gradients: Where they come from.
            memory_budget: Bytes of main memory that G may take on this rank; a larger one is
                mapped from a file. By default half of what is free.
            directory: Where that file lies; by default the system's folder for temporary files.
            allowance: Asked after every piece; True ends with the gradients there are. All
                ranks must be told the same.

        Raises:
            MeasurementError: G fits neither into the memory nor onto the disk.
        """
        if memory_budget is None:
            memory_budget = free_bytes(torch.device("cpu")) / 2
        with gradients.shard.ranks.together():
            values = _storage(gradients, memory_budget, directory)
        count = 0
        for start, stop in pieces(gradients):
            values[start:stop] = gradients.rows(start, stop).cpu().numpy()
            count = stop
            if allowance.is_over():
                break
        return cls(values[:count], gradients.device, gradients.shard)

    @property
    def at_hand(self) -> bool:
        """Whether G lies in the memory that `rows` hands it out in, so that it costs nothing."""
        return self.device.type == "cpu" and not isinstance(self.values, np.memmap)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return gradients ``start`` to ``stop - 1``, [stop - start, n_local], to be read only."""
        return torch.from_numpy(self.values[start:stop]).to(self.device)

    def precondition(self, scale: Tensor) -> None:
        """Multiply every gradient, in place, by ``scale`` [n_local], entry by entry."""
        factors = scale.cpu().numpy()
        for row in self.values:
            row *= factors

    def by_gradient(self, chosen: NDArray[np.int64] | None = None) -> Iterator[NDArray[Any]]:
        """Yield G's columns in SG's sense, the gradients, in blocks [b, n] of those chosen.

        Of several ranks each is given its even share of them, which it must take together with
        the others: all get the same number of blocks, and some may be empty.
        """
        indices = np.arange(self.num_gradients) if chosen is None else chosen
        ranks = self.shard.ranks
        step = max(1, _BLOCK_BYTES // (self.size * self.values.itemsize))
        share = ranks.share_of(len(indices))
        for start in range(0, share, step):
            stop = min(start + step, share)
            wanted = [indices[i * share :][start:stop] for i in range(ranks.world)]
            yield self.values[wanted[0]] if ranks.world == 1 else self._all_to_all(wanted)

    def by_parameter(self, chosen: NDArray[np.int64] | None = None) -> Iterator[NDArray[Any]]:
        """Yield G's rows in SG's sense, one parameter over the iterations, in blocks [b, T].

        Of several ranks each is given those of its slice of the parameters; all get the same
        number of blocks, and some may be empty.
        """
        step = max(1, _BLOCK_BYTES // (self.num_gradients * self.values.itemsize))
        most = self.shard.ranks.share_of(self.size)
        here: NDArray[np.int64] | None = None
        if chosen is not None:
            most = min(most, len(chosen))
            here = self.shard.restricted(torch.from_numpy(chosen))[1].numpy()
        for start in range(0, most, step):
            stop = min(start + step, most)
            columns = slice(start, stop) if here is None else here[start:stop]
            yield np.ascontiguousarray(self.values[:, columns].T)

    def _all_to_all(self, wanted: list[NDArray[np.int64]]) -> NDArray[Any]:
        """Return this rank's of the whole gradients that each rank wants, [b, n]."""
        ranks = self.shard.ranks
        count = len(wanted[ranks.rank])
        shapes = [(count, length) for length in lengths(self.shard)]
        slices = ranks.all_to_all([torch.from_numpy(self.values[i]) for i in wanted], shapes)
        return torch.cat(slices, dim=1).cpu().numpy()


class GradientCovariance:
    """The covariance, or the second moment, of stored gradients as a symmetric operator.

    A product reads G twice and costs 4 T n flops. Its eigenvalues are those of `gram.spectra`;
    the operator is for what needs products, such as ``u^T C u`` for an eigenvector u of the
    Hessian.

    Args:
        history: T gradients.
        centred: True for C = sum (g_t - g)(g_t - g)^T / (T - 1), with g their mean; False for
            M = sum g_t g_t^T / T.

    Raises:
        ValueError: A covariance of fewer than two gradients.

    Example:
        >>> history = GradientHistory(np.array([[3.0, 0.0], [1.0, 2.0]]))
        >>> GradientCovariance(history).matvec(torch.tensor([1.0, 0.0], dtype=torch.float64))
        tensor([ 2., -2.], dtype=torch.float64)
    """

    def __init__(self, history: GradientHistory, *, centred: bool = True) -> None:
        if history.num_gradients < 1 + centred:
            raise ValueError(
                f"{history.num_gradients} gradients have no covariance; collect at least 2."
            )
        self.history, self.centred = history, centred
        self.size, self.dtype, self.device = history.size, history.dtype, history.device
        self.shard = history.shard

    def matvec(self, vector: Tensor) -> Tensor:
        """Return the product with a vector [n_local], a new tensor [n_local]."""
        return self.matmat(vector.unsqueeze(0))[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """Return the products with the rows of [b, n_local], a new tensor [b, n_local]."""
        history = self.history
        spans = list(pieces(history))
        shares = torch.cat([history.rows(*span) @ vectors.T for span in spans])
        shares = summed(shares, history.shard.ranks)
        if self.centred:
            # sum (g_t - g)(p_t - p) = sum g_t (p_t - p): centring the shares is enough.
            shares = shares.to(accumulator(self.device), torch.float64)
            shares = (shares - shares.mean(dim=0)).to(vectors)
        products = torch.zeros_like(vectors)
        for start, stop in spans:
            products.addmm_(shares[start:stop].T, history.rows(start, stop))
        return products / (history.num_gradients - self.centred)


def _storage(
    gradients: GradientRows, memory_budget: float, directory: str | Path | None
) -> NDArray[Any]:
    """Return an array [T, n_local], in memory if it fits and else in a file that has no name."""
    shape = (gradients.num_gradients, gradients.shard.length)
    dtype = np.dtype(str(gradients.dtype).removeprefix("torch."))
    needed = shape[0] * shape[1] * dtype.itemsize
    if needed <= memory_budget or needed == 0:
        return np.empty(shape, dtype)
    folder = Path(tempfile.gettempdir() if directory is None else directory)
    if not folder.is_dir():
        raise MeasurementError(
            f"G takes {needed / 1e9:.1f} GB and shall lie in a file, but directory={str(folder)!r} "
            "is no folder. Make it, or give another."
        )
    free = shutil.disk_usage(folder).free
    try:
        if needed > free:
            raise OSError("too large")
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, not as a crash later
                os.posix_fallocate(file.fileno(), 0, needed)
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        raise MeasurementError(
            f"G of {shape[0]} gradients of {shape[1]:,} parameters takes {needed / 1e9:.1f} GB; "
            f"{memory_budget / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB in {folder} are free. "
            "Lower num_gradients, select fewer `parameters`, give another `directory`, or ask for "
            "spectra only (tests=False), which need no G."
        ) from error

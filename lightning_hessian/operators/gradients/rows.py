"""Gradients of many mini-batches at fixed parameters: the gradient history matrix G, by rows.

SG is "On the Overlooked Structure of Stochastic Gradients" (Xie et al., NeurIPS 2023). Its G is
n x T; here gradients are the rows of a [T, n] array, so that each lies contiguous in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_hessian.linear.ranks import Ranks
from lightning_hessian.linear.shards import Shard
from lightning_hessian.operators.engines import derivatives
from lightning_hessian.probe.loss import LossFunction
from lightning_hessian.probe.minibatches import MiniBatches
from lightning_hessian.probe.objective import Mode, Objective
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import MeasurementError

_PIECE_BYTES = 32 * 2**20
"""Gradients worked on at a time, where nothing else decides."""

_PER_SAMPLE_BYTES = 256 * 2**20
"""Per-sample gradients that vmap makes at a time; what it holds beside them is a few times that."""

_LARGEST_CHUNK = 256


class GradientRows(Protocol):
    """T gradients of n numbers, computed or stored; of several ranks each holds a slice of all.

    Attributes:
        num_gradients: T.
        size: Number of parameters n.
        shard: Which entries of a gradient this process holds; n_local of them, all n if alone.
        stride: How many are made at a time; best asked for in multiples of it.
        dtype: Precision of the gradients.
        device: Where `rows` puts them.
    """

    num_gradients: int
    size: int
    shard: Shard
    stride: int
    dtype: torch.dtype
    device: torch.device

    def rows(self, start: int, stop: int) -> Tensor:
        """Return gradients ``start`` to ``stop - 1``, [stop - start, n_local], to be read only.

        Where gradients are computed all ranks call it together.
        """

    def precondition(self, scale: Tensor) -> None:
        """Multiply every gradient from now on by ``scale`` [n_local], entry by entry."""


class MiniBatchGradients:
    """The gradients of mini-batches at the present parameters, computed when they are asked for.

    They must be asked for inside `isolated`, and the parameters must not change meanwhile. The same
    gradient comes out whenever it is asked for: batches and random layers are seeded by the number
    of the mini-batch.

    Args:
        module: The module.
        loss_fn: ``loss_fn(module, batch) -> mean loss``, or None; see `probe.objective`.
        minibatches: T mini-batches, one at least. Those of one sample go through ``vmap`` in
            chunks, where the module allows it.
        space: The parameters to differentiate by.
        mode: ``"eval"`` or ``"train"``.
        clip_norm: Gradients of a larger norm are scaled down to it (SG section 5.6).
        seed: Of random layers.

    Attributes:
        engine: ``"vmap"`` or ``"autograd"``, the one in use.
        losses: Loss of each mini-batch computed so far, float64 [T], NaN for the others.
        num_computed: Gradients computed so far; more than T where they were computed anew.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None,
        minibatches: MiniBatches,
        space: ParameterSpace,
        *,
        mode: Mode = "eval",
        clip_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        self._minibatches, self._clip_norm = minibatches, clip_norm
        self._objective = Objective(module, loss_fn, [minibatches[0]], space, mode=mode, seed=seed)
        self._scale: Tensor | None = None
        self.num_gradients, self.size = len(minibatches), space.size
        self.shard, self.stride = Shard.whole(space.size), 1
        self.dtype, self.device = space.dtype, space.device
        self.engine = "vmap" if minibatches.batch_size == 1 else "autograd"
        self._checked = False
        self.losses = np.full(len(minibatches), np.nan)
        self.num_computed = 0
        self.on_product: Callable[[int], None] | None = None  # told how many, after each piece

    def isolated(self) -> AbstractContextManager[None]:
        """Return the block in which gradients are asked for; afterwards nothing has changed."""
        return self._objective.isolated()

    def precondition(self, scale: Tensor) -> None:
        """Multiply every gradient from now on by ``scale`` [n], entry by entry."""
        self._scale = scale

    def rows(self, start: int, stop: int) -> Tensor:
        """Return gradients ``start`` to ``stop - 1``, a new tensor [stop - start, n].

        Raises:
            MeasurementError: A gradient is NaN or infinite, or the loss has none.
        """
        rows = torch.empty(stop - start, self.size, dtype=self.dtype, device=self.device)
        step = self._chunk() if self.engine == "vmap" else 1
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part = rows[first - start : last - start]
            if self.engine == "vmap":
                self._fill_per_sample(part, first, last)
            if self.engine != "vmap":
                for i in range(first, last):
                    self._fill(part[i - first], i)
            self.num_computed += last - first
            if self.on_product is not None:
                self.on_product(last - first)
        self._check_finite(rows, start)
        if self._clip_norm is not None:
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            rows.mul_((self._clip_norm / norms).clamp_(max=1.0))
        if self._scale is not None:
            rows.mul_(self._scale)
        return rows

    def _chunk(self) -> int:
        bytes_each = self.size * self.dtype.itemsize
        return max(1, min(_LARGEST_CHUNK, _PER_SAMPLE_BYTES // bytes_each))

    def _fill(self, row: Tensor, index: int) -> None:
        """Write the gradient of one mini-batch into ``row`` [n]."""
        leaves = tuple(value.requires_grad_() for value in self._objective.point())
        number = self._minibatches.numbers[index]
        loss = self._objective.loss(leaves, self._minibatches[index], number)
        if not loss.requires_grad:
            raise MeasurementError(
                "The loss does not depend on any selected parameter (it carries no gradient). "
                "Return the loss as a tensor with its graph, not detached, and select parameters "
                "it uses."
            )
        parts = derivatives([loss], leaves)
        if self._objective.is_written():  # by a hook: once more, on copies that it does not reach
            self._fill(row, index)
            return
        torch.cat([part.reshape(-1).to(row) for part in parts], out=row)
        self.losses[index] = float(loss.detach())

    def _fill_per_sample(self, rows: Tensor, start: int, stop: int) -> None:
        """Write the gradients of single samples into ``rows``, or turn to autograd for good."""
        reference = None
        if not self._checked:  # what vmap does otherwise than autograd is not taken from it
            reference = torch.empty_like(rows[0])
            self._fill(reference, start)
        try:
            self._vmap(rows, start, stop)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            # A loss that reads a value, writes in place, draws random numbers or refuses single
            # samples. Where autograd cannot do it either, it says why.
            self.engine = "autograd"
            return
        if reference is not None:
            difference = torch.linalg.vector_norm(rows[0] - reference)
            tolerance = torch.finfo(self.dtype).eps ** 0.5
            if not difference <= tolerance * torch.linalg.vector_norm(reference):
                self.engine = "autograd"
            self._checked = True

    def _vmap(self, rows: Tensor, start: int, stop: int) -> None:
        batch = self._minibatches.joined(start, stop)
        samples: list[Tensor] = []
        apply_to_collection(batch, Tensor, samples.append)
        samples = [sample.to(self.device) for sample in samples]

        def loss_of_one(values: tuple[Tensor, ...], sample: Sequence[Tensor]) -> Tensor:
            parts = iter(part.unsqueeze(0) for part in sample)
            one = apply_to_collection(batch, Tensor, lambda _: next(parts))
            return self._objective.loss(values, one, start)

        # Random draws are left to autograd, which seeds them by the number of the mini-batch.
        each = torch.func.vmap(
            torch.func.grad_and_value(loss_of_one), in_dims=(None, 0), randomness="error"
        )
        point = self._objective.point()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            gradients, losses = each(point, samples)
        torch.cat([part.flatten(1).to(rows) for part in gradients], dim=1, out=rows)
        self.losses[start:stop] = losses.detach().to("cpu", torch.float64).numpy()

    def _check_finite(self, rows: Tensor, start: int) -> None:
        finite = rows.isfinite().all(dim=1)
        if not finite.all():
            index = start + int((~finite).nonzero()[0])
            raise MeasurementError(
                f"The gradient of mini-batch {self._minibatches.numbers[index]} is NaN or infinite "
                f"(its loss is {self.losses[index]:g}). The run may have diverged (lower the "
                "learning rate), or the batch holds NaN."
            )


def adam_preconditioner(gradients: GradientRows, *, eps: float = 1e-8) -> Tensor:
    """Return what Adam multiplies a gradient by, ``1 / (sqrt(v) + eps)``, by entry [n_local].

    v is the mean of the squares of the T gradients: what Adam's running average tends to while
    the parameters are fixed. It does not depend on the order of the gradients, and a first step
    is treated as a last one. The first moment, a running mean over iterations, plays no part.

    Args:
        gradients: Read once, piece by piece.
        eps: Adam's.
    """
    total = torch.zeros(
        gradients.shard.length, dtype=torch.float64, device=accumulator(gradients.device)
    )
    for start, stop in pieces(gradients):
        rows = gradients.rows(start, stop)
        for row in rows:  # the float64 squares of a whole piece would take twice its memory
            total += row.to(total).square()
    mean = total.div_(gradients.num_gradients)
    return mean.sqrt_().add_(eps).reciprocal_().to(gradients.device, gradients.dtype)


def pieces(gradients: GradientRows, piece_bytes: float = _PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of runs of gradients that take at most so many bytes, if possible.

    They are the same on all ranks.
    """
    stride = gradients.stride
    step = stride * max(1, int(piece_bytes // (stride * bytes_of_row(gradients))))
    for start in range(0, gradients.num_gradients, step):
        yield start, min(start + step, gradients.num_gradients)


def bytes_of_row(gradients: GradientRows) -> int:
    """Return how many bytes of one gradient a rank holds at most."""
    return gradients.shard.ranks.share_of(gradients.size) * gradients.dtype.itemsize


def accumulator(device: torch.device) -> torch.device:
    """Return where float64 sums are kept: on the device, unless it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def lengths(shard: Shard) -> list[int]:
    """Return how many entries each of the ranks holds of a vector in even slices."""
    width = shard.ranks.share_of(shard.size)
    return [max(0, min(width, shard.size - r * width)) for r in range(shard.ranks.world)]


def summed(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum over the ranks, where the tensor is."""
    if ranks.world == 1:
        return tensor
    return ranks.all_reduce(tensor.to(ranks.device).contiguous()).to(tensor.device)

"""What is checked of a gradient structure, before its gradients are computed and after."""

from __future__ import annotations

import math
import warnings

from lightning_hessian.linear.memory import most_bytes
from lightning_hessian.linear.ranks import RankError, Ranks
from lightning_hessian.probe.minibatches import MiniBatches
from lightning_hessian.probe.parameters import ParameterSpace
from lightning_hessian.results import ArgumentError, MeasurementError
from lightning_hessian.statistics.gaussianity import MIN_POINTS


def check_number(num_gradients: int, tests: bool, memory_budget: float | None) -> None:
    """Check T by itself: enough for the tests, and no more than any memory here could hold.

    Whether they fit into what is free is known only at the measurement.
    """
    check_enough(num_gradients, tests)
    most = most_bytes() / 2 if memory_budget is None else memory_budget
    if 2 * gram_bytes(num_gradients) > most:
        raise ArgumentError("num_gradients", num_gradients, too_many(num_gradients, most))


def check_momentum(momentum: float, preconditioner: str | None) -> None:
    """Check that momentum stands alone: Adam's own first moment is another average."""
    if momentum and preconditioner is not None:
        raise ArgumentError(
            "momentum",
            momentum,
            f"It is SGD's, and preconditioner={preconditioner!r} is not. Give one of them.",
        )


def gram_bytes(num_gradients: int) -> int:
    """Return the bytes of the inner products of T gradients."""
    return 8 * num_gradients**2


def too_many(num_gradients: int, memory_budget: float) -> str:
    """Return what to tell where the inner products of T gradients do not fit."""
    return (
        f"The inner products of {num_gradients} gradients take "
        f"{gram_bytes(num_gradients) / 1e9:.2g} GB, more than half of the "
        f"{memory_budget / 1e9:.2g} GB that may be used. Lower num_gradients to "
        f"{int(math.sqrt(memory_budget / gram_bytes(1) / 2))} at most, or raise memory_budget."
    )


def check_space(space: ParameterSpace, tests: bool) -> None:
    """Raise ValueError where parameters lie in shards, or are too few for the tests."""
    if space.held is not None:
        raise ValueError(
            "The structure of gradients cannot be measured on parameters in shards yet "
            "(`fully_shard`, tensor parallelism, or FSDP1 with too little memory to gather them). "
            "Use strategy='ddp', or measure a checkpoint on one device."
        )
    if tests and space.size < MIN_POINTS:
        raise ValueError(
            f"{space.size} parameters are too few to be tested (at least {MIN_POINTS}); give "
            "tests=False."
        )


def check_enough(num_gradients: int, tests: bool) -> None:
    """Check that T is large enough."""
    if num_gradients < _least(tests):
        raise ArgumentError(
            "num_gradients",
            num_gradients,
            f"That is too few: tests need {MIN_POINTS}, spectra alone (tests=False) 2. Raise it, "
            "lower batch_size, or bring more data.",
        )


def _least(tests: bool) -> int:
    return MIN_POINTS if tests else 2


def check_alike(minibatches: MiniBatches, space: ParameterSpace, ranks: Ranks) -> None:
    """Raise RankError unless all ranks draw the same mini-batches for the same parameters."""
    told = ranks.all_gather_object((minibatches.total, minibatches.checksum(), space.size))
    for rank, other in enumerate(told):
        if other != told[0]:
            raise RankError(
                f"Rank {rank} has other data or parameters than rank 0: {other[0]} and "
                f"{told[0][0]} mini-batches, {other[2]:,} and {told[0][2]:,} parameters"
                f"{'' if other[1] == told[0][1] else ', other samples'}. Give all ranks the same "
                "data in the same order, and the same arguments."
            )


def check_count(count: int, wanted: int, tests: bool, ranks: Ranks) -> None:
    """Tell where time cut the gradients short, or raise if too few are left."""
    least = _least(tests)
    if count < least:
        raise MeasurementError(
            f"The time was up after {count} gradients, and at least {least} are needed. Allow "
            "more, or lower num_gradients or batch_size."
        )
    if count < wanted and ranks.rank == 0:
        warnings.warn(
            f"The time was up after {count} of {wanted} gradients; allow more or lower "
            "num_gradients.",
            stacklevel=5,  # past the function, and both decorators, to the caller
        )

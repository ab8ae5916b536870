"""SGD against Adam, each at the best of its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]] = {
    "SGD": lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9),
    "Adam": lambda parameters, rate: torch.optim.Adam(parameters, rate),
}
"""What makes each, with momentum 0.9 in both and nothing else but the learning rate set."""


def half_decades(first: float, last: float) -> tuple[float, ...]:
    """Return learning rates from 10^first to 10^last, by factors of the root of 10.

    Example:
        >>> half_decades(-1, 0)
        (0.1, 0.31623, 1.0)
    """
    return tuple(
        float(f"{10 ** (i / 2):.5g}") for i in range(round(2 * first), round(2 * last) + 1)
    )


@dataclass(frozen=True)
class Best:
    """The best of several learning rates: it, its loss, and whether a better may lie beyond."""

    rate: float
    loss: float
    at_the_edge: bool


def best(losses: dict[float, float]) -> Best:
    """Return the learning rate of the least loss; what diverged counts as infinite."""
    finite = {rate: loss if math.isfinite(loss) else math.inf for rate, loss in losses.items()}
    rate = min(finite, key=lambda one: finite[one])
    return Best(rate, finite[rate], rate in (min(finite), max(finite)))

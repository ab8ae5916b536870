"""How an optimizer preconditions one parameter: what a rule says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lightning_hessian.results import ArgumentError


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """How an optimizer would step one parameter from now on, its preconditioner frozen.

    Near its present point a loss is a quadratic, on which an optimizer with a frozen
    preconditioner P is a linear iteration. It is stable as long as the largest eigenvalue of
    P^-1 (H + W) is below a threshold, which momentum, the learning rate and decoupled weight decay
    decide; W is the coupled weight decay, which the optimizer adds to the gradient.

    Attributes:
        threshold: The largest stable eigenvalue of P^-1 (H + W), a number above 0; infinite where
            the parameter does not move, at a learning rate of 0.
        diagonal: The diagonal of P, in the shape of the parameter as this rank holds it; None
            stands for 1 (unless ``inverse_root`` is given).
        inverse_root: Applies P^-1/2, a symmetric matrix over the entries of the parameter, to a
            tensor of its shape, where P is no diagonal.
        weight_decay: The diagonal of W, one number.
        maximizes: Whether the loss is maximized, so that -H takes the place of H.
    """

    threshold: float
    diagonal: Tensor | None = None
    inverse_root: Callable[[Tensor], Tensor] | None = None
    weight_decay: float = 0.0
    maximizes: bool = False

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ArgumentError("threshold", self.threshold, "Give a number above 0.")
        if self.diagonal is not None and self.inverse_root is not None:
            raise ArgumentError("inverse_root", self.inverse_root, "Give it or `diagonal`.")


PreconditionerRule: TypeAlias = Callable[
    [Tensor, Mapping[str, Any], Mapping[str, Any]], Preconditioner | None
]
"""``rule(parameter, group, state)``; None where the optimizer has not stepped the parameter yet."""

"""How an optimizer preconditions one parameter: what a rule says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from lightning_hessian.results import ArgumentError
from lightning_hessian.results.arguments import (
    Rule,
    check_fields,
    flag,
    function_of,
    instance_of,
    optional,
    real_number,
)


def _threshold(name: str, value: Any) -> Any:
    """Apply the rule of a threshold, which may be infinite."""
    above_zero = real_number("Give a number above 0, infinite where nothing moves.", above=0)
    return value if type(value) is float and value == math.inf else above_zero(name, value)


_RULES: dict[str, Rule] = {
    "threshold": _threshold,
    "diagonal": optional(instance_of(Tensor, "Give a tensor in the shape of the parameter.")),
    "inverse_root": optional(function_of("tensor", returns="P^-1/2 times it")),
    "weight_decay": real_number("Give a number from 0 on.", least=0),
    "maximizes": flag,
}


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

    Raises:
        ArgumentError: A threshold that is not above 0, or P given twice.

    Example:
        Gradient descent at a learning rate of 0.1 is stable below 2 / 0.1:

        >>> Preconditioner(threshold=2 / 0.1).threshold
        20.0
    """

    threshold: float
    diagonal: Tensor | None = None
    inverse_root: Callable[[Tensor], Tensor] | None = None
    weight_decay: float = 0.0
    maximizes: bool = False

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        if self.diagonal is not None and self.inverse_root is not None:
            raise ArgumentError("inverse_root", self.inverse_root, "Give it or `diagonal`.")


PreconditionerRule: TypeAlias = Callable[
    [Tensor, Mapping[str, Any], Mapping[str, Any]], Preconditioner | None
]
"""``rule(parameter, group, state)``; None where the optimizer has not stepped the parameter yet."""

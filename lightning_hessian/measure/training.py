"""What training is doing at the moment of a measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True, eq=False)
class Training:
    """The optimizers that train a module, and the update that they applied last.

    Attributes:
        optimizers: All that step this module's parameters.
        update: The last applied update by name of the parameter: parameters after the step minus
            those before it, each tensor as this rank holds the parameter (its local part where it
            is sharded). None where no step was seen.
    """

    optimizers: tuple[Optimizer, ...] = ()
    update: Mapping[str, Tensor] | None = None

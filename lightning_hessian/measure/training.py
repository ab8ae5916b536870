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

    Example:
        >>> import torch
        >>> from lightning_hessian import Session, StabilityInstrument
        >>> _ = torch.manual_seed(0)
        >>> model, batches = torch.nn.Linear(3, 1), [(torch.randn(9, 3), torch.randn(9, 1))]
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> training = Training(optimizers=(torch.optim.SGD(model.parameters(), lr=0.5),))
        >>> with Session(model, loss_fn, batches, training=training) as session:
        ...     found = StabilityInstrument().measure(session, None).scalars()
        >>> found["threshold"], found["ratio"] < 2
        (4.0, True)
    """

    optimizers: tuple[Optimizer, ...] = ()
    update: Mapping[str, Tensor] | None = None

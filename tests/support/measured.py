"""A small network, its batches and its loss, as arguments of what measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """A network of 19 parameters with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def hessian_loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(batch[0]), batch[1])


def loss(module: Any, batch: Any) -> torch.Tensor:
    """Returns the loss that a network names itself."""
    return module.hessian_loss(batch)


torch.manual_seed(0)
NET = Net()
BATCHES = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(2)]
MEASURED = {"model": NET, "loss_fn": loss, "batches": BATCHES}

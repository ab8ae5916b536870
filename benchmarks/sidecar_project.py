"""The project of benchmarks/sidecar.py, as a sidecar finds it by name: a module and its data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from fit import digits
from problems import lenet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    """LeNet, which learns by momentum SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.network = lenet()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean loss."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return momentum SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def train_loader() -> DataLoader[Any]:
    """Return the training data, from the folder that the benchmark was given."""
    folder = os.environ.get("SIDECAR_DATA")
    train, _ = digits(Path(folder) if folder else None)
    return DataLoader(TensorDataset(*train), 64, shuffle=True)

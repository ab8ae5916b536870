"""A project as a user has one: a module, a datamodule, a loss, and what is wrong with some."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(L.LightningModule):
    """Thirteen to forty parameters, in double precision."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(3, width), nn.Tanh()).double()
        self.head = nn.Linear(width, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)


class Data(L.LightningDataModule):
    """Thirty points of two classes, in batches of twelve: the last is ragged."""

    def __init__(self, count: int = 30) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.hparams.count, 3, generator=generator, dtype=torch.float64)
        self.points = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.points, batch_size=12)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.points, batch_size=30)


def batches() -> list[tuple[Tensor, Tensor]]:
    data = Data()
    data.setup("fit")
    return [data.points[:12], data.points[12:24], data.points[24:]]


def squared(module: Net, batch: tuple[Tensor, Tensor]) -> Tensor:
    return module(batch[0]).square().mean()


STOP_AFTER: list[int] = []


def interrupted(module: Net, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The training loss; Ctrl-C once as many evaluations have been made as STOP_AFTER says."""
    if STOP_AFTER:
        STOP_AFTER[0] -= 1
        if STOP_AFTER[0] == 0:
            raise KeyboardInterrupt
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


not_a_module = 3

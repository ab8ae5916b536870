"""A classifier, its data and the callback of its gradients, so small that a fit takes no time."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import (
    GradientStructureCallback,
)
from lightning_hessian.measure.budget import Budget


def _samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    noise = torch.randn(count, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] + 0.5 * noise > 0).long() + (inputs[:, 1] > 1))


TRAIN, VAL = _samples(160, 1), _samples(40, 2)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(TRAIN, batch_size=8, shuffle=True), DataLoader(VAL, batch_size=20)


class Classifier(L.LightningModule):
    """Dropout and BatchNorm, whose state a careless measurement would change."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 3)
        )
        self.losses: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def gradient_callback(**arguments: Any) -> GradientStructureCallback:
    defaults: dict[str, Any] = {
        "num_gradients": 40, "num_eigenvalues": 12, "time_budget": Budget(seconds=600),
        "on_error": "raise", "figures": None,
    }  # fmt: skip
    return GradientStructureCallback(**{**defaults, **arguments})


def seeded_model() -> Classifier:
    L.seed_everything(3, verbose=False)
    return Classifier()

"""A module that does what modules do, and loaders of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import torch
import torchmetrics
from callbacks.tiny_modules import (
    NUM_TRAIN,
    samples,
    train_loader,
)
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


class Everything(L.LightningModule):
    """Dropout, BatchNorm, an LSTM and a frozen layer; metrics and lists kept in training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1)
        self.mse = torchmetrics.MeanSquaredError()
        self.errors = torchmetrics.CatMetric()
        self.losses: list[Tensor] = []
        self.steps: list[Any] = []

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.lstm(inputs.reshape(len(inputs), 2, 2))
        return self.head(self.frozen(self.dropout(self.norm(states[:, -1]))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        found = self(inputs)
        loss = nn.functional.mse_loss(found, targets)
        self.mse(found.float(), targets)
        self.errors.update((found.detach().float() - targets).abs())
        self.losses.append(loss.detach())
        modes = [module.training for module in self.modules()]
        self.steps.append((self.global_step, inputs.clone(), loss.detach(), modes))
        self.log("train_mse", self.mse, on_step=True, on_epoch=True)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("listed_loss", torch.stack(self.losses).mean())
        self.log("largest_error", self.errors.compute().max())
        self.losses.clear()
        self.errors.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:  # comes after that of the callbacks
        self.steps.append([module.training for module in self.modules()])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class WithoutLstm(Everything):
    """The same without the LSTM, which has no forward-mode derivative."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.frozen(self.dropout(self.norm(inputs[:, :3]))))


class Augmented(Dataset):
    """Noise from all three global generators on every fetch."""

    def __init__(self) -> None:
        self.data = samples(NUM_TRAIN, seed=1)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.data[index]
        scale = random.uniform(0.9, 1.1) * np.random.uniform(0.9, 1.1)
        return scale * inputs + 0.1 * torch.randn(4), target


class AugmentedByItself(Augmented):
    """Noise from a generator of the dataset's own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(3)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.data[index]
        return inputs * float(self.generator.uniform(0.5, 1.5)), target


class Stream(IterableDataset):
    """Samples without an index, with noise from the global generator."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, target in samples(NUM_TRAIN, seed=1):
            yield inputs + 0.1 * torch.randn(4), target


class Permutation(Sampler):
    """A sampler of the user's own, with a generator that goes on from epoch to epoch."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(4)

    def __iter__(self) -> Iterator[int]:
        yield from self.random.permutation(NUM_TRAIN).tolist()

    def __len__(self) -> int:
        return NUM_TRAIN


class Buckets(BatchSampler):
    """A batch sampler of the user's own around a sampler with a generator."""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def buckets() -> DataLoader[Any]:
    data = samples(NUM_TRAIN, seed=1)
    batches = Buckets(RandomSampler(data, generator=seeded()), batch_size=8, drop_last=True)
    return DataLoader(data, batch_sampler=batches)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": train_loader,
    "own generator": lambda: train_loader(generator=seeded()),
    "workers": lambda: train_loader(
        dataset=Augmented(), num_workers=1, persistent_workers=True, generator=seeded()
    ),
    "workers without generator": lambda: train_loader(
        dataset=Augmented(), num_workers=1, persistent_workers=True
    ),
    "augmented": lambda: train_loader(dataset=Augmented()),
    "augmented by itself": lambda: train_loader(dataset=AugmentedByItself()),
    "stream": lambda: train_loader(dataset=Stream(), shuffle=False),
    "subset": lambda: train_loader(
        sampler=SubsetRandomSampler(range(20), generator=seeded()), shuffle=False
    ),
    "weighted": lambda: train_loader(
        sampler=WeightedRandomSampler(torch.ones(NUM_TRAIN), NUM_TRAIN), shuffle=False
    ),
    "own sampler": lambda: train_loader(sampler=Permutation(), shuffle=False),
    "own batch sampler": buckets,
}

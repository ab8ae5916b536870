"""Modules, data and callbacks so small that a whole training run takes a fraction of a second."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from support.callbacks import with_spectrum
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import HessianSpectrumCallback
from lightning_hessian.measure.budget import Budget

FEATURES = 4
NUM_PARAMETERS = 31
NUM_TRAIN, NUM_VAL, BATCH = 32, 16, 8


def samples(count: int, seed: int) -> TensorDataset:
    """Inputs [count, 4] and targets [count, 1] of a noisy nonlinear regression."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    noise = torch.randn(count, 1, generator=generator)
    return TensorDataset(inputs, torch.sin(2 * inputs.sum(1, keepdim=True)) + 0.3 * noise)


def train_loader(**arguments: Any) -> DataLoader[Any]:
    """Four batches of eight, shuffled unless it is told otherwise."""
    arguments = {"batch_size": BATCH, "shuffle": True, **arguments}
    return DataLoader(arguments.pop("dataset", samples(NUM_TRAIN, seed=1)), **arguments)


def val_loader(**arguments: Any) -> DataLoader[Any]:
    """Two batches of eight, in order."""
    return DataLoader(samples(NUM_VAL, seed=2), batch_size=BATCH, **arguments)


def small_callback(**arguments: Any) -> HessianSpectrumCallback:
    """A quick measurement without figures, whose failure fails the test; it speaks of no cost."""
    defaults: dict[str, Any] = {
        "num_eigenvalues": 5,
        "num_batches": 2,
        "time_budget": Budget(seconds=600),
        "figures": None,
        "on_error": "raise",
    }
    return with_spectrum(**{**defaults, **arguments})


class _Regression:
    """Body of a two-layer network of 31 parameters, for a LightningModule of either package."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1))

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Regression(_Regression, L.LightningModule):
    """The regression of ``lightning``."""


class PlRegression(_Regression, pl.LightningModule):
    """The regression of ``pytorch_lightning``."""


class _Data:
    def train_dataloader(self) -> DataLoader[Any]:
        return train_loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return val_loader()


class RegressionData(_Data, L.LightningDataModule):
    """The data of ``lightning``."""


class PlRegressionData(_Data, pl.LightningDataModule):
    """The data of ``pytorch_lightning``."""


def dense_eigenvalues(module: Any, inputs: Tensor, targets: Tensor) -> NDArray[np.float64]:
    """All eigenvalues, descending, of the dense float64 Hessian of a `Regression`'s loss."""
    net = copy.deepcopy(module.net).double()
    names = [name for name, _ in net.named_parameters()]
    shapes = [parameter.shape for parameter in net.parameters()]
    flat = nn.utils.parameters_to_vector(net.parameters()).detach()

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return (functional_call(net, values, inputs.double()) - targets).square().mean()

    return torch.linalg.eigvalsh(jacfwd(grad(loss))(flat)).flip(0).numpy()


def in_a_fresh_process(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code that may import from here, in a process that may die."""
    here = Path(__file__).parent
    folders = [str(here), str(here.parent), str(here.parents[1])]
    paths = f"import sys; sys.path[:0] = {folders!r}\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", paths + code],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def seeded_module(**arguments: Any) -> Regression:
    """The regression, as every test begins with it."""
    torch.manual_seed(0)
    return Regression(**arguments)


def last_eigenvalues(callback: HessianSpectrumCallback) -> Any:
    """The eigenvalues that were measured last."""
    assert callback.last_spectrum is not None
    return callback.last_spectrum.eigenvalues

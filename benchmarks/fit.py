"""What a user feels: how much longer a fit takes with the default callback.

    OMP_NUM_THREADS=1 python benchmarks/fit.py [--data-dir DATA] [--clock cpu] [--only lenet-10]

Every row is a ratio of two fits made one after the other in one run: with the callback, over
without it. Both begin from the same weights, and end with the same ones.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from problems import GPT, Batch, lenet, mnist, photographs, shakespeare
from timing import CLOCKS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import HessianSpectrumCallback


class Classifier(L.LightningModule):
    """A network that learns to classify, with the loss of a validation."""

    def __init__(self, network: nn.Module, learning_rate: float, adam: bool) -> None:
        super().__init__()
        self.network = network
        self.learning_rate = learning_rate
        self.adam = adam

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        inputs, labels = batch
        return nn.functional.cross_entropy(self.network(inputs), labels.flatten())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean loss."""
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return momentum SGD, or AdamW."""
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


@dataclass(frozen=True)
class Fit:
    """A fit to be watched.

    Attributes:
        name: As printed.
        network: Makes the network.
        data: Returns what is trained on, and what is validated on.
        batch_size: Of training.
        trainer: Arguments of the Trainer.
        learning_rate: Of the optimizer.
        adam: Whether that is AdamW.
    """

    name: str
    network: Callable[[], nn.Module]
    data: Callable[[Path | None], tuple[Batch, Batch]]
    batch_size: int
    trainer: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.01
    adam: bool = False


def users_cnn() -> nn.Module:
    """Return a network of the kind that users bring: BatchNorm, strides, 34,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.Conv2d(48, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def digits(folder: Path | None) -> tuple[Batch, Batch]:
    """Return 10,000 images of MNIST to train on, and 1,000 others."""
    images, labels = mnist(folder, 11_000)
    return (images[:10_000], labels[:10_000]), (images[10_000:], labels[10_000:])


def characters(folder: Path | None) -> tuple[Batch, Batch]:
    """Return sequences of 64 characters: as many as 2,000 steps take, and 64 others."""
    text = shakespeare(folder)
    starts = torch.randint(len(text) - 65, (32_064,), generator=torch.Generator().manual_seed(0))
    found = torch.stack([text[i : i + 65] for i in starts.tolist()])
    inputs, labels = found[:, :-1].contiguous(), found[:, 1:].contiguous()
    return (inputs[:32_000], labels[:32_000]), (inputs[32_000:], labels[32_000:])


FITS = {
    "lenet-10": Fit("LeNet, 10,000 images, 10 epochs", lenet, digits, 64, {"max_epochs": 10}),
    "lenet-50": Fit("the same, 50 epochs", lenet, digits, 64, {"max_epochs": 50}),
    "gpt": Fit(
        "GPT of 0.8M, 20 validations 100 steps apart",
        lambda: GPT(context=64, depth=4, heads=4, width=128),
        characters,
        16,
        {"max_steps": 2000, "val_check_interval": 100},
        1e-3,
        True,
    ),
    "cnn-30": Fit("CNN of 34k, CIFAR-10 subset, 30 epochs", users_cnn, photographs, 128,
                  {"max_epochs": 30}, 0.05),
    "cnn-100": Fit("the same, 100 epochs", users_cnn, photographs, 128, {"max_epochs": 100}, 0.05),
}  # fmt: skip


def fitted(
    fit: Fit, data: tuple[Batch, Batch], callbacks: list[Any], clock: Callable[[], float]
) -> tuple[float, list[Tensor]]:
    """Return the seconds of a fit, and the weights at its end."""
    torch.manual_seed(0)
    module = Classifier(fit.network(), fit.learning_rate, fit.adam)
    train, validate = (TensorDataset(*part) for part in data)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=CSVLogger(folder),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **fit.trainer,
        )
        begun = clock()
        trainer.fit(
            module,
            DataLoader(train, fit.batch_size, shuffle=True),
            DataLoader(validate, 500),
        )
        return clock() - begun, [p.detach().clone() for p in module.parameters()]


def main() -> None:
    """Print one row for each fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="by default synthetic stand-ins")
    parser.add_argument("--only", action="append", choices=sorted(FITS), help="several times")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="(%(default)s)")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.clock} clock, "
          f"{'synthetic data' if options.data_dir is None else 'real data'}\n")  # fmt: skip
    print("| fit | alone | with the callback | ratio | whole measurements | of validations |")
    print("|---|---|---|---|---|---|")
    for name in options.only or FITS:
        fit = FITS[name]
        data = fit.data(options.data_dir)
        alone, expected = fitted(fit, data, [], clock)
        callback = HessianSpectrumCallback()
        watched, found = fitted(fit, data, [callback], clock)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), name
        row = callback.history
        due = fit.trainer.get("max_epochs") or 20
        print(
            f"| {fit.name} | {alone:.1f} s | {watched:.1f} s | {watched / alone:.2f} | {len(row)} "
            f"(one {row[-1]['seconds']:.1f} s, {row[-1]['num_hvps']:.0f} products) | {due} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

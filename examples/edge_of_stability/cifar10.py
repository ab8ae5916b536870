"""The edge of stability, watched by the callback: sharpness over the optimizer's threshold.

    python cifar10.py --data-dir DATA [--out FOLDER]

Full-batch gradient descent and full-batch Adam on 1000 images of CIFAR-10 rise to a ratio of 1 and
hover there (Cohen et al. 2021, figure 1; 2022); SGD and AdamW on mini-batches do not get so far.
Each run is measured by `StabilityInstrument` at every so many training steps; nothing validates.
DATA holds ``cifar10/cifar10-subset.npz``, with ``train_images`` [N, 3, 32, 32] and
``train_labels`` [N]. Without it the script says so and ends.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hessian import EveryNTrainSteps, HessianSpectrumCallback

NUM_IMAGES = 1000
WIDTH = 64


@dataclass(frozen=True)
class Run:
    """One way to train the same network on the same images.

    Attributes:
        title: Of its panel.
        optimizer: Makes the optimizer of a network's parameters.
        batch_size: `NUM_IMAGES` for full-batch training.
        steps: How many optimizer steps.
        every: At every how many of them the run is measured.
    """

    title: str
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batch_size: int
    steps: int
    every: int


RUNS = {
    "gd": Run(
        "full-batch gradient descent, $\\eta$ = 0.05",
        lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        NUM_IMAGES, 1500, 15,
    ),
    "adam": Run(
        "full-batch Adam, $\\eta$ = 0.0003",
        lambda parameters: torch.optim.Adam(parameters, lr=3e-4, eps=1e-7),
        NUM_IMAGES, 1500, 15,
    ),
    "sgd": Run(
        "SGD, batches of 20, $\\eta$ = 0.05",
        lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        20, 1500, 15,
    ),
    "adamw": Run(
        "AdamW, batches of 20, $\\eta$ = 0.0003",
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        20, 1500, 15,
    ),
}  # fmt: skip


class Network(L.LightningModule):
    """A dense network with two hidden layers, as in Cohen et al. 2021, on images halved in size."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.net = nn.Sequential(
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(768, WIDTH), nn.Tanh(),
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return half the squared error, the sum over classes, the mean over images."""
        targets = nn.functional.one_hot(batch[1], 10).to(batch[0].dtype)
        return (self.net(batch[0]) - targets).square().sum(dim=1).mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the run."""
        return self.run.optimizer(self.parameters())


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the first images, each channel standardised, and their labels."""
    with np.load(folder / "cifar10" / "cifar10-subset.npz") as file:
        pixels = torch.from_numpy(file["train_images"][:NUM_IMAGES]).float() / 255
        labels = torch.from_numpy(file["train_labels"][:NUM_IMAGES])
    mean, std = (of(pixels, (0, 2, 3))[:, None, None] for of in (torch.mean, torch.std))
    return (pixels - mean) / std, labels


def measured(run: Run, data: tuple[Tensor, Tensor], folder: Path) -> dict[str, np.ndarray]:
    """Train, and return what the callback logged, by its names."""
    L.seed_everything(0, verbose=False)
    generator = torch.Generator().manual_seed(1)

    def batches() -> Any:
        order = torch.randperm(NUM_IMAGES, generator=generator)
        for chosen in order.split(run.batch_size):
            yield data[0][chosen], data[1][chosen]

    class Passes(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([data]) if run.batch_size == NUM_IMAGES else batches()

    callback = HessianSpectrumCallback(
        num_eigenvalues=10,
        blocks=None,
        # All images in one batch: the curvature of the very loss that full-batch training descends.
        data=[data],
        # A run of seconds that is measured at every 15 steps pays for no such share of its time.
        time_budget=None,
        # A whole spectrum is measured once, when training has ended.
        every_n_validations=EveryNTrainSteps(run.every, whole=run.steps),
        monitor="train_loss",
        figures=None,
    )
    logger = CSVLogger(folder, name="", version="")
    trainer = L.Trainer(
        max_steps=run.steps, max_epochs=-1, accelerator="cpu", logger=logger, callbacks=[callback],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Network(run), DataLoader(Passes(), batch_size=None))
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["stability/ratio"]]
    keys = ("step", "stability/sharpness", "stability/threshold", "stability/ratio",
            "stability/loss", "stability/num_hvps", "stability/lambda_1")  # fmt: skip
    return {key: np.array([float(row[key]) for row in rows]) for key in keys}


def figure(found: dict[str, dict[str, np.ndarray]]) -> Any:
    """Return a figure: the ratio of each run with the line at 1, and its loss beneath."""
    from lightning_hessian.tracking.style import COLOURS, new_figure, quiet_grid

    drawn, axes = new_figure(
        2.9 * len(found) + 0.4, 4.6, nrows=2, ncols=len(found), sharex="col", sharey="row",
        squeeze=False, height_ratios=(3, 2),
    )  # fmt: skip
    for column, (name, rows) in enumerate(found.items()):
        above, below = axes[:, column]
        above.plot(rows["step"], rows["stability/ratio"], color=COLOURS[0], linewidth=1.1)
        above.axhline(1.0, color="0.2", linestyle="--", linewidth=1)
        below.plot(rows["step"], rows["stability/loss"], color=COLOURS[1], linewidth=1.1)
        above.set_title(RUNS[name].title, fontsize="small")
        below.set(xlabel="optimizer step", yscale="log")
        quiet_grid(above)
        quiet_grid(below)
    axes[0, 0].set_ylabel("sharpness / threshold")
    axes[0, 0].set_ylim(0, 1.6)
    axes[1, 0].set_ylabel("loss on all images")
    return drawn


def main() -> None:
    """Train the four runs, print a table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("edge_of_stability.png"))
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, help="fewer than the runs' own, to try it out")
    given = parser.parse_args()
    if not (given.data_dir / "cifar10" / "cifar10-subset.npz").is_file():
        print(f"skipped: {given.data_dir} has no cifar10/cifar10-subset.npz")
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    data, found = images(given.data_dir), {}
    print("run    threshold  ratio at the end, mean of the last fifth  range  loss  HVPs  seconds")
    for name in given.only:
        run = RUNS[name]
        if given.steps:
            run = Run(run.title, run.optimizer, run.batch_size, given.steps, run.every)
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rows = found[name] = measured(run, data, Path(folder))
        last = rows["stability/ratio"][-max(1, len(rows["step"]) // 5) :]
        print(
            f"{name:6} {rows['stability/threshold'][-1]:9.0f} {last.mean():6.2f} "
            f"[{last.min():.2f}, {last.max():.2f}] {rows['stability/loss'][-1]:8.4f} "
            f"{np.median(rows['stability/num_hvps']):4.0f} {time.monotonic() - begun:5.0f}",
            flush=True,
        )
    from lightning_hessian.tracking.style import render

    given.out.write_bytes(render(figure(found)))


if __name__ == "__main__":
    main()

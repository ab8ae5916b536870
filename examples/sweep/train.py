"""Trains 24 small networks on real digits, offline: optimisers x learning rates x widths.

``make sweep`` runs this and then ``lightning-hessian report`` over all runs. A run that is already
complete in the output folder is not repeated, so a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each run, a thread for each process

import lightning as L
import torch
from lightning.pytorch.loggers import WandbLogger
from sklearn.datasets import load_digits
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import HessianSpectrumCallback
from lightning_hessian.cli.digits import DigitsClassifier
from lightning_hessian.histories.offline_run import read_offline_run

PROJECT = "lightning-hessian-sweep"
OPTIMIZERS = {
    "sgd": (0.05, 0.2),
    "momentum": (0.01, 0.05),
    "adam": (0.001, 0.005),
}
WIDTHS = (4, 8, 16, 32)
NUM_TRAIN = 600  # few enough that the networks differ in how they generalize
NUM_EPOCHS = 40
EVERY = 2  # epochs between measurements


@dataclass(frozen=True)
class Trial:
    """One point of the sweep."""

    optimizer: str
    learning_rate: float
    width: int

    @property
    def run_id(self) -> str:
        """Names the run and its folder."""
        return f"{self.optimizer}-{self.learning_rate:g}-w{self.width}"


TRIALS = [
    Trial(optimizer, rate, width)
    for width, (optimizer, rates) in itertools.product(WIDTHS, OPTIMIZERS.items())
    for rate in rates
]


class SweepClassifier(DigitsClassifier):
    """The demo's network with a choice of optimisers, and losses over whole data sets."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial.width, trial.learning_rate)
        self.optimizer_name = trial.optimizer

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        """Log loss and error on the held-out images, and the loss on the training images."""
        images, labels = batch
        logits = self.network(images)
        loss = functional.cross_entropy(logits, labels)
        if dataloader_idx:
            self.log("fit_loss", loss, add_dataloader_idx=False)
            return
        self.log("val_loss", loss, add_dataloader_idx=False)
        error = (logits.argmax(1) != labels).float().mean()
        self.log("val_error", error, add_dataloader_idx=False)

    def configure_optimizers(self):
        """Return the optimiser of the trial."""
        if self.optimizer_name == "adam":
            return torch.optim.Adam(self.parameters(), self.learning_rate)
        momentum = 0.9 if self.optimizer_name == "momentum" else 0.0
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=momentum)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 600 images to train on and 1,197 held out; nothing is chosen by the latter."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    train = TensorDataset(images[:NUM_TRAIN], labels[:NUM_TRAIN])
    return train, TensorDataset(images[NUM_TRAIN:], labels[NUM_TRAIN:])


def train(trial: Trial, out: Path) -> float:
    """Train one network and log it offline under ``out``; return the seconds it took."""
    started = time.monotonic()
    _quiet()
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    train_set, held_out = digits()
    model = SweepClassifier(trial)
    whole = DataLoader(train_set, batch_size=NUM_TRAIN)
    config = asdict(trial) | {"num_parameters": sum(p.numel() for p in model.parameters())}
    logger = WandbLogger(
        project=PROJECT, name=trial.run_id, id=trial.run_id, save_dir=out, offline=True,
        config=config,
    )  # fmt: skip
    # No bound: the runs are small, and all are to be compared at the same epochs.
    hessian = HessianSpectrumCallback(
        monitor=["val_loss", "val_error"], data=whole, time_budget=None
    )
    trainer = L.Trainer(
        max_epochs=NUM_EPOCHS,
        check_val_every_n_epoch=EVERY,
        accelerator="cpu",
        logger=logger,
        callbacks=[hessian],
        default_root_dir=out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10_000,
    )
    loaders = [DataLoader(held_out, batch_size=len(held_out)), whole]
    trainer.fit(model, DataLoader(train_set, batch_size=32, shuffle=True), loaders)
    logger.experiment.finish()
    return time.monotonic() - started


def finished(trial: Trial, out: Path) -> bool:
    """Whether the run is complete in ``out``."""
    for folder in sorted((out / "wandb").glob(f"offline-run-*-{trial.run_id}")):
        run = read_offline_run(folder)
        if run.exit_code == 0 and run.complete:
            return True
    return False


def _quiet() -> None:
    import wandb

    wandb.setup(settings=wandb.Settings(mode="offline", silent=True, console="off"))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="The measurement took")


def main() -> None:
    """Run what is missing of the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("sweep_output"), help="%(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    missing = [trial for trial in TRIALS if not finished(trial, options.out)]
    print(f"{len(TRIALS) - len(missing)} of {len(TRIALS)} runs are there already", flush=True)
    missing = missing[: options.limit]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        trials = {pool.submit(train, trial, options.out): trial for trial in missing}
        for done, future in enumerate(as_completed(trials), 1):
            name = trials[future].run_id
            print(f"{done}/{len(missing)}  {name:<20} {future.result():5.0f} s", flush=True)


if __name__ == "__main__":
    main()

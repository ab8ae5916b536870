"""A fit as a user starts it, in a process of its own, with a checkpoint after each epoch.

Run as ``python -m support.sidecar_job FOLDER EPOCHS SECONDS``, which it waits in each epoch. The
callback measures at every validation, for its numbers to be compared with those of a sidecar.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_hessian import Budget, HessianSpectrumCallback
from lightning_hessian.results import save_spectrum
from support import trained
from support.callbacks import with_spectrum
from support.runs import wandb_logger

NUM_EIGENVALUES, TOL = 6, 1e-6


class Slow(Callback):
    """Makes an epoch last, and keeps the spectra of the callback before it."""

    def __init__(self, seconds: float, measuring: HessianSpectrumCallback, folder: Path) -> None:
        self.seconds, self.measuring, self.folder = seconds, measuring, folder

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        time.sleep(self.seconds)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.measuring.last_spectrum is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            save_spectrum(self.measuring.last_spectrum, self.folder / f"{step}.npz")


def main() -> None:
    folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
    torch.manual_seed(0)
    callback = with_spectrum(
        num_eigenvalues=NUM_EIGENVALUES, tol=TOL, blocks=None, figures=None, progress=False,
        time_budget=Budget(seconds=600), monitor="val_loss", on_error="raise",
    )  # fmt: skip
    keep = ModelCheckpoint(monitor="val_loss", save_top_k=-1, save_last=True, filename="{epoch}")
    slow = Slow(float(sys.argv[3]), callback, folder / "expected")
    logger = wandb_logger(folder, group="pairs")
    L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=logger, enable_progress_bar=False,
        callbacks=[callback, keep, slow], enable_model_summary=False,
        log_every_n_steps=1,
    ).fit(trained.Net(width=4), datamodule=trained.Data())  # fmt: skip
    logger.experiment.finish()


if __name__ == "__main__":
    main()

"""Runs of a tiny network with real loggers, and what these wrote, read back."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from callbacks.tiny_modules import Regression, train_loader, val_loader

from lightning_hessian import HessianSpectrumCallback
from lightning_hessian.histories.offline_run import OfflineRun, read_offline_run
from lightning_hessian.measure.blocks import BlocksInstrument
from lightning_hessian.measure.budget import Budget
from support.callbacks import with_spectrum

Row = dict[str, Any]


def measuring(**arguments: Any) -> HessianSpectrumCallback:
    """A quick measurement with figures at the first, every second and the last measurement."""
    defaults: dict[str, Any] = {
        "num_eigenvalues": 8, "num_batches": 2, "time_budget": Budget(seconds=600),
        "figures": 2, "on_error": "raise",
    }  # fmt: skip
    cut = arguments.get("blocks", "layer")
    densities = BlocksInstrument(cut or "layer", densities=True, density_steps=20, density_probes=1)
    instruments = [] if cut is None else [densities]
    return with_spectrum(**{"instruments": instruments, **defaults, **arguments})


class RankOnly(HessianSpectrumCallback):
    """Draws one figure, where which one does not matter."""

    correlated = ()

    def drawings(self) -> Any:
        found = super().drawings()
        return {"rank": found["rank"]} if found else {}


def measuring_rank_only(**arguments: Any) -> RankOnly:
    """The quick measurement with one figure, of fewer eigenvalues."""
    defaults: dict[str, Any] = {
        "num_eigenvalues": 4, "num_batches": 1, "time_budget": Budget(seconds=600),
        "blocks": None, "figures": 2, "on_error": "raise", "monitor": "val_loss",
    }  # fmt: skip
    return with_spectrum(RankOnly, **{**defaults, **arguments})


def train(folder: Path, callbacks: list[Any], logger: Any, epochs: int = 3, **more: Any) -> Any:
    """Trains, validating twice an epoch, and returns the Trainer."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "enable_checkpointing": False, "enable_progress_bar": False, "val_check_interval": 0.5,
        **more,
    }  # fmt: skip
    path = arguments.pop("ckpt_path", None)
    module = arguments.pop("module", None) or Regression()
    trainer = L.Trainer(
        accelerator="cpu", logger=logger, callbacks=callbacks, max_epochs=epochs,
        log_every_n_steps=1, enable_model_summary=False, default_root_dir=folder, **arguments,
    )  # fmt: skip
    trainer.fit(module, train_loader(shuffle=False), val_loader(), ckpt_path=path)
    return trainer


def wandb_logger(folder: Path, **arguments: Any) -> Any:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    return WandbLogger(
        project="test", save_dir=folder, offline=True, settings=settings, **arguments
    )


def ended(path: Path) -> OfflineRun:
    """Reads a run once wandb has written its end, which may take a moment after `finish`."""
    deadline = time.monotonic() + 20
    while (run := read_offline_run(path)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return run


def finished(logger: Any, folder: Path) -> OfflineRun:
    """Ends the run and reads it."""
    logger.experiment.finish()
    run = ended(folder)
    assert run.exit_code == 0
    assert run.complete
    assert not run.problems
    return run


def csv_rows(logger: Any) -> list[Row]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def tensorboard_events(folder: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guidance = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(folder, size_guidance=guidance).Reload()

"""The demo: a network learns real digits while its Hessian spectrum is logged offline."""

from __future__ import annotations

import logging
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian.callbacks.hessian_spectrum import HessianSpectrumCallback
from lightning_hessian.histories.load import load_runs
from lightning_hessian.histories.offline_run import read_offline_run
from lightning_hessian.reports.findings import CorrelationReport
from lightning_hessian.reports.live import follow
from lightning_hessian.reports.report import correlation_report, write_report
from lightning_hessian.reports.verdicts import answer_within, judged, ranked
from lightning_hessian.tracking.figures import rank_plot

NUM_EPOCHS = 15
NUM_EIGENVALUES = 100
_COLUMNS = (
    ("epoch", "epoch", "d"),
    ("val_loss", "val_loss", ".4f"),
    ("d_ks", "d_ks", ".4f"),
    ("s_hat", "s_hat", ".3f"),
    ("lambda_1", "lambda_1", ".3f"),
    ("trace", "Tr(H)", ".2f"),
    ("num_converged", "converged", ".0f"),
    ("seconds", "seconds", ".1f"),
)


class DigitsClassifier(L.LightningModule):
    """A small convolutional network for 8 x 8 digits; nothing in it knows of Hessians."""

    def __init__(self, width: int = 16, learning_rate: float = 0.05) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 16, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the validation loss."""
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.parameters(), self.learning_rate, momentum=0.9)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)


class DigitsData(L.LightningDataModule):
    """Scikit-learn's 1,797 handwritten digits: 1,400 to train, 397 to validate."""

    def setup(self, stage: str) -> None:
        """Load and split the images."""
        try:
            from sklearn.datasets import load_digits
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The demo's digits come with scikit-learn: pip install 'lightning-hessian[demo]'."
            ) from error
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target, dtype=torch.long)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
        self.train_set = TensorDataset(images[:1400], labels[:1400])
        self.val_set = TensorDataset(images[1400:], labels[1400:])

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of 64."""
        return DataLoader(self.train_set, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation images in one batch."""
        return DataLoader(self.val_set, batch_size=len(self.val_set))


class Table(L.Callback):
    """Print a line for each measurement."""

    def __init__(self, hessian: HessianSpectrumCallback) -> None:
        self.hessian = hessian

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the head."""
        print("  ".join(f"{title:>9}" for _, title, _ in _COLUMNS))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the row that the Hessian callback, earlier in the list, has completed."""
        rows = self.hessian.history
        if trainer.sanity_checking or not rows:
            return
        print("  ".join(_cell(rows[-1], key, form) for key, _, form in _COLUMNS), flush=True)


def run_demo(
    out: Path, *, num_epochs: int = NUM_EPOCHS, num_eigenvalues: int = NUM_EIGENVALUES
) -> Path:
    """Train, measure, print, write figure, page and report of the run; return the figure."""
    from lightning.pytorch.loggers import WandbLogger

    from lightning_hessian.measure.spectrum import hessian_spectrum

    out.mkdir(parents=True, exist_ok=True)
    _quiet()
    L.seed_everything(0, verbose=False)
    model, data = DigitsClassifier(), DigitsData()
    data.setup("fit")
    probe = DataLoader(data.train_set, batch_size=350)  # the Hessian of the whole training loss
    # No bound: training takes seconds here, and a correlation wants a point after each epoch.
    hessian = HessianSpectrumCallback(num_eigenvalues=num_eigenvalues, data=probe, time_budget=None)
    print(
        f"Training a network of {sum(p.numel() for p in model.parameters()):,} parameters on "
        f"{len(data.train_set):,} handwritten digits; after each epoch the top "
        f"{num_eigenvalues} eigenvalues of its Hessian.\n"
    )
    spectra = {
        "at initialisation": hessian_spectrum(model, None, probe, num_eigenvalues=num_eigenvalues)
    }
    logger = WandbLogger(project="lightning-hessian-demo", save_dir=out, offline=True)
    trainer = L.Trainer(
        max_epochs=num_epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=[hessian, Table(hessian)],
        default_root_dir=out,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(model, datamodule=data)
    assert hessian.last_spectrum is not None
    spectra[f"after {num_epochs} epochs"] = hessian.last_spectrum
    run_folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    figure = out / "spectrum.png"
    rank_plot(spectra).savefig(figure, dpi=150)
    _wait_for_the_end(run_folder)
    page = follow(run_folder, out, once=True)
    report = correlation_report(load_runs(run_folder, cache=False, progress=False), workers=1)
    _print_correlations(report)
    print(f"\nFigure: {figure}")
    print(f"Page with all charts: {page}")
    print(f"Report: {write_report(report, out / 'report')}")
    print(f"Offline W&B run: {run_folder}")
    print("Look at it in the terminal:   wandb beta leet " + str(run_folder))
    print("Or send it to your account:   wandb sync " + str(run_folder))
    return figure


def _wait_for_the_end(run_folder: Path, seconds: float = 20.0) -> None:
    """Wait until W&B has written the end of the run, so that all who read it read the same."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and read_offline_run(run_folder).exit_code is None:
        time.sleep(0.1)


def _print_correlations(report: CorrelationReport) -> None:
    """Print what the report and the page say, in the same words."""
    for monitor in report.monitors:
        pairs = [p for p in ranked(report.within) if p.monitor == monitor and not math.isnan(p.r)]
        if not pairs:
            print(f"\nToo few epochs for a correlation with {monitor}.")
            continue
        title = f"Correlation with {monitor}"
        print(f"\n{title:<36}  Pearson r   r of differences   Spearman    n")
        for pair in pairs:
            print(
                f"  {pair.statistic:<34}  {pair.r:>9.3f}   {pair.r_differences:>16.3f}   "
                f"{pair.spearman:>8.3f} {pair.num_points:>4}\n    {judged(pair).sentence}"
            )
    print(f"\n{answer_within(report.within)}")


def _cell(row: dict[str, float], key: str, form: str) -> str:
    return f"{row[key]:>9{form}}" if key in row else f"{'-':>9}"


def _quiet() -> None:
    """Leave the terminal to the table."""
    import wandb

    wandb.setup(settings=wandb.Settings(mode="offline", silent=True, console="off"))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message="The measurement took")

"""Draws the gallery: the figures of a real run, as vector files beside `gallery.md`.

Run by `make gallery`; takes one to three minutes.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import lightning as L
from torch.utils.data import DataLoader

from lightning_hessian import GradientStructureCallback, HessianSpectrumCallback, hessian_spectrum
from lightning_hessian.cli.digits import DigitsClassifier, DigitsData
from lightning_hessian.measure.blocks import BlocksInstrument
from lightning_hessian.tracking.correlation_figures import scatter_plot
from lightning_hessian.tracking.figures import rank_plot
from lightning_hessian.tracking.gradient_figures import ratio_plot, spectra_plot
from lightning_hessian.tracking.scalars import CORRELATED
from lightning_hessian.tracking.style import render

FOLDER = Path(__file__).parent / "gallery"
NUM_EIGENVALUES = 100
NUM_EPOCHS = 15


def main() -> None:
    """Train the network of the demo and draw all figures."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    L.seed_everything(0, verbose=False)
    model, data = DigitsClassifier(), DigitsData()
    data.setup("fit")
    probe = DataLoader(data.train_set, batch_size=350)
    before = hessian_spectrum(model, None, probe, num_eigenvalues=NUM_EIGENVALUES)
    densities = BlocksInstrument(densities=True, density_steps=20, density_probes=1)
    hessian = HessianSpectrumCallback(
        num_eigenvalues=NUM_EIGENVALUES, data=probe, time_budget=None, instruments=[densities]
    )
    gradients = GradientStructureCallback(num_gradients=400, batch_size=32, data=probe)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=NUM_EPOCHS,
            accelerator="cpu",
            logger=False,
            callbacks=[hessian, gradients],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=sys.stdout.isatty(),
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data)
    after, structure = hessian.last_spectrum, gradients.last_structure
    assert after is not None
    assert structure is not None
    figures = {name: drawing() for name, drawing in hessian.drawings().items()}
    trained = f"after {NUM_EPOCHS} epochs"
    figures["rank"] = rank_plot({"at initialisation": before, trained: after})
    figures["scatter"] = scatter_plot(hessian.history, CORRELATED, "val_loss")
    figures["gradient_spectra"] = spectra_plot(structure, after)
    figures["gradient_ratio"] = ratio_plot(structure, after)
    FOLDER.mkdir(exist_ok=True)
    for name, figure in figures.items():
        (FOLDER / f"{name}.svg").write_bytes(render(figure, "svg"))
        print(FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()

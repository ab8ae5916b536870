"""Train a network and measure the rows of a table that are about it.

Training is Lightning's, and the Hessian is measured by `HessianSpectrumCallback` at the ends of the
epochs that rows ask for, by both protocols: converged eigenvalues, and pooled Ritz values.
"""

from __future__ import annotations

import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import networks
import recipes
import torch
from data import Data, load
from fits import gradient_numbers, spectrum_numbers
from rows import Gradients, Hessian, Network, Row
from torch import Tensor, nn

from lightning_hessian import HessianSpectrumCallback, PooledSLQ, gradient_structure
from lightning_hessian.measure.recipes import hpl_language_model
from lightning_hessian.measure.spectrum import SpectrumInstrument

SMALL = 30_000
"""Networks of fewer parameters are trained and measured in float64 by default."""

PROBE_BATCH = 1000

Save = Callable[[Row, dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """What a run may change of its rows; every change is part of the name of a result.

    Attributes:
        seed: Of initialisation, order of samples, label noise and Lanczos vectors.
        device: ``"cpu"`` or ``"cuda"``.
        precision: ``"float32"`` or ``"float64"``, of what is measured; by default that of the
            training, which goes by the size of the network. Rows of an epoch on the way are
            trained in it too, for they are measured within the training.
        probe: Samples of the Hessian, in the place of the row's.
    """

    seed: int = 0
    device: str = "cpu"
    precision: str | None = None
    probe: int | None = None

    @property
    def name(self) -> str:
        """The name of a result's file, without its ending."""
        probe = "" if self.probe is None else f"-probe{self.probe}"
        precision = "" if self.precision is None else f"-{self.precision}"
        return f"seed{self.seed}{probe}{precision}"


@dataclass(frozen=True)
class PooledInstrument(SpectrumInstrument):
    """The papers' protocol, beside the converged eigenvalues of the same session."""

    name: str = field(default="pooled", init=False)
    prefix: str = field(default="pooled", init=False)


@dataclass(frozen=True)
class AtEpochs:
    """Due at the ends of these epochs, where every ``every``-th epoch is validated."""

    epochs: frozenset[int] = frozenset()
    every: int = 1
    during_validate: bool = True

    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        """Return whether this is the end of one of the epochs; always outside a fit."""
        return not self.epochs or validation * self.every in self.epochs


class DivergedError(RuntimeError):
    """Training by a recipe has ended in NaN: that is the result of its rows."""


class _Keep(L.Callback):
    """Hands on what `HessianSpectrumCallback` has measured, as soon as it is there."""

    def __init__(self, source: HessianSpectrumCallback, keep: Callable[[Any, int], None]) -> None:
        self.source, self.keep, self.seen = source, keep, 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(self.source.history) > self.seen:
            self.seen = len(self.source.history)
            self.keep(trainer, trainer.current_epoch + 1)


class Bench:
    """A network with its data, ready to be trained and measured.

    Args:
        network: Which.
        settings: What differs from its rows.
        data_dir: Holds the data sets.
        work_dir: Where trained networks are kept, so that a later row finds them.
    """

    def __init__(
        self, network: Network, settings: Settings, data_dir: Path, work_dir: Path
    ) -> None:
        L.seed_everything(settings.seed, verbose=False)
        data = load(data_dir, network.data, settings.seed)
        self.network, self.settings, self.data_dir = network, settings, data_dir
        module = networks.build(
            network.model, tuple(data.inputs.shape[1:]), network.data.num_classes
        )
        size = sum(parameter.numel() for parameter in module.parameters())
        self.trained_in = "float64" if size < SMALL else "float32"
        self.precision = settings.precision or self.trained_in
        self.data = data
        recipe = network.recipe
        self.num_epochs = 0 if recipe is None else recipes.epochs_of(recipe, len(data.labels))
        self.module = recipes.Classifier(module, recipe, self.num_epochs)
        self.work_dir = work_dir
        self._in_precision(self.trained_in)
        self.about: dict[str, Any] = {
            "num_parameters": size,
            "num_train": len(data.labels),
            "num_published": data.full,
            "precision": self.precision,
            "device": _device_name(settings.device),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
        }

    @property
    def file(self) -> Path:
        """Where the trained network is kept."""
        name = f"{self.network.key}-seed{self.settings.seed}-{self.trained_in}.pt"
        return self.work_dir / name

    def _in_precision(self, precision: str) -> None:
        """Bring the network and the data to a precision."""
        self._now = precision
        self.module.to(getattr(torch, precision))
        self.data = self.data.to(getattr(torch, precision))

    def train(self, rows: Sequence[Row], save: Save) -> None:
        """Train, unless that was done before; rows of an epoch on the way are measured there."""
        recipe = self.network.recipe
        on_the_way = [row for row in rows if row.epoch is not None]
        if recipe is None:
            return
        if on_the_way:
            self.trained_in = self.precision
            self._in_precision(self.trained_in)
        self.about["trained_in"] = self.trained_in
        file = self.file
        if file.exists() and not on_the_way:
            self.module.network.load_state_dict(torch.load(file, weights_only=True))
            return
        epochs = frozenset(row.epoch for row in on_the_way if row.epoch is not None)
        every = math.gcd(self.num_epochs, *epochs)
        callbacks: list[L.Callback] = []
        if on_the_way:
            (measure,) = {row.measure for row in on_the_way}
            assert isinstance(measure, Hessian)
            source = self._callback(measure, AtEpochs(epochs, every, during_validate=False))

            def keep(trainer: L.Trainer, epoch: int) -> None:
                chosen = [row for row in on_the_way if row.epoch == epoch]
                self._keep_spectra(chosen, source, trainer, save)

            callbacks = [source, _Keep(source, keep)]
        begun = time.monotonic()
        loaders = (
            recipes.loader(self.data.inputs, self.data.labels, recipe.batch_size, shuffle=True),
            self._test_loader(),
        )
        trainer = self._trainer(callbacks, max_epochs=self.num_epochs, max_steps=recipe.steps or -1,
                                check_val_every_n_epoch=every)  # fmt: skip
        trainer.fit(self.module, *loaders)
        self.about["training_seconds"] = round(time.monotonic() - begun, 1)
        if not all(bool(part.isfinite().all()) for part in self.module.network.parameters()):
            raise DivergedError("Training by the recipe ends in NaN.")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.module.network.state_dict(), file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)

    def measure(self, rows: Sequence[Row], save: Save) -> None:
        """Measure the rows of the network as it is now."""
        now = [row for row in rows if row.epoch is None]
        self._in_precision(self.precision)
        trainer = self._trainer([])
        (found,) = trainer.validate(self.module, self._test_loader(), verbose=False)
        self.about["test_loss"] = found["val_loss"]
        self.about["test_accuracy"] = found["val_accuracy"]
        self._measure_hessians([row for row in now if isinstance(row.measure, Hessian)], save)
        self._measure_gradients([row for row in now if isinstance(row.measure, Gradients)], save)

    def _measure_hessians(self, rows: Sequence[Row], save: Save) -> None:
        for measure, group in _grouped(rows, lambda row: _spectrum_of(row.measure)):
            source = self._callback(measure, AtEpochs())
            trainer = self._trainer([source])
            trainer.validate(self.module, self._test_loader(), verbose=False)
            self._keep_spectra(group, source, trainer, save)

    def _keep_spectra(
        self, rows: Sequence[Row], source: HessianSpectrumCallback, trainer: L.Trainer, save: Save
    ) -> None:
        spectra = {
            "converged": source.records["spectrum"].spectrum,
            "pooled": source.records["pooled"].spectrum,
        }
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for row in rows:
            about = dict(self.about, probe=int(spectra["converged"].num_samples))
            about["probe_loss"] = spectra["converged"].loss
            about.setdefault("test_loss", metrics.get("val_loss"))
            about.setdefault("test_accuracy", metrics.get("val_accuracy"))
            numbers = {name: spectrum_numbers(one, row) for name, one in spectra.items()}
            save(row, {"about": about, "numbers": numbers})

    def _callback(self, measure: Hessian, schedule: AtEpochs) -> HessianSpectrumCallback:
        batches = self._probe(measure)
        parameters = None
        if measure.parameters == "head":
            parameters = hpl_language_model(self.module.network)["parameters"]
        # 3 runs of 1000 steps are HPL's (C.1.5, C.2.2); for CNNs it says no number of runs.
        pooled = PooledInstrument(num_eigenvalues=measure.k, parameters=parameters,
                                  protocol=PooledSLQ(), trace_probes=0)  # fmt: skip
        converged = SpectrumInstrument(num_eigenvalues=measure.k, parameters=parameters,
                                       trace_probes=0)  # fmt: skip
        return HessianSpectrumCallback(
            num_eigenvalues=measure.k, monitor="val_loss", every_n_validations=schedule,
            data=batches, loss_fn=recipes.loss_fn, parameters=parameters, blocks=None,
            time_budget=None, figures=None, progress=False, on_error="raise",
            seed=self.settings.seed, instruments=[converged, pooled],
        )  # fmt: skip

    def _probe(self, measure: Hessian) -> list[tuple[Tensor, Tensor]]:
        data: Data = self.data
        if measure.data is not None:
            data = load(self.data_dir, measure.data, self.settings.seed)
            data = data.to(getattr(torch, self._now))
        count = self.settings.probe or measure.probe or len(data.labels)
        inputs, labels = data.inputs[:count], data.labels[:count]
        return list(zip(inputs.split(PROBE_BATCH), labels.split(PROBE_BATCH), strict=True))

    def _measure_gradients(self, rows: Sequence[Row], save: Save) -> None:
        module = self.module.network.to(self.settings.device)
        for measure, group in _grouped(rows, lambda row: row.measure.run):
            wanted = {row.measure.statistic for row in group}
            structure = gradient_structure(
                module, _decayed(measure.weight_decay), [(self.data.inputs, self.data.labels)],
                num_gradients=measure.count, batch_size=measure.batch_size,
                tests=bool(wanted & {"dimension", "iteration"}), clip_norm=measure.clip_norm,
                preconditioner=measure.preconditioner, momentum=measure.momentum,
                mode=measure.mode, seed=self.settings.seed,
                num_eigenvalues=max(row.measure.k for row in group),
            )  # fmt: skip
            for row in group:
                numbers = {"gradients": gradient_numbers(structure, row)}
                save(row, {"about": self.about, "numbers": numbers})

    def _trainer(self, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
        return L.Trainer(
            accelerator="gpu" if self.settings.device == "cuda" else "cpu", devices=1,
            precision="64-true" if self._now == "float64" else "32-true",
            callbacks=callbacks, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            **options,
        )  # fmt: skip

    def _test_loader(self) -> Any:
        return recipes.loader(self.data.test_inputs, self.data.test_labels, 2000, shuffle=False)


def measure_rows(
    rows: Sequence[Row], settings: Settings, data_dir: Path, work_dir: Path, save: Save
) -> None:
    """Train the one network that the rows are about, and measure them.

    Args:
        rows: All of one network.
        settings: What differs from the rows.
        data_dir: Holds the data sets.
        work_dir: Where trained networks are kept.
        save: Called with a row and its numbers as soon as these are there.

    Raises:
        MissingDataError, MissingPackageError: Something that the rows need is not here.
    """
    (network,) = {row.network for row in rows}
    with warnings.catch_warnings():
        # Lightning on the number of workers, on logging steps, and the like.
        warnings.filterwarnings("ignore", module="lightning")
        bench = Bench(network, settings, data_dir, work_dir)
        try:
            bench.train(rows, save)
        except DivergedError:
            for row in rows:
                save(row, {"about": bench.about, "numbers": {}, "diverged": True})
            return
        bench.measure(rows, save)


def _spectrum_of(measure: Hessian | Gradients) -> Hessian:
    """Return what has to be computed for a row: gaps are those of the same eigenvalues."""
    assert isinstance(measure, Hessian)
    return replace(measure, statistic="eigenvalues")


def _grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _decayed(weight_decay: float) -> Callable[[nn.Module, Any], Tensor]:
    """Return the loss with the term whose gradient is weight decay."""
    if not weight_decay:
        return recipes.loss_fn

    def with_decay(module: nn.Module, batch: Any) -> Tensor:
        squares = sum((parameter**2).sum() for parameter in module.parameters())
        return recipes.loss_fn(module, batch) + weight_decay / 2 * squares

    return with_decay


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def _versions() -> dict[str, str]:
    names = ["torch", "lightning", "numpy", "scipy", "lightning-hessian"]
    if find_spec("pytorch_optimizer") is not None:
        names.append("pytorch_optimizer")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}

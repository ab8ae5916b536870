"""Checks of the callback in a fit on the device."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gpu.running import Check, Settings


class Network(L.LightningModule):
    """A tanh network of 131 parameters with dropout, which draws on the device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 4))

    def loss(self, batch: Any) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def training_step(self, batch: Any) -> Tensor:
        """Return the loss."""
        return self.loss(batch)

    def validation_step(self, batch: Any) -> None:
        """Log the loss."""
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, whose state is on the device too."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def data() -> DataLoader[Any]:
    """Return 44 samples in four classes."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(44, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, (inputs[:, :2] > 0).long() @ torch.tensor([1, 2])), 8)


@contextmanager
def quiet() -> Iterator[None]:
    """Open a block in which Lightning says nothing."""
    loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


def fit(
    settings: Settings, callbacks: list[L.Callback], *, precision: Any = "32-true"
) -> dict[str, Tensor]:
    """Train for three epochs with deterministic algorithms, and return the weights."""
    with quiet():
        model = Network()
        torch.manual_seed(1)
        trainer = L.Trainer(
            accelerator="gpu" if settings.is_card else "cpu", devices=1, max_epochs=3,
            deterministic=True, precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        )  # fmt: skip
        try:
            trainer.fit(model, data(), data())
        finally:
            torch.use_deterministic_algorithms(False)
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> str:
    """Raise where weights differ in a bit."""
    wrong = [name for name in first if not torch.equal(first[name], second[name])]
    if wrong:
        raise AssertionError(f"weights differ with the callback: {', '.join(wrong)}")
    return "weights have the same bits"


def spectrum_callback(**options: Any) -> Any:
    """Return the callback, with settings that suit a small network."""
    from lightning_hessian import HessianSpectrumCallback

    given = {"num_eigenvalues": 5, "time_budget": None, "figures": None, "progress": False}
    return HessianSpectrumCallback(**{**given, **options})


def untouched(options: dict[str, Any], precision: Any, settings: Settings) -> str:
    """Compare the weights of a fit with and without the callback."""
    callback = spectrum_callback(on_error="raise", **options)
    measured = fit(settings, [callback], precision=precision)
    if len(callback.history) < 3:
        raise AssertionError(f"{len(callback.history)} measurements instead of 3")
    return same_bits(fit(settings, [], precision=precision), measured)


def gradients_untouched(settings: Settings) -> str:
    """Compare the weights of a fit with and without the callback for gradients."""
    from lightning_hessian import GradientStructureCallback

    callback = GradientStructureCallback(time_budget=None, figures=None, progress=False)
    return same_bits(fit(settings, []), fit(settings, [callback]))


def out_of_memory(settings: Settings) -> str:
    """See training go on, to the same weights, where a measurement asks for a petabyte."""
    asked: list[int] = []

    def loss(module: Network, batch: Any) -> Tensor:
        asked.append(1)
        there = torch.empty(2**50, dtype=torch.uint8, device=settings.device)
        return module.loss(batch) + there[0]

    callback = spectrum_callback(loss_fn=loss, on_error="warn")
    weights = fit(settings, [callback])
    if not asked:
        raise AssertionError("no measurement was tried")
    if callback.history and callback.last_spectrum is not None:
        raise AssertionError("a petabyte was given")
    return same_bits(fit(settings, []), weights)


def checks() -> list[Check]:
    """Return the checks of this module."""
    kinds: dict[str, tuple[dict[str, Any], Any]] = {
        "spectrum and blocks": ({}, "32-true"),
        "Gauss-Newton matrix": ({"matrix": "gauss_newton"}, "32-true"),
        "bf16-mixed": ({}, "bf16-mixed"),
    }
    return [
        *(
            Check(f"fit unchanged, {kind}", functools.partial(untouched, *given), seconds=45)
            for kind, given in kinds.items()
        ),
        Check("fit unchanged, gradients", gradients_untouched, seconds=45),
        Check("fit goes on when memory runs out", out_of_memory, seconds=45),
    ]

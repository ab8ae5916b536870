"""The numbers of the callback against dense Hessians, whatever the data, the loop, the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from callbacks.tiny_modules import (
    BATCH,
    NUM_TRAIN,
    NUM_VAL,
    PlRegression,
    Regression,
    RegressionData,
    dense_eigenvalues,
    in_a_fresh_process,
    last_eigenvalues,
    samples,
    seeded_module,
    small_callback,
    train_loader,
    val_loader,
)
from torch import Tensor

from lightning_hessian import HessianSpectrumCallback
from lightning_hessian.callbacks.schedule import EveryNValidations

MakeTrainer = Callable[..., Any]
TRAIN, VAL = samples(NUM_TRAIN, seed=1).tensors, samples(NUM_VAL, seed=2).tensors
OTHER = samples(24, seed=3)
"""Neither of the data sets that the Trainer has."""


def _assert_spectrum_of(
    callback: HessianSpectrumCallback, module: Any, data: Iterable[Tensor]
) -> None:
    """The last eigenvalues are those of the dense Hessian on ``data``, at the present weights."""
    expected = dense_eigenvalues(module, *data)[: callback.num_eigenvalues]
    np.testing.assert_allclose(last_eigenvalues(callback), expected, rtol=1e-4, atol=1e-6)


# Which data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param("train", TRAIN, id="train"),
        pytest.param("val", VAL, id="val"),
        pytest.param(torch.utils.data.DataLoader(OTHER, batch_size=7), OTHER.tensors, id="loader"),
        pytest.param([OTHER[:16], OTHER[16:]], OTHER.tensors, id="list of batches"),
    ],
)
def test_spectrum_of_the_chosen_data(make_trainer: MakeTrainer, data: Any, expected: Any) -> None:
    callback, module = small_callback(data=data, num_batches=10), seeded_module()
    make_trainer(callback, max_epochs=2).fit(module, train_loader(), val_loader())
    assert len(callback.history) == 2
    _assert_spectrum_of(callback, module, expected)
    others = [part for part in (TRAIN, VAL, OTHER.tensors) if part is not expected]
    for other in others:
        with pytest.raises(AssertionError):
            _assert_spectrum_of(callback, module, other)


def test_the_first_of_several_validation_loaders(make_trainer: MakeTrainer) -> None:
    class TwoLoaders(Regression):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val_loss", self.loss(batch), add_dataloader_idx=True)

    torch.manual_seed(0)
    callback, module = small_callback(data="val", monitor="val_loss/dataloader_idx_1"), TwoLoaders()
    loaders = [val_loader(), torch.utils.data.DataLoader(OTHER, batch_size=BATCH)]
    make_trainer(callback).fit(module, train_loader(), loaders)
    _assert_spectrum_of(callback, module, VAL)
    assert "val_loss/dataloader_idx_1" in callback.history[0]


class TwoParts(Regression):
    """Trains on a dict of two batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.loss(batch["one"]) + self.loss(batch["other"])) / 2


@pytest.mark.parametrize("combine", [dict, lambda loaders: L.pytorch.utilities.CombinedLoader(
    loaders, "min_size")], ids=["dict", "CombinedLoader"])  # fmt: skip
def test_a_dict_of_training_loaders(make_trainer: MakeTrainer, combine: Any) -> None:
    one, other = samples(16, seed=4), samples(16, seed=5)
    torch.manual_seed(0)
    callback, module = small_callback(num_batches=10), TwoParts()
    loaders = combine({"one": train_loader(dataset=one), "other": train_loader(dataset=other)})
    make_trainer(callback).fit(module, loaders, val_loader())
    both = [torch.cat(parts) for parts in zip(one.tensors, other.tensors, strict=True)]
    _assert_spectrum_of(callback, module, both)


@pytest.mark.parametrize("overfit", [2, 0.5], ids=["batches", "share"])
def test_overfit_batches_measures_what_is_trained_on(
    make_trainer: MakeTrainer, overfit: float
) -> None:
    callback, module = small_callback(num_batches=10), seeded_module()
    trainer = make_trainer(callback, overfit_batches=overfit)
    trainer.fit(module, train_loader(shuffle=False), val_loader())
    assert trainer.global_step == 2
    _assert_spectrum_of(callback, module, [part[: 2 * BATCH] for part in TRAIN])


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_transfer_hooks_of_the_module(make_trainer: MakeTrainer, hook: str) -> None:
    scales = type(
        "ScalesByHook",
        (Regression,),
        {hook: lambda self, batch, dataloader_idx: [3 * batch[0], batch[1]]},
    )
    torch.manual_seed(0)
    callback, module = small_callback(num_batches=10), scales()
    make_trainer(callback).fit(module, train_loader(), val_loader())
    _assert_spectrum_of(callback, module, (3 * TRAIN[0], TRAIN[1]))


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_precision_of_the_trainer(make_trainer: MakeTrainer, precision: str) -> None:
    callback, module = small_callback(num_batches=10), seeded_module()
    make_trainer(callback, precision=precision).fit(module, train_loader(), val_loader())
    assert callback.last_spectrum is not None
    is_double = precision == "64-true"
    assert callback.last_spectrum.dtype == ("float64" if is_double else "float32")
    inputs = TRAIN[0].bfloat16().float() if precision == "bf16-true" else TRAIN[0]
    targets = TRAIN[1].bfloat16().float() if precision == "bf16-true" else TRAIN[1]
    _assert_spectrum_of(callback, module, (inputs, targets))


def test_the_same_probe_batches_at_every_measurement(make_trainer: MakeTrainer) -> None:
    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return NUM_TRAIN

        def __getitem__(self, index: int) -> Any:
            return TRAIN[0][index] + torch.randn(4), TRAIN[1][index]

    spectra = []

    class Remembers(L.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                spectra.append(last_eigenvalues(callback))

    callback = small_callback()
    trainer = make_trainer(callback, Remembers(), max_epochs=3)
    trainer.fit(seeded_module(lr=0.0), train_loader(dataset=Noisy()), val_loader())
    assert len(spectra) == 3
    np.testing.assert_array_equal(spectra[1], spectra[0])
    np.testing.assert_array_equal(spectra[2], spectra[0])


def test_another_seed_draws_other_samples(make_trainer: MakeTrainer) -> None:
    module, spectra = seeded_module(lr=0.0), []
    for seed in (0, 0, 1):
        callback = small_callback(seed=seed)
        make_trainer(callback).fit(module, train_loader(), val_loader())
        spectra.append(last_eigenvalues(callback))
    np.testing.assert_array_equal(spectra[1], spectra[0])
    assert not np.allclose(spectra[2], spectra[0], rtol=1e-2)


def test_selected_parameters(make_trainer: MakeTrainer) -> None:
    callback = small_callback(num_eigenvalues=6, parameters="net.2.*", num_batches=10)
    module = seeded_module()
    make_trainer(callback).fit(module, train_loader(), val_loader())
    hidden = torch.cat([module.net[:2](TRAIN[0]), torch.ones(NUM_TRAIN, 1)], dim=1).double()
    expected = torch.linalg.eigvalsh(2 * hidden.T @ hidden / NUM_TRAIN).flip(0)
    np.testing.assert_allclose(last_eigenvalues(callback), expected.detach().numpy(), rtol=1e-4)


def test_the_loss_a_module_names_itself(make_trainer: MakeTrainer) -> None:
    class Named(Regression):
        def hessian_loss(self, batch: Any) -> Tensor:
            return 7 * self.loss(batch)

    def twice(module: Any, batch: Any) -> Tensor:
        return 2 * module.loss(batch)

    for arguments, factor in (({}, 7), ({"loss_fn": twice}, 2)):
        torch.manual_seed(0)
        callback, module = small_callback(num_batches=10, **arguments), Named()
        make_trainer(callback).fit(module, train_loader(), val_loader())
        expected = factor * dense_eigenvalues(module, *TRAIN)[:5]
        np.testing.assert_allclose(last_eigenvalues(callback), expected, rtol=1e-4, atol=1e-6)


def test_linearizing_a_squared_error_does_not_kill_the_run(tmp_path: Path) -> None:
    """In torch 2.13 `torch.func.linearize` of F.mse_loss's gradient is a segmentation fault."""
    code = """
import numpy as np, torch, lightning as L
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader
spectra = []
for hvp in ("autograd", "linearize"):
    torch.manual_seed(0)
    callback = small_callback(hvp=hvp)
    trainer = L.Trainer(
        accelerator="cpu", callbacks=callback, max_epochs=1, logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Regression(), train_loader(shuffle=False), val_loader())
    spectra.append(callback.last_spectrum.eigenvalues)
np.testing.assert_allclose(*spectra, rtol=1e-4)
"""
    run = in_a_fresh_process(code, tmp_path)
    assert run.returncode == 0, f"exit code {run.returncode}\n{run.stderr[-2000:]}"


def test_manual_optimization_with_a_loss(make_trainer: MakeTrainer) -> None:
    callback, module = small_callback(num_batches=10, loss_fn=lambda m, b: m.loss(b)), Manual()
    make_trainer(callback).fit(module, train_loader(), val_loader())
    _assert_spectrum_of(callback, module, TRAIN)


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


# Which loop ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["train", "val", [OTHER[:]]], ids=["train", "val", "list"])
def test_validate_agrees_with_fit(make_trainer: MakeTrainer, data: Any) -> None:
    inference = []

    class Regards(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            inference.append(torch.is_inference_mode_enabled())
            super().validation_step(batch, batch_idx)

    torch.manual_seed(0)
    module = Regards()
    in_fit = small_callback(data=data)
    make_trainer(in_fit).fit(module, datamodule=RegressionData())
    assert not any(inference)
    inference.clear()
    in_validate = small_callback(
        data=data, every_n_validations=EveryNValidations(1, during_validate=True)
    )
    trainer = make_trainer(in_validate)
    (metrics,) = trainer.validate(module, datamodule=RegressionData(), verbose=False)
    assert all(inference)
    assert inference
    np.testing.assert_allclose(last_eigenvalues(in_validate), last_eigenvalues(in_fit), rtol=1e-6)
    assert metrics["hessian/lambda_1"] == pytest.approx(in_fit.history[-1]["lambda_1"], rel=1e-6)
    assert metrics["val_loss"] == pytest.approx(in_fit.history[-1]["val_loss"], rel=1e-6)


def test_validate_after_fit_on_the_same_trainer(make_trainer: MakeTrainer) -> None:
    callback, module = (
        small_callback(every_n_validations=EveryNValidations(1, during_validate=True)),
        seeded_module(),
    )
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, train_loader(), val_loader())
    in_fit, history = last_eigenvalues(callback), callback.history
    trainer.validate(module, val_loader(), verbose=False)
    assert last_eigenvalues(callback) is not in_fit
    np.testing.assert_allclose(last_eigenvalues(callback), in_fit, rtol=1e-6)
    assert callback.history == history


@pytest.mark.parametrize("loop", ["validate", "test"])
def test_measures_nothing_unasked(make_trainer: MakeTrainer, loop: str) -> None:
    callback = small_callback(
        every_n_validations=EveryNValidations(1, during_validate=loop == "test")
    )
    trainer = make_trainer(callback)
    (metrics,) = getattr(trainer, loop)(seeded_module(), val_loader(), verbose=False)
    assert callback.last_spectrum is None
    assert list(metrics) == ["val_loss" if loop == "validate" else "test_loss"]


def test_validate_without_training_data_says_what_to_do(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        small_callback(every_n_validations=EveryNValidations(1, during_validate=True))
    )
    with pytest.raises(ValueError, match=r"data='train'.*give data='val' or a DataLoader"):
        trainer.validate(seeded_module(), val_loader(), verbose=False)


def test_validate_measures_at_every_call_whatever_the_schedule(make_trainer: MakeTrainer) -> None:
    callback = small_callback(
        data="val", every_n_validations=EveryNValidations(100, during_validate=True)
    )
    make_trainer(callback).validate(seeded_module(), val_loader(), verbose=False)
    assert callback.last_spectrum is not None


# Which package -------------------------------------------------------------------------------


@pytest.mark.parametrize("as_list", [True, False], ids=["list", "single"])
def test_pytorch_lightning(tmp_path: Path, as_list: bool) -> None:
    callback = small_callback(num_batches=10)
    torch.manual_seed(0)
    module = PlRegression()
    trainer = pl.Trainer(
        callbacks=[callback] if as_list else callback,
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, train_loader(), val_loader())
    assert len(callback.history) == 2
    _assert_spectrum_of(callback, module, TRAIN)
    assert "hessian/s_hat" in trainer.callback_metrics


def test_pytorch_lightning_logs_nothing_twice(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Speaks(PlRegression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.logger.log_metrics({"spoken": loss.item()}, step=self.global_step)
            return loss

    names = []
    for callbacks in ([], [small_callback()]):
        logger = pl.loggers.CSVLogger(tmp_path, version=str(len(callbacks)))
        trainer = make_trainer(*callbacks, package=pl, logger=logger)
        trainer.fit(Speaks(), train_loader(), val_loader())
        rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("spoken")
        names.append(sum(bool(row.split(",")[column]) for row in rows[1:]))
    assert names == [4, 4]

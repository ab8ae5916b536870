"""The callback with ``matrix="gauss_newton"``: what it logs, and what it does not touch."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.tiny_modules import Regression, RegressionData, samples, small_callback
from support.gauss_newton_oracle import dense_gauss_newton
from torch import Tensor

from lightning_hessian.measure.options import LossOptions


def trained(module: L.LightningModule, *callbacks: L.Callback) -> L.LightningModule:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=RegressionData())
    return module


def regression(kind: type[Regression] = Regression) -> Regression:
    torch.manual_seed(0)
    return kind()


def dense_eigenvalues(module: Any, data: Any) -> np.ndarray:
    """Eigenvalues, descending, of the dense matrix of the mean squared error."""
    matrix = dense_gauss_newton(
        module.net, data[0], lambda z: 2 * torch.eye(len(z), dtype=z.dtype) / len(z)
    )
    return torch.linalg.eigvalsh(matrix).flip(0).numpy()


def test_the_callback_logs_what_it_has_measured_and_leaves_training_alone():
    probe = samples(16, seed=3)[:]
    callback = small_callback(matrix="gauss_newton", layers="layer", data=[probe], num_batches=1)
    plain, measured = trained(regression()), trained(regression(), callback)
    for before, after in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(before, after)
    assert [row["gauss_newton"] for row in callback.history] == [1.0, 1.0]
    expected = dense_eigenvalues(measured, probe)
    np.testing.assert_allclose(callback.last_spectrum.eigenvalues, expected[:5], rtol=1e-3)
    assert callback.history[-1]["lambda_1"] == pytest.approx(expected[0], rel=1e-3)
    assert callback.last_spectrum.matrix_kind == "gauss_newton"
    assert callback.last_blocks.matrix_kind == "gauss_newton"
    assert {one.matrix_kind for one in callback.last_layers.values()} == {"gauss_newton"}


def test_rows_of_the_hessian_say_nothing_of_it():
    callback = small_callback(num_batches=1)
    trained(regression(), callback)
    assert all("gauss_newton" not in row for row in callback.history)


class Handmade(Regression):
    """A squared error written out by hand."""

    def loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()


def test_a_loss_that_cannot_be_split_leaves_training_alone_and_says_what_to_give():
    callback = small_callback(matrix="gauss_newton", num_batches=1, on_error="warn")
    with pytest.warns(UserWarning, match=r"training goes on: .*mse_loss.*outputs_and_loss"):
        measured = trained(regression(Handmade), callback)
    plain = trained(regression(Handmade))
    for before, after in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(before, after)


def test_with_the_split_given_it_is_measured():
    def outputs_and_loss(module: Any, batch: Any) -> Any:
        return module.net(batch[0]), lambda z: (z - batch[1]).square().mean()

    probe = samples(16, seed=3)[:]
    callback = small_callback(
        matrix="gauss_newton",
        loss_options=LossOptions(outputs_and_loss=outputs_and_loss),
        data=[probe],
        num_batches=1,
    )
    expected = dense_eigenvalues(trained(regression(Handmade), callback), probe)
    np.testing.assert_allclose(callback.last_spectrum.eigenvalues, expected[:5], rtol=1e-3)

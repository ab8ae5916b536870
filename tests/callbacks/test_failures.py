"""What cannot be measured costs one clear warning, what cannot be meant is refused at once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.tiny_modules import (
    BATCH,
    FEATURES,
    NUM_PARAMETERS,
    Regression,
    samples,
    small_callback,
    train_loader,
    val_loader,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from lightning_hessian import MeasurementError
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import LossOptions

MakeTrainer = Callable[..., Any]


class SaysNaN(Regression):
    """Its loss turns NaN with the first step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * float("nan")


class Corrupt(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        raise OSError("corrupt image 17.png")


class ForcesAttention(Regression):
    backend = SDPBackend.MATH

    def loss(self, batch: Any) -> Tensor:
        query = self.net[0].weight.view(1, 1, 5, FEATURES)
        with sdpa_kernel(self.backend):
            attended = nn.functional.scaled_dot_product_attention(query, query, query)
        return super().loss(batch) + attended.square().mean()


class ForcesFusedAttention(ForcesAttention):
    backend = SDPBackend.FLASH_ATTENTION


class DetachesItsLoss(Regression):
    def hessian_loss(self, batch: Any) -> Tensor:
        return self.loss(batch).detach()


class ReturnsManyLosses(Regression):
    def hessian_loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square()


class OnceDifferentiable(torch.autograd.Function):
    """A square whose author allows one derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Kernel(torch.autograd.Function):
    """A square whose backward is a kernel that autograd does not see, as flash_attn's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.from_numpy(
            2 * ctx.saved_tensors[0].detach().numpy() * gradient.numpy(force=True)
        )


class Square:
    apply = staticmethod(torch.square)


class Squares(Regression):
    square: Any = Square

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 20 * self.square.apply(self.net[0].weight).square().mean()


class AllowsOneDerivative(Squares):
    square = OnceDifferentiable


class HidesItsBackward(Squares):
    square = Kernel


def concave(module: Any, batch: Any) -> Tensor:
    return -sum(parameter.square().sum() for parameter in module.parameters())


FAILURES: dict[str, tuple[type[Regression], dict[str, Any], str]] = {
    "NaN loss": (SaysNaN, {}, r"loss of probe batch 0 is nan.*lower the learning rate"),
    "empty loader": (
        Regression,
        {"data": DataLoader([], batch_size=BATCH)},
        r"probe data is empty.*([Gg]ive|[Cc]heck)",
    ),
    "data that raise": (Regression, {"data": DataLoader(Corrupt())}, r"OSError.*corrupt image 17"),
    "fused attention": (
        ForcesFusedAttention,
        {"hvp": "autograd"},
        r"fused kernel, which has no double backward.*sdpa_kernel.*MATH",
    ),
    "once_differentiable": (
        AllowsOneDerivative,
        {"hvp": "autograd"},
        r"double backward.*(loss_fn\(module, batch\)|hessian_loss)",
    ),
    "hidden backward": (
        HidesItsBackward,
        {"hvp": "autograd"},
        r"double backward.*(loss_fn\(module, batch\)|hessian_loss)",
    ),
    "detached loss": (DetachesItsLoss, {}, r"carries no gradient.*Return the loss as a tensor"),
    "many losses": (ReturnsManyLosses, {}, r"not a scalar.*Return the mean loss"),
}


def _fit_and_catch(trainer: Any, module: Any) -> list[str]:
    """The warnings of a training that goes on to its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, train_loader(), val_loader())
    assert trainer.global_step == 4 * trainer.max_epochs
    assert trainer.state.finished
    return [str(warning.message) for warning in caught]


def _own_warnings(trainer: Any, reference: Any, module: type[Regression]) -> list[str]:
    """The warnings that a trainer with a callback gives beside those of one without."""
    others = set(_fit_and_catch(reference, module()))
    return [message for message in _fit_and_catch(trainer, module()) if message not in others]


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_warns_once_and_training_goes_on(make_trainer: MakeTrainer, name: str) -> None:
    module, arguments, message = FAILURES[name]
    callback = small_callback(on_error="warn", **arguments)
    trainer = make_trainer(callback)
    (warning,) = _own_warnings(trainer, make_trainer(), module)
    assert re.search(message, warning)
    assert "step 3" in warning
    assert "training goes on" in warning
    assert not [key for key in trainer.callback_metrics if key.startswith("hessian/")]
    assert "val_loss" in trainer.callback_metrics
    assert callback.history == []


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_raises_where_that_is_asked(make_trainer: MakeTrainer, name: str) -> None:
    module, arguments, message = FAILURES[name]
    trainer = make_trainer(small_callback(on_error="raise", **arguments))
    cause = OSError if name == "data that raise" else (MeasurementError, ValueError)
    with pytest.raises(cause, match="corrupt image 17" if cause is OSError else message):
        trainer.fit(module(), train_loader(), val_loader())


@pytest.mark.parametrize(
    ("module", "exact"),
    [
        (ForcesFusedAttention, ForcesAttention),
        (AllowsOneDerivative, Squares),
        (HidesItsBackward, Squares),
    ],
)
def test_without_a_second_derivative_differences_serve(
    make_trainer: MakeTrainer, module: type[Regression], exact: type[Regression]
) -> None:
    """By default, and with a warning: an eigenvalue may be inexact, but not silently wrong."""
    spectra = []
    for each in (exact, module):
        L.seed_everything(3, verbose=False)
        callback = small_callback(num_batches=10)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(callback).fit(each(), train_loader(), val_loader())
        assert callback.last_spectrum is not None
        spectra.append(callback.last_spectrum.eigenvalues)
    np.testing.assert_allclose(spectra[1], spectra[0], rtol=2e-2, atol=1e-3)
    (warning,) = {str(w.message) for w in caught if "inite differences" in str(w.message)}
    assert "double backward" in warning


def test_no_positive_eigenvalue(make_trainer: MakeTrainer) -> None:
    callback = small_callback(on_error="warn", loss_fn=concave)
    trainer = make_trainer(callback)
    (warning,) = _own_warnings(trainer, make_trainer(), Regression)
    assert re.search(r"[Nn]o power law .*positive", warning)
    (row,) = callback.history
    assert row["lambda_1"] == pytest.approx(-2)
    assert abs(row["trace"] + 2 * NUM_PARAMETERS) <= 4 * row["trace_std_error"]
    absent = {"d_ks", "d_c", "power_law", "p_value", "beta_hat", "beta_sigma", "s_hat"}
    absent |= {"eigengap_d_ks", "eigengap_s_hat"}
    assert not absent & row.keys()
    logged = {key.removeprefix("hessian/") for key in trainer.callback_metrics}
    assert not absent & logged
    assert "lambda_1" in logged


def test_the_warning_comes_at_the_measurement_that_failed(make_trainer: MakeTrainer) -> None:
    """Some measurements fail, the others are kept and correlated."""

    class FailsAtTimes(Regression):
        def hessian_loss(self, batch: Any) -> Tensor:
            if self.current_epoch in (1, 4):
                raise ArithmeticError("an epoch without a Hessian")
            return self.loss(batch)

    callback = small_callback(on_error="warn", num_eigenvalues=8)
    trainer = make_trainer(callback, max_epochs=6)
    found = _own_warnings(trainer, make_trainer(max_epochs=6), FailsAtTimes)
    found = [message for message in found if "power_law is left out: 8 values" not in message]
    assert [re.findall(r"step (\d+)", message) for message in found] == [["7"], ["19"]]
    assert all("ArithmeticError: an epoch without a Hessian" in message for message in found)
    assert [row["epoch"] for row in callback.history] == [0, 2, 3, 5]
    assert {found.num_points for found in callback.correlations().values()} == {4}


def test_a_failed_measurement_is_not_logged_again(make_trainer: MakeTrainer) -> None:
    """`callback_metrics` keeps old values, a logger must not get them as new ones."""

    class Logged(L.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                rows.append(set(trainer._results.metrics(on_step=False)["log"]))

    def fails_later(module: Any, batch: Any) -> Tensor:
        if module.current_epoch == 1:
            raise ArithmeticError
        return module.loss(batch)

    rows: list[set[str]] = []
    callback = small_callback(on_error="warn", loss_fn=fails_later)
    _fit_and_catch(make_trainer(callback, Logged(), max_epochs=3), Regression())
    assert ["hessian/lambda_1" in row for row in rows] == [True, False, True]


def test_unconverged_eigenvalues_are_said_to_be(make_trainer: MakeTrainer) -> None:
    callback = small_callback(num_eigenvalues=8, time_budget=Budget(products=13))
    found = _own_warnings(make_trainer(callback), make_trainer(), Regression)
    (warning,) = [message for message in found if "eigenvalues converged" in message]
    assert re.search(r"\d of 8 .*allow more or lower num_eigenvalues", warning)
    (row,) = callback.history
    assert row["num_converged"] < 8
    assert row["num_fitted"] <= row["num_converged"]
    assert row["num_hvps"] <= 13


def test_data_of_another_size_of_batch_are_refused_with_a_remedy(
    make_trainer: MakeTrainer,
) -> None:
    """Tensors of different first dimensions do not say how many samples a batch has."""
    inputs, targets = samples(16, seed=1).tensors
    ragged = [(inputs[:8], targets[:8], torch.zeros(3)), (inputs[8:], targets[8:], torch.zeros(3))]
    trainer = make_trainer(small_callback(data=ragged, on_error="warn"))
    (warning,) = _own_warnings(trainer, make_trainer(), Regression)
    assert re.search(r"number of samples.*Give batch_weight", warning)
    callback = small_callback(
        data=ragged, loss_options=LossOptions(batch_weight=lambda batch: len(batch[0]))
    )
    make_trainer(callback).fit(Regression(), train_loader(), val_loader())
    assert len(callback.history) == 1

"""Misuse of the callback is refused before training, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from callbacks.tiny_modules import (
    Regression,
    small_callback,
    train_loader,
    val_loader,
)
from torch import Tensor

from lightning_hessian import HessianSpectrumCallback
from lightning_hessian.callbacks.schedule import EveryNValidations
from lightning_hessian.measure.blocks import BlocksInstrument
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.options import LossOptions, PooledSLQ
from lightning_hessian.measure.spectrum import SpectrumInstrument

MakeTrainer = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_eigenvalues": 0}, "num_eigenvalues=0"),
        ({"hvp": "magic"}, r"hvp='magic'.*linearize"),
        ({"data": "training"}, r"data='training'.*'train', 'val'"),
        ({"data": []}, "data=.* no batch"),
        ({"data": iter(train_loader())}, r"is an iterator.*Give a DataLoader or a list"),
        ({"on_error": "ignore"}, r"on_error='ignore'.*'warn'"),
        ({"tol": 0.0}, "tol=0"),
        ({"tol": -1e-3}, "tol=-0.001"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"time_budget": Budget(products=3)}, r"budget=.*products=3.*too small.*Raise it"),
        ({"instruments": [SpectrumInstrument(trace_probes=1)]}, r"trace_probes=1.*at least 2"),
        ({"num_batches": 0}, "num_batches=0"),
        ({"every_n_validations": 0}, "every_n_validations=0.*at least 1"),
        ({"every_n_validations": 1.5}, "every_n_validations=1.5"),
        ({"time_budget": 0.0}, "time_budget=0"),
        ({"time_budget": -5}, "time_budget=-5"),
        ({"time_budget": 600}, r"time_budget=600.*share.*Budget\(products=..., seconds=...\)"),
        ({"significance": 1.5}, "significance=1.5"),
        ({"loss_fn": "mse"}, r"loss_fn='mse'.*loss_fn\(module, batch\)"),
        (
            {"parameters": "nothing.*"},
            r"'nothing.\*' matches no parameter.*net\.[02]\.(weight|bias)",
        ),
        ({"parameters": []}, r"parameters=\[\].*selects nothing"),
        ({"parameters": lambda name, parameter: False}, "accepts none of"),
        ({"num_eigenvalues": 32}, r"num_eigenvalues=32.*31 numbers.*1 to 31"),
        ({"num_eigenvalues": 7, "parameters": "net.2.*"}, r"num_eigenvalues=7.*1 to 6"),
    ],
)
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_misuse_is_refused_before_training(
    make_trainer: MakeTrainer, on_error: str, arguments: dict[str, Any], message: str
) -> None:
    made = []

    def use() -> None:
        callback = HessianSpectrumCallback(
            **{"num_eigenvalues": 5, "on_error": on_error, **arguments}
        )
        made.append(make_trainer(callback))
        made[0].fit(Regression(), train_loader(), val_loader())

    with pytest.raises(ValueError, match=message):
        use()
    assert all(trainer.global_step == 0 for trainer in made)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossOptions(mode="evaluation"), r"mode='evaluation'.*'eval'"),
        (lambda: Budget(products=0), "products=0"),
        (lambda: Budget(share=1.5), r"share=1.5.*below 1"),
        (lambda: PooledSLQ(num_runs=0), "num_runs=0"),
        (lambda: SpectrumInstrument(num_eigenvalues=0), "num_eigenvalues=0"),
        (lambda: SpectrumInstrument(tol=-1.0), "tol=-1"),
        (lambda: BlocksInstrument(rel_error=0), "rel_error=0"),
        (lambda: BlocksInstrument("layers"), r"blocks='layers'.*one of layer"),
    ],
)
def test_options_and_instruments_are_checked_where_they_are_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Manual(Regression):
    automatic_optimization = False


class HasNoTrainingLoss(Regression):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Manual, r"optimises manually.*Give loss_fn\(module, batch\).*hessian_loss"),
        (HasNoTrainingLoss, r"dataloader_iter.*Give loss_fn\(module, batch\).*hessian_loss"),
    ],
)
@pytest.mark.parametrize("loop", ["fit", "validate"])
def test_a_module_without_a_loss_is_refused(
    make_trainer: MakeTrainer, module: type[Regression], message: str, loop: str
) -> None:
    trainer = make_trainer(
        small_callback(
            on_error="warn", every_n_validations=EveryNValidations(1, during_validate=True)
        )
    )
    loaders = [train_loader(), val_loader()] if loop == "fit" else [val_loader()]
    with pytest.raises(ValueError, match=message):
        getattr(trainer, loop)(module(), *loaders)
    assert trainer.global_step == 0

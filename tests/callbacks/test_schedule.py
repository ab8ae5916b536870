"""When the callback measures, and how long it may take."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader
from support.callbacks import with_spectrum
from torch import Tensor

from lightning_hessian import AtSteps, EveryNValidations
from lightning_hessian.callbacks import measuring
from lightning_hessian.measure.budget import Budget

MakeTrainer = Callable[..., Any]


def _fit(make_trainer: MakeTrainer, callback: Any, **arguments: Any) -> list[int]:
    """Trains six epochs of four steps, and returns how many were made at each measurement."""
    trainer = make_trainer(callback, **{"max_epochs": 6, **arguments})
    trainer.fit(Regression(), train_loader(), val_loader())
    return [int(row["step"]) + 1 for row in callback.history]


class WhenTheStepDoubles:
    """A schedule of the user's own."""

    def __repr__(self) -> str:
        return "WhenTheStepDoubles()"

    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        return last_step is None or step >= 2 * last_step


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (1, [4, 8, 12, 16, 20, 24]),
        (2, [8, 16, 24]),
        (4, [16]),
        (EveryNValidations(3), [12, 24]),
        (AtSteps([1, 9, 10, 24, 1000]), [4, 12, 24]),
        (AtSteps([0]), [4]),
        (WhenTheStepDoubles(), [4, 8, 16]),
    ],
    ids=str,
)
def test_steps_of_the_measurements(
    make_trainer: MakeTrainer, schedule: Any, steps: list[int]
) -> None:
    assert _fit(make_trainer, small_callback(every_n_validations=schedule)) == steps


def test_validations_count_not_epochs(make_trainer: MakeTrainer) -> None:
    callback = small_callback(every_n_validations=2)
    assert _fit(make_trainer, callback, val_check_interval=0.25, max_epochs=2) == [2, 4, 6, 8]
    callback = small_callback(every_n_validations=2)
    assert _fit(make_trainer, callback, check_val_every_n_epoch=2) == [16]


def test_optimizer_steps_under_accumulation(make_trainer: MakeTrainer) -> None:
    callback = small_callback(every_n_validations=AtSteps([3]))
    assert _fit(make_trainer, callback, accumulate_grad_batches=4) == [3]


def test_the_sanity_check_measures_nothing(make_trainer: MakeTrainer) -> None:
    validations = []

    class Counts(Regression):
        def on_validation_epoch_end(self) -> None:
            validations.append(callback.last_spectrum)

    callback = small_callback(every_n_validations=2)
    trainer = make_trainer(callback, num_sanity_val_steps=2, max_epochs=2)
    trainer.fit(Counts(), train_loader(), val_loader())
    # The sanity check does not count as a validation either.
    assert [spectrum is not None for spectrum in validations] == [False, False, True]


def test_fast_dev_run(make_trainer: MakeTrainer) -> None:
    callback = small_callback(num_batches=4)
    assert _fit(make_trainer, callback, fast_dev_run=True) == [1]
    assert callback.history[0]["d_ks"] > 0


def test_barebones_warns_and_measures_nothing(make_trainer: MakeTrainer) -> None:
    callback = small_callback()
    barebones = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), None
    )
    with pytest.warns(UserWarning, match="barebones") as caught:
        steps = _fit(
            make_trainer,
            callback,
            barebones=True,
            log_every_n_steps=None,
            max_epochs=2,
            **barebones,
        )
    ours = [str(w.message) for w in caught if "HessianSpectrumCallback" in str(w.message)]
    assert len(ours) == 1
    assert steps == []
    assert callback.last_spectrum is None


# Time ----------------------------------------------------------------------------------------


class Slow(Regression):
    """Training takes time, four times ``seconds`` in an epoch; measuring takes none of it."""

    seconds = 0.02

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.training:
            time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


class Slower(Slow):
    seconds = 0.25


def slow_loss(module: Any, batch: Any) -> Tensor:
    time.sleep(0.05)
    return module.loss(batch)


def _warnings(
    make_trainer: MakeTrainer, callback: Any, module: type[Slow] = Slow, **arguments: Any
) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callback, **arguments).fit(module(), train_loader(), val_loader())
    return [str(warning.message) for warning in caught]


def test_a_costly_measurement_says_so_once(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_COSTLY_SECONDS", 0.0)
    callback = with_spectrum(
        num_eigenvalues=5, num_batches=1, loss_fn=slow_loss, hvp="recompute",
        time_budget=Budget(products=8), on_error="raise", figures=None,
    )  # fmt: skip
    messages = _warnings(make_trainer, callback, max_epochs=3)
    assert len(callback.history) == 3
    (message,) = [message for message in messages if "time_budget" in message]
    assert "Give time_budget=0.2" in message


def test_a_cheap_measurement_says_nothing_of_its_cost(make_trainer: MakeTrainer) -> None:
    callback = with_spectrum(num_eigenvalues=3, num_batches=1, figures=None)
    messages = _warnings(make_trainer, callback, Slower)
    assert len(callback.history) == 1
    assert not [message for message in messages if "time_budget" in message]


def test_a_schedule_continues_after_a_resume(make_trainer: MakeTrainer, tmp_path: Any) -> None:
    torch.manual_seed(0)
    first = small_callback(every_n_validations=2)
    trainer = make_trainer(first, max_epochs=3)
    trainer.fit(Regression(), train_loader(), val_loader())
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    second = small_callback(every_n_validations=2)
    make_trainer(second, max_epochs=4).fit(
        Regression(), train_loader(), val_loader(), ckpt_path=tmp_path / "three.ckpt"
    )
    assert [row["epoch"] for row in second.history] == [1, 3]

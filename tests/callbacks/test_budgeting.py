"""The budget keeps its word: whole measurements or none, the last always, within the share."""

from __future__ import annotations

import csv
import itertools
import logging
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_hessian import (
    Absent,
    AtSteps,
    EveryNValidations,
    HessianSpectrumCallback,
    Scalars,
)
from lightning_hessian.measure.budget import Budget

MakeTrainer = Callable[..., Any]


def test_each_fit_has_an_account_of_its_own(make_trainer: MakeTrainer) -> None:
    """A callback that is used again knows nothing of what another module took."""
    callback = costly()
    assert fit(make_trainer, callback, max_epochs=3)[-1] == 12
    before = callback._budgeting.account
    assert fit(make_trainer, callback, max_epochs=2)[-1] == 8
    assert callback._budgeting.account is not before
    assert callback._budgeting.account.made == 1


# Fits ---------------------------------------------------------------------------------------------


class Slow(Regression):
    """Training takes time, measuring takes none of it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.training:
            time.sleep(0.02)
        return super().training_step(batch, batch_idx)


class Slower(Slow):
    """An epoch takes two seconds, so that a busy machine hardly counts."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.training:
            time.sleep(0.5)
        return super().training_step(batch, batch_idx)


def slow_loss(module: Any, batch: Any) -> Tensor:
    time.sleep(0.02)
    return module.loss(batch)


def costly(**arguments: Any) -> HessianSpectrumCallback:
    """Returns a callback whose measurement takes about as long as ten epochs."""
    given = {"loss_fn": slow_loss, "hvp": "recompute", "num_batches": 1, "blocks": None}
    return small_callback(**{"time_budget": 0.2, **given, **arguments})


def fit(
    make_trainer: MakeTrainer, callback: Any, *others: Any, module: Any = None, **arguments: Any
) -> list[int]:
    """Trains epochs of four steps, and returns how many were made at each measurement."""
    trainer = make_trainer(*others, callback, **{"max_epochs": 6, **arguments})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module or Slow(), train_loader(), val_loader())
    return [int(row["step"]) + 1 for row in callback.history]


def test_a_run_that_pays_for_none_has_the_last(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    callback = costly()
    with caplog.at_level(logging.INFO):
        assert fit(make_trainer, callback) == [24]
    said = [record.getMessage() for record in caplog.records if "Hessian" in record.getMessage()]
    forecast, summary = said
    assert "A whole measurement takes about" in forecast
    assert "time_budget=0.2 pays for 1, the last one included" in forecast
    assert "num_eigenvalues (5)" in forecast
    assert "1 of 6 due validations were measured" in summary
    row = callback.history[0]
    assert row["num_converged"] == 5
    assert {"val_loss", "gap"} <= row.keys()


@pytest.mark.parametrize("epochs", [6, 20])
def test_measurements_keep_within_their_share(epochs: int, make_trainer: MakeTrainer) -> None:
    callback = small_callback(time_budget=0.3, num_batches=1, blocks=None)
    steps = fit(make_trainer, callback, max_epochs=epochs)
    assert steps[-1] == 4 * epochs
    *others, _ = [row["seconds"] for row in callback.history]
    trained = callback._budgeting.account.trained
    assert sum(others) <= 1.1 * 0.3 * trained


def test_measurements_that_cost_next_to_nothing_are_all_made(make_trainer: MakeTrainer) -> None:
    callback = small_callback(time_budget=0.9, blocks=None)
    assert fit(make_trainer, callback, module=Slower(), max_epochs=3) == [4, 8, 12]


@pytest.mark.parametrize("schedule", [EveryNValidations(5), AtSteps([1000])], ids=str)
def test_the_last_is_measured_whatever_the_schedule(
    schedule: Any, make_trainer: MakeTrainer
) -> None:
    assert fit(make_trainer, costly(every_n_validations=schedule))[-1:] == [24]


def test_a_measurement_that_fails_is_paid_for_too(make_trainer: MakeTrainer) -> None:
    """One that fails at every validation does not cost more than the budget allows."""
    calls = []

    def fails_late(module: Any, batch: Any) -> Tensor:
        time.sleep(0.02)
        calls.append(module.trainer.current_epoch)
        if len(calls) > 30:
            raise ArithmeticError("no number")
        return module.loss(batch)

    callback = costly(loss_fn=fails_late, on_error="warn", time_budget=0.01)
    assert fit(make_trainer, callback, max_epochs=8) == []
    assert set(calls) <= {0, 7}


def test_without_a_budget_the_schedule_decides(make_trainer: MakeTrainer) -> None:
    callback = small_callback(every_n_validations=4, time_budget=None)
    assert fit(make_trainer, callback) == [16]


def test_an_end_that_nobody_foresaw_is_caught_up_in_one_row(
    make_trainer: MakeTrainer, tmp_path: Any
) -> None:
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    callback = costly()
    logger = CSVLogger(tmp_path, name="run", version="")
    assert fit(make_trainer, callback, stop, logger=logger) == [8]
    row = callback.history[0]
    assert row["epoch"] == 1
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    found = [dict(zip(names, line.split(","), strict=True)) for line in rows[1:]]
    (late,) = [one for one in found if one["hessian/lambda_1"] and one["val_loss"]]
    assert float(late["hessian/lambda_1"]) == pytest.approx(row["lambda_1"], rel=1e-5)
    assert float(late["val_loss"]) == pytest.approx(row["val_loss"], rel=1e-5)
    assert int(late["step"]) == row["step"]
    of_it = [one for one in found if int(one["step"]) == row["step"] and one["val_loss"]]
    assert len(of_it) == 2  # that of Lightning, and this one


def test_a_validation_that_cannot_be_caught_up_is_told(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    class Stops(Slow):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            if self.trainer.current_epoch == 3 and batch_idx == 2:
                self.trainer.should_stop = True
            return None

    callback = costly(time_budget=0.2)
    with caplog.at_level(logging.INFO):
        steps = fit(make_trainer, callback, module=Stops(), check_val_every_n_epoch=3)
    assert steps == []
    assert "the last validation was not measured: the run went on for 3 more steps" in caplog.text


def test_weights_are_the_same_when_the_last_is_caught_up(make_trainer: MakeTrainer) -> None:
    ends = []
    for callbacks in ([], [costly()]):
        torch.manual_seed(0)
        module = Slow()
        stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
        make_trainer(*callbacks, stop, max_epochs=6).fit(module, train_loader(), val_loader())
        ends.append([parameter.detach().clone() for parameter in module.parameters()])
        ends[-1].append(torch.rand(3))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_measurement_that_its_seconds_would_cut_is_not_begun(make_trainer: MakeTrainer) -> None:
    callback = costly(time_budget=Budget(seconds=0.05))
    trainer = make_trainer(callback, max_epochs=2)
    with pytest.warns(UserWarning, match="measures nothing: a whole measurement takes about"):
        trainer.fit(Slow(), train_loader(), val_loader())
    assert callback.history == []


def test_a_measurement_that_was_cut_short_is_no_row(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the allowance jumps, where the estimate was fine."""
    from lightning_hessian.linear import allowance

    callback = small_callback(time_budget=Budget(seconds=60), blocks=None, on_error="warn")
    jumps = itertools.count(time.monotonic(), 4.0)
    monkeypatch.setattr(allowance, "time", SimpleNamespace(monotonic=lambda: next(jumps)))
    trainer = make_trainer(callback, max_epochs=1)
    with pytest.warns(UserWarning, match=r"time was up after .* nothing.*Budget\(seconds=60\)"):
        trainer.fit(Regression(), train_loader(), val_loader())
    assert callback.history == []


# What takes a few products --------------------------------------------------------------------


class Cheap:
    """An instrument of one gradient, in the place of the built-in one of few products."""

    name, prefix = "stability", "cheap"

    def __init__(self) -> None:
        self.sizes: list[float] = []
        self.fails = self.is_absent = False

    def check(self, model: Any) -> None:
        """Fits every model."""

    def cost(self, session: Any) -> int:
        """A gradient is about one product."""
        return 1

    def measure(self, session: Any, allowance: Any) -> Scalars | Absent:
        """Return the length of the gradient."""
        if self.is_absent:
            return Absent(("There is no length at all.",))
        if self.fails:
            raise ArithmeticError("no length today")
        self.sizes.append(float(session.shard.norm(session.gradient())))
        return Scalars({"gradient": self.sizes[-1]})


def test_a_few_products_are_measured_between_whole_measurements(
    make_trainer: MakeTrainer, tmp_path: Any
) -> None:
    ends = []
    for instruments in (None, [Cheap()]):
        torch.manual_seed(0)
        module = Slower()
        given = {"num_batches": 10, "time_budget": 0.3}
        callbacks = [] if instruments is None else [costly(instruments=instruments, **given)]
        logger = CSVLogger(tmp_path / str(len(ends)), flush_logs_every_n_steps=1)
        trainer = make_trainer(*callbacks, max_epochs=4, logger=logger)
        trainer.fit(module, train_loader(), val_loader())
        ends.append([parameter.detach().clone() for parameter in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    (callback,), (cheap,) = callbacks, instruments or []
    assert [int(row["step"]) for row in callback.history] == [15]  # the whole one, at the end
    with open(next((tmp_path / "1").rglob("metrics.csv"))) as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["cheap/gradient"]) for row in rows if row["cheap/gradient"]]
    assert logged == pytest.approx(cheap.sizes, rel=1e-6)
    assert len(logged) >= 3  # beside the whole one
    whole = [row for row in rows if row["hessian/lambda_1"]]
    assert len(whole) == 1
    for row in rows:  # in the rows of the validation metrics
        assert bool(row["val_loss"]) >= bool(row["cheap/gradient"])


def test_what_is_absent_among_them_is_told_once(make_trainer: MakeTrainer) -> None:
    cheap = Cheap()
    cheap.is_absent = True
    trainer = make_trainer(costly(instruments=[cheap], time_budget=0.3), max_epochs=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Slower(), train_loader(), val_loader())
    (said,) = [str(w.message) for w in caught if "no length" in str(w.message)]
    assert said == "Step 3: There is no length at all."  # between whole measurements


def test_a_failure_among_them_is_told_and_training_goes_on(make_trainer: MakeTrainer) -> None:
    cheap = Cheap()
    cheap.fails = True
    callback = costly(instruments=[cheap], on_error="warn")
    trainer = make_trainer(callback, max_epochs=6)
    with pytest.warns(UserWarning, match="No statistics of stability: .*no length today"):
        trainer.fit(Slow(), train_loader(), val_loader())
    assert trainer.global_step == 24
    assert [int(row["step"]) for row in callback.history] == [23]

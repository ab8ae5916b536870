"""The budget keeps its word: whole measurements or none, the last always, within the share."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_hessian import (
    Absent,
    AtSteps,
    EveryNValidations,
    HessianSpectrumCallback,
    Scalars,
)
from lightning_hessian.callbacks.account import Account
from lightning_hessian.callbacks.run_length import is_last_validation, share_done
from lightning_hessian.measure.budget import Budget

MakeTrainer = Callable[..., Any]


# The account, by hand ---------------------------------------------------------------------------


def account(share: float | None = 0.1, **given: Any) -> Account:
    return Account(Budget(share=share), **given)


def test_nothing_is_asked_before_a_product_was_timed_or_without_a_bound() -> None:
    assert account().allows(done=0.1, last=False)
    assert account(None, estimate=1e9, trained=1.0).allows(done=0.1, last=False)


@pytest.mark.parametrize(
    ("done", "allowed"),
    [(0.1, True), (0.51, False), (None, False)],  # the run pays for 10, for 1.96, for nobody knows
)
def test_the_first_is_made_on_credit_where_the_run_pays_for_the_last_too(
    done: float | None, allowed: bool
) -> None:
    found = account(trained=100.0, estimate=10.0 if done != 0.1 else 10.1)
    found.pay(0.001)
    assert found.allows(done=done, last=False) == allowed


def test_between_first_and_last_a_measurement_is_made_once_it_is_saved_up() -> None:
    found = account(trained=10.0, estimate=2.0)
    assert found.allows(done=0.05, last=False)
    found.pay(2.0)
    found.measured(2.0)
    for trained, allowed in ((39.0, False), (40.0, True)):
        found.trained = trained
        assert found.allows(done=0.05, last=False) == allowed
        assert found.allows(done=0.05, last=True)


@pytest.mark.parametrize("num_validations", [6, 20, 200])
@pytest.mark.parametrize("seconds", [0.05, 0.3, 2.0, 30.0])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_share_is_kept_but_for_the_last(
    num_validations: int, seconds: float, noise: float
) -> None:
    """A fit by a clock of our own, with epochs of a second: at most 10 % over before the last."""
    generator = torch.Generator().manual_seed(0)
    found = account(0.2, estimate=seconds)
    for validation in range(1, num_validations + 1):
        found.earn(1.0)
        last = validation == num_validations
        if last:
            assert found.spent <= 1.1 * 0.2 * num_validations
        if found.allows(done=validation / num_validations, last=last):
            taken = seconds * (1 + noise * float(torch.rand((), generator=generator)))
            found.pay(taken)
            found.measured(taken)
        else:
            assert not last
    affordable = 0.2 * num_validations / (seconds * (1 + noise))
    assert found.made >= min(num_validations, max(1, math.floor(affordable)))


def test_a_clock_that_is_set_back_earns_and_costs_nothing() -> None:
    found = account(trained=5.0, spent=0.1)
    found.earn(-3.0)
    found.pay(-3.0)
    assert (found.trained, found.spent) == (5.0, 0.1)


def test_an_account_goes_on_after_a_checkpoint() -> None:
    found = account(trained=5.0, spent=0.25, made=2)
    resumed = Account.checked(found.budget, found.state_dict())
    assert (resumed.trained, resumed.spent, resumed.made) == (5.0, 0.25, 2)


@pytest.mark.parametrize("bad", [-1.0, math.nan, "1", None, True])
def test_a_damaged_account_is_refused(bad: Any) -> None:
    state = {**account().state_dict(), "spent": bad}
    with pytest.raises(ValueError, match="spent="):
        Account.checked(Budget(share=0.1), state)


# How long a fit is, by Lightning itself -----------------------------------------------------------


class Asks(Regression):
    """Notes at every validation what is foreseen, and at the end which was the last."""

    def __init__(self) -> None:
        super().__init__()
        self.foreseen: list[bool] = []
        self.done: list[float | None] = []

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.foreseen.append(is_last_validation(self.trainer))
            self.done.append(share_done(self.trainer))


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 1},
        {"max_epochs": 5},
        {"max_epochs": 5, "check_val_every_n_epoch": 2},
        {"max_epochs": 6, "check_val_every_n_epoch": 3},
        {"max_epochs": 3, "val_check_interval": 0.5},
        {"max_epochs": 3, "val_check_interval": 3},
        {"max_epochs": 4, "val_check_interval": 3, "check_val_every_n_epoch": 2},
        {"max_epochs": 3, "val_check_interval": 5, "check_val_every_n_epoch": None},
        {"max_steps": 10},
        {"max_steps": 10, "max_epochs": -1},
        {"max_steps": 9, "val_check_interval": 2},
        {"max_steps": 5, "accumulate_grad_batches": 2},
        {"max_epochs": 3, "limit_train_batches": 3},
        {"max_epochs": 3, "accumulate_grad_batches": 3},
        {"fast_dev_run": True},
    ],
    ids=str,
)
def test_the_last_validation_is_foreseen(
    arguments: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    module = Asks()
    make_trainer(**arguments).fit(module, train_loader(), val_loader())
    assert module.foreseen == [False] * (len(module.foreseen) - 1) + [True]
    shares = [done for done in module.done if done is not None]
    assert shares == sorted(shares)
    assert len(shares) == len(module.foreseen)
    assert shares[0] > 0
    assert shares[-1] <= 1


class Stream(IterableDataset[Any]):
    """The training samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(train_loader().dataset)


@pytest.mark.parametrize("each", [1, 2])
def test_the_last_validation_of_data_without_a_length(each: int, make_trainer: MakeTrainer) -> None:
    module = Asks()
    trainer = make_trainer(max_epochs=4, check_val_every_n_epoch=each)
    trainer.fit(module, DataLoader(Stream(), batch_size=8), val_loader())
    assert module.foreseen == [False] * (4 // each - 1) + [True]
    assert module.done == pytest.approx([epoch / 4 for epoch in range(each, 5, each)])


class TwoSteps(Asks):
    """Optimizes by hand, twice a batch: its steps are twice its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


@pytest.mark.parametrize("arguments", [{"max_epochs": 3}, {"max_steps": 20}], ids=str)
def test_the_last_validation_of_a_module_that_steps_twice(
    arguments: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    module = TwoSteps()
    make_trainer(**{"max_epochs": -1, **arguments}).fit(module, train_loader(), val_loader())
    assert module.foreseen == [False] * (len(module.foreseen) - 1) + [True]


@pytest.mark.parametrize("data", [train_loader, lambda: DataLoader(Stream(), batch_size=8)])
def test_validations_by_the_clock_are_asked_about(
    data: Callable[[], Any], make_trainer: MakeTrainer
) -> None:
    """Whether another comes is not known, unless there is no batch left for it."""
    module = Asks()
    trainer = make_trainer(max_epochs=2, val_check_interval="00:00:00:00")
    trainer.fit(module, data(), val_loader())
    assert module.foreseen
    assert not any(module.foreseen[:-1])


def test_a_stop_before_min_epochs_is_no_end(make_trainer: MakeTrainer) -> None:
    module = Asks()
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    make_trainer(stop, max_epochs=9, min_epochs=5).fit(module, train_loader(), val_loader())
    assert len(module.foreseen) == 5
    assert not any(module.foreseen)


def test_each_fit_has_an_account_of_its_own(make_trainer: MakeTrainer) -> None:
    """A callback that is used again knows nothing of what another module took."""
    callback = costly()
    assert fit(make_trainer, callback, max_epochs=3)[-1] == 12
    before = callback._budgeting.account
    assert fit(make_trainer, callback, max_epochs=2)[-1] == 8
    assert callback._budgeting.account is not before
    assert callback._budgeting.account.made == 1


def test_a_run_without_an_end_has_no_last_validation(make_trainer: MakeTrainer) -> None:
    module = Asks()
    stop = EarlyStopping("val_loss", patience=2, min_delta=1e9)
    make_trainer(stop, max_epochs=-1).fit(module, train_loader(), val_loader())
    assert module.foreseen == [False] * 3
    assert module.done == [None] * 3


def test_the_end_of_the_time_is_seen_at_the_validation_it_brings(make_trainer: MakeTrainer) -> None:
    module = Asks()
    trainer = make_trainer(max_time={"seconds": 1}, max_epochs=-1, val_check_interval=2)
    trainer.fit(module, train_loader(), val_loader())
    assert not any(module.foreseen[:-1])
    assert all(done is not None and 0 < done <= 1 for done in module.done)


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


def test_few_products_take_half_of_what_is_earned_at_most() -> None:
    found = account(0.2, estimate=50.0, estimate_of_few=0.07)
    made = 0
    for _ in range(100):
        found.earn(1.0)
        if found.allows_few():
            found.pay_few(0.07)
            made += 1
            assert found.spent_on_few <= 0.1 * found.trained
    assert made == 100
    assert found.saved == pytest.approx(20 - 100 * 0.07)
    found.estimate_of_few = 3.1  # more than half of 20 has left
    assert not found.allows_few()
    assert not account(0.2, estimate=5.0, trained=100.0).allows_few()  # there are none
    assert not account(None, estimate_of_few=0.1, trained=100.0).allows_few()


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

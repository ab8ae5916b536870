"""What follows a measurement costs no run: loggers, folders, schedules, figures, damaged state."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from lightning_hessian import HessianSpectrumCallback

MakeTrainer = Callable[..., Any]
EPOCHS = 5


class Quiet(Logger):
    """Takes everything; what is derived from it fails somewhere."""

    name, version, save_dir = "quiet", 0, None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


class RefusesCorrelations(Quiet):
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(key.startswith(("correlation/", "hessian/gap")) for key in metrics):
            raise ConnectionError("503")


class HasNoFolder(Quiet):
    @property
    def log_dir(self) -> str:
        raise RuntimeError("log_dir is not ready")


class WandbLogger(Quiet):
    """Speaks as W&B's does, and is not connected."""

    @property
    def experiment(self) -> Any:
        return Unconnected()


class Unconnected:
    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("no network")


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class IsNeverDue:
    def is_due(self, validation: int, step: int, last_step: int | None) -> bool:
        raise KeyError("schedule")


class AnswersInTensors:
    def is_due(self, validation: int, step: int, last_step: int | None) -> Any:
        return torch.ones(2)


def silent_loss(module: Any, batch: Any) -> Tensor:
    raise SilentError


def _raising(error: Exception) -> Callable[..., Any]:
    def act(*args: Any, **kwargs: Any) -> Any:
        raise error

    return act


def _with(name: str, error: Exception) -> Callable[[HessianSpectrumCallback], None]:
    return lambda callback: setattr(callback, name, _raising(error))


def _bar(callback: HessianSpectrumCallback) -> None:
    callback._new_progress = _raising(OSError("no terminal"))  # type: ignore[method-assign]


class LogsNothing(Regression):
    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        if any(key.startswith("hessian/") for key in dictionary):
            raise ValueError("twice with other arguments")
        super().log_dict(dictionary, *args, **kwargs)


FAULTS: dict[str, dict[str, Any]] = {
    "a logger refuses correlations": {"logger": RefusesCorrelations()},
    "a logger's folder": {"figures": 10, "logger": HasNoFolder()},
    "a logger is not connected": {"figures": 10, "logger": WandbLogger()},
    "one of two loggers": {"logger": [RefusesCorrelations(), Quiet()]},
    "the schedule raises": {"arguments": {"every_n_validations": IsNeverDue()}},
    "the schedule's answer": {"arguments": {"every_n_validations": AnswersInTensors()}},
    "an exception without text": {"arguments": {"loss_fn": silent_loss}},
    "correlating": {"change": _with("correlations", ValueError("no"))},
    "encoding the spectrum": {"figures": 10, "change": _with("spectrum_code", OverflowError("no"))},
    "making figures": {"figures": 10, "change": _with("drawings", SilentError())},
    "drawing a figure": {
        "figures": 10,
        "change": lambda c: setattr(c, "drawings", lambda: {"rank": _raising(SilentError())}),
    },
    "the progress bar": {"change": _bar},
    "logging the statistics": {"module": LogsNothing},
}


def _fit(make_trainer: MakeTrainer, fault: dict[str, Any], on_error: str) -> tuple[Any, list[str]]:
    L.seed_everything(3, verbose=False)
    figures = fault.get("figures")
    callback = small_callback(figures=figures, on_error=on_error, **fault.get("arguments", {}))
    callback.drawings = dict  # they take most of the time, and have tests of their own
    fault.get("change", lambda _: None)(callback)
    module = fault.get("module", Regression)()
    epochs = EPOCHS if figures is None else 2  # too few for a correlation, and its figure
    trainer = make_trainer(callback, max_epochs=epochs, logger=fault.get("logger", False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, train_loader(), val_loader())
    assert trainer.current_epoch == epochs
    told = [str(w.message) for w in caught if re.search(r"raining goes on", str(w.message))]
    return [p.detach().clone() for p in module.parameters()], told


def _expected(make_trainer: MakeTrainer, epochs: int) -> list[Tensor]:
    L.seed_everything(3, verbose=False)
    model = Regression()
    make_trainer(max_epochs=epochs).fit(model, train_loader(), val_loader())
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_after_the_measurement_is_told_and_training_goes_on(
    make_trainer: MakeTrainer, name: str
) -> None:
    weights, told = _fit(make_trainer, FAULTS[name], "warn")
    expected = _expected(make_trainer, EPOCHS if FAULTS[name].get("figures") is None else 2)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert told
    if "loss_fn" not in FAULTS[name].get("arguments", {}) and name != "the progress bar":
        assert len(told) == len(set(told))  # once for each thing


RAISED = [name for name in FAULTS if name not in (
    "a logger's folder", "a logger is not connected", "drawing a figure")]  # fmt: skip


@pytest.mark.parametrize("name", RAISED)
def test_a_fault_raises_where_that_is_asked(make_trainer: MakeTrainer, name: str) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - each has its own
        _fit(make_trainer, FAULTS[name], "raise")


def test_the_other_logger_is_served_where_one_fails(make_trainer: MakeTrainer) -> None:
    class Keeps(Quiet):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            keys.update(metrics)

    keys: set[str] = set()
    _fit(make_trainer, {"logger": [RefusesCorrelations(), Keeps()]}, "warn")
    assert {"correlation/num_points", "hessian/gap", "hessian/lambda_1"} <= keys


ROW = {"step": 4, "epoch": 0, "lambda_1": 1.0}
DAMAGED: dict[str, Any] = {
    "no mapping": [1, 2],
    "empty": {},
    "history of numbers": {"history": [1, 2], "num_validations": 0},
    "rows of texts": {"history": [{"step": "x"}], "num_validations": 0},
    "rows without step": {"history": [{"epoch": 1}], "num_validations": 1},
    "steps that fall": {"history": [ROW, ROW], "num_validations": 2},
    "a step that is no number": {"history": [{**ROW, "step": float("nan")}], "num_validations": 1},
    "count of validations": {"history": [], "num_validations": "many"},
    "negative count": {"history": [], "num_validations": -3},
    "a spectrum": {"history": [], "num_validations": 0, "spectra": {"1": "damaged"}},
    "a spectrum's step": {"history": [], "num_validations": 0, "spectra": {"x": "damaged"}},
    "spectra": {"history": [], "num_validations": 0, "spectra": 7},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_state_begins_a_new_history(make_trainer: MakeTrainer, name: str) -> None:
    callback = small_callback(on_error="warn")
    with pytest.warns(UserWarning, match=r"history of the checkpoint failed"):
        callback.load_state_dict(DAMAGED[name])
    assert callback.history == []
    make_trainer(callback, max_epochs=2).fit(Regression(), train_loader(), val_loader())
    assert len(callback.history) == 2
    with pytest.raises(Exception):  # noqa: B017, PT011 - each has its own
        small_callback(on_error="raise").load_state_dict(DAMAGED[name])


@pytest.mark.parametrize("monitor", [["val_loss", 3], b"val_loss", [], 3, None, ("",)])
def test_a_monitor_that_is_no_name_is_refused(monitor: Any) -> None:
    with pytest.raises(ValueError, match=r"monitor=.*name of a logged metric"):
        small_callback(monitor=monitor)


def test_the_documentation_counts_these_cases() -> None:
    page = (Path(__file__).parents[2] / "docs" / "trust.md").read_text(encoding="utf-8")
    assert f"exceptions without text | {len(FAULTS)} | {len(FAULTS)} |" in page
    assert f"in a checkpoint is damaged | {len(DAMAGED)} | {len(DAMAGED)} |" in page


# The generalization gap -------------------------------------------------------------------------


class LogsAnError(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_error", self.loss(batch).sqrt())


class NamesItsLoss(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/MSE_Loss", self.loss(batch))
        self.log("val_loss", 100.0)


@pytest.mark.parametrize(
    ("module", "monitor", "loss"),
    [
        (Regression, ("val_loss", "gap"), "val_loss"),
        (Regression, "gap", "val_loss"),
        (LogsAnError, ("val_error", "gap"), "val_loss"),
        (NamesItsLoss, ("val/MSE_Loss", "gap"), "val/MSE_Loss"),
    ],
)
def test_the_gap_is_taken_from_the_first_monitored_loss(
    make_trainer: MakeTrainer, module: type[Regression], monitor: Any, loss: str
) -> None:
    callback = small_callback(monitor=monitor, num_batches=10)
    trainer = make_trainer(callback)
    model = module()
    trainer.fit(model, train_loader(), val_loader())
    whole = torch.utils.data.default_collate(list(train_loader().dataset))
    with torch.no_grad():
        probe = float(model.loss(whole))
    (row,) = callback.history
    assert row["loss"] == pytest.approx(probe, rel=1e-6)
    assert row["gap"] == pytest.approx(float(trainer.callback_metrics[loss]) - probe, rel=1e-5)


def test_there_is_no_gap_to_other_data(make_trainer: MakeTrainer, recwarn: Any) -> None:
    for data in ("val", list(train_loader())):
        callback = small_callback(data=data)
        make_trainer(callback).fit(Regression(), train_loader(), val_loader())
        assert "gap" not in callback.history[0]
    assert not [w for w in recwarn if "gap" in str(w.message)]


class LogsNoLoss(Regression):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_error", self.loss(batch))


def test_a_gap_without_a_loss_is_told_once(make_trainer: MakeTrainer, recwarn: Any) -> None:
    callback = small_callback(monitor=("val_error", "gap"))
    make_trainer(callback, max_epochs=3).fit(LogsNoLoss(), train_loader(), val_loader())
    assert len([w for w in recwarn if "generalization gap" in str(w.message)]) == 1
    assert all("gap" not in row for row in callback.history)


# Comparability and cost -------------------------------------------------------------------------


def test_a_number_of_fitted_eigenvalues_that_changes_is_told_once(
    make_trainer: MakeTrainer, recwarn: Any
) -> None:
    callback = small_callback(num_eigenvalues=8)
    measured = callback.measure
    counts = iter([8.0, 8.0, 6.0, 8.0])

    def measure(*args: Any) -> Any:
        scalars, absent = measured(*args)
        return {**scalars, "num_fitted": next(counts)}, absent

    callback.measure = measure  # type: ignore[method-assign]
    make_trainer(callback, max_epochs=4).fit(Regression(), train_loader(), val_loader())
    (warning,) = [str(w.message) for w in recwarn if "not comparable" in str(w.message)]
    assert "num_fitted changed from 8 to 6" in warning


def test_the_number_of_fitted_eigenvalues_that_stays_says_nothing(
    make_trainer: MakeTrainer, recwarn: Any
) -> None:
    callback = small_callback(num_eigenvalues=3)
    make_trainer(callback, max_epochs=3).fit(Regression(), train_loader(), val_loader())
    assert {row["num_fitted"] for row in callback.history} == {3}
    assert not [w for w in recwarn if "not comparable" in str(w.message)]

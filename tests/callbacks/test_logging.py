"""What the loggers get: same row, same values, nothing twice, keys as promised."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from scipy import stats
from support.runs import finished, wandb_logger
from torch import Tensor

MakeTrainer = Callable[..., Any]
Row = dict[str, Any]

ALWAYS = {
    "d_ks", "d_c", "p_value", "beta_hat", "beta_sigma", "s_hat", "lambda_1", "trace",
    "trace_std_error", "eigengap_d_ks", "eigengap_s_hat", "num_eigenvalues", "num_converged",
    "num_hvps", "seconds", "loss", "gap",
}  # fmt: skip
SOMETIMES = {"lambda_min", "num_fitted", "power_law", "eigengap_num_below_bounds"}
CORRELATED = (
    "d_ks", "s_hat", "lambda_1", "trace", "eigengap_d_ks", "eigengap_s_hat",
    "block_off_diagonal_ratio", "stability/ratio", "stability/update_curvature",
    "stability/gradient_share",
)  # fmt: skip
EPOCHS = 6


def _is_ours(key: str) -> bool:
    return key.startswith(("hessian", "correlation", "stability"))


def _csv_rows(logger: Any) -> list[Row]:
    """The rows of a CSV log as numbers, without the empty cells."""
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _validations(rows: list[Row], monitor: str = "val_loss") -> list[Row]:
    return [row for row in rows if monitor in row]


def _assert_history(rows: list[Row], history: list[dict[str, float]]) -> None:
    """The logged statistics are those of the history, rounded to float32."""
    assert len(rows) == len(history)
    for row, expected in zip(rows, history, strict=True):
        logged = {k.partition("/")[2]: v for k, v in row.items() if k.startswith("hessian/")}
        logged.pop("gap", None)  # known a moment later: it may stand in the row of correlations
        others = {"step", "epoch", "val_loss", "gap"}
        logged |= {k: v for k, v in row.items() if k.startswith("stability/")}
        assert logged.keys() == expected.keys() - others
        for name, value in logged.items():
            assert np.float32(value) == np.float32(expected[name]), name
        assert np.float32(row["val_loss"]) == np.float32(expected["val_loss"])


def _pearson(history: list[dict[str, float]], statistic: str, monitor: str) -> float:
    series = [[row[key] for row in history] for key in (statistic, monitor)]
    return float(stats.pearsonr(*series)[0])


def _assert_correlations(rows: list[Row], history: list[dict[str, float]], monitor: str) -> None:
    """The rows hold, for 4, 5, ... points, the correlations of the history so far."""
    assert [row["correlation/num_points"] for row in rows] == list(range(4, len(history) + 1))
    for row in rows:
        points = history[: int(row["correlation/num_points"])]
        for statistic in CORRELATED:
            name, other = (re.sub("[^0-9a-zA-Z_]", "_", one) for one in (statistic, monitor))
            key = f"correlation/pearson_{name}_{other}"
            assert row[key] == pytest.approx(_pearson(points, statistic, monitor), abs=1e-6)


# W&B, CSV and TensorBoard, all at once -------------------------------------------------------


class Speaks(Regression):
    """Logs by self.log, by the logger and by what is behind it, on steps and on epochs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"one": loss + 1, "two": loss + 2}, on_step=True, on_epoch=True)
        for logger in self.loggers:
            logger.log_metrics({"spoken": loss.item()}, step=self.global_step)
            if isinstance(logger, WandbLogger):
                logger.experiment.log({"behind": loss.item()})
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_scalar("behind", loss.item(), self.global_step)
        self.logger.log_metrics({"first": loss.item()}, step=self.global_step)
        return loss


class LogsAnError(Regression):
    """Logs a second metric, which nothing but `monitor` could choose."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_error", self.loss(batch).sqrt())


class Run:
    """A run that was trained with all loggers: its history, and what each of them recorded."""

    def __init__(self, folder: Path, callbacks: list[Any]) -> None:
        torch.manual_seed(0)
        loggers = [
            wandb_logger(folder),
            CSVLogger(folder, name="csv"),
            TensorBoardLogger(folder, name="tensorboard"),
        ]
        trainer = L.Trainer(
            accelerator="cpu",
            logger=loggers,
            callbacks=callbacks,
            max_epochs=EPOCHS // 2,
            val_check_interval=0.5,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Speaks(), train_loader(shuffle=False), val_loader())
        self.wandb = finished(loggers[0], folder).rows
        self.csv = _csv_rows(loggers[1])
        self.tensorboard = _tensorboard_rows(loggers[2].log_dir)


def _tensorboard_rows(folder: str) -> list[Row]:
    """One row for each step, from TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    rows: dict[int, Row] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            # Lightning writes the epoch beside everything.
            assert tag == "epoch" or tag not in rows.get(event.step, {}), f"{tag} twice"
            rows.setdefault(event.step, {"step": event.step})[tag] = event.value
    return [rows[step] for step in sorted(rows)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, own_wandb: None) -> Any:
    callback = small_callback(num_eigenvalues=8)
    run = Run(tmp_path_factory.mktemp("measured"), [callback])
    run.history, run.correlations = callback.history, callback.correlations()
    assert len(run.history) == EPOCHS
    return run


@pytest.fixture(scope="module")
def unmeasured(tmp_path_factory: pytest.TempPathFactory, own_wandb: None) -> Any:
    return Run(tmp_path_factory.mktemp("unmeasured"), [])


@pytest.mark.parametrize("logger", ["wandb", "csv", "tensorboard"])
def test_statistics_stand_in_the_row_of_the_monitor(measured: Any, logger: str) -> None:
    rows = _validations(getattr(measured, logger))
    assert len(rows) == EPOCHS
    _assert_history(rows, measured.history)
    step = "trainer/global_step" if logger == "wandb" else "step"
    assert [row[step] for row in rows] == [row["step"] for row in measured.history]


@pytest.mark.parametrize("logger", ["wandb", "csv", "tensorboard"])
def test_correlations_are_those_of_the_history(measured: Any, logger: str) -> None:
    rows = [row for row in getattr(measured, logger) if "correlation/num_points" in row]
    _assert_correlations(rows, measured.history, "val_loss")
    step = "trainer/global_step" if logger == "wandb" else "step"
    validations = _validations(getattr(measured, logger))
    assert [row[step] for row in rows] == [row[step] for row in validations[3:]]


@pytest.mark.parametrize("logger", ["wandb", "csv", "tensorboard"])
def test_nothing_else_is_logged_and_nothing_twice(
    measured: Any, unmeasured: Any, logger: str
) -> None:
    clocks = {"_step", "_runtime", "_timestamp"}
    found, expected = (
        [{k: v for k, v in row.items() if not _is_ours(k) and k not in clocks} for row in rows]
        for rows in (getattr(measured, logger), getattr(unmeasured, logger))
    )
    frame = {"step", "epoch", "trainer/global_step"}
    assert [row for row in found if row.keys() - frame] == expected
    spoken = [row["spoken"] for row in expected if "spoken" in row]
    assert len(spoken) == 4 * EPOCHS // 2


@pytest.mark.parametrize("logger", ["wandb", "csv", "tensorboard"])
def test_the_gap_is_the_validation_loss_minus_that_of_the_probe(measured: Any, logger: str) -> None:
    gaps = [row["val_loss"] - row["loss"] for row in measured.history]
    assert [row["gap"] for row in measured.history] == gaps
    logged = [row["hessian/gap"] for row in getattr(measured, logger) if "hessian/gap" in row]
    assert logged == pytest.approx(gaps, abs=1e-6)
    rows = [row for row in getattr(measured, logger) if "correlation/num_points" in row]
    _assert_correlations(rows, measured.history, "gap")


def test_scan_history_would_find_the_row(measured: Any) -> None:
    keys = ["hessian/d_ks", "hessian/s_hat", "hessian/trace", "val_loss", "epoch"]
    rows = [row for row in measured.wandb if all(key in row for key in keys)]
    assert len(rows) == EPOCHS


def test_keys_are_those_of_the_contract(measured: Any) -> None:
    keys = {key for row in measured.wandb for key in row if _is_ours(key)}
    assert all(re.fullmatch(r"[A-Za-z0-9_]+/[A-Za-z0-9_]+", key) for key in keys)
    statistics = {key.removeprefix("hessian/") for key in keys if key.startswith("hessian/")}
    assert statistics >= ALWAYS
    others = statistics - ALWAYS - SOMETIMES
    assert all(name.startswith("block_") for name in others)
    correlations = {key for key in keys if key.startswith("correlation/")}
    kinds = ("pearson", "pearson_low", "pearson_high", "spearman", "differences")
    expected = {
        f"correlation/{kind}_{name.replace('/', '_')}_{monitor}"
        for name in CORRELATED for kind in kinds for monitor in ("val_loss", "gap")
    }  # fmt: skip
    fewer = {
        f"correlation/num_points_{name.replace('/', '_')}_{monitor}"
        for (name, monitor), found in measured.correlations.items()
        if found.num_points < len(measured.history)
    }
    assert correlations == expected | fewer | {"correlation/num_points"}


def test_correlations_are_with_what_monitor_names_and_with_nothing_else(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = small_callback(num_eigenvalues=4, monitor="val_error", figures=4)
    trainer = make_trainer(callback, max_epochs=4, logger=CSVLogger(tmp_path))
    trainer.fit(LogsAnError(), train_loader(), val_loader())
    last = _csv_rows(trainer.logger)[-1]
    assert {"val_loss", "val_error"} <= set().union(*_csv_rows(trainer.logger))
    found = {key for key in last if key.startswith("correlation/")} - {"correlation/num_points"}
    assert len(found) >= 4 * (len(CORRELATED) - 1)
    assert all(key.endswith("_val_error") for key in found)
    drawn = {file.name.partition("_step_")[0] for file in Path(tmp_path).rglob("*.png")}
    assert {name for name in drawn if name.startswith("hessian_scatter")} == {
        "hessian_scatter_val_error"
    }


def test_statistics_follow_from_one_another(measured: Any) -> None:
    for row in measured.history:
        num_fitted = row["num_fitted"]
        assert 4 <= num_fitted <= row["num_converged"] <= row["num_eigenvalues"] == 8
        assert row["beta_sigma"] == pytest.approx((row["beta_hat"] - 1) / np.sqrt(num_fitted))
        assert row["s_hat"] == pytest.approx(1 / (row["beta_hat"] - 1))
        assert row["d_c"] == pytest.approx(1.36 / np.sqrt(num_fitted), rel=1e-3)
        assert "power_law" not in row  # eight values are too few for a verdict


def test_without_a_logger(make_trainer: MakeTrainer) -> None:
    callback = small_callback(num_eigenvalues=8)
    trainer = make_trainer(callback, max_epochs=5, logger=False)
    trainer.fit(Regression(), train_loader(), val_loader())
    assert len(callback.history) == 5
    found = callback.correlations()[("lambda_1", "val_loss")]
    assert found.r == pytest.approx(_pearson(callback.history, "lambda_1", "val_loss"), abs=1e-9)
    assert found.num_points == 5
    assert float(trainer.callback_metrics["hessian/d_ks"]) > 0


@pytest.mark.usefixtures("own_wandb")
def test_wandb_called_behind_lightnings_back(tmp_path: Path) -> None:
    """Many modules call wandb.log themselves."""
    import wandb

    class CallsWandb(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            wandb.log({"direct": loss.item()})
            return loss

    logger = wandb_logger(tmp_path)
    assert logger.experiment is wandb.run
    trainer = L.Trainer(
        accelerator="cpu", logger=logger, callbacks=[small_callback()], max_epochs=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(CallsWandb(), train_loader(), val_loader())
    assert sum("direct" in row for row in finished(logger, tmp_path).rows) == 4


# Which monitor -------------------------------------------------------------------------------


class LogsAtTheEnd(Regression):
    """Knows its metrics only in its own on_validation_epoch_end, after the callbacks'."""

    def on_validation_epoch_start(self) -> None:
        self.total: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.total.append(self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        loss = torch.stack(self.total).mean()
        self.log("val_loss", loss)
        self.log("val/score", -2 * loss)
        if self.current_epoch % 2 == 0:
            self.log("rare", loss)


def test_a_metric_of_the_modules_own_hook_is_not_one_off(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = small_callback(monitor=["val_loss", "val/score"], num_eigenvalues=8)
    trainer = make_trainer(callback, max_epochs=EPOCHS, logger=CSVLogger(tmp_path))
    trainer.fit(LogsAtTheEnd(), train_loader(), val_loader())
    rows = _validations(_csv_rows(trainer.logger))
    assert len({row["val_loss"] for row in rows}) == EPOCHS
    _assert_history(
        rows, [{k: v for k, v in row.items() if k != "val/score"} for row in callback.history]
    )
    for row in callback.history:
        assert row["val/score"] == pytest.approx(-2 * row["val_loss"], rel=1e-6)


def test_a_metric_of_another_validation_is_not_paired(make_trainer: MakeTrainer) -> None:
    callback = small_callback(monitor=["val_loss", "rare"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(callback, max_epochs=3).fit(LogsAtTheEnd(), train_loader(), val_loader())
    first, second, third = callback.history
    assert first["rare"] == first["val_loss"]
    assert third["rare"] == third["val_loss"]
    assert "rare" not in second, "the value of the validation before"


def test_several_monitors_one_with_a_slash(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Slashed(Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            self.log_dict({"val/loss": loss, "val/weighted loss-2": loss**2})

    monitors = ["val/loss", "val/weighted loss-2"]
    callback = small_callback(num_eigenvalues=8, monitor=monitors)
    trainer = make_trainer(callback, max_epochs=EPOCHS, logger=CSVLogger(tmp_path))
    trainer.fit(Slashed(), train_loader(), val_loader())
    rows = [row for row in _csv_rows(trainer.logger) if "correlation/num_points" in row]
    for monitor in monitors:
        _assert_correlations(rows, callback.history, monitor)
    ours = {key for row in _csv_rows(trainer.logger) for key in row if _is_ours(key)}
    assert "correlation/pearson_d_ks_val_weighted_loss_2" in ours
    assert all(re.fullmatch(r"\w+/\w+", key, flags=re.ASCII) for key in ours)


def test_a_missing_monitor_warns_once_and_names_near_keys(make_trainer: MakeTrainer) -> None:
    callback = small_callback(monitor=["val_los", "val_loss"])
    trainer = make_trainer(callback, max_epochs=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Regression(), train_loader(), val_loader())
    (message,) = [str(w.message) for w in caught if "val_los'" in str(w.message)]
    assert re.search(r"monitor='val_los'.*val_loss.*Log it .* or give another monitor", message)
    assert len(callback.history) == 5
    assert all("val_los" not in row for row in callback.history)
    assert {monitor for _, monitor in callback.correlations()} == {"val_loss"}


def test_two_callbacks_do_not_mix_their_values(make_trainer: MakeTrainer) -> None:
    """Under one key self.log would average what the two give it; refusing is as good as telling."""
    on_train, on_val = small_callback(), small_callback(data="val")
    trainer = make_trainer(on_train, on_val)
    try:
        trainer.fit(Regression(), train_loader(), val_loader())
    except ValueError:
        assert trainer.global_step == 0
        return
    measured = [callback.history[0]["lambda_1"] for callback in (on_train, on_val)]
    assert abs(measured[0] - measured[1]) > 1e-3
    logged = float(trainer.callback_metrics["hessian/lambda_1"])
    assert min(abs(logged - value) for value in measured) < 1e-5

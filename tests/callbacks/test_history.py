"""The history of a callback: in checkpoints, after a resume, and for its caller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.tiny_modules import (
    Regression,
    RegressionData,
    last_eigenvalues,
    seeded_module,
    small_callback,
    train_loader,
    val_loader,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_hessian.callbacks.schedule import EveryNValidations

MakeTrainer = Callable[..., Any]


def _without_clock(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def test_model_checkpoint_monitors_a_statistic(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callback = small_callback(num_eigenvalues=8)
    best = ModelCheckpoint(tmp_path / "best", monitor="hessian/s_hat", mode="min", save_top_k=1)
    trainer = make_trainer(callback, best, max_epochs=5, enable_checkpointing=True)
    trainer.fit(seeded_module(), train_loader(), val_loader())
    values = [row["s_hat"] for row in callback.history]
    assert len(set(values)) == 5
    assert float(best.best_model_score) == pytest.approx(min(values), rel=1e-6)
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["epoch"] == int(np.argmin(values))
    (state,) = [v for k, v in saved["callbacks"].items() if "HessianSpectrumCallback" in k]
    # The row of the validation at which it was saved is there.
    assert state["history"] == callback.history[: int(np.argmin(values)) + 1]


def test_a_resumed_run_is_the_uninterrupted_one(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    def train(callback: Any, module: Any, epochs: int, **arguments: Any) -> Any:
        trainer = make_trainer(
            callback, max_epochs=epochs, logger=CSVLogger(tmp_path, version=str(len(versions)))
        )
        versions.append(trainer)
        trainer.fit(module, train_loader(shuffle=False), val_loader(), **arguments)
        return trainer

    versions: list[Any] = []
    whole = small_callback(num_eigenvalues=8, every_n_validations=2)
    train(whole, seeded_module(), 10)

    first = small_callback(num_eigenvalues=8, every_n_validations=2)
    trainer = train(first, seeded_module(), 5)
    checkpoint = tmp_path / "five.ckpt"
    trainer.save_checkpoint(checkpoint)
    assert len(first.history) == 2

    torch.manual_seed(99)
    second = small_callback(num_eigenvalues=8, every_n_validations=2)
    trainer = train(second, Regression(), 10, ckpt_path=checkpoint, weights_only=True)
    assert [row["epoch"] for row in second.history] == [1, 3, 5, 7, 9]
    # Eigenvectors are in no checkpoint: the first drift after it is missing, with its products.
    assert "stability/drift" in whole.history[2]
    for name in ("stability/drift", "stability/drift_bound", "stability/num_hvps", "num_hvps"):
        for callback in (whole, second):
            callback._history.rows[2].pop(name, None)
    assert _without_clock(second.history) == _without_clock(whole.history)
    assert second.correlations() == whole.correlations()
    assert trainer.logged_metrics.keys() >= {"hessian/d_ks"}
    last = (Path(trainer.logger.log_dir) / "metrics.csv").read_text()
    assert "correlation/num_points" in last


def test_another_run_draws_the_same_probe_samples(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    L.seed_everything(1, verbose=False)
    callback, module = small_callback(), seeded_module()
    trainer = make_trainer(callback, max_epochs=2)
    trainer.fit(module, datamodule=RegressionData())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    L.seed_everything(2, verbose=False)
    again = small_callback(every_n_validations=EveryNValidations(1, during_validate=True))
    make_trainer(again).validate(
        Regression(), datamodule=RegressionData(), ckpt_path=tmp_path / "two.ckpt", verbose=False
    )
    np.testing.assert_array_equal(last_eigenvalues(again), last_eigenvalues(callback))


def test_the_history_is_the_callers_to_change(make_trainer: MakeTrainer) -> None:
    callback = small_callback()
    make_trainer(callback).fit(seeded_module(), train_loader(), val_loader())
    callback.history[0]["d_ks"] = -1.0
    callback.history.clear()
    assert callback.history[0]["d_ks"] > 0
    assert all(type(value) in (int, float) for value in callback.history[0].values())


def test_history_keeps_float64(make_trainer: MakeTrainer) -> None:
    callback = small_callback()
    trainer = make_trainer(callback)
    trainer.fit(seeded_module(), train_loader(), val_loader())
    (row,) = callback.history
    assert row["lambda_1"] == last_eigenvalues(callback)[0]
    logged = float(trainer.callback_metrics["hessian/lambda_1"])
    assert logged == float(np.float32(row["lambda_1"]))
    assert logged != row["lambda_1"]


def test_state_of_callbacks_on_different_data_is_kept_apart() -> None:
    settings: list[dict[str, Any]] = [{}, {"data": "val"}, {"monitor": "val_acc"}]
    keys = [small_callback(**setting).state_key for setting in settings]
    assert len(set(keys)) == 3
    assert small_callback().state_key == keys[0]

"""The callback in a real Trainer: what it logs, what it leaves alone, what it says."""

from __future__ import annotations

import csv
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.tiny_classifier import TRAIN, gradient_callback, loaders, seeded_model
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from support.callbacks import with_spectrum
from support.gradient_oracles import explicit, in_batches, loop_gradients
from torch import Tensor

from lightning_hessian import (
    HessianSpectrumCallback,
    gradient_structure,
)
from lightning_hessian.callbacks.schedule import EveryNValidations
from lightning_hessian.measure.budget import Budget

MakeTrainer = Callable[..., L.Trainer]

SPECTRAL = {
    "d_ks", "d_c", "p_value", "beta_hat", "beta_sigma", "s_hat", "lambda_1", "trace",
    "num_outliers", "eigengap_d_ks", "eigengap_s_hat", "num_eigenvalues", "num_fitted",
    "mean_gradient_norm", "num_gradients", "loss", "seconds",
}  # fmt: skip
NOISE = {"noise_scale", "noise_scale_std_error", "critical_batch_size"}
"""There where the mean gradient is told from zero."""
RATES = {
    "power_law_rate", "gaussian_rate", "dimension_gaussian_rate", "iteration_power_law_rate",
}  # fmt: skip
CORRELATED = {
    "d_ks", "s_hat", "lambda_1", "trace", "num_outliers", "power_law_rate", "gaussian_rate",
}  # fmt: skip


def _hessian(**arguments: Any) -> HessianSpectrumCallback:
    return with_spectrum(
        num_eigenvalues=5, num_batches=2, time_budget=Budget(seconds=600), on_error="raise",
        figures=None, **arguments,
    )  # fmt: skip


# What is logged ------------------------------------------------------------------------------


def test_keys_stand_in_the_row_of_the_validation_loss(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = gradient_callback(monitor="val_loss")
    trainer = make_trainer(callback, max_epochs=5, logger=CSVLogger(tmp_path, name="", version=""))
    trainer.fit(seeded_model(), *loaders())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["gradient/lambda_1"]]
    assert len(measured) == 5
    for number, row in enumerate(measured):
        assert row["val_loss"]
        keys = {k.removeprefix("gradient/") for k in row if k.startswith("gradient/") and row[k]}
        assert keys - NOISE == SPECTRAL | RATES
        assert keys & NOISE == (set() if number else NOISE)  # this network has learnt its data
    correlated = [row for row in rows if row.get("correlation/gradient_num_points")]
    assert [float(row["correlation/gradient_num_points"]) for row in correlated] == [4, 5]
    constant = {s for s in CORRELATED if len({row[s] for row in callback.history}) == 1}
    wanted = {f"correlation/pearson_gradient_{s}_val_loss" for s in CORRELATED - constant}
    found = {
        key
        for key in correlated[-1]
        if key.startswith("correlation/pearson_gradient_") and correlated[-1][key]
    }
    assert found == wanted
    for statistic in CORRELATED - constant:
        x = [float(row[f"gradient/{statistic}"]) for row in measured]
        y = [float(row["val_loss"]) for row in measured]
        r = float(correlated[-1][f"correlation/pearson_gradient_{statistic}_val_loss"])
        assert r == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-4)


def test_without_tests_there_are_no_rates(make_trainer: MakeTrainer) -> None:
    callback = gradient_callback(tests=False, monitor="val_loss")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callback).fit(seeded_model(), *loaders())
    said = [
        str(w.message) for w in caught if w.category is UserWarning and "Step" in str(w.message)
    ]
    assert all("power_law is left out" in message for message in said)
    (row,) = callback.history
    assert row.keys() - {"step", "epoch", "val_loss"} - NOISE == SPECTRAL


def test_a_checkpoint_can_monitor_it(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="gradient/trace", mode="min")
    callback = gradient_callback()
    trainer = make_trainer(callback, best, max_epochs=3, enable_checkpointing=True)
    trainer.fit(seeded_model(), *loaders())
    lowest = min(row["trace"] for row in callback.history)
    assert float(best.best_model_score) == pytest.approx(lowest, rel=1e-6)


# What is measured ----------------------------------------------------------------------------


def _in_order() -> list[tuple[Tensor, Tensor]]:
    return in_batches(TRAIN.tensors, 8)


def test_the_numbers_are_those_of_a_loop(make_trainer: MakeTrainer) -> None:
    callback, model = gradient_callback(data=_in_order(), num_gradients=20), seeded_model()
    make_trainer(callback, max_epochs=2).fit(model, *loaders())
    model.eval()
    gradients = loop_gradients(model, lambda m, b: m.loss(b), _in_order())
    eigenvalues = explicit(gradients, centred=True)
    row = callback.history[-1]
    np.testing.assert_allclose(callback.last_structure.covariance, eigenvalues[:12], rtol=1e-4)
    assert row["lambda_1"] == pytest.approx(eigenvalues[0], rel=1e-5)
    assert row["trace"] == pytest.approx(eigenvalues.sum(), rel=1e-5)
    losses = [model.loss(batch).item() for batch in _in_order()]
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert row["mean_gradient_norm"] == pytest.approx(
        np.linalg.norm(gradients.mean(axis=0)), rel=1e-4
    )


def test_a_loader_with_too_few_batches_is_drawn_from_anew(make_trainer: MakeTrainer) -> None:
    callback = gradient_callback(num_gradients=50)
    make_trainer(callback).fit(seeded_model(), *loaders())
    assert callback.last_structure.num_gradients == 50
    assert callback.last_structure.batch_size == 8
    callback = gradient_callback(num_gradients=15, num_batches=15, tests=False)
    make_trainer(callback).fit(seeded_model(), *loaders())
    assert callback.last_structure.num_gradients == 15
    assert callback.last_structure.batch_size is None


@pytest.mark.parametrize("variant", [{"preconditioner": "adam"}, {"momentum": 0.9}])
def test_it_agrees_with_the_front_door(make_trainer: MakeTrainer, variant: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "num_gradients": 60, "batch_size": 4, "clip_norm": 0.5, "mode": "train",
        "num_eigenvalues": 12, "seed": 5, **variant,
    }  # fmt: skip
    callback, model = gradient_callback(data=_in_order(), **options), seeded_model()
    make_trainer(callback).fit(model, *loaders())
    # The measurement came before the end of the epoch, after its last step: the same weights.
    expected = gradient_structure(model.train(), None, _in_order(), **options)
    np.testing.assert_array_equal(callback.last_structure.covariance, expected.covariance)
    np.testing.assert_array_equal(
        callback.last_structure.iteration_tests.p_values, expected.iteration_tests.p_values
    )


def test_validate_measures_where_that_is_asked(make_trainer: MakeTrainer) -> None:
    for asked in (False, True):
        callback = gradient_callback(
            data="val",
            batch_size=4,
            every_n_validations=EveryNValidations(1, during_validate=asked),
        )
        trainer = make_trainer(callback)
        trainer.validate(seeded_model(), loaders()[1], verbose=False)
        assert ("gradient/lambda_1" in trainer.callback_metrics) == asked


# What is left alone --------------------------------------------------------------------------


def _outcome(make_trainer: MakeTrainer, *callbacks: Any) -> dict[str, Any]:
    model = seeded_model()
    trainer = make_trainer(*callbacks, max_epochs=3)
    trainer.fit(model, *loaders())
    return {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "losses": model.losses,
        "gradients": [parameter.grad for parameter in model.parameters()],
        "modes": [part.training for part in model.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "val_loss": float(trainer.callback_metrics["val_loss"]),
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mode": "train"},
        {"batch_size": 1, "num_gradients": 60},
        {"batch_size": 1, "mode": "train", "parameters": "net.4.*"},
        {"preconditioner": "adam", "tests": False},
        {"memory_budget": 2.7e4},
        {"data": "val", "batch_size": 4},
    ],
    ids=lambda a: "-".join(map(str, a)) or "defaults",
)
def test_training_is_the_same_to_the_last_bit(
    make_trainer: MakeTrainer, arguments: dict[str, Any]
) -> None:
    callback = gradient_callback(**arguments)
    if arguments.get("mode") == "train" and arguments.get("batch_size") == 1:
        callback.on_error = "warn"  # BatchNorm cannot train on one sample: a failure, not a change
        with pytest.warns(UserWarning, match="training goes on"):
            found = _outcome(make_trainer, callback)
    else:
        found = _outcome(make_trainer, callback)
        assert len(callback.history) == 3
    torch.testing.assert_close(found, _outcome(make_trainer), rtol=0, atol=0)


def test_both_callbacks_in_one_trainer(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    alone = {}
    for name, make in (("gradient", gradient_callback), ("hessian", _hessian)):
        callback = make()
        make_trainer(callback, max_epochs=5).fit(seeded_model(), *loaders())
        alone[name] = callback.history
    gradients, hessian = gradient_callback(), _hessian()
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = make_trainer(gradients, hessian, max_epochs=5, logger=logger)
    trainer.fit(seeded_model(), *loaders())

    def without_time(rows: list[dict[str, float]]) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert without_time(gradients.history) == without_time(alone["gradient"])
    assert without_time(hessian.history) == without_time(alone["hessian"])
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["hessian/lambda_1"]]
    assert len(measured) == 5
    assert all(row["gradient/lambda_1"] and row["val_loss"] for row in measured)
    for callback, prefix in ((gradients, "gradient_"), (hessian, "")):
        points = [row[f"correlation/{prefix}num_points"] for row in rows]
        assert [float(value) for value in points if value] == [4, 5]
        last = [row[f"correlation/pearson_{prefix}d_ks_val_loss"] for row in rows]
        last = [float(value) for value in last if value][-1]
        assert last == pytest.approx(callback.correlations()["d_ks", "val_loss"].r)
    assert gradients.state_key != hessian.state_key
    found = _outcome(make_trainer, gradient_callback(), _hessian())
    torch.testing.assert_close(found, _outcome(make_trainer), rtol=0, atol=0)


def test_the_history_goes_on_after_a_resume(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    whole = gradient_callback()
    make_trainer(whole, max_epochs=4).fit(seeded_model(), *loaders())
    first = gradient_callback()
    trainer = make_trainer(first, max_epochs=2)
    trainer.fit(seeded_model(), *loaders())
    path = tmp_path / "two.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    resumed = gradient_callback()
    trainer = make_trainer(resumed, max_epochs=4)
    trainer.fit(seeded_model(), *loaders(), ckpt_path=path)
    assert [row["epoch"] for row in resumed.history] == [0, 1, 2, 3]
    assert resumed.history[:2] == first.history
    assert [row["step"] for row in resumed.history] == [row["step"] for row in whole.history]
    assert {c.num_points for c in resumed.correlations().values()} == {4}

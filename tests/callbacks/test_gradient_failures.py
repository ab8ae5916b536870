"""A measurement of gradients that fails, and misuse of its callback."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from callbacks.tiny_classifier import gradient_callback, loaders, seeded_model
from torch import Tensor

from lightning_hessian import (
    MeasurementError,
)
from lightning_hessian.callbacks import measuring

MakeTrainer = Callable[..., Any]


def _nan(module: Any, batch: Any) -> Tensor:
    return module.loss(batch) * float("nan")


def _reads_a_broken_file(module: Any, batch: Any) -> Tensor:
    raise OSError("corrupt image 17.png")


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"loss_fn": _nan}, r"gradient of mini-batch 0 is NaN.*lower the learning rate"),
    "OSError": ({"loss_fn": _reads_a_broken_file}, r"OSError: corrupt image 17"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_warns_and_training_goes_on(make_trainer: MakeTrainer, name: str) -> None:
    arguments, message = FAILURES[name]
    callback = gradient_callback(on_error="warn", **arguments)
    trainer = make_trainer(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(seeded_model(), *loaders())
    (warning,) = [str(w.message) for w in caught if "gradient statistics" in str(w.message)]
    assert re.search(message, warning)
    assert "step 19" in warning
    assert trainer.state.finished
    assert callback.history == []
    assert not any(key.startswith("gradient/") for key in trainer.callback_metrics)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_raises_where_that_is_asked(make_trainer: MakeTrainer, name: str) -> None:
    arguments, message = FAILURES[name]
    trainer = make_trainer(gradient_callback(on_error="raise", **arguments))
    with pytest.raises(
        (MeasurementError, ValueError, OSError), match=message.removeprefix("OSError: ")
    ):
        trainer.fit(seeded_model(), *loaders())


def test_a_statistic_that_has_no_value_is_absent_and_said(make_trainer: MakeTrainer) -> None:
    """The same gradient from every mini-batch: no covariance, no power law, nothing to test."""

    def always(module: Any, batch: Any) -> Tensor:
        return sum(parameter.square().sum() for parameter in module.parameters())

    callback = gradient_callback(loss_fn=always)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callback).fit(seeded_model(), *loaders())
    said = " ".join(str(warning.message) for warning in caught)
    for reason in ("No power law was fitted", "No outliers were counted", "gaussian_rate is left"):
        assert reason in said
    (row,) = callback.history
    absent = {"d_ks", "s_hat", "power_law", "num_outliers", "gaussian_rate"}
    assert not absent & row.keys()
    assert row["num_fitted"] == 0
    assert row["trace"] == pytest.approx(0, abs=1e-9)
    assert row["mean_gradient_norm"] > 1


def test_a_cost_is_said_with_the_remedy(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_COSTLY_SECONDS", 0.0)
    callback = gradient_callback(time_budget=None, num_gradients=400)
    with pytest.warns(UserWarning, match=r"took .* Give time_budget=0.2"):
        make_trainer(callback, max_steps=2, val_check_interval=1).fit(seeded_model(), *loaders())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gradients": 19}, "num_gradients=19.*too few: tests need 20"),
        ({"num_eigenvalues": 0}, "num_eigenvalues=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 161}, r"batch_size=161.*hold 160 samples.*Lower"),
        ({"memory_budget": 10.0}, r"inner products of \d+ gradients.*raise memory"),
        ({"preconditioner": "sgd"}, "preconditioner='sgd'"),
        ({"clip_norm": -1.0}, "clip_norm=-1"),
        ({"mode": "test"}, "mode='test'"),
        ({"max_tested": 0}, "max_tested=0"),
        ({"significance": 2.0}, "significance=2"),
        ({"num_batches": 0}, "num_batches=0"),
        ({"on_error": "ignore"}, "on_error='ignore'"),
        ({"parameters": "nothing"}, "'nothing' matches no parameter"),
        ({"parameters": "net.4.bias"}, "3 parameters are too few to be tested"),
        ({"loss_fn": "mse"}, "loss_fn='mse'"),
    ],
)
def test_misuse_is_refused_before_training(
    make_trainer: MakeTrainer, arguments: dict[str, Any], message: str
) -> None:
    made: list[Any] = []

    def use() -> None:
        made.append(make_trainer(gradient_callback(**{"on_error": "warn", **arguments})))
        made[0].fit(seeded_model(), *loaders())

    with pytest.raises(ValueError, match=message):
        use()
    assert all(trainer.global_step == 0 for trainer in made)

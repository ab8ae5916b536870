"""Measurements by training steps: of a few products, and whole ones where nothing validates."""

from __future__ import annotations

import csv
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.test_updates import ByHand, Sees
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_hessian import EveryNTrainSteps, GradientStructureCallback
from lightning_hessian.linear.allowance import Allowance
from lightning_hessian.measure.budget import Budget
from lightning_hessian.measure.instrument import Scalars
from lightning_hessian.measure.session import Session

MakeTrainer = Callable[..., Any]


class Norm:
    """The norm of the parameters, and the step at which it was taken."""

    name = "norm"
    prefix = "own"

    def __init__(self) -> None:
        self.rows: list[tuple[int, float]] = []

    def check(self, model: nn.Module) -> None:
        pass

    def cost(self, session: Session) -> int:
        return 1

    def measure(self, session: Session, allowance: Allowance) -> Scalars:
        flat = nn.utils.parameters_to_vector(session.model.parameters())
        step = session.model.trainer.global_step  # type: ignore[union-attr]
        self.rows.append((step, float(flat.norm())))  # type: ignore[arg-type]
        return Scalars({"norm": flat.norm(), "step": step, "loss": session.loss})  # type: ignore


class Watched(Regression):
    """Knows the norm of its parameters after each step."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr)
        self.norms: dict[int, float] = {}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        flat = nn.utils.parameters_to_vector(self.parameters())
        self.norms[self.trainer.global_step] = float(flat.norm())


def _fit(
    make_trainer: MakeTrainer, callback: Any, module: Any = None, *more: Any, **arguments: Any
) -> Any:
    """Trains six epochs of four steps."""
    torch.manual_seed(0)
    trainer = make_trainer(callback, *more, **{"max_epochs": 6, **arguments})
    trainer.fit(Watched() if module is None else module, train_loader(), val_loader())
    return trainer


def _rows(logger: CSVLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# Between validations -------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 5])
def test_instruments_of_few_products_at_every_n_steps(
    make_trainer: MakeTrainer, tmp_path: Path, n: int
) -> None:
    norm, module, logger = Norm(), Watched(), CSVLogger(tmp_path)
    callback = small_callback(
        blocks=None, instruments=[norm], every_n_validations=EveryNTrainSteps(n), time_budget=None
    )
    monitor = LearningRateMonitor(logging_interval="step")
    _fit(make_trainer, callback, module, monitor, logger=logger, log_every_n_steps=1)
    whole = [4, 8, 12, 16, 20, 24]
    assert [row["step"] + 1 for row in callback.history] == whole
    # What is due at a step that a validation was measured at is not measured again.
    wanted = sorted({*whole, *range(n, 24, n)})
    assert [step for step, _ in norm.rows] == wanted
    for step, found in norm.rows:
        assert found == pytest.approx(module.norms[step], rel=1e-6)
    logged = {int(float(row["own/step"])): row for row in _rows(logger) if row["own/step"]}
    assert list(logged) == wanted
    # The loggers count rows from 0: the row of the batch that made the step.
    losses = {int(row["step"]) for row in _rows(logger) if row["train_loss"]}
    for step, row in logged.items():
        assert bool(row["hessian/lambda_1"]) == (step in whole)
        assert row["stability/ratio"]
        assert int(row["step"]) == step - 1
        assert int(row["step"]) in losses


def test_the_update_is_that_of_the_step(make_trainer: MakeTrainer) -> None:
    sees = Sees()
    callback = small_callback(
        blocks=None, instruments=[sees], every_n_validations=EveryNTrainSteps(3), time_budget=None
    )
    module = ByHand()
    module.callback = callback
    # Two optimizers: two steps a batch; 6, 12, ... are due after the third batch, and so on.
    _fit(make_trainer, callback, module, max_epochs=3)
    assert len(sees.found) > 3
    for found in sees.found:
        assert found is not None
        assert any(
            all(torch.equal(found[key], change[key]) for key in found) for change in module.changes
        )


def test_within_the_budget(make_trainer: MakeTrainer) -> None:
    """Half of a share is for what is measured at steps; a share of nearly nothing pays for none."""
    counts = []
    for share in (1e-9, 0.999):
        norm = Norm()
        callback = small_callback(
            num_eigenvalues=2, blocks=None, time_budget=share, instruments=[norm],
            every_n_validations=EveryNTrainSteps(1, every_n_validations=1000),
            loss_fn=lambda module, batch: module.loss(batch),
        )  # fmt: skip

        class Slow(Watched):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                time.sleep(0.1)  # of training alone: the loss is measured by `loss_fn`
                return super().training_step(batch, batch_idx)

        _fit(make_trainer, callback, Slow(), max_epochs=4)
        counts.append(len(norm.rows) - len(callback.history))
        account = callback._budgeting.account
        assert account.spent_on_few <= share * account.trained / 2 + max(
            0.0, account.estimate_of_few or 0.0
        )
    assert counts[0] == 0
    assert counts[1] > 0


def test_training_is_the_same_to_the_last_bit(make_trainer: MakeTrainer) -> None:
    found = []
    schedules = (EveryNTrainSteps(1), EveryNTrainSteps(3, every_n_validations=2), None)
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        for schedule in schedules:
            callbacks = []
            if schedule is not None:
                callbacks = [small_callback(every_n_validations=schedule, time_budget=None)]

            class Dropping(Regression):
                def __init__(self, kind: Any = optimizer) -> None:
                    super().__init__()
                    self.kind = kind
                    self.net.insert(1, nn.Dropout(0.2))

                def configure_optimizers(self) -> Any:
                    return self.kind(self.parameters(), lr=0.02)

            torch.manual_seed(3)
            module = Dropping()
            trainer = make_trainer(*callbacks, max_epochs=3, accumulate_grad_batches=3)
            trainer.fit(module, train_loader(), val_loader())
            state = [value for s in trainer.optimizers[0].state.values() for value in s.values()]
            tensors = [value for value in state if isinstance(value, Tensor)]
            found.append([*module.state_dict().values(), *tensors, torch.get_rng_state()])
    for first in (0, 3):
        for with_it in found[first : first + 2]:
            assert all(torch.equal(a, b) for a, b in zip(with_it, found[first + 2], strict=True))


# Without validation --------------------------------------------------------------------------


class NoValidation(Regression):
    validation_step = None  # type: ignore[assignment]


def _said(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("how", ["no loader", "limit"])
def test_a_fit_without_validation_says_how_to_measure(make_trainer: MakeTrainer, how: str) -> None:
    callback = small_callback()
    arguments = {"limit_val_batches": 0} if how == "limit" else {}
    trainer = make_trainer(callback, **arguments)
    loaders = [train_loader()] if how == "no loader" else [train_loader(), val_loader()]
    said = _said(lambda: trainer.fit(Regression(), *loaders))
    (message,) = [text for text in said if "every_n_validations=EveryNTrainSteps(" in text]
    assert message.startswith("HessianSpectrumCallback measures nothing in this fit")
    assert callback.history == []
    with_validation = small_callback()
    fit = lambda: _fit(make_trainer, with_validation, max_epochs=1)  # noqa: E731
    assert not [text for text in _said(fit) if "EveryNTrainSteps" in text]


@pytest.mark.parametrize(
    ("schedule", "few", "whole"),
    [
        (EveryNTrainSteps(8), [8, 16, 22], [8, 16, 22]),
        (EveryNTrainSteps(5, whole=10), [5, 10, 15, 20, 22], [10, 20, 22]),
        (EveryNTrainSteps(4, whole=1000), [4, 8, 12, 16, 20, 22], [22]),
        (EveryNTrainSteps(11), [11, 22], [11, 22]),
    ],
    ids=str,
)
def test_whole_measurements_by_steps_and_at_the_end(
    make_trainer: MakeTrainer,
    tmp_path: Path,
    schedule: EveryNTrainSteps,
    few: list[int],
    whole: list[int],
) -> None:
    norm, logger = Norm(), CSVLogger(tmp_path)
    callback = small_callback(
        blocks=None, instruments=[norm], every_n_validations=schedule, time_budget=None,
        monitor="train_loss",
    )  # fmt: skip
    trainer = make_trainer(callback, max_steps=22, max_epochs=-1, logger=logger)
    said = _said(lambda: trainer.fit(Watched(), train_loader()))
    assert not [text for text in said if "measures nothing" in text]
    assert [step for step, _ in norm.rows] == few
    assert [row["step"] + 1 for row in callback.history] == whole
    assert callback.history[-1]["epoch"] == 5
    logged = [row for row in _rows(logger) if row.get("hessian/lambda_1")]
    assert [int(row["step"]) + 1 for row in logged] == whole
    for row in callback.history:
        assert math.isfinite(row["train_loss"])
        assert "stability/update_curvature" in row  # that of the last step too
    assert float(logged[-1]["hessian/lambda_1"]) == pytest.approx(callback.history[-1]["lambda_1"])


def test_a_share_of_the_time_without_validation(make_trainer: MakeTrainer) -> None:
    """What is skipped is counted; the last is measured whatever is left."""
    callback = small_callback(
        blocks=None, time_budget=1e-6, every_n_validations=EveryNTrainSteps(5)
    )
    trainer = make_trainer(callback, max_epochs=6)
    trainer.fit(Watched(), train_loader())
    assert [row["step"] + 1 for row in callback.history] == [24]
    assert callback._budgeting.account.skipped == 4
    assert callback._budgeting.account.made == 1


def test_gradients_by_steps(make_trainer: MakeTrainer) -> None:
    callback = GradientStructureCallback(
        num_gradients=20, batch_size=1, figures=None, tests=False, on_error="raise",
        every_n_validations=EveryNTrainSteps(10), monitor="train_loss",
    )  # fmt: skip
    make_trainer(callback, max_epochs=6).fit(Watched(), train_loader())
    assert [row["step"] + 1 for row in callback.history] == [10, 20, 24]


def test_a_resumed_fit_goes_on_counting(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    first = small_callback(every_n_validations=EveryNTrainSteps(5), time_budget=None)
    trainer = make_trainer(first, max_epochs=3)
    trainer.fit(Watched(), train_loader())
    assert [row["step"] + 1 for row in first.history] == [5, 10, 12]
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    second = small_callback(every_n_validations=EveryNTrainSteps(5), time_budget=None)
    make_trainer(second, max_epochs=5).fit(
        Watched(), train_loader(), ckpt_path=tmp_path / "three.ckpt"
    )
    assert [row["step"] + 1 for row in second.history] == [5, 10, 12, 15, 20]


def test_a_failure_at_a_step_is_told_and_training_goes_on(make_trainer: MakeTrainer) -> None:
    class Fails(Norm):
        def measure(self, session: Session, allowance: Allowance) -> Scalars:
            raise ZeroDivisionError("a slip")

    callback = small_callback(
        blocks=None, instruments=[Fails()], every_n_validations=EveryNTrainSteps(3, whole=100),
        on_error="warn", time_budget=Budget(seconds=600),
    )  # fmt: skip
    trainer = make_trainer(callback, max_epochs=3)
    said = _said(lambda: trainer.fit(Watched(), train_loader()))
    assert trainer.global_step == 12
    assert [text for text in said if "a slip" in text]
    assert [row["step"] + 1 for row in callback.history] == [12]


def test_misuse() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps=0"):
        EveryNTrainSteps(0)
    with pytest.raises(ValueError, match="whole=0"):
        EveryNTrainSteps(5, whole=0)

"""How long a fit is, and which validation is its last, by Lightning itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from callbacks.tiny_modules import Regression, train_loader, val_loader
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader, IterableDataset

from lightning_hessian.callbacks.run_length import is_last_validation, share_done

MakeTrainer = Callable[..., Any]


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


def test_a_stop_before_min_epochs_is_no_end(make_trainer: MakeTrainer) -> None:
    module = Asks()
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    make_trainer(stop, max_epochs=9, min_epochs=5).fit(module, train_loader(), val_loader())
    assert len(module.foreseen) == 5
    assert not any(module.foreseen)

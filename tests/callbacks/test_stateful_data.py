"""Data that remember what was read of them: training is the same, bit for bit, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from callbacks.tiny_modules import Regression, small_callback, train_loader, val_loader
from support.shared_data import SHARED, CountsInItsClass
from support.stateful_data import COPIED, CountsSamples, mapped, stream
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from lightning_hessian import GradientStructureCallback
from lightning_hessian.callbacks.schedule import EveryNValidations
from lightning_hessian.measure.budget import Budget

MakeTrainer = Callable[..., Any]


class Doubles(Regression):
    """Changes its batch in place; takes a batch of several loaders too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            return sum(super(Doubles, self).training_step(part, 0) for part in batch.values())
        batch[0].mul_(1.01)
        return super().training_step(batch, batch_idx)


def small_gradient_callback(**arguments: Any) -> GradientStructureCallback:
    return GradientStructureCallback(
        **{
            "num_gradients": 6, "num_eigenvalues": 3, "num_batches": 6, "tests": False,
            "time_budget": Budget(seconds=600), "figures": None, "on_error": "raise", **arguments,
        }
    )  # fmt: skip


BOTH = pytest.mark.parametrize(
    "make_callback", [small_callback, small_gradient_callback], ids=["hessian", "gradient"]
)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEEN_SAMPLES", "0")


def _weights(make_trainer: MakeTrainer, loader: Any, *callbacks: Any) -> list[Tensor]:
    L.seed_everything(5, verbose=False)
    module = Doubles()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(*callbacks, max_epochs=3, limit_train_batches=3).fit(
            module, loader, val_loader()
        )
    return [parameter.detach().clone() for parameter in module.parameters()]


@BOTH
@pytest.mark.parametrize("name", COPIED)
def test_state_of_the_data_sets_own_is_as_it_would_have_been(
    make_trainer: MakeTrainer, name: str, make_callback: Callable[..., Any]
) -> None:
    expected = _weights(make_trainer, COPIED[name]())
    callback = make_callback()
    found = _weights(make_trainer, COPIED[name](), callback)
    assert len(callback.history) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@BOTH
@pytest.mark.parametrize("on_error", ["warn", "raise"])
@pytest.mark.parametrize("name", SHARED)
def test_state_that_a_copy_shares_is_refused_before_training(
    make_trainer: MakeTrainer, name: str, make_callback: Callable[..., Any], on_error: str
) -> None:
    trainer = make_trainer(make_callback(on_error=on_error))
    module = Doubles()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with pytest.raises(ValueError, match=r"Give data=\[\.\.\.\]"):
        trainer.fit(module, SHARED[name](), val_loader())
    assert trainer.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_the_documentation_counts_these_cases() -> None:
    page = (Path(__file__).parents[2] / "docs" / "trust.md").read_text(encoding="utf-8")
    assert f"same bits | {len(COPIED)} x 2 callbacks | {2 * len(COPIED)} |" in page
    shared = len(SHARED)
    assert f"refused | {shared} x 2 callbacks x 2 settings of `on_error` | {4 * shared} |" in page


@BOTH
def test_a_list_of_batches_serves_where_the_data_are_refused(
    make_trainer: MakeTrainer, make_callback: Callable[..., Any]
) -> None:
    CountsInItsClass.seen = 0
    expected = _weights(make_trainer, mapped(CountsInItsClass()))
    CountsInItsClass.seen = 0
    callback = make_callback(data=list(train_loader()) * 2)
    found = _weights(make_trainer, mapped(CountsInItsClass()), callback)
    assert callback.history
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["CountsSamples", "CountsEpochs", "combined"])
def test_a_loader_given_as_data_may_be_that_of_training(
    make_trainer: MakeTrainer, name: str
) -> None:
    expected = _weights(make_trainer, COPIED[name]())
    loader = COPIED[name]()
    found = _weights(make_trainer, loader, small_callback(data=loader))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class OneDataSet(L.LightningDataModule):
    """Its loaders are made anew at every call, over one data set, by a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.data = CountsSamples()
        self.batches = 0

    def collate(self, batch: Any) -> Any:
        self.batches += 1
        inputs, targets = default_collate(batch)
        return inputs * (1 + 1e-2 * self.batches), targets

    def train_dataloader(self) -> DataLoader[Any]:
        return mapped(self.data, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        return val_loader()


def test_a_data_module_that_counts(make_trainer: MakeTrainer) -> None:
    outcomes = []
    for callbacks in (
        [],
        [small_callback(every_n_validations=EveryNValidations(1, during_validate=True))],
    ):
        L.seed_everything(5, verbose=False)
        module, data = Doubles(), OneDataSet()
        trainer = make_trainer(*callbacks, max_epochs=2)
        trainer.validate(module, datamodule=data, verbose=False)
        trainer.fit(module, datamodule=data)
        outcomes.append((data.data.seen, data.batches, *map(torch.clone, module.parameters())))
    assert outcomes[0][:2] == outcomes[1][:2]
    assert all(map(torch.equal, outcomes[0][2:], outcomes[1][2:]))


class CountsAtValidation(CountsSamples):
    pass


def test_validation_data_that_count(make_trainer: MakeTrainer) -> None:
    losses = []
    for callbacks in ([], [small_callback(data="val")]):
        L.seed_everything(5, verbose=False)
        trainer = make_trainer(*callbacks, max_epochs=3, num_sanity_val_steps=0)
        trainer.fit(Regression(), train_loader(), stream(CountsAtValidation()))
        losses.append(float(trainer.callback_metrics["val_loss"]))
    assert losses[0] == losses[1]

"""A measurement is paired with the metrics of its own validation, whoever else reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from callbacks.tiny_modules import Regression, RegressionData, small_callback
from lightning.pytorch.callbacks import ModelCheckpoint


class EverySecond(Regression):
    """Logs a metric at every second validation only."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[float] = []

    def on_validation_epoch_end(self) -> None:
        if self.current_epoch % 2 == 0:
            self.logged.append(float(self.net[0].weight.detach().norm()))
            self.log("rare", self.logged[-1])


class Reads(L.Callback):
    """Asks for the metrics after us, in the same validation and in training."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        assert "val_loss" in trainer.callback_metrics

    def on_train_batch_end(self, trainer: Any, *others: Any) -> None:
        assert "train_loss" in trainer.callback_metrics


READERS: dict[str, Callable[[], list[L.Callback]]] = {
    "nobody": list,
    "checkpoints": lambda: [ModelCheckpoint(monitor="val_loss", save_top_k=1)],
    "a callback": lambda: [Reads()],
}


@pytest.mark.parametrize("reader", READERS)
def test_a_metric_of_an_older_validation_is_not_paired(
    make_trainer: Callable[..., Any], reader: str
) -> None:
    callback, module = small_callback(monitor=["val_loss", "rare"]), EverySecond()
    trainer = make_trainer(
        callback, *READERS[reader](), max_epochs=5, enable_checkpointing=reader == "checkpoints"
    )
    trainer.fit(module, RegressionData())
    rows = callback.history
    assert ["rare" in row for row in rows] == [True, False, True, False, True]
    assert [row["rare"] for row in rows if "rare" in row] == pytest.approx(module.logged[-3:])
    assert all("val_loss" in row for row in rows)


class OfTheEpoch(Regression):
    """Logs metrics of whole training epochs, which come after the validation of the epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("of_the_epoch", loss, on_step=False, on_epoch=True)
        self.log("always_one", 1.0, on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("reader", READERS)
def test_a_metric_of_a_training_epoch_is_paired_with_the_next_validation(
    make_trainer: Callable[..., Any], reader: str
) -> None:
    names = ["val_loss", "of_the_epoch", "always_one"]
    callback = small_callback(monitor=names)
    trainer = make_trainer(
        callback, *READERS[reader](), max_epochs=4, enable_checkpointing=reader == "checkpoints"
    )
    trainer.fit(OfTheEpoch(), RegressionData())
    rows = callback.history
    for name in names[1:]:
        assert [name in row for row in rows] == [False, True, True, True], name
    assert len({row["of_the_epoch"] for row in rows[1:]}) == 3

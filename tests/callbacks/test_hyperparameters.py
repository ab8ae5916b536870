"""The callback's arguments among the hyperparameters of a run, beside the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from callbacks.tiny_modules import (
    NUM_PARAMETERS,
    Regression,
    small_callback,
    train_loader,
    val_loader,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.runs import finished, train, wandb_logger

from lightning_hessian import EveryNTrainSteps, GradientStructureCallback, HessianSpectrumCallback
from lightning_hessian.callbacks.hyperparameters import plain
from lightning_hessian.histories.load import load_runs
from lightning_hessian.measure.budget import Budget

MakeTrainer = Callable[..., Any]


class Named(Regression):
    """Has hyperparameters of its own, under names that we might have taken, too."""

    def __init__(self, optimizer: str = "the user's", num_parameters: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def small() -> HessianSpectrumCallback:
    return HessianSpectrumCallback(
        num_eigenvalues=3, blocks=None, figures=None, num_batches=1, monitor=("val_loss", "gap"),
        time_budget=None, layers={"first": "net.0.*"}, every_n_validations=EveryNTrainSteps(7),
    )  # fmt: skip


def assert_ours(found: dict[str, Any]) -> None:
    assert found["num_eigenvalues"] == 3
    assert found["monitor"] == "val_loss, gap"
    assert found["data"] == "train"
    assert found["blocks"] is None
    assert found["layers"] == "first: net.0.*"
    assert found["every_n_validations"] == "EveryNTrainSteps(n=7, every_n_validations=1)"
    assert found["num_parameters"] == NUM_PARAMETERS
    assert found["optimizer"] == "Adam"


@pytest.mark.usefixtures("own_wandb")
def test_they_stand_beside_the_users(tmp_path: Path) -> None:
    wandb = wandb_logger(tmp_path, config={"num_parameters": 3, "width": 7})
    csv, tensorboard = CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tensorboard")
    gradients = GradientStructureCallback(num_gradients=8, tests=False, figures=None)
    train(tmp_path, [small(), gradients], [wandb, csv, tensorboard], 1, module=Named())
    config = finished(wandb, tmp_path).config
    files = [
        yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
        for logger in (csv, tensorboard)
    ]
    for found in (config, *files):
        assert_ours(found["hessian_callback"])
        assert found["gradient_callback"]["num_gradients"] == 8
        assert found["gradient_callback"]["num_parameters"] == NUM_PARAMETERS
        assert (found["optimizer"], found["num_parameters"]) == ("the user's", 3)
    assert config["width"] == 7
    # Read back, they are columns by which runs are grouped.
    (run,) = load_runs(csv.log_dir, cache=False)
    assert run.config["hessian_callback.optimizer"] == "Adam"


def test_tensorboard_shows_the_users(tmp_path: Path) -> None:
    """Its page of hyperparameters has those that were logged first."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    logger = TensorBoardLogger(tmp_path, "tensorboard")
    train(tmp_path, [small()], logger, 1, module=Named())
    events = EventAccumulator(logger.log_dir).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert set(shown) == {"optimizer", "num_parameters"}


class Refuses(CSVLogger):
    def log_hyperparams(self, params: Any = None) -> None:
        if params and "hessian_callback" in params:
            raise RuntimeError("no more than two hyperparameters")
        super().log_hyperparams(params)


def test_a_logger_that_refuses_costs_a_warning(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callback = small_callback(blocks=None, on_error="warn")
    trainer = make_trainer(callback, logger=Refuses(tmp_path))
    with pytest.warns(UserWarning, match=r"logging hyperparameters to Refuses failed: .*no more"):
        trainer.fit(Named(), train_loader(), val_loader())
    assert len(callback.history) == 1
    found = yaml.safe_load((Path(trainer.logger.log_dir) / "hparams.yaml").read_text())
    assert found["num_parameters"] == 3


def test_values_are_plain() -> None:
    class Calls:
        def __call__(self) -> None:
            """Be called."""

    assert plain(Budget(share=0.2)) == "Budget(share=0.2)"
    assert plain([torch.zeros(2), torch.zeros(2)]) == "list"
    assert plain(train_loader()) == "DataLoader"
    assert plain(Calls()) == "Calls"
    assert plain(torch.nn.functional.mse_loss) == "mse_loss"
    assert plain({"head": ["net.2.*", "net.0.bias"]}) == "head: net.2.*, net.0.bias"

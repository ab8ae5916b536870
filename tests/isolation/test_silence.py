"""What a loss logs and prints is heard by nobody while it is measured."""

from __future__ import annotations

import contextlib

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.loggers.logger import Logger
from support.states import assert_same, measure, module_state
from torch import nn

from lightning_hessian.isolation.context import muted


class Recorder(Logger):
    """Keeps all that is said to it."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.said: list = []

    @property
    def experiment(self):
        return self.said

    def log_metrics(self, metrics, step=None):
        self.said.append(metrics)

    def log_hyperparams(self, *args, **kwargs):
        self.said.append(args)


class Speaking(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.fails = False

    def training_step(self, batch):
        loss = self.layer(batch).square().mean()
        self.log("train_loss", loss, prog_bar=True)
        self.log_dict({"a": loss})
        self.print("a line")
        self.logger.log_metrics({"direct": 1.0})
        for logger in self.loggers:
            logger.experiment.append("experiment")
        self.trainer.logger.log_hyperparams({"x": 1})
        if self.fails:
            raise KeyError("no such sample")
        return loss


class Nested(Speaking):
    """Its loss is that of a LightningModule inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Speaking()

    def training_step(self, batch):
        self.inner.log("inner_loss", 1.0)
        self.inner.print("a line")
        return super().training_step(batch) + self.inner.layer(batch).square().mean()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [Speaking, Nested])
def test_nothing_is_logged_or_printed(kind, fails, capsys):
    module, loggers = kind(), [Recorder(), Recorder()]
    module.fails = fails
    trainer = L.Trainer(
        accelerator="cpu", logger=loggers, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.strategy.connect(module)
    module.trainer = trainer
    capsys.readouterr()
    before = module_state(module)
    if fails:
        with pytest.raises(KeyError):
            measure(module, [torch.randn(5, 3)], num_eigenvalues=1)
    else:
        measure(module, [torch.randn(5, 3)], num_eigenvalues=1)
    assert [logger.said for logger in loggers] == [[], []]
    assert capsys.readouterr().out == ""
    assert trainer.loggers == loggers
    assert trainer.callback_metrics == {}
    assert_same(before, module_state(module))
    assert not {"log", "log_dict", "print"} & vars(module).keys()
    module.print("heard again")
    assert "heard again" in capsys.readouterr().out


def test_a_silenced_method_of_the_users_own_comes_back():
    module, said = Speaking(), []
    module.log = lambda *args, **kwargs: said.append(args)
    own = module.log
    with muted(module):
        module.log("loss", 1.0)
    assert module.log is own
    module.log("loss", 2.0)
    assert said == [("loss", 2.0)]


class WandbRun:
    """As `wandb.Run`: what it is told goes through methods, which may be replaced on a run."""

    def __init__(self) -> None:
        self.said: list = []

    def log(self, *args):
        self.said.append(args)

    def log_artifact(self, *args):
        self.said.append(args)

    def alert(self, *args):
        self.said.append(args)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("place", ["run", "module", "both", "neither"])
@pytest.mark.parametrize("name", ["log", "log_artifact", "alert"])
def test_what_the_user_put_in_place_of_wandbs_logging_comes_back(
    name, place, raises, nested, monkeypatch
):
    run, heard = WandbRun(), []
    monkeypatch.setattr(wandb, "run", run)
    monkeypatch.setattr(wandb, name, getattr(run, name))
    mine = lambda *args: heard.append(args)  # noqa: E731
    if place in ("run", "both"):
        setattr(run, name, mine)
    if place in ("module", "both"):
        monkeypatch.setattr(wandb, name, mine)
    before, module_before = dict(vars(run)), dict(vars(wandb))
    with contextlib.suppress(KeyError), muted(nn.Linear(1, 1)):
        with muted(nn.Linear(1, 1)) if nested else contextlib.nullcontext():
            getattr(wandb.run, name)("behind the back")
        getattr(wandb, name)("behind the back")
        if raises:
            raise KeyError
    assert (run.said, heard) == ([], [])
    assert vars(run) == before
    assert vars(wandb) == module_before
    getattr(wandb.run, name)("heard again")
    assert [("heard again",)] in (run.said, heard)


def test_a_run_without_attributes_of_its_own_can_stand_there(monkeypatch):
    class Slim:
        __slots__ = ()

        def log(self, *args):
            raise AssertionError("never called")

    monkeypatch.setattr(wandb, "run", Slim())
    with muted(nn.Linear(1, 1)):
        wandb.log({"a": 1})

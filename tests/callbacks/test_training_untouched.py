"""Training with the callback is, bit for bit, training without it."""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from callbacks.tiny_modules import (
    Regression,
    small_callback,
    train_loader,
    val_loader,
)
from support.every_loader import LOADERS, Everything, WithoutLstm
from torch import Tensor

from lightning_hessian.measure.options import LossOptions

OURS = ("hessian/", "correlation/", "stability/")


def _outcome(
    make_trainer: Callable[..., Any],
    *callbacks: Any,
    module: Callable[[], L.LightningModule] = Everything,
    loader: Callable[[], Any] = train_loader,
    **arguments: Any,
) -> dict[str, Any]:
    """Trains from the seed, and returns all that training leaves behind."""
    L.seed_everything(7, verbose=False)
    model, data = module(), loader()
    trainer = make_trainer(*callbacks, **{"max_epochs": 2, **arguments})
    trainer.fit(model, data, val_loader())
    return {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "gradients": [parameter.grad for parameter in model.parameters()],
        "modes": [part.training for part in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "rng": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
        "generator": data.generator.get_state() if getattr(data, "generator", None) else None,
        "steps": getattr(model, "steps", None),
        "metrics": {
            name: value
            for name, value in trainer.callback_metrics.items()
            if not name.startswith(OURS)
        },
    }


def _assert_identical(found: Any, expected: Any, path: str = "") -> None:
    """Compares to the last bit, and says where."""
    assert type(found) is type(expected), path
    if isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            _assert_identical(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), path
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            _assert_identical(one, other, f"{path}/{index}")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(found, expected), path
    else:
        assert found == expected, path


def _check(make_trainer: Callable[..., Any], arguments: dict[str, Any], **setting: Any) -> Any:
    """Compares the outcomes with and without a callback, which must have measured."""
    callback = small_callback(**arguments)
    expected = _outcome(make_trainer, **setting)
    found = _outcome(make_trainer, callback, **setting)
    assert len(callback.history) >= 2
    _assert_identical(found, expected)
    return callback


def _setting(arguments: dict[str, Any]) -> str:
    """Names a case by its arguments, those that are words or numbers with their values."""
    plain = {k: v for k, v in arguments.items() if isinstance(v, (str, int, float))}
    return "-".join(f"{k}={plain[k]}" if k in plain else k for k in arguments)


def _plain_loss(module: Any, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean()


class DrawsOneNumber(L.Callback):
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        torch.rand(())


def test_the_comparison_sees_one_random_number(make_trainer: Callable[..., Any]) -> None:
    expected = _outcome(make_trainer)
    found = _outcome(make_trainer, DrawsOneNumber())
    for part in ("weights", "optimizer", "rng", "steps", "metrics"):
        with pytest.raises(AssertionError):
            _assert_identical(found[part], expected[part])


@pytest.mark.parametrize("name", LOADERS)
def test_whatever_the_loader(make_trainer: Callable[..., Any], name: str) -> None:
    _check(make_trainer, {}, loader=LOADERS[name])


@pytest.mark.parametrize(
    "arguments",
    [
        {"val_check_interval": 0.5},
        {"accumulate_grad_batches": 3, "val_check_interval": 1},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"reload_dataloaders_every_n_epochs": 1},
        {"gradient_clip_val": 0.1, "num_sanity_val_steps": 0},
    ],
    ids=_setting,
)
def test_whatever_the_trainer(make_trainer: Callable[..., Any], arguments: dict[str, Any]) -> None:
    _check(make_trainer, {}, **arguments)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


class AnyOptimizer(Regression):
    """A regression whose optimizer is chosen."""

    name = "SGD"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.name](self.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_the_optimizer(make_trainer: Callable[..., Any], name: str) -> None:
    module = type(f"With{len(name)}", (AnyOptimizer,), {"name": name})
    callback = _check(make_trainer, {}, module=module)
    assert all("stability/ratio" in row for row in callback.history)


@pytest.mark.parametrize(
    "arguments",
    [
        {"data": "val"},
        {"data": train_loader()},
        {"data": list(val_loader())},
        {"loss_options": LossOptions(mode="train"), "hvp": "autograd"},
        {"hvp": "linearize", "loss_fn": _plain_loss},
        {"hvp": "recompute"},
        {"loss_fn": _plain_loss},
    ],
    ids=_setting,
)
def test_whatever_is_measured(make_trainer: Callable[..., Any], arguments: dict[str, Any]) -> None:
    module = WithoutLstm if arguments.get("hvp") == "linearize" else Everything
    _check(make_trainer, arguments, module=module, loader=LOADERS["augmented"])


def _draws_and_fails(module: Any, batch: Any) -> Tensor:
    module.train()
    torch.rand(())
    raise ArithmeticError("half way")


def _never_linearised(module: Any, batch: Any) -> Tensor:
    """The backward of hardsigmoid has no forward derivative."""
    torch.rand(())
    return torch.nn.functional.hardsigmoid(_plain_loss(module, batch) / 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_fn": _draws_and_fails}, "half way"),
        ({"loss_fn": _never_linearised, "hvp": "linearize"}, "hvp='linearize' could not"),
    ],
    ids=["loss_fn", "linearize"],
)
def test_when_a_measurement_fails(
    make_trainer: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    callback = small_callback(on_error="warn", **arguments)
    expected = _outcome(make_trainer, module=WithoutLstm)
    with pytest.warns(UserWarning, match=message):
        found = _outcome(make_trainer, callback, module=WithoutLstm)
    assert callback.history == []
    _assert_identical(found, expected)


class KeepsItsNormInEval(Everything):
    """A BatchNorm that never trains by its batches, as in a frozen backbone."""

    def on_train_epoch_start(self) -> None:
        self.norm.eval()


@pytest.mark.parametrize(
    ("mode", "module", "expected"),
    [
        ("eval", Everything, (False, False)),
        ("train", Everything, (True, True)),
        ("train", KeepsItsNormInEval, (True, False)),
    ],
)
def test_mode_of_dropout_and_norm(
    make_trainer: Callable[..., Any], mode: str, module: Any, expected: tuple[bool, bool]
) -> None:
    """In mode="train" the measurement has the modes of training, not of all that could train."""
    modes = []

    def loss_fn(module: Any, batch: Any) -> Tensor:
        modes.append((module.dropout.training, module.norm.training))
        return _plain_loss(module, batch)

    options = LossOptions(mode=mode)
    arguments = {"loss_options": options, "loss_fn": loss_fn, "hvp": "autograd"}
    _check(make_trainer, arguments, module=module)
    assert set(modes) == {expected}


class AugmentedOnTheDevice(Everything):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]


def test_random_augmentation_after_the_transfer(make_trainer: Callable[..., Any]) -> None:
    _check(make_trainer, {}, module=AugmentedOnTheDevice)


class Meter:
    """A running mean, as many projects have one."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1


class Keeps(Regression):
    """Keeps something from each training step, in a container of one kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.list: list[float] = []
        self.by_stage: dict[str, list[float]] = {"train": [], "val": []}
        self.by_batch: defaultdict[int, list[float]] = defaultdict(list)
        self.deque: deque[float] = deque(maxlen=5)
        self.counter: Counter[str] = Counter()
        self.tensor, self.array = torch.zeros(2), np.zeros(2)
        self.meter = Meter()
        self.metrics = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()])
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        value = loss.item()
        if self.kind == "list":
            self.list.append(value)
        elif self.kind == "dict of lists":
            self.by_stage["train"].append(value)
        elif self.kind == "defaultdict":
            self.by_batch[batch_idx].append(value)
        elif self.kind == "deque":
            self.deque.append(value)
        elif self.kind == "counter":
            self.counter["steps"] += 1
        elif self.kind == "number":
            self.count += 1
        elif self.kind == "tensor":
            self.tensor += value
        elif self.kind == "array":
            self.array += value
        elif self.kind == "object":
            self.meter.update(value)
        elif self.kind == "metric collection":
            self.metrics.update(self.net(batch[0]), batch[1])
        return loss

    def kept(self) -> list[Any]:
        metric = self.metrics["MeanSquaredError"]
        return [
            self.list, dict(self.by_stage), dict(self.by_batch), list(self.deque),
            dict(self.counter), self.count, self.tensor, self.array,
            (self.meter.total, self.meter.count), metric.sum_squared_error, metric.total,
        ]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "list", "dict of lists", "defaultdict", "deque", "counter", "number", "tensor", "array",
        "object", "metric collection",
    ],
)  # fmt: skip
def test_what_training_step_keeps(make_trainer: Callable[..., Any], kind: str) -> None:
    kept = []
    for callbacks in ([], [small_callback()]):
        L.seed_everything(7, verbose=False)
        module = Keeps(kind)
        before = repr(module.kept())
        make_trainer(*callbacks, max_epochs=2).fit(module, train_loader(), val_loader())
        kept.append(module.kept())
        assert repr(kept[-1]) != before, "the module kept nothing"
    _assert_identical(kept[1], kept[0])

"""Training with the callback is, bit for bit, training without it."""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from callbacks.tiny_modules import (
    NUM_TRAIN,
    Regression,
    samples,
    small_callback,
    train_loader,
    val_loader,
)
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_hessian.measure.options import LossOptions

OURS = ("hessian/", "correlation/", "stability/")


class Everything(L.LightningModule):
    """Dropout, BatchNorm, an LSTM and a frozen layer; metrics and lists kept in training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1)
        self.mse = torchmetrics.MeanSquaredError()
        self.errors = torchmetrics.CatMetric()
        self.losses: list[Tensor] = []
        self.steps: list[Any] = []

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.lstm(inputs.reshape(len(inputs), 2, 2))
        return self.head(self.frozen(self.dropout(self.norm(states[:, -1]))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        found = self(inputs)
        loss = nn.functional.mse_loss(found, targets)
        self.mse(found.float(), targets)
        self.errors.update((found.detach().float() - targets).abs())
        self.losses.append(loss.detach())
        modes = [module.training for module in self.modules()]
        self.steps.append((self.global_step, inputs.clone(), loss.detach(), modes))
        self.log("train_mse", self.mse, on_step=True, on_epoch=True)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("listed_loss", torch.stack(self.losses).mean())
        self.log("largest_error", self.errors.compute().max())
        self.losses.clear()
        self.errors.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:  # comes after that of the callbacks
        self.steps.append([module.training for module in self.modules()])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class WithoutLstm(Everything):
    """The same without the LSTM, which has no forward-mode derivative."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.frozen(self.dropout(self.norm(inputs[:, :3]))))


class Augmented(Dataset):
    """Noise from all three global generators on every fetch."""

    def __init__(self) -> None:
        self.data = samples(NUM_TRAIN, seed=1)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.data[index]
        scale = random.uniform(0.9, 1.1) * np.random.uniform(0.9, 1.1)
        return scale * inputs + 0.1 * torch.randn(4), target


class AugmentedByItself(Augmented):
    """Noise from a generator of the dataset's own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(3)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = self.data[index]
        return inputs * float(self.generator.uniform(0.5, 1.5)), target


class Stream(IterableDataset):
    """Samples without an index, with noise from the global generator."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, target in samples(NUM_TRAIN, seed=1):
            yield inputs + 0.1 * torch.randn(4), target


class Permutation(Sampler):
    """A sampler of the user's own, with a generator that goes on from epoch to epoch."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(4)

    def __iter__(self) -> Iterator[int]:
        yield from self.random.permutation(NUM_TRAIN).tolist()

    def __len__(self) -> int:
        return NUM_TRAIN


class Buckets(BatchSampler):
    """A batch sampler of the user's own around a sampler with a generator."""


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def _buckets() -> DataLoader[Any]:
    data = samples(NUM_TRAIN, seed=1)
    batches = Buckets(RandomSampler(data, generator=_seeded()), batch_size=8, drop_last=True)
    return DataLoader(data, batch_sampler=batches)


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": train_loader,
    "own generator": lambda: train_loader(generator=_seeded()),
    "workers": lambda: train_loader(
        dataset=Augmented(), num_workers=1, persistent_workers=True, generator=_seeded()
    ),
    "workers without generator": lambda: train_loader(
        dataset=Augmented(), num_workers=1, persistent_workers=True
    ),
    "augmented": lambda: train_loader(dataset=Augmented()),
    "augmented by itself": lambda: train_loader(dataset=AugmentedByItself()),
    "stream": lambda: train_loader(dataset=Stream(), shuffle=False),
    "subset": lambda: train_loader(
        sampler=SubsetRandomSampler(range(20), generator=_seeded()), shuffle=False
    ),
    "weighted": lambda: train_loader(
        sampler=WeightedRandomSampler(torch.ones(NUM_TRAIN), NUM_TRAIN), shuffle=False
    ),
    "own sampler": lambda: train_loader(sampler=Permutation(), shuffle=False),
    "own batch sampler": _buckets,
}


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

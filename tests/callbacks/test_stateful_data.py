"""Data that remember what was read of them: training is the same, bit for bit, or refused."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import queue
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from callbacks.tiny_modules import Regression, samples, small_callback, train_loader, val_loader
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    default_collate,
)
from torch.utils.data.datapipes.iter import IterableWrapper, Shuffler

from lightning_hessian import GradientStructureCallback
from lightning_hessian.callbacks.schedule import EveryNValidations
from lightning_hessian.measure.budget import Budget

MakeTrainer = Callable[..., Any]
SIZE = 32


class Samples(Dataset):
    """The plain samples; what is derived from it changes them by what it remembers."""

    def __init__(self) -> None:
        self.inputs, self.targets = samples(SIZE, seed=1).tensors
        self.prepare()

    def prepare(self) -> None:
        """Makes the state."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index] * (1 + 1e-2 * self.count(index)), self.targets[index]

    def count(self, index: int) -> float:
        """Returns how often a sample was read before, or the like."""
        raise NotImplementedError


class Stream(IterableDataset):
    """The same as a stream."""

    def __init__(self) -> None:
        self.data = samples(4 * SIZE, seed=1)
        self.prepare()

    def prepare(self) -> None:
        """Makes the state."""


# State that a copy has of its own --------------------------------------------------------------


class CountsSamples(Samples):
    def prepare(self) -> None:
        self.seen = 0

    def count(self, index: int) -> float:
        self.seen += 1
        return self.seen


class CountsInADictOfLists(Samples):
    def prepare(self) -> None:
        self.seen: dict[str, list[int]] = {"counts": [0] * SIZE}

    def count(self, index: int) -> float:
        self.seen["counts"][index] += 1
        return sum(self.seen["counts"])


class CountsInSlots(Samples):
    class Counter:
        __slots__ = ("n",)

        def __init__(self) -> None:
            self.n = 0

    def prepare(self) -> None:
        self.seen = self.Counter()

    def count(self, index: int) -> float:
        self.seen.n += 1
        return self.seen.n


class ConsumesAList(Samples):
    def prepare(self) -> None:
        self.strengths = [float(i) for i in range(2000)]

    def count(self, index: int) -> float:
        return self.strengths.pop()


class ConsumesAnIterator(Samples):
    def prepare(self) -> None:
        self.strengths = iter([float(i) for i in range(2000)])

    def count(self, index: int) -> float:
        return next(self.strengths)


class ConsumesAQueue(Samples):
    def prepare(self) -> None:
        self.strengths: queue.Queue[float] = queue.Queue()
        for i in range(2000):
            self.strengths.put(float(i))

    def count(self, index: int) -> float:
        return self.strengths.get()


class ChangesItsTensor(Samples):
    def count(self, index: int) -> float:
        self.inputs[index] *= 1.01
        return 0


class ChangesItsArray(Samples):
    def prepare(self) -> None:
        self.array = np.zeros(SIZE)

    def count(self, index: int) -> float:
        torch.from_numpy(self.array[index : index + 1]).add_(1)  # past NumPy's back
        return self.array.sum()


class SharesATensorWithWorkers(Samples):
    def prepare(self) -> None:
        self.seen = torch.zeros(1).share_memory_()

    def count(self, index: int) -> float:
        self.seen += 1
        return float(self.seen)


class CachesSamples(Samples):
    """A cache whose entries depend on the order in which it was filled."""

    def prepare(self) -> None:
        self.cache: dict[int, float] = {}

    def count(self, index: int) -> float:
        return self.cache.setdefault(index, len(self.cache))


class CountsInATransform(Samples):
    class Transform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(()))

    def prepare(self) -> None:
        self.transform = self.Transform()

    def count(self, index: int) -> float:
        self.transform.n += 1
        return float(self.transform.n)


class ReadsAFile(Samples):
    """A cursor of the operating system's: the position of an open file."""

    def prepare(self) -> None:
        path = Path("strengths.bin")
        path.write_bytes(bytes(range(256)) * 8)
        self.file = path.open("rb")

    def count(self, index: int) -> float:
        return self.file.read(1)[0]

    def __del__(self) -> None:
        self.file.close()


class RemovesItsFolder(CountsSamples):
    """Whose end deletes what the original still reads."""

    def prepare(self) -> None:
        super().prepare()
        handle, name = tempfile.mkstemp(dir=".")
        os.close(handle)
        self.path = Path(name)
        self.path.write_text("3")

    def count(self, index: int) -> float:
        return super().count(index) + float(self.path.read_text())

    def __del__(self) -> None:
        self.path.unlink(missing_ok=True)


class CountsEpochs(Stream):
    def prepare(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.epoch))
        yield from (self.data[i] for i in order.tolist())


class IsItsOwnIterator(Stream):
    def prepare(self) -> None:
        self.place = -1

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.place += 1
        if self.place >= len(self.data):
            raise StopIteration
        return self.data[self.place]


class GoesOnAtItsPlace(IsItsOwnIterator):
    """A stream that begins where the last pass ended."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(SIZE):
            self.place = (self.place + 1) % len(self.data)
            yield self.data[self.place]


class SetsItsEpoch(CountsSamples):
    """As Hugging Face's: Lightning or the user calls ``set_epoch``."""

    def set_epoch(self, epoch: int) -> None:
        self.seen = 1000 * epoch


class CountingSampler(Sampler):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch += epoch

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(np.random.default_rng(self.epoch).permutation(SIZE).tolist())

    def __len__(self) -> int:
        return SIZE


class CountingCollate:
    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, batch: Any) -> Any:
        self.batches += 1
        inputs, targets = default_collate(batch)
        return inputs * (1 + 1e-2 * self.batches), targets


class HandsOutItsBatches(Dataset):
    """Whole batches, the very tensors that it holds, which the module then changes."""

    def __init__(self) -> None:
        data = samples(SIZE, seed=1)
        self.batches = [list(data[i : i + 8]) for i in range(0, SIZE, 8)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def _stream(data: Any, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=8, **arguments)


def _mapped(data: Any, **arguments: Any) -> DataLoader[Any]:
    return train_loader(dataset=data, **arguments)


def _partial_collate() -> DataLoader[Any]:
    return _mapped(samples(SIZE, 1), collate_fn=functools.partial(CountingCollate().__call__))


COPIED: dict[str, Callable[[], Any]] = {
    **{
        kind.__name__: functools.partial(lambda kind: _mapped(kind()), kind)
        for kind in (
            CountsSamples, CountsInADictOfLists, CountsInSlots, ConsumesAList, ConsumesAnIterator,
            ConsumesAQueue, ChangesItsTensor, ChangesItsArray, SharesATensorWithWorkers,
            CachesSamples, CountsInATransform, ReadsAFile, RemovesItsFolder, SetsItsEpoch,
        )
    },
    **{
        kind.__name__: functools.partial(lambda kind: _stream(kind()), kind)
        for kind in (CountsEpochs, IsItsOwnIterator, GoesOnAtItsPlace)
    },
    "subset": lambda: _mapped(Subset(CountsSamples(), range(24))),
    "concatenated": lambda: _mapped(ConcatDataset([CountsSamples(), CachesSamples()])),
    "chained": lambda: _stream(ChainDataset([CountsEpochs(), GoesOnAtItsPlace()])),
    "data pipe": lambda: _stream(Shuffler(IterableWrapper(list(samples(SIZE, 1))))),
    "sampler": lambda: _mapped(samples(SIZE, 1), sampler=CountingSampler(), shuffle=False),
    "collate": lambda: _mapped(samples(SIZE, 1), collate_fn=CountingCollate()),
    "collate by a partial": _partial_collate,
    "workers": lambda: _mapped(CachesSamples(), num_workers=1, persistent_workers=True),
    "own batches": lambda: DataLoader(HandsOutItsBatches(), batch_size=None),
    "combined": lambda: CombinedLoader(
        {"a": _mapped(CountsSamples()), "b": _stream(CountsEpochs())}, "min_size"
    ),
}  # fmt: skip


# State that is shared with every copy -----------------------------------------------------------

SEEN = 0
REGISTRY: dict[str, int] = {"seen": 0}


class CountsInItsClass(Samples):
    seen = 0

    def count(self, index: int) -> float:
        type(self).seen += 1
        return self.seen


class CountsInAListOfItsClass(Samples):
    seen: list[int] = []  # noqa: RUF012 - the fault that is meant

    def count(self, index: int) -> float:
        self.seen.append(index)
        return len(self.seen)


class CountsInAGlobal(Samples):
    def count(self, index: int) -> float:
        global SEEN
        SEEN += 1
        return SEEN


def _register() -> int:
    REGISTRY["seen"] += 1
    return REGISTRY["seen"]


class CountsInAGlobalOfAFunction(Samples):
    def count(self, index: int) -> float:
        return _register()


class CountsInADefault(Samples):
    def count(self, index: int, seen: list[int] = []) -> float:  # noqa: B006 - as above
        seen.append(index)
        return len(seen)


class CountsInTheEnvironment(Samples):
    def count(self, index: int) -> float:
        os.environ["SEEN_SAMPLES"] = str(int(os.environ.get("SEEN_SAMPLES", "0")) + 1)
        return float(os.environ["SEEN_SAMPLES"])


class IsASingleton(CountsSamples):
    def __deepcopy__(self, memo: Any) -> IsASingleton:
        return self


class CountsBetweenProcesses(Samples):
    def prepare(self) -> None:
        self.seen = multiprocessing.Value("i", 0)

    def count(self, index: int) -> float:
        self.seen.value += 1
        return self.seen.value


class HoldsAGenerator(Samples):
    def prepare(self) -> None:
        self.strengths = (float(i) for i in itertools.count())

    def count(self, index: int) -> float:
        return next(self.strengths)


class HoldsATable(Samples):
    def prepare(self) -> None:
        self.rows = sqlite3.connect(":memory:").execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 2000) SELECT * "
            "FROM n"
        )

    def count(self, index: int) -> float:
        return self.rows.fetchone()[0]


class ReadsLines(Samples):
    """A text file within its own iteration does not tell where it is."""

    def prepare(self) -> None:
        path = Path("strengths.txt")
        path.write_text("".join(f"{i}\n" for i in range(2000)))
        self.lines = path.open()
        next(self.lines)

    def count(self, index: int) -> float:
        return float(next(self.lines))


def _closure() -> DataLoader[Any]:
    seen = 0

    def collate(batch: Any) -> Any:
        nonlocal seen
        seen += 1
        inputs, targets = default_collate(batch)
        return inputs * (1 + 1e-2 * seen), targets

    return _mapped(samples(SIZE, 1), collate_fn=collate)


def _lambda_with_a_list() -> DataLoader[Any]:
    seen: list[int] = []
    return _mapped(samples(SIZE, 1), collate_fn=lambda b: (seen.append(1), default_collate(b))[1])


class Walked:
    """A loader of another kind, which cannot be copied."""

    def __init__(self) -> None:
        self.source = iter(_mapped(samples(SIZE, 1)))
        self.numbers = (i for i in range(10**6))

    def __iter__(self) -> Iterator[Any]:
        next(self.numbers)
        return iter(_mapped(samples(SIZE, 1)))

    def __len__(self) -> int:
        return 4


SHARED: dict[str, Callable[[], Any]] = {
    **{
        kind.__name__: functools.partial(lambda kind: _mapped(kind()), kind)
        for kind in (
            CountsInItsClass, CountsInAListOfItsClass, CountsInAGlobal, CountsInADefault,
            CountsInAGlobalOfAFunction, CountsInTheEnvironment, IsASingleton,
            CountsBetweenProcesses, HoldsAGenerator, HoldsATable, ReadsLines,
        )
    },
    "closure": _closure,
    "list of a closure": _lambda_with_a_list,
    "loader of another kind": Walked,
    "subset of one that counts in its class": lambda: _mapped(Subset(CountsInItsClass(), range(9))),
}  # fmt: skip


# Tests ------------------------------------------------------------------------------------------


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
    expected = _weights(make_trainer, _mapped(CountsInItsClass()))
    CountsInItsClass.seen = 0
    callback = make_callback(data=list(train_loader()) * 2)
    found = _weights(make_trainer, _mapped(CountsInItsClass()), callback)
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
        return _mapped(self.data, collate_fn=self.collate)

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
        trainer.fit(Regression(), train_loader(), _stream(CountsAtValidation()))
        losses.append(float(trainer.callback_metrics["val_loss"]))
    assert losses[0] == losses[1]

"""Data that remember what was read of them, in a state that a copy has for itself: `COPIED`."""

from __future__ import annotations

import functools
import os
import queue
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from callbacks.tiny_modules import samples, train_loader
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


def stream(data: Any, **arguments: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=8, **arguments)


def mapped(data: Any, **arguments: Any) -> DataLoader[Any]:
    return train_loader(dataset=data, **arguments)


def _partial_collate() -> DataLoader[Any]:
    return mapped(samples(SIZE, 1), collate_fn=functools.partial(CountingCollate().__call__))


COPIED: dict[str, Callable[[], Any]] = {
    **{
        kind.__name__: functools.partial(lambda kind: mapped(kind()), kind)
        for kind in (
            CountsSamples, CountsInADictOfLists, CountsInSlots, ConsumesAList, ConsumesAnIterator,
            ConsumesAQueue, ChangesItsTensor, ChangesItsArray, SharesATensorWithWorkers,
            CachesSamples, CountsInATransform, ReadsAFile, RemovesItsFolder, SetsItsEpoch,
        )
    },
    **{
        kind.__name__: functools.partial(lambda kind: stream(kind()), kind)
        for kind in (CountsEpochs, IsItsOwnIterator, GoesOnAtItsPlace)
    },
    "subset": lambda: mapped(Subset(CountsSamples(), range(24))),
    "concatenated": lambda: mapped(ConcatDataset([CountsSamples(), CachesSamples()])),
    "chained": lambda: stream(ChainDataset([CountsEpochs(), GoesOnAtItsPlace()])),
    "data pipe": lambda: stream(Shuffler(IterableWrapper(list(samples(SIZE, 1))))),
    "sampler": lambda: mapped(samples(SIZE, 1), sampler=CountingSampler(), shuffle=False),
    "collate": lambda: mapped(samples(SIZE, 1), collate_fn=CountingCollate()),
    "collate by a partial": _partial_collate,
    "workers": lambda: mapped(CachesSamples(), num_workers=1, persistent_workers=True),
    "own batches": lambda: DataLoader(HandsOutItsBatches(), batch_size=None),
    "combined": lambda: CombinedLoader(
        {"a": mapped(CountsSamples()), "b": stream(CountsEpochs())}, "min_size"
    ),
}  # fmt: skip

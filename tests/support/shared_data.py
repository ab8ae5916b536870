"""Data that remember what was read of them, in a state that every copy shares: `SHARED`."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from callbacks.tiny_modules import samples
from torch.utils.data import DataLoader, Subset, default_collate

from support.stateful_data import SIZE, CountsSamples, Samples, mapped

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

    return mapped(samples(SIZE, 1), collate_fn=collate)


def _lambda_with_a_list() -> DataLoader[Any]:
    seen: list[int] = []
    return mapped(samples(SIZE, 1), collate_fn=lambda b: (seen.append(1), default_collate(b))[1])


class Walked:
    """A loader of another kind, which cannot be copied."""

    def __init__(self) -> None:
        self.source = iter(mapped(samples(SIZE, 1)))
        self.numbers = (i for i in range(10**6))

    def __iter__(self) -> Iterator[Any]:
        next(self.numbers)
        return iter(mapped(samples(SIZE, 1)))

    def __len__(self) -> int:
        return 4


SHARED: dict[str, Callable[[], Any]] = {
    **{
        kind.__name__: functools.partial(lambda kind: mapped(kind()), kind)
        for kind in (
            CountsInItsClass, CountsInAListOfItsClass, CountsInAGlobal, CountsInADefault,
            CountsInAGlobalOfAFunction, CountsInTheEnvironment, IsASingleton,
            CountsBetweenProcesses, HoldsAGenerator, HoldsATable, ReadsLines,
        )
    },
    "closure": _closure,
    "list of a closure": _lambda_with_a_list,
    "loader of another kind": Walked,
    "subset of one that counts in its class": lambda: mapped(Subset(CountsInItsClass(), range(9))),
}  # fmt: skip

"""The `metrics.csv` of a run that has no logger, in the form of Lightning's CSVLogger."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning_hessian.results.output import atomic_write
from lightning_hessian.tracking.loggers import own_folder

NAME = "metrics.csv"


class MetricsFile:
    """A table with a row for each step, whole on the disk after every addition.

    Lightning's own writer rewrites its file in place where a key is new, so that a full disk loses
    the rows before it. Here a new file takes the place of the old one, and new columns stand at
    the end: the old rows only grow by commas.

    Args:
        folder: Where the file is made at the first addition.

    Attributes:
        path: The file.
        statistics: Which keys are statistics of measurements.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.statistics: set[str] = set()
        self._keys: list[str] = []
        self._row: dict[str, float] = {}
        self._begin = 0  # where the last row begins
        self._end = 0  # where it ends; what lies beyond was not written to its end

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write values at a step, into the row that is there already if it was the last one.

        Raises:
            OSError: The disk is full, or the folder cannot be written. The rows before are whole,
                and the values come with the next addition at the same step.
        """
        if self._row.get("step") != step:
            self._row = {"step": step}
            self._begin = self._end
        self._row.update(values)
        keys = list(dict.fromkeys([*self._keys, *self._row]))
        if len(keys) > len(self._keys):
            self._widen(keys)
        text = _line(self._row.get(key, "") for key in self._keys)
        self._end = self._begin
        with self.path.open("r+b") as file:
            file.seek(self._begin)
            file.truncate()
            file.write(text)
        self._end = self._begin + len(text)

    def _widen(self, keys: list[str]) -> None:
        """Write the rows before the last one anew, with more columns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = _line(keys)
        commas = b"," * (len(keys) - len(self._keys))
        size = len(header)
        with atomic_write(self.path) as file:
            file.write(header)
            for line in self._rows():
                size += file.write(line.rstrip(b"\n") + commas + b"\n")
        self._keys, self._begin, self._end = keys, size, size

    def _rows(self) -> Iterator[bytes]:
        """Yield the rows before the last one, without the header."""
        if not self._keys:
            return
        with self.path.open("rb") as file:
            file.readline()
            while file.tell() < self._begin:
                yield file.readline()


def _line(fields: Iterable[Any]) -> bytes:
    """Return a line of CSV; floats keep all their digits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().encode(errors="replace")


_FILES: WeakKeyDictionary[Any, MetricsFile] = WeakKeyDictionary()


def own_metrics(trainer: Any) -> MetricsFile:
    """Return the table of a Trainer without logger, the same one for all of its callbacks."""
    if trainer not in _FILES:
        _FILES[trainer] = MetricsFile(own_folder(trainer))
    return _FILES[trainer]

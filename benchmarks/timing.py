"""Times that a loaded machine cannot turn into a wrong ratio: works in turn, ratios by round."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What time is: ``"cpu"`` is that of this process, which other processes do not change much."""

_clock = CLOCKS["wall"]


def use_clock(name: str) -> None:
    """Measure by this clock from now on; the processor's is right for one thread only."""
    global _clock
    _clock = CLOCKS[name]


@dataclass(frozen=True)
class Times:
    """Seconds of several works, measured in turn; one list for each, with one entry a round.

    Attributes:
        seconds: Name to times.
        load: Load average of the last minute, before and after.
    """

    seconds: Mapping[str, list[float]]
    load: tuple[float, float]

    def median(self, name: str) -> float:
        """Return the median time of a work."""
        return statistics.median(self.seconds[name])

    def best(self, name: str) -> float:
        """Return its shortest time."""
        return min(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Return the median over rounds of one time over another of the same round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def record(self, base: str) -> dict[str, Any]:
        """Return what goes into the JSON."""
        return {
            "load": self.load,
            "works": {
                name: {
                    "best_seconds": self.best(name),
                    "median_seconds": self.median(name),
                    f"median_ratio_to_{base}": self.ratio(name, base),
                    f"ratio_of_best_to_{base}": self.best(name) / self.best(base),
                }
                for name in self.seconds
            },
        }


def in_turn(works: Mapping[str, Callable[[], Any]], rounds: int) -> Times:
    """Return the times of some works, each done once in every round, after a round to warm up."""
    before = os.getloadavg()[0]
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            start = _clock()
            work()
            if turn:
                seconds[name].append(_clock() - start)
    return Times(seconds, (before, os.getloadavg()[0]))


def once(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the time of some work and its result."""
    start = _clock()
    result = work()
    return _clock() - start, result


class PeakMemory:
    """The memory of this process (resident set): ``grown`` says by how much it has been more.

    Linux only; elsewhere ``grown`` is None.
    """

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        except OSError:
            self._start = None
        else:
            self._start = _status("VmRSS")

    def grown(self) -> int | None:
        """Return how many bytes the peak since then lies above what was held at the start."""
        return None if self._start is None else _status("VmHWM") - self._start


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields[field].split()[0]) * 1024

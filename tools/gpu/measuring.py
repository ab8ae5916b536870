"""Seconds and memory on a device, which is waited for before a clock is read."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def wait(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    work: Callable[[], Any], device: torch.device, *, rounds: int = 7, least: float = 0.05
) -> float:
    """Return the median time of some work, of rounds that are no shorter than ``least``.

    On the CPU, where it only has to run, there is one round.
    """
    if device.type == "cpu":
        rounds, least = 1, 0.0
    work()
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    times = max(1, int(least / max(time.perf_counter() - start, 1e-6)))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            work()
        wait(device)
        found.append((time.perf_counter() - start) / times)
    return statistics.median(found)


def forget(device: torch.device) -> None:
    """Let go of what is unreachable, and begin to measure the peak of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Return the most bytes of the device that tensors have taken; None on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

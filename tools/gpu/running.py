"""Runs checks one by one: what fails, or takes too long, is noted, and the rest goes on."""

from __future__ import annotations

import gc
import json
import platform
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "torchmetrics", "numpy", "scipy", "wandb", "powerlaw", "triton")


class SkippedError(Exception):
    """A check does not apply here; says why."""


@dataclass(frozen=True)
class Settings:
    """Where checks run, and how many of them.

    Attributes:
        device: The device under test.
        quick: Whether one network stands for all.
    """

    device: torch.device
    quick: bool = False

    @property
    def is_card(self) -> bool:
        """Whether the device is a card."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Check:
    """One thing that has to be true.

    Attributes:
        name: Of the check.
        work: Raises where it is not true; returns what else there is to say of it.
        seconds: How long it may take.
        only_full: Whether ``--quick`` leaves it out.
    """

    name: str
    work: Callable[[Settings], str]
    seconds: float = 30
    only_full: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a check has ended.

    Attributes:
        name: Of the check.
        verdict: ``"passed"``, ``"failed"`` or ``"skipped"``.
        message: What it said.
        seconds: How long it took.
    """

    name: str
    verdict: str
    message: str
    seconds: float


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Open a block that ends with a TimeoutError once its seconds are over.

    A signal does it, so that nothing is left running. A kernel that hangs on the card is waited
    for in C++, where no signal reaches Python; what starts processes limits them by itself.
    """

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    try:
        # Once more every second: what is called may take the first error for one of its own.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome_of(check: Check, settings: Settings, seconds_left: float) -> Outcome:
    """Run a check and return how it has ended."""
    if settings.quick and check.only_full:
        return Outcome(check.name, "skipped", "left out by --quick", 0.0)
    if seconds_left < 2:
        return Outcome(check.name, "skipped", "no time was left", 0.0)
    start = time.perf_counter()
    try:
        with limited(min(check.seconds, seconds_left)):
            verdict, message = "passed", check.work(settings)
    except SkippedError as error:
        verdict, message = "skipped", str(error)
    except ModuleNotFoundError as error:
        ours = (error.name or "").startswith(("lightning_hessian", "gpu", "support"))
        verdict = "failed" if ours else "skipped"
        message = f"{error.name} is not installed"
    except Exception as error:  # noqa: BLE001 - whatever it is, the others have their turn
        verdict, message = "failed", said(error)
    gc.collect()
    if settings.is_card:
        torch.cuda.empty_cache()
    return Outcome(check.name, verdict, message, time.perf_counter() - start)


def said(error: BaseException) -> str:
    """Return the message of an error, and the last line of the package that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "lightning_hessian" in frame.filename]
    where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    text = " / ".join(line.strip() for line in lines[:3]) or "no message"
    return f"{type(error).__name__}: {text[:400]}{where}"


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the results depend on: the card, the driver's version, the packages."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "device": str(device),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "card": card.name,
            "cards": torch.cuda.device_count(),
            "card_bytes": card.total_memory,
            "capability": f"{card.major}.{card.minor}",
        }
    return found


def run(checks: list[Check], settings: Settings, budget: float, file: Path | None) -> list[Outcome]:
    """Run checks within so many seconds; the file has the outcomes after every one of them."""
    start, outcomes = time.perf_counter(), []
    for check in checks:
        left = budget - (time.perf_counter() - start)
        outcome = outcome_of(check, settings, left)
        outcomes.append(outcome)
        print(line_of(outcome), flush=True)
        if file is not None:
            seconds = time.perf_counter() - start
            write(file, settings, outcomes, seconds)
    return outcomes


def line_of(outcome: Outcome) -> str:
    """Return the row of a check in the table."""
    mark = {"passed": "passed ", "failed": "FAILED ", "skipped": "skipped"}[outcome.verdict]
    return f"{mark} {outcome.seconds:6.1f} s  {outcome.name:<44} {outcome.message}".rstrip()


def write(file: Path, settings: Settings, outcomes: list[Outcome], seconds: float) -> None:
    """Write the record of a run."""
    counts = {v: sum(o.verdict == v for o in outcomes) for v in ("passed", "failed", "skipped")}
    record = {
        "environment": environment(settings.device),
        "ran_on_a_card": settings.is_card,
        "quick": settings.quick,
        "seconds": seconds,
        **counts,
        "checks": [asdict(outcome) for outcome in outcomes],
    }
    file.write_text(json.dumps(record, indent=1) + "\n")

"""Checks of several processes: NCCL on cards, gloo on the CPU; torchrun starts `job.py`."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gpu.running import Check, Settings, SkippedError
from gpu.spectra import compare

HERE = Path(__file__).resolve().parent
LIMIT = 75
KINDS = ("ddp", "fully_shard", "lightning ddp", "lightning fsdp2", "lightning fsdp")


def measured(kind: str, everywhere: bool, settings: Settings) -> str:
    """Run a job and compare its eigenvalues with those of the dense Hessian."""
    processes = 1
    if everywhere:
        processes = torch.cuda.device_count() if settings.is_card else 2
        if processes < 2:
            raise SkippedError("there is one card")
    if kind == "lightning fsdp" and not settings.is_card:
        raise SkippedError("Lightning's FSDPStrategy runs on cards only")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        text = launched(kind, processes, settings, file)
        if not file.exists():
            raise AssertionError(f"the processes ended without a result: {text[-400:]}")
        record = json.loads(file.read_text())
    said = compare(record["eigenvalues"], record["expected"], 1e-4)
    return f"{processes} process{'es' if processes > 1 else ''}, {record['backend']}: {said}"


def launched(kind: str, processes: int, settings: Settings, file: Path) -> str:
    """Start the processes, wait for them, and return what they said."""
    root = HERE.parents[1]
    paths = os.pathsep.join(map(str, (root, root / "tests", root / "tools")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(processes), str(HERE / "job.py"), kind, settings.device.type, str(file),
    ]  # fmt: skip
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = running.communicate(timeout=LIMIT - 5)
    finally:
        if running.poll() is None:  # those that torchrun has started go with it
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    return text


def checks() -> list[Check]:
    """Return the checks of this module."""
    return [
        Check(
            f"ranks {kind}, {'all' if everywhere else 'one'}",
            functools.partial(measured, kind, everywhere),
            seconds=LIMIT,
            only_full=everywhere or kind not in ("ddp", "fully_shard"),
        )
        for everywhere in (False, True)
        for kind in KINDS
    ]

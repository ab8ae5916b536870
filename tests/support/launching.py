"""How a test runs a job on several ranks: Lightning's own launcher starts the processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

JOBS = Path(__file__).parent
JOB = JOBS / "job.py"


def run_torchrun(job: str, file: Path) -> Any:
    """Runs a job on two ranks by torch's own launcher; returns what it wrote into the file."""
    environment = {**os.environ, "PYTHONPATH": str(JOBS.parents[1]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(JOBS / job), str(file)],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


def two_ranks_are_alike(job: str, kind: str, folder: Path) -> None:
    """Runs a job in two processes that meet in a file; each of them says "alike" at its end."""
    paths = os.pathsep.join([str(JOBS.parents[1]), str(JOBS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(JOBS / job), kind, str(rank), "2", str(folder / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (said, complained) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, f"exit status {rank.returncode}: {said}{complained}"
        assert said.strip().endswith("alike")


def run(folder: Path, **job: Any) -> list[dict[str, Any]]:
    """Runs a job on its ranks; returns what each of them saw."""
    done = launch(folder, **job)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = range(job.get("devices", 1))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in ranks]


def launch(folder: Path, **job: Any) -> subprocess.CompletedProcess[str]:
    """Runs a job on its ranks, which may fail."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "WANDB_SILENT": "true", "PYTHONWARNINGS": "ignore"}
    environment |= {"PYTHONPATH": str(JOB.parents[2])}
    return subprocess.run(
        [sys.executable, str(JOB), str(folder), json.dumps(job)],
        capture_output=True, text=True, timeout=240, env=environment, cwd=folder,
    )  # fmt: skip


def leave() -> NoReturn:
    """Ends a rank that has done its work: torch's threads have aborted a process at its end."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)

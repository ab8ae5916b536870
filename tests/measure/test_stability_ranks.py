"""Stability over two ranks is that of one process, whatever the optimizer keeps in shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import JOBS

JOB = JOBS / "stability_ranks.py"


@pytest.mark.parametrize("kind", ["data", "fsdp2"])
def test_two_ranks_have_the_stability_of_one_process(kind: str, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(JOB.parents[2]), str(JOB.parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(JOB), kind]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store")],
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
        assert rank.returncode == 0, complained
        assert said.strip().endswith("alike")

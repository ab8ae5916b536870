"""Checkpointed segments of a network whose parameters lie in shards, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.checkpointing_job import ENGINES, Net, products
from support.launching import JOBS

JOB = JOBS / "checkpointing_job.py"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the first of two ranks found."""
    file = tmp_path_factory.mktemp("checkpointing") / "found.json"
    environment = {**os.environ, "PYTHONPATH": str(JOB.parents[2]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(JOB), str(file)],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(file.read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_segments_in_shards_give_what_the_whole_gives_without_checkpointing(seen, engine):
    expected = products(Net(checkpointed=False), "autograd")
    tolerance = 1e-6 if engine == "finite_difference" else 1e-10
    np.testing.assert_allclose(seen["found"][engine], expected, atol=tolerance)


def test_buffers_are_as_they_were(seen):
    assert seen["same"]

"""Checkpointed segments of a network whose parameters lie in shards, against one process."""

from __future__ import annotations

import numpy as np
import pytest
from support.checkpointing_job import ENGINES, Net, products
from support.launching import run_torchrun


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the first of two ranks found."""
    return run_torchrun(
        "checkpointing_job.py", tmp_path_factory.mktemp("checkpointing") / "found.json"
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_segments_in_shards_give_what_the_whole_gives_without_checkpointing(seen, engine):
    expected = products(Net(checkpointed=False), "autograd")
    tolerance = 1e-6 if engine == "finite_difference" else 1e-10
    np.testing.assert_allclose(seen["found"][engine], expected, atol=tolerance)


def test_buffers_are_as_they_were(seen):
    assert seen["same"]

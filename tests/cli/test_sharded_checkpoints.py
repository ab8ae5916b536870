"""Checkpoints that ranks wrote in parts: made whole without running code, and measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint

from lightning_hessian.cli.checkpoints import read_checkpoint
from lightning_hessian.cli.main import main
from lightning_hessian.cli.sharded_checkpoints import read_weights
from lightning_hessian.histories.load import load_runs
from lightning_hessian.results import load_spectrum

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """The checkpoints of a real fit on two ranks."""
    place = tmp_path_factory.mktemp("sharded")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "support.sharded_fit", str(place / "kept")],
        env=environment, capture_output=True, text=True, timeout=240, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "kept"


def test_the_weights_are_those_that_lightning_itself_puts_together(folder):
    for name in ("epoch=0", "epoch=1", "last"):
        expected = _load_distributed_checkpoint(folder / f"{name}.ckpt")["state_dict"]
        found = read_weights(folder / f"{name}.ckpt")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_folder_of_them_is_measured_as_one_of_whole_checkpoints(folder, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("epoch=0", "epoch=1"):
        content = _load_distributed_checkpoint(folder / f"{name}.ckpt")
        torch.save(
            {k: v for k, v in content.items() if "optimizer" not in k}, whole / f"{name}.ckpt"
        )
        assert read_checkpoint(whole / f"{name}.ckpt", trust=False).has_data_hparams
    arguments = ["--module", "support.trained:Net", "--data", "support.trained:Data",
                 "--num-eigenvalues", "3"]  # fmt: skip
    assert main(["measure", str(whole), *arguments, "--out", str(tmp_path / "a")]) == 0
    checkpoints = [str(folder / f"epoch={epoch}.ckpt") for epoch in (0, 1)]
    assert main(["measure", *checkpoints, *arguments, "--out", str(tmp_path / "b")]) == 0
    for name in ("epoch=0", "epoch=1"):
        one, two = (load_spectrum(tmp_path / out / "spectra" / f"{name}.npz") for out in "ab")
        assert (one.eigenvalues == two.eigenvalues).all()
    (run,) = load_runs(tmp_path / "b", cache=False).runs
    assert run.steps.tolist() == [2, 4]  # two ranks: two batches an epoch
    assert not list((tmp_path / "b").glob("whole-*"))

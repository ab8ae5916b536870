"""The example sweep: one of its runs, shorter, and what `finished` makes of it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from support.runs import ended

from lightning_hessian import load_runs

SCRIPT = Path(__file__).parents[2] / "examples" / "sweep" / "train.py"


@pytest.fixture
def sweep(monkeypatch):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("sweep_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sweep_example", module)
    spec.loader.exec_module(module)
    return module


def test_a_run_of_the_sweep_can_be_reported(sweep, own_wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "NUM_EPOCHS", 4)
    trial = sweep.Trial("adam", 0.005, 4)
    assert trial in sweep.TRIALS
    assert len({trial.run_id for trial in sweep.TRIALS}) == 24
    assert not sweep.finished(trial, tmp_path)
    sweep.train(trial, tmp_path)
    ended(next((tmp_path / "wandb").glob("offline-run-*")))
    (run,) = load_runs(tmp_path, cache=False)
    assert sweep.finished(trial, tmp_path)
    assert run.name == trial.run_id
    assert run.config["num_parameters"] == 838
    both = run.series("val_loss") + run.series("hessian/d_ks") + run.series("val_error")
    steps = run.steps[both == both]
    assert steps.tolist() == [2 * 19 - 1, 4 * 19 - 1]  # 19 batches an epoch, counted from zero

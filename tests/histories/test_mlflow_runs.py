"""MLflow's folder, as its own client writes it, read back without MLflow."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pages import data_of
from support.runs import measuring_rank_only, train

from lightning_hessian import correlation_report, load_runs
from lightning_hessian.histories.local_runs import find_local_runs, read_local_run
from lightning_hessian.reports.live import follow

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def file_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # frozen by mlflow 3, still there


def new_logger(folder: Path, **arguments: Any) -> Any:
    from lightning.pytorch.loggers import MLFlowLogger

    return MLFlowLogger(experiment_name="test", save_dir=str(folder / "mlruns"), **arguments)


def test_a_run_of_the_callback(tmp_path: Path) -> None:
    callback, logger = measuring_rank_only(figures=2), new_logger(tmp_path, run_name="fast")
    train(tmp_path, [callback], logger, epochs=3)
    (run,) = load_runs(tmp_path / "mlruns", cache=False)
    assert (run.kind, run.name, run.run_id) == ("mlflow", "fast", logger.run_id)
    assert run.problems == ()
    history = callback.history
    measured = np.isfinite(run.series("hessian/lambda_1"))
    assert run.steps[measured].tolist() == [row["step"] for row in history]
    for key, name in (("hessian/lambda_1", "lambda_1"), ("val_loss", "val_loss")):
        expected = np.float32([row[name] for row in history])
        np.testing.assert_array_equal(np.float32(run.series(key)[measured]), expected)
    config = run.config
    assert (config["hessian_callback.num_eigenvalues"], config["hessian_callback.blocks"]) == (
        4, None,
    )  # fmt: skip
    assert config["hessian_callback.optimizer"] == "SGD"
    assert run.identities == (callback._identity,)
    page = data_of(follow(tmp_path / "mlruns", tmp_path / "page", once=True).read_text())
    assert (page["measurements"], page["kind"]) == (len(history), "mlflow")
    assert page["notes"] == ["MLflow's spectra and figures are not shown"]
    # It is what MLflow's own client reads.
    client = logger.experiment
    seen = client.get_metric_history(logger.run_id, "hessian/lambda_1")
    assert [(m.step, m.value) for m in seen] == list(
        zip(run.steps[measured], run.series("hessian/lambda_1")[measured], strict=True)
    )


def write_runs(folder: Path, number: int) -> list[Any]:
    loggers = []
    for i in range(number):
        logger = new_logger(folder, run_name=f"run {i}")
        logger.log_hyperparams({"lr": 10.0**-i, "model": {"width": 2**i}, "note": "so, so"})
        for step in range(5):
            row = {"val_loss": 1.0 / (1 + step + i), "hessian/d_ks": 0.1 * step + i}
            logger.log_metrics(row, step=step)
        logger.finalize("success")
        loggers.append(logger)
    return loggers


def test_a_folder_of_runs_is_a_report(tmp_path: Path) -> None:
    loggers = write_runs(tmp_path, 5)
    loggers[4].experiment.delete_run(loggers[4].run_id)
    with pytest.warns(UserWarning, match="was deleted in MLflow"):
        table = load_runs(tmp_path / "mlruns", cache=False, workers=1)
    assert sorted(run.name for run in table) == [f"run {i}" for i in range(4)]
    assert {run.config["lr"] for run in table} == {1.0, 0.1, 0.01, 0.001}
    assert {run.config["model.width"] for run in table} == {1, 2, 4, 8}
    report = correlation_report(table, group="model.width", size=None)
    assert len(report.across) == 1
    assert report.across[0].num_points == 4


def test_what_is_damaged_is_told(tmp_path: Path) -> None:
    (logger,) = write_runs(tmp_path, 1)
    (folder,) = (tmp_path / "mlruns").glob(f"*/{logger.run_id}")
    loss = folder / "metrics" / "val_loss"
    loss.write_text(loss.read_text() + "123 nan 7\nhalf a li")
    os.symlink("/etc/hostname", folder / "metrics" / "outside")
    os.symlink("/etc/hostname", folder / "params" / "outside")
    (found,) = find_local_runs(folder)
    run = read_local_run(found)
    assert [p for p in run.problems if "val_loss, line 7" in p]
    assert "outside" not in {*run.columns, *run.config}
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 7]
    assert math.isnan(run.series("val_loss")[-1])
